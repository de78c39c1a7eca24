"""Prometheus exporter for Creatify's text generator."""

__version__ = "0.1.0"

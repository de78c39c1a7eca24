"""The files that are made of the dashboard, one for each way to get it."""

import json
from typing import Any

import yaml

from creatify_dashboard.board import dashboard

UID = "creatify-text-generator"
_MADE = "# Made by grafana/generate.py (make dashboard): change the code there.\n"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, as a person would write them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def files() -> dict[str, str]:
    """Return the text of every file by its path below grafana/."""
    board = dashboard()
    return {
        f"dashboards/{UID}.json": _text(board),
        f"export/{UID}.json": _text(exported(board)),
        "kubernetes/dashboard.yaml": config_map(board),
    }


def _text(board: dict[str, Any]) -> str:
    return json.dumps(board, indent=2, sort_keys=True) + "\n"


def exported(board: dict[str, Any]) -> dict[str, Any]:
    """Return the dashboard as grafana.com and "Import" want it: with a question for the data source.

    The answer is the first choice of the variable, so that it can be changed later as anywhere else.
    """
    source = {
        "name": "DS_PROMETHEUS",
        "label": "Prometheus",
        "description": "Where creatify-exporter is scraped",
        "type": "datasource",
        "pluginId": "prometheus",
        "pluginName": "Prometheus",
    }
    copy: dict[str, Any] = json.loads(json.dumps(board))
    for variable in copy["templating"]["list"]:
        if variable["type"] == "datasource":
            variable["current"] = {"selected": True, "text": "Prometheus", "value": "${DS_PROMETHEUS}"}
    return {"__inputs": [source], "__elements": {}, "__requires": _required(copy), "id": None} | copy


def _required(board: dict[str, Any]) -> list[dict[str, str]]:
    panels = [inner for panel in board["panels"] for inner in (panel, *panel.get("panels", []))]
    kinds = sorted({panel["type"] for panel in panels} - {"row"})
    names = {"stat": "Stat", "table": "Table", "timeseries": "Time series"}
    return [
        {"type": "grafana", "id": "grafana", "name": "Grafana", "version": "10.4.0"},
        {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
        *({"type": "panel", "id": kind, "name": names[kind], "version": ""} for kind in kinds),
    ]


def config_map(board: dict[str, Any]) -> str:
    """Return the ConfigMap that the sidecar of Grafana's Helm chart finds by its label."""
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "creatify-exporter-dashboard",
            "labels": {"app.kubernetes.io/name": "creatify-exporter", "grafana_dashboard": "1"},
            "annotations": {"grafana_folder": "Creatify"},
        },
        # Without indents: kubectl apply keeps a copy in an annotation, which may have 256 KiB.
        "data": {f"{UID}.json": json.dumps(board, separators=(",", ":"), sort_keys=True) + "\n"},
    }
    return _MADE + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)

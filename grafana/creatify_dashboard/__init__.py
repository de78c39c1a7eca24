"""The Grafana dashboard as code: one module per row, and what turns them into files."""

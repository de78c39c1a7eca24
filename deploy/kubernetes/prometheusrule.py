"""Write deploy/kubernetes/base/prometheusrule.yaml: prometheus/alerts.yml as the Prometheus operator takes it.

Usage: python deploy/kubernetes/prometheusrule.py
"""

from pathlib import Path

import yaml

_HERE = Path(__file__).resolve().parent
SOURCE = _HERE.parents[1] / "prometheus" / "alerts.yml"
TARGET = _HERE / "base" / "prometheusrule.yaml"
_HEADER = (
    "# Made from prometheus/alerts.yml by deploy/kubernetes/prometheusrule.py (make generate): change that file.\n"
)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, as a person would write them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def render() -> str:
    """Return the manifest for the rules as they are now."""
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": "creatify-exporter",
            "labels": {"app.kubernetes.io/name": "creatify-exporter"},
        },
        "spec": yaml.safe_load(SOURCE.read_text(encoding="utf-8")),
    }
    return _HEADER + yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")

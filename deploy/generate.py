"""Write what is made from the Helm chart and for it; `make generate` runs this, and a test compares.

- deploy/helm/creatify-exporter/values.schema.json gets docs/config.schema.json as the schema of `config`.
- The chart's files/ links to the rules and the dashboards of the project; a packaged chart holds their contents.
- deploy/kubernetes becomes what the chart renders, for kubectl and kustomize.

Usage: python deploy/generate.py
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "creatify-exporter"
KUBERNETES = ROOT / "deploy" / "kubernetes"
NAME = "creatify-exporter"
_HEADER = "# Made from deploy/helm/creatify-exporter by deploy/generate.py (make generate): change the chart.\n"
# What version 0.1.0 came with: the selector of a StatefulSet cannot change.
_COMMON = {
    "selectorLabels": {"app.kubernetes.io/name": NAME},
    "existingSecret": NAME,
    "serviceMonitor": {"enabled": True},
    "prometheusRule": {"enabled": True},
}
VALUES: Mapping[str, Mapping[str, Any]] = {
    "base": _COMMON,
    "postgres": {
        **_COMMON,
        "replicaCount": 2,
        "postgresql": {"enabled": True},
        "podDisruptionBudget": {"enabled": True},
    },
}


def without_lookahead(schema: Any) -> Any:
    """Return a JSON Schema whose patterns Go's regular expressions can read: a least length in place of `(?=[0-9])`."""
    if isinstance(schema, list):
        return [without_lookahead(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: without_lookahead(value) for key, value in schema.items() if key != "$schema"}
    if isinstance(pattern := made.get("pattern"), str) and "(?=[0-9])" in pattern:
        made |= {"pattern": pattern.replace("(?=[0-9])", ""), "minLength": 1}
    return made


def values_schema() -> str:
    """Return values.schema.json with the configuration's schema as it is now."""
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    schema["properties"]["config"] = without_lookahead(json.loads((ROOT / "docs" / "config.schema.json").read_text()))
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def manifests(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the manifests that the chart renders, by file name, without what belongs to Helm or to one namespace."""
    with helm.Chart.load(CHART) as chart:
        rendered = chart.render(dict(values), name=NAME)
    made = {}
    for path, text in sorted(rendered.items()):
        if path.endswith(".yaml") and text.strip():
            kept = [
                line.rstrip()
                for line in text.strip().splitlines()
                if not line.startswith(("  namespace: ", "    app.kubernetes.io/managed-by: ", "    helm.sh/chart: "))
            ]
            made[Path(path).name] = _HEADER + "\n".join(kept) + "\n"
    return made


def links() -> dict[Path, Path]:
    """Return the links below the chart's files/, and the files of the project that they lead to."""
    made = {CHART / "files" / "alerts.yml": ROOT / "prometheus" / "alerts.yml"}
    for dashboard in (ROOT / "grafana" / "dashboards").glob("*.json"):
        made[CHART / "files" / "dashboards" / dashboard.name] = dashboard
    return made


def kustomization(directory: str, resources: list[str]) -> str:
    """Return the kustomization of a folder of manifests."""
    with helm.Chart.load(CHART) as chart:
        version = chart.version
    text = yaml.safe_dump(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "images": [{"name": NAME, "newTag": version}],
            "resources": resources,
        },
        sort_keys=False,
    )
    return f"{_HEADER}# kubectl apply -k deploy/kubernetes/{directory}\n{text}"


def files() -> dict[Path, str]:
    """Return every generated file below deploy/, as it is to be."""
    made = {CHART / "values.schema.json": values_schema()}
    for directory, values in VALUES.items():
        texts = manifests(values)
        made |= {KUBERNETES / directory / name: text for name, text in texts.items()}
        made[KUBERNETES / directory / "kustomization.yaml"] = kustomization(directory, sorted(texts))
    return made


if __name__ == "__main__":
    shutil.rmtree(CHART / "files", ignore_errors=True)
    for link, target in links().items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))
    (CHART / "values.schema.json").write_text(values_schema(), encoding="utf-8")
    shutil.rmtree(KUBERNETES, ignore_errors=True)
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

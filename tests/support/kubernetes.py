"""Manifests of the chart: rendered with Helm's engine, checked with the schemas of those who read them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "creatify-exporter"
KUBERNETES_VERSIONS = ("1.29", "1.37")
# Dashboards and rules are long; where PyYAML was built with libyaml, that reads them in a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Manifest = dict[str, Any]

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": r"^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$", "minLength": 2}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_RELABELINGS = {
    "type": "array",
    "items": _closed(
        {
            "sourceLabels": {"type": "array", "items": {"type": "string"}},
            "targetLabel": {"type": "string"},
            "replacement": {"type": "string"},
            "regex": {"type": "string"},
            "action": {"enum": ["replace", "keep", "drop", "labeldrop"]},
        }
    ),
}
_SECRET_KEY = _closed({"name": {"type": "string"}, "key": {"type": "string"}}, "name", "key")

# The fields of the Prometheus operator's custom resources that are used here; no package carries its schemas.
OPERATOR_SPECS = {
    "PrometheusRule": _closed(
        {
            "groups": {
                "type": "array",
                "items": _closed(
                    {
                        "name": {"type": "string", "minLength": 1},
                        "interval": _DURATION,
                        "rules": {
                            "type": "array",
                            "items": _closed(
                                {
                                    "record": {"type": "string"},
                                    "alert": {"type": "string"},
                                    "expr": {"type": "string"},
                                    "for": _DURATION,
                                    "keep_firing_for": _DURATION,
                                    "labels": _TEXTS,
                                    "annotations": _TEXTS,
                                },
                                "expr",
                            ),
                        },
                    },
                    "name",
                ),
            }
        }
    ),
    "ServiceMonitor": _closed(
        {
            "jobLabel": {"type": "string"},
            "selector": _closed({"matchLabels": _TEXTS}),
            "endpoints": {
                "type": "array",
                "items": _closed(
                    {
                        "port": {"type": "string"},
                        "interval": _DURATION,
                        "scrapeTimeout": _DURATION,
                        "scheme": {"enum": ["http", "https"]},
                        "tlsConfig": _closed(
                            {
                                "ca": _closed({"secret": _SECRET_KEY}),
                                "cert": _closed({"secret": _SECRET_KEY}),
                                "keySecret": _SECRET_KEY,
                                "serverName": {"type": "string"},
                            }
                        ),
                        "basicAuth": _closed({"username": _SECRET_KEY, "password": _SECRET_KEY}),
                        "relabelings": _RELABELINGS,
                        "metricRelabelings": _RELABELINGS,
                    }
                ),
            },
        },
        "selector",
        "endpoints",
    ),
    "ScrapeConfig": _closed(
        {
            "staticConfigs": {
                "type": "array",
                "items": _closed({"targets": {"type": "array", "items": {"type": "string"}}, "labels": _TEXTS}),
            },
            "scheme": {"enum": ["HTTP", "HTTPS"]},
            "scrapeInterval": _DURATION,
            "scrapeTimeout": _DURATION,
            "metricsPath": {"type": "string"},
            "basicAuth": _closed({"username": _SECRET_KEY, "password": _SECRET_KEY}),
            "relabelings": _RELABELINGS,
            "metricRelabelings": _RELABELINGS,
        }
    ),
}
_OPERATOR_VERSIONS = {
    "PrometheusRule": "monitoring.coreos.com/v1",
    "ServiceMonitor": "monitoring.coreos.com/v1",
    "ScrapeConfig": "monitoring.coreos.com/v1alpha1",
}


def validate_manifest(manifest: Mapping[str, Any], *versions: str) -> None:
    """Check an object against the schema of its kind, in the oldest and the newest Kubernetes unless told."""
    spec = OPERATOR_SPECS.get(manifest["kind"])
    if spec is not None:
        assert manifest["apiVersion"] == _OPERATOR_VERSIONS[manifest["kind"]]
        Draft202012Validator(spec).validate(manifest["spec"])
        return
    for version in versions or KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


@cache
def _chart() -> helm.Chart:
    return helm.Chart.load(CHART)


def render_texts(values: Mapping[str, Any], name: str = "creatify-exporter", namespace: str = "prod") -> dict[str, str]:
    """Return what the chart renders, by the name of the template."""
    rendered = _chart().render(dict(values), name=name, namespace=namespace)
    return {Path(path).name: text for path, text in rendered.items()}


def render(values: Mapping[str, Any], name: str = "creatify-exporter", namespace: str = "prod") -> list[Manifest]:
    """Return the objects that the chart renders."""
    texts = render_texts(values, name, namespace)
    documents = [yaml.load(text, _LOADER) for path, text in texts.items() if path.endswith(".yaml")]
    return [document for document in documents if document]


def one(manifests: list[Manifest], kind: str, suffix: str = "") -> Manifest:
    """Return the one object of a kind whose name ends like that."""
    (found,) = [each for each in manifests if each["kind"] == kind and each["metadata"]["name"].endswith(suffix)]
    return found

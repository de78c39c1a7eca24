"""What deploy/ and the Dockerfile say fits the program, its files, and the schemas of those who read them."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from creatify_exporter import __version__, config
from tests.support.commands import output, run
from tests.support.exporter import Exporter

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
POSTGRES = DEPLOY / "kubernetes" / "overlays" / "postgres"
COMPOSE = DEPLOY / "compose.yaml"
UNIT = DEPLOY / "systemd" / "creatify-exporter.service"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

KUBERNETES_VERSIONS = ("1.29", "1.37")

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": r"^([0-9]+d)?([0-9]+h)?([0-9]+m)?([0-9]+s)?$", "minLength": 2}


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


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
                        "relabelings": {
                            "type": "array",
                            "items": _closed(
                                {
                                    "sourceLabels": {"type": "array", "items": {"type": "string"}},
                                    "targetLabel": {"type": "string"},
                                    "replacement": {"type": "string"},
                                }
                            ),
                        },
                    }
                ),
            },
        },
        "selector",
        "endpoints",
    ),
}


def load(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def base_manifests() -> dict[str, dict[str, Any]]:
    manifests = [load(BASE / name) for name in load(BASE / "kustomization.yaml")["resources"]]
    return {manifest["kind"]: manifest for manifest in manifests}


def validate_manifest(manifest: dict[str, Any]) -> None:
    spec = OPERATOR_SPECS.get(manifest["kind"])
    if spec is not None:
        assert manifest["apiVersion"] == "monitoring.coreos.com/v1"
        Draft202012Validator(spec).validate(manifest["spec"])
        return
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check_config(path: Path, secrets: Path) -> "config.Config":
    """Load a configuration as the deployment would: its secret files are there, and so is its environment."""
    text = path.read_text(encoding="utf-8")
    for directory in ("/run/secrets/creatify-exporter", "${CREDENTIALS_DIRECTORY}"):
        text = text.replace(directory, str(secrets))
    for name in ("api_id", "api_key"):
        (secrets / name).write_text("value\n")
    (secrets / "ledger_url").write_text("postgresql://user:password@db.example/creatify\n")
    copy = secrets / "config.yaml"
    copy.write_text(text)
    return config.load(copy, {"CREATIFY_API_ID": "id", "CREATIFY_API_KEY": "key"})


@pytest.mark.parametrize(
    "path",
    [
        DEPLOY / "config.yaml",
        DEPLOY / "systemd" / "config.yaml",
        BASE / "config.yaml",
        POSTGRES / "config.yaml",
    ],
    ids=lambda path: str(path.relative_to(DEPLOY)),
)
def test_each_configuration_is_valid(path: Path, tmp_path: Path) -> None:
    loaded = check_config(path, tmp_path)
    assert [workspace.name for workspace in loaded.workspaces] == ["default"]


# Compose


def test_compose_follows_the_compose_specification() -> None:
    output(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_every_file_that_compose_mounts_is_there() -> None:
    mounted = [
        volume.split(":")[0]
        for service in load(COMPOSE)["services"].values()
        for volume in service["volumes"]
        if volume.startswith(".")
    ]
    assert len(mounted) >= 5
    for path in mounted:
        assert (DEPLOY / path).exists(), path


def test_compose_shows_the_demo_until_there_are_credentials(tmp_path: Path) -> None:
    shell, option, script = load(COMPOSE)["services"]["creatify-exporter"]["entrypoint"]
    fake = tmp_path / "creatify-exporter"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)

    def started(**credentials: str) -> str:
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **credentials}
        return output(shell, option, script.replace("$$", "$"), env=environment)

    assert started(CREATIFY_API_ID="", CREATIFY_API_KEY="") == "--demo\n"
    assert started(CREATIFY_API_ID="i", CREATIFY_API_KEY="k") == "--config.file=/etc/creatify-exporter/config.yaml\n"


def test_compose_runs_the_exporter_with_no_more_rights_than_it_needs() -> None:
    exporter = load(COMPOSE)["services"]["creatify-exporter"]
    assert exporter["read_only"] is True
    assert exporter["cap_drop"] == ["ALL"]
    assert exporter["security_opt"] == ["no-new-privileges:true"]


# Kubernetes


@pytest.mark.parametrize("kind", ["Service", "StatefulSet", "ServiceMonitor", "PrometheusRule"])
def test_each_manifest_of_the_base_follows_its_schema(kind: str) -> None:
    validate_manifest(base_manifests()[kind])


def test_a_manifest_with_an_unknown_field_would_be_noticed() -> None:
    broken = base_manifests()["StatefulSet"]
    broken["spec"]["template"]["spec"]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_manifest(broken)


def test_the_pods_meet_the_restricted_security_standard() -> None:
    pod = base_manifests()["StatefulSet"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == 65534
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


def test_probes_service_and_monitor_name_ports_and_paths_that_exist() -> None:
    manifests = base_manifests()
    (container,) = manifests["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert port == {"name": "metrics", "containerPort": 9877}
    assert container["livenessProbe"]["httpGet"] == {"path": "/-/healthy", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/-/ready", "port": "metrics"}
    service, monitor = manifests["Service"]["spec"], manifests["ServiceMonitor"]["spec"]
    assert service["ports"] == [{"name": "metrics", "port": 9877, "targetPort": "metrics"}]
    assert [endpoint["port"] for endpoint in monitor["endpoints"]] == ["metrics"]
    labels = manifests["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["StatefulSet"]["spec"]["selector"]["matchLabels"] == labels
    assert service["selector"] == labels
    assert monitor["selector"]["matchLabels"] == manifests["Service"]["metadata"]["labels"]


def test_instance_is_the_name_that_a_pod_keeps() -> None:
    (endpoint,) = base_manifests()["ServiceMonitor"]["spec"]["endpoints"]
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "instance"}]


def test_each_volume_is_mounted_and_the_ledger_is_where_the_image_works() -> None:
    spec = base_manifests()["StatefulSet"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = [claim["metadata"]["name"] for claim in spec["volumeClaimTemplates"]]
    assert sorted(mounts) == sorted([volume["name"] for volume in pod["volumes"]] + claims)
    assert mounts["data"] == "/data"
    assert "WORKDIR /data" in DOCKERFILE
    assert container["args"] == [f"--config.file={mounts['config']}/config.yaml"]
    assert load(BASE / "config.yaml")["workspaces"][0]["api_id_file"] == f"{mounts['secrets']}/api_id"


def test_the_prometheus_rule_holds_the_rules_as_they_are_now() -> None:
    script = "import prometheusrule, sys; sys.stdout.write(prometheusrule.render())"
    rendered = output(sys.executable, "-c", script, cwd=DEPLOY / "kubernetes")
    assert (BASE / "prometheusrule.yaml").read_text(encoding="utf-8") == rendered, "stale: run make generate"
    assert load(BASE / "prometheusrule.yaml")["spec"] == load(ROOT / "prometheus" / "alerts.yml")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders overlays, is not installed")
@pytest.mark.parametrize("directory", [BASE, POSTGRES], ids=["base", "postgres"])
def test_what_kustomize_makes_follows_the_schemas(directory: Path) -> None:
    rendered = output("kubectl", "kustomize", directory)
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(rendered)}
    for manifest in manifests.values():
        validate_manifest(manifest)
    stateful = manifests["StatefulSet"]["spec"]
    (container,) = stateful["template"]["spec"]["containers"]
    assert container["image"] == f"creatify-exporter:{__version__}"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    if directory == BASE:
        assert (stateful["replicas"], mounted) == (1, {"config", "secrets", "data"})
    else:
        assert (stateful["replicas"], mounted) == (2, {"config", "secrets"})
        assert "volumeClaimTemplates" not in stateful
        assert "ledger_url" in manifests["ConfigMap"]["data"]["config.yaml"]


# systemd


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # Where the unit says it is installed, nothing is installed here.
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8")))
    verified = run("systemd-analyze", "verify", unit)
    assert (verified.returncode, verified.stderr) == (0, "")
    # 1.5 on systemd's scale from 0 (safe) to 10; its own services are at 2 to 9.
    judged = run("systemd-analyze", "security", "--offline=true", "--threshold=15", unit)
    assert judged.returncode == 0, judged.stdout[-200:]


def test_the_unit_starts_what_the_documentation_installs() -> None:
    unit = UNIT.read_text(encoding="utf-8")
    documented = (ROOT / "docs" / "operation.md").read_text(encoding="utf-8")
    program, flag = re.findall(r"(?m)^ExecStart=(\S+) --config\.file=(\S+)$", unit)[0]
    assert f"python3 -m venv {program.removesuffix('/bin/creatify-exporter')}\n" in documented
    assert f"deploy/systemd/config.yaml {flag}\n" in documented
    for name, path in re.findall(r"(?m)^LoadCredential=(\w+):(\S+)$", unit):
        assert f"install -m 0600 /dev/stdin {path}\n" in documented
        assert f"${{CREDENTIALS_DIRECTORY}}/{name}\n" in (DEPLOY / "systemd" / "config.yaml").read_text()


# The image


def test_the_image_says_the_version() -> None:
    assert re.findall(r"(?m)^ARG VERSION=(\S+)$", DOCKERFILE) == [__version__]


def test_the_image_gets_no_more_than_it_is_built_from() -> None:
    """Every path that the Dockerfile copies from the context passes .dockerignore, and nothing else does."""
    copied = {source for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", DOCKERFILE) for source in line.split()[:-1]}
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[1] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)


@pytest.mark.process
def test_the_health_check_tells_a_live_exporter_from_a_dead_one(tmp_path: Path) -> None:
    """It is Python's, since slim images have no curl."""
    (line,) = re.findall(r"(?m)^  CMD (.+)$", DOCKERFILE)
    _, option, script = json.loads(line)
    exporter = Exporter(tmp_path, "--demo")
    check = script.replace("127.0.0.1:9877", f"127.0.0.1:{exporter.port}")
    assert check != script
    with exporter:
        output(sys.executable, option, check)
    assert run(sys.executable, option, check).returncode == 1

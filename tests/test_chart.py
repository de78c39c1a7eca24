"""The Helm chart: what it renders is valid, safe, starts the exporter, and is what deploy/kubernetes holds."""

import itertools
import json
import random
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import psutil
import pytest
import requests
import trustme
import yaml

from creatify_exporter import __version__, config
from deploy import generate
from tests.support.commands import output, run
from tests.support.exporter import parse
from tests.support.kubernetes import CHART, Manifest, one, render, render_texts, validate_manifest
from tests.support.packages import require
from tests.support.pod import USER, Pod, can_isolate, write_volume
from tests.support.postgres import Postgres
from tests.support.processes import eventually, free_port
from tests.support.stage import Stage, credentials
from tests.test_webauth import HASHES

ROOT = Path(__file__).resolve().parents[1]
KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")

TLS = {
    "cert_file": "/run/secrets/creatify-exporter-tls/tls.crt",
    "key_file": "/run/secrets/creatify-exporter-tls/tls.key",
}
CLIENTS = TLS | {
    "client_ca_file": "/run/secrets/creatify-exporter-tls/ca.crt",
    "client_auth_type": "RequireAndVerifyClientCert",
}
USERS = {"prometheus": "$2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG"}
EVERYTHING: dict[str, Any] = {
    "commonLabels": {"team": "media"},
    "image": {"repository": "registry.example/creatify-exporter", "digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "existingSecret": "creatify",
    "web": {"config": {"tls_server_config": CLIENTS, "basic_auth_users": USERS}, "tlsSecret": "creatify-tls"},
    "extraArgs": ["--log.format=json"],
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy.example:3128"}],
    "extraEnvFrom": [{"secretRef": {"name": "more"}}],
    "extraVolumes": [{"name": "authorities", "configMap": {"name": "authorities"}}],
    "extraVolumeMounts": [{"name": "authorities", "mountPath": "/etc/authorities", "readOnly": True}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "monitoring",
    "podAnnotations": {"example.com/owner": "media"},
    "podLabels": {"tier": "monitoring"},
    "serviceAccount": {"annotations": {"example.com/role": "none"}},
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "extraEgress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}],
    },
    "podDisruptionBudget": {"enabled": True, "maxUnavailable": "50%"},
    "serviceMonitor": {
        "enabled": True,
        "labels": {"release": "kube-prometheus-stack"},
        "tlsConfig": {"ca": {"secret": {"name": "creatify-tls", "key": "ca.crt"}}, "serverName": "creatify-exporter"},
        "basicAuth": {"username": {"name": "scrape", "key": "user"}, "password": {"name": "scrape", "key": "password"}},
        "relabelings": [{"targetLabel": "cluster", "replacement": "blue"}],
        "metricRelabelings": [{"sourceLabels": ["__name__"], "regex": "python_.*", "action": "drop"}],
    },
    "prometheusRule": {"enabled": True, "labels": {"release": "kube-prometheus-stack"}},
    "dashboard": {"enabled": True, "annotations": {"grafana_folder": "Creatify"}},
}
# Every switch and what it can be. A release is one choice of each.
SWITCHES: dict[str, list[Mapping[str, Any]]] = {
    "secret": [{}, {"existingSecret": "mine"}, {"secrets": {"api_id": "i", "api_key": "k", "ledger_url": "u"}}],
    "ledger": [
        {},
        {"persistence": {"enabled": False}},
        {"persistence": {"existingClaim": "mine", "storageClass": "fast"}},
        {"persistence": {"storageClass": "fast", "annotations": {"example.com/backup": "no"}}},
        {"postgresql": {"enabled": True}, "replicaCount": 2},
    ],
    "web": [
        {},
        {"web": {"config": {"tls_server_config": TLS}, "tlsSecret": "tls"}},
        {"web": {"config": {"tls_server_config": CLIENTS}, "tlsSecret": "tls"}},
        {"web": {"config": {"basic_auth_users": USERS}}},
        {"web": {"existingSecret": "web"}},
    ],
    "demo": [{}, {"demo": True}],
    "probes": [{}, {key: {"tcpSocket": {"port": "metrics"}} for key in ("livenessProbe", "readinessProbe")}],
    "account": [{}, {"serviceAccount": {"create": False}}, {"serviceAccount": {"name": "mine"}}],
    "names": [{}, {"nameOverride": "texts"}, {"fullnameOverride": "texts"}, {"selectorLabels": {"app": "texts"}}],
    **{
        name: [{}, {name: {"enabled": True}}, {name: EVERYTHING[name]}]
        for name in ("networkPolicy", "podDisruptionBudget", "serviceMonitor", "prometheusRule", "dashboard")
    },
    **{name: [{}, {name: EVERYTHING[name]}] for name in ("extraArgs", "extraEnv", "extraEnvFrom", "affinity")},
    **{name: [{}, {name: EVERYTHING[name]}] for name in ("commonLabels", "podLabels", "podAnnotations", "tolerations")},
    "volumes": [{}, {name: EVERYTHING[name] for name in ("extraVolumes", "extraVolumeMounts")}],
    "image": [{}, {"image": EVERYTHING["image"]}, {"image": {"tag": "main"}, "imagePullSecrets": [{"name": "r"}]}],
}
POSTGRESQL = {"replicaCount": 2, "postgresql": {"enabled": True}, "existingSecret": "creatify"}


def pairwise() -> Iterator[dict[str, Any]]:
    """Yield values in which every choice of every switch meets every choice of every other one."""
    chance = random.Random(16)
    sizes = {name: range(len(choices)) for name, choices in SWITCHES.items()}
    left = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(sizes, 2)
        for i, j in itertools.product(sizes[a], sizes[b])
    }

    def news(choice: Mapping[str, int]) -> set[frozenset[tuple[str, int]]]:
        return {frozenset(pair) for pair in itertools.combinations(choice.items(), 2)} & left

    while left:
        seed = dict(min(left, key=sorted))
        candidates = [{name: chance.choice(size) for name, size in sizes.items()} | seed for _ in range(30)]
        best = max(candidates, key=lambda each: len(news(each)))
        left -= news(best)
        yield {key: value for name, i in best.items() for key, value in SWITCHES[name][i].items()}


COMBINATIONS = list(pairwise())


@cache
def combination(index: int) -> list[Manifest]:
    """Return what one of the combinations renders; to be read only."""
    return render(COMBINATIONS[index])


# Lint and schema


@pytest.mark.parametrize("values", [{}, EVERYTHING, POSTGRESQL], ids=["defaults", "everything", "postgresql"])
def test_strict_lint_finds_nothing(values: dict[str, Any]) -> None:
    report = helm.lint(CHART, values, strict=True)
    information = 1
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > information] == []


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 2},
        {"serviceMonitor": {"enable": True}},
        {"image": {"repository": ""}},
        {"config": {"workspace": []}},
        {"config": {"workspaces": []}},
        {"config": {"workspaces": [{"name": "a", "api_id_file": "/i"}]}},
        {"config": {"listing": {"min_interval": "soon"}}},
        {"web": {"config": {"basic_auth_users": {"prometheus": "password in the clear"}}}},
        {"web": {"config": {"http_server_config": {"http2": True}}}},
        {"extraArgs": ["config.file=x"]},
    ],
    ids=str,
)
def test_values_that_the_schema_does_not_know_are_refused(values: dict[str, Any]) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmValuesError):
        chart.validate_schema(chart.merge_values(values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicaCount": 2}, "needs postgresql.enabled"),
        ({"existingSecret": "a", "secrets": {"api_id": "i"}}, "existingSecret and secrets"),
        ({"web": {"existingSecret": "a", "config": {"basic_auth_users": USERS}}}, "web.existingSecret and web.config"),
        (
            {"config": {"workspaces": [{"name": "a", "api_id_file": "/i", "api_key": "in-the-clear"}]}},
            "config.workspaces[0].api_key",
        ),
        ({"config": {"ledger": {"url": "postgresql://u:in-the-clear@db/x"}}}, "config.ledger.url"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_work_are_refused_with_what_to_do(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmRenderError) as refused:
        render(values)
    assert message in str(refused.value)
    assert "in-the-clear" not in str(refused.value)


def test_the_schema_knows_each_value_and_no_other() -> None:
    def check(schema: Mapping[str, Any], values: Mapping[str, Any], path: str) -> None:
        assert schema.get("additionalProperties") is False, path
        known = set(schema["properties"])
        assert known - {"global"} == set(values), path
        for key, value in values.items():
            below = schema["properties"][key]
            if isinstance(value, dict) and "properties" in below and key != "config":
                check(below, value, f"{path}.{key}")

    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    check(schema, yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), "values")


@pytest.mark.parametrize(
    "document", [ROOT / "config.example.yaml", ROOT / "deploy" / "config.yaml"], ids=lambda p: p.name
)
def test_every_configuration_of_the_repository_passes_as_values(document: Path) -> None:
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values({"config": yaml.safe_load(document.read_text(encoding="utf-8"))}))


# What is rendered


@pytest.mark.parametrize("values", [{}, EVERYTHING, POSTGRESQL], ids=["defaults", "everything", "postgresql"])
def test_what_is_rendered_follows_the_schemas_of_the_oldest_and_the_newest_kubernetes(values: dict[str, Any]) -> None:
    for manifest in render(values):
        validate_manifest(manifest)


def test_every_combination_of_two_switches_renders_valid_objects() -> None:
    """Valid in the newest Kubernetes; what is the same but for its metadata is checked once."""
    seen: set[str] = set()
    for index in range(len(COMBINATIONS)):
        for manifest in combination(index):
            text = json.dumps(manifest | {"metadata": None}, sort_keys=True)
            if text not in seen:
                validate_manifest(manifest, "1.37")
            seen.add(text)
            assert manifest["metadata"]["namespace"] == "prod"
    assert len(COMBINATIONS) >= 20
    assert len(seen) > 50


def test_a_field_that_kubernetes_does_not_know_would_be_noticed() -> None:
    broken = one(render({}), "StatefulSet")
    broken["spec"]["template"]["spec"]["readOnlyRootFilesystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_manifest(broken)
    with pytest.raises(jsonschema.ValidationError):
        validate_manifest({"kind": "ServiceMonitor", "apiVersion": "monitoring.coreos.com/v1", "spec": {"port": 1}})


def test_optional_objects_are_off_until_asked_for() -> None:
    assert sorted(manifest["kind"] for manifest in render({})) == [
        "ConfigMap",
        "Service",
        "ServiceAccount",
        "StatefulSet",
    ]
    everything = {manifest["kind"] for manifest in render(EVERYTHING)}
    assert everything >= {"NetworkPolicy", "PodDisruptionBudget", "ServiceMonitor", "PrometheusRule", "Secret"}


def test_labels_of_kube_prometheus_stack_are_settable() -> None:
    manifests = render(EVERYTHING)
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert one(manifests, kind)["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert one(manifests, "ConfigMap", "-dashboards")["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_with_an_existing_secret_no_secret_is_in_the_manifests() -> None:
    texts = render_texts({"existingSecret": "creatify", "postgresql": {"enabled": True}, "replicaCount": 3})
    manifests = [yaml.safe_load(text) for path, text in texts.items() if path.endswith(".yaml")]
    assert "Secret" not in {manifest["kind"] for manifest in manifests if manifest}
    named = one([each for each in manifests if each], "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    assert [volume["secret"]["secretName"] for volume in named if "secret" in volume] == ["creatify"]


def test_values_of_secrets_are_in_secrets_alone() -> None:
    values = {"secrets": {"api_id": "SECRET-1", "api_key": "SECRET-2"}, "web": {"config": {"basic_auth_users": USERS}}}
    texts = render_texts(values)
    for secret in ("SECRET-1", "SECRET-2", USERS["prometheus"]):
        assert [path for path, text in texts.items() if secret in text] == []
    pod = Pod.__new__(Pod)
    pod.manifests, pod.secrets = render(values), {}
    assert pod.files_of({"secret": {"secretName": "creatify-exporter"}}) == values["secrets"]


def test_the_rules_and_dashboards_of_a_packaged_chart_are_the_files_of_the_project(tmp_path: Path) -> None:
    archive = Path(helm.package(CHART, destination=tmp_path))
    assert archive.name == f"creatify-exporter-{__version__}.tgz"
    with tarfile.open(archive) as packed:
        found = {}
        for member in packed.getmembers():
            assert member.isfile(), f"{member.name} is no file: a link leads nowhere outside the checkout"
            content = packed.extractfile(member)
            assert content is not None
            found[member.name] = content.read()
    dashboards = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
    prefix = "creatify-exporter/files"
    assert found[f"{prefix}/alerts.yml"] == (ROOT / "prometheus" / "alerts.yml").read_bytes()
    assert {name for name in found if name.startswith(f"{prefix}/dashboards/")} == {
        f"{prefix}/dashboards/{path.name}" for path in dashboards
    }
    for path in dashboards:
        assert found[f"{prefix}/dashboards/{path.name}"] == path.read_bytes()


def test_the_rendered_rules_and_dashboards_are_those_of_the_project() -> None:
    manifests = render({"prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}})
    rules = yaml.safe_load((ROOT / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    assert one(manifests, "PrometheusRule")["spec"] == rules
    for name, text in one(manifests, "ConfigMap", "-dashboards")["data"].items():
        assert json.loads(text) == json.loads((ROOT / "grafana" / "dashboards" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("index", range(len(COMBINATIONS)))
def test_the_pods_meet_the_restricted_security_standard(index: int) -> None:
    pod = one(combination(index), "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("index", [i for i, each in enumerate(COMBINATIONS) if "serviceMonitor" in each])
def test_service_monitor_and_selectors_name_pods_and_ports_that_exist(index: int) -> None:
    manifests = combination(index)
    stateful, service = one(manifests, "StatefulSet")["spec"], one(manifests, "Service")
    monitor = one(manifests, "ServiceMonitor")["spec"]
    labels = stateful["template"]["metadata"]["labels"].items()
    (port,) = stateful["template"]["spec"]["containers"][0]["ports"]
    assert (port["name"], service["spec"]["ports"][0]["targetPort"]) == ("metrics", "metrics")
    assert [endpoint["port"] for endpoint in monitor["endpoints"]] == [service["spec"]["ports"][0]["name"]]
    assert stateful["serviceName"] == service["metadata"]["name"]
    assert stateful["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["jobLabel"] in service["metadata"]["labels"]


def test_instance_is_the_name_that_a_pod_keeps() -> None:
    (endpoint,) = one(render({"serviceMonitor": {"enabled": True}}), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["relabelings"] == [{"sourceLabels": ["__meta_kubernetes_pod_name"], "targetLabel": "instance"}]


@pytest.mark.parametrize("index", range(len(COMBINATIONS)))
def test_each_volume_is_mounted_and_each_mount_has_a_volume(index: int) -> None:
    spec = one(combination(index), "StatefulSet")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
    volumes = [volume["name"] for volume in spec["template"]["spec"].get("volumes", [])]
    assert sorted(mount["name"] for mount in container.get("volumeMounts", [])) == sorted(volumes + claims)


def test_the_ledger_is_where_the_image_works() -> None:
    (container,) = one(render({}), "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}["data"] == "/data"
    assert "WORKDIR /data" in DOCKERFILE


def test_what_to_do_next_is_said_after_the_installation() -> None:
    def notes(values: dict[str, Any]) -> str:
        return render_texts(values, name="texts", namespace="media")["NOTES.txt"]

    assert "kubectl --namespace media create secret generic texts-creatify-exporter --from-file=api_id" in notes({})
    assert "ledger_url=ledger_url" in notes({"postgresql": {"enabled": True}})
    assert "create secret" not in notes({"existingSecret": "creatify"})
    assert "https://localhost:9877" in notes({"web": {"config": {"tls_server_config": TLS}}})
    assert "WARNING" in notes({"persistence": {"enabled": False}})
    assert "does not scrape" not in notes({"serviceMonitor": {"enabled": True}})


# deploy/kubernetes


def test_the_generated_files_are_what_the_chart_gives_now() -> None:
    stale = "stale: run make generate"
    for path, text in generate.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)} is {stale}"
    made = {path for path in generate.files() if KUBERNETES in path.parents}
    assert {path for path in KUBERNETES.rglob("*") if path.is_file()} == made, stale
    for link, target in generate.links().items():
        assert link.resolve() == target, stale


def test_the_schema_of_the_configuration_is_the_projects() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))["properties"]["config"]
    project = json.loads((ROOT / "docs" / "config.schema.json").read_text(encoding="utf-8"))
    assert set(schema["properties"]) == set(project["properties"]) == set(config.Config.model_fields)
    assert "(?=" not in json.dumps(schema)


@pytest.mark.parametrize("directory", list(generate.VALUES))
def test_what_kustomize_makes_of_it_follows_the_schemas(directory: str) -> None:
    (kubectl,) = require("kubectl")
    manifests = list(yaml.safe_load_all(output(kubectl, "kustomize", KUBERNETES / directory)))
    for manifest in manifests:
        validate_manifest(manifest)
    stateful = one(manifests, "StatefulSet")["spec"]
    (container,) = stateful["template"]["spec"]["containers"]
    assert container["image"] == f"creatify-exporter:{__version__}"
    assert ("volumeClaimTemplates" in stateful) == (directory == "base")
    assert stateful["replicas"] == {"base": 1, "postgres": 2}[directory]


def test_what_cannot_change_of_a_stateful_set_is_as_in_version_0_1_0() -> None:
    """`kubectl apply -k` over an installation of 0.1.0 must not be refused."""
    stateful = one([yaml.safe_load((KUBERNETES / "base" / "statefulset.yaml").read_text())], "StatefulSet")
    assert stateful["metadata"]["name"] == stateful["spec"]["serviceName"] == "creatify-exporter"
    assert stateful["spec"]["selector"] == {"matchLabels": {"app.kubernetes.io/name": "creatify-exporter"}}
    assert "podManagementPolicy" not in stateful["spec"]
    claim = {"accessModes": ["ReadWriteOncePod"], "resources": {"requests": {"storage": "1Gi"}}}
    assert stateful["spec"]["volumeClaimTemplates"] == [{"metadata": {"name": "data"}, "spec": claim}]


# The pod runs


class Certificates:
    """An authority, the files of a kubernetes.io/tls Secret, and a client that has a certificate."""

    def __init__(self, directory: Path) -> None:
        self.authority, self.bundle = trustme.CA(), directory / "ca.pem"
        self.authority.cert_pem.write_to_path(self.bundle)
        server, client = self.authority.issue_cert("127.0.0.1"), self.authority.issue_cert("client.example")
        self.client = directory / "client.pem"
        client.private_key_and_cert_chain_pem.write_to_path(self.client)
        self.secret = {
            "tls.crt": b"".join(pem.bytes() for pem in server.cert_chain_pems).decode(),
            "tls.key": server.private_key_pem.bytes().decode(),
            "ca.crt": self.authority.cert_pem.bytes().decode(),
        }


WEB: dict[str, dict[str, Any]] = {
    "plain": {},
    "tls": {"config": {"tls_server_config": TLS}, "tlsSecret": "tls"},
    "users-and-clients": {
        "config": {"tls_server_config": CLIENTS, "basic_auth_users": HASHES},
        "tlsSecret": "tls",
    },
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("web", "isolated"), [*((web, True) for web in WEB if can_isolate()), ("users-and-clients", False)]
)
def test_the_rendered_manifests_start_the_exporter_and_its_probes_answer(
    tmp_path: Path, web: str, isolated: bool
) -> None:
    certificates, port = Certificates(tmp_path), free_port()
    with Stage() as stage:
        manifests = render(
            {
                "existingSecret": "creatify",
                "config": {"api": {"base_url": "${API_URL}"}},
                "extraEnv": [{"name": "API_URL", "value": stage.api.url}],
                "extraArgs": [f"--web.listen-address=127.0.0.1:{port}"],
                "web": WEB[web],
            }
        )
        api_id, api_key = credentials("main")
        secrets = {"creatify": {"api_id": api_id, "api_key": api_key}, "tls": certificates.secret}
        with Pod(tmp_path, manifests, port, secrets, isolated=isolated) as pod:
            eventually(lambda: pod.probe("readinessProbe"), 20, "the readiness probe succeeds")
            answer = requests.get(
                f"{'http' if web == 'plain' else 'https'}://127.0.0.1:{port}/metrics",
                verify=str(certificates.bundle),
                cert=str(certificates.client) if web == "users-and-clients" else None,
                auth=("ann", "pw") if web == "users-and-clients" else None,
                timeout=30,
            )
            assert answer.status_code == 200
            assert parse(answer.text).values("creatify_up", "workspace") == {("default",): 1}
            assert (pod.folder("data") / "creatify-exporter.db").is_file()
            if isolated:
                uids = psutil.Process(pod.pid).uids()
                assert {uids.real, uids.effective, uids.saved} == {USER}
                assert (pod.folder("data") / "creatify-exporter.db").stat().st_uid == USER
        assert pod.stop() == 0
    with pytest.raises(OSError):  # noqa: PT011 - refused, reset: whatever the kubelet would see
        pod.probe("livenessProbe")


@pytest.mark.process
def test_two_replicas_share_a_ledger_in_postgresql_and_write_no_file(tmp_path: Path, postgres: Postgres) -> None:
    api_id, api_key = credentials("main")
    with Stage() as stage, ExitStack() as stack:
        secret = {"api_id": api_id, "api_key": api_key, "ledger_url": postgres.create_database()}
        pods = []
        for name in ("first", "second"):
            port = free_port()
            values = POSTGRESQL | {
                "config": {"api": {"base_url": stage.api.url}},
                "extraArgs": [f"--web.listen-address=127.0.0.1:{port}"],
            }
            pod = Pod(tmp_path / name, render(values), port, {"creatify": secret}, isolated=can_isolate())
            pods.append(stack.enter_context(pod))
        for pod in pods:
            eventually(partial(pod.probe, "readinessProbe"), 20, "the readiness probe succeeds")
            answer = parse(requests.get(f"http://127.0.0.1:{pod.port}/metrics", timeout=30).text)
            assert answer.value("creatify_exporter_ledger_up") == 1
            assert answer.value("creatify_exporter_ledger_tasks", workspace="default") == 100
    assert [path for path in tmp_path.rglob("*.db*") if path.is_file()] == []


@pytest.mark.process
def test_a_rotated_secret_is_taken_when_the_kubelet_swaps_its_folder(tmp_path: Path) -> None:
    port = free_port()
    api_id, api_key = credentials("main")
    with Stage() as stage:
        values = {
            "existingSecret": "creatify",
            "config": {"api": {"base_url": stage.api.url}},
            "extraArgs": [f"--web.listen-address=127.0.0.1:{port}", "--config.auto-reload-interval=1s"],
        }
        old = {"creatify": {"api_id": api_id, "api_key": "revoked"}}

        def up() -> float | None:
            answer = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30)
            return parse(answer.text).value("creatify_up", workspace="default")

        with Pod(tmp_path, render(values), port, old, isolated=can_isolate()) as pod:
            assert up() == 0
            write_volume(pod.folder("secrets"), {"api_id": api_id, "api_key": api_key})
            eventually(lambda: up() == 1, 30, "the new key is used", every=0.5)


@pytest.mark.skipif(not can_isolate(), reason="this machine gives the tests no mounts of their own")
def test_the_root_of_an_isolated_pod_is_read_only(tmp_path: Path) -> None:
    pod = Pod(tmp_path, render({"demo": True}), 1, {}, isolated=True)
    pod.container["args"] = []
    *before, script = pod.command()
    start, _, _ = script.rpartition("exec /")
    for path in ("/x", "/usr/x", "/etc/x", "/tmp/x", "/data/x", str(ROOT / "x")):
        tried = run(*before, f"{start}! touch {pod.root / 'root'}{path} 2>/dev/null")
        assert tried.returncode == 0, f"{path} can be written: {tried.stderr}"

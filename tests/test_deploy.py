"""What deploy/ and the Dockerfile say fits the program, its files, and the schemas of those who read them."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from creatify_exporter import __version__, config
from tests.support.commands import output, run
from tests.support.exporter import Exporter
from tests.support.packages import require
from tests.support.schemas import follows

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
UNIT = DEPLOY / "systemd" / "creatify-exporter.service"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def check_config(path: Path, secrets: Path) -> "config.Config":
    """Load a configuration as the deployment would: its secret files are there, and so is its environment."""
    text = path.read_text(encoding="utf-8")
    text = text.replace("${CREDENTIALS_DIRECTORY}", str(secrets))
    for name in ("api_id", "api_key"):
        (secrets / name).write_text("value\n")
    copy = secrets / "config.yaml"
    copy.write_text(text)
    return config.load(copy, {"CREATIFY_API_ID": "id", "CREATIFY_API_KEY": "key"})


@pytest.mark.parametrize(
    "path",
    [
        DEPLOY / "config.yaml",
        DEPLOY / "systemd" / "config.yaml",
    ],
    ids=lambda path: str(path.relative_to(DEPLOY)),
)
def test_each_configuration_is_valid(path: Path, tmp_path: Path) -> None:
    loaded = check_config(path, tmp_path)
    assert [workspace.name for workspace in loaded.workspaces] == ["default"]


# Compose


def test_compose_follows_the_compose_specification() -> None:
    assert follows("compose-spec", COMPOSE)


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


# systemd


def test_the_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    (analyze,) = require("systemd-analyze")
    unit = tmp_path / UNIT.name
    # Where the unit says it is installed, nothing is installed here.
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(encoding="utf-8")))
    verified = run(analyze, "verify", unit)
    assert (verified.returncode, verified.stderr) == (0, "")
    # 1.5 on systemd's scale from 0 (safe) to 10; its own services are at 2 to 9.
    judged = run(analyze, "security", "--offline=true", "--threshold=15", unit)
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

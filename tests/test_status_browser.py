"""The status page in a real browser: every state, two widths, both colour schemes."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.packages import require
from tests.support.statuses import STATES
from tests.support.webhost import ROOT, hosting

pytestmark = pytest.mark.process

PACKAGES = ["axe-core@4.14.1", "playwright-core@1.65.1"]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "creatify-exporter-tests" / "-".join(PACKAGES)


def modules(npm: str) -> Path:
    """Return the folder of the packages from npm, installed once for all runs; only CI insists on them."""
    found = CACHE / "node_modules"
    if not all((found / package.split("@")[0] / "package.json").is_file() for package in PACKAGES):
        CACHE.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--prefix", str(CACHE), "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
        installed = subprocess.run(install, capture_output=True, text=True, timeout=120, check=False)
        if installed.returncode != 0 and os.environ.get("CI") != "true":
            pytest.skip("the packages from npm cannot be installed")
        assert installed.returncode == 0, installed.stderr
    return found


@pytest.fixture(scope="module")
def looks() -> dict[str, dict[str, Any]]:
    """What the browser found out, by state."""
    chromium, node, npm = require("chromium", "node", "npm")
    pictures = os.environ.get("STATUS_PICTURES", "")
    with hosting(states=True) as host:
        urls = [f"{host.url}{state}/?pause" for state in STATES]  # or it would be renewed while it is looked at
        looked = subprocess.run(
            [node, str(ROOT / "tests/support/look.js"), str(modules(npm)), chromium, pictures, *urls],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
    assert looked.returncode == 0, looked.stderr
    found = [json.loads(line) for line in looked.stdout.splitlines()]
    return {one["name"]: one for one in found}


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_be_seen_read_and_reached(looks: dict[str, dict[str, Any]], state: str) -> None:
    look = looks[state]
    assert look["status"] == 200
    assert look["complaints"] == []
    assert look["violations"] == []
    assert look["overflow"] == []
    assert (look["styled"], look["scripts"], look["roles"]) == (True, 0, [1, 1, 1, 1, 1])
    assert look["heading"] < 500
    assert look["reached"][0] == "Renew it every 30 s"
    assert len(set(look["reached"])) >= 5

"""What somebody has of version 0.1.0 works with this one: metrics, flags, configuration (ledger: test_schema.py)."""

import json
import shutil
from pathlib import Path

import pytest
import requests
import yaml

from creatify_exporter import cli, config
from creatify_exporter.metrics import METRICS
from tests.support.exporter import Exporter
from tests.support.stage import Stage, credentials

OLD = Path(__file__).parent / "data" / "version-0.1.0"


def test_each_metric_of_version_0_1_0_is_there_with_its_type_and_labels() -> None:
    old = json.loads((OLD / "metrics.json").read_text(encoding="utf-8"))
    now = {metric.name: [metric.type, *metric.labels] for metric in METRICS}
    assert len(old) == 23
    assert {name: now.get(name) for name in old} == old


def test_each_flag_of_version_0_1_0_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    help_text = capsys.readouterr().out
    flags = [line.split()[0] for line in (OLD / "flags.txt").read_text(encoding="utf-8").splitlines()]
    assert len(flags) == 14
    assert [flag for flag in flags if flag not in help_text] == []


def test_the_example_configuration_of_version_0_1_0_means_what_it_meant() -> None:
    loaded = config.load(OLD / "config.yaml", {})
    written = yaml.safe_load((OLD / "config.yaml").read_text(encoding="utf-8"))
    assert [workspace.name for workspace in loaded.workspaces] == ["marketing"]
    assert loaded.api.timeout == 60
    assert loaded.listing.max_age == 300
    assert loaded.exposition.zero_hold == 180
    for section, keys in written.items():
        if isinstance(keys, dict):
            assert set(keys) <= set(type(getattr(loaded, section)).model_fields), section


@pytest.mark.process
def test_an_installation_of_version_0_1_0_starts_as_it_is(tmp_path: Path) -> None:
    """Its configuration, and its ledger in the working directory."""
    shutil.copy(OLD.parent / "ledger-0.1.0" / "ledger.db", tmp_path / "creatify-exporter.db")
    written = yaml.safe_load((OLD / "config.yaml").read_text(encoding="utf-8"))
    with Stage() as stage:
        api_id, api_key = credentials("main")
        written["workspaces"] = [{"name": "main", "api_id": api_id, "api_key": api_key}]
        written["api"]["base_url"] = stage.api.url
        with Exporter(tmp_path, config=written) as exporter:
            assert exporter.scrape().value("creatify_up", workspace="main") == 1
            ready: requests.Response = exporter.get("/-/ready")
    assert ready.status_code == 200

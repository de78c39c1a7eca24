"""The procedures of docs/operation.md, followed word for word."""

import os
import re
import sqlite3
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import psycopg
import pytest
import yaml

from tests.support.commands import output
from tests.support.exporter import Exporter
from tests.support.postgres import Postgres
from tests.support.processes import eventually
from tests.support.prometheus import Prometheus
from tests.support.stage import Stage, counter_series

pytestmark = pytest.mark.process

OPERATION = (Path(__file__).resolve().parents[1] / "docs" / "operation.md").read_text(encoding="utf-8")

Counters = Mapping[tuple[str, ...], float]


def block(kind: str, heading: str) -> str:
    """Return the first fenced block of a kind below a heading."""
    section = OPERATION.split(f"# {heading}\n", 1)[1]
    found = re.search(rf"(?ms)^( *)```{kind}\n(.*?)^ *```$", section)
    assert found is not None
    return re.sub(rf"(?m)^{found[1]}", "", found[2])


def of(workspace: str, counters: Counters) -> Counters:
    return {(key[0], *key[2:]): value for key, value in counters.items() if key[1] == workspace}


def run_for_a_while(stage: Stage, exporter: Exporter) -> Counters:
    """Let the workspaces work, so that their counters are no longer 0; return the counters."""
    exporter.scrape()
    stage.time.jump(30)
    counters = counter_series(exporter.scrape())
    assert all(any(of(name, counters).values()) for name in stage.simulations)
    return counters


@pytest.fixture
def stage() -> Stage:
    return Stage("marketing", "other")


def on_sqlite(directory: Path, statements: str) -> None:
    with sqlite3.connect(directory / "creatify-exporter.db") as connection:
        connection.executescript(statements)
    connection.close()


def test_a_ledger_moved_away_begins_anew(stage: Stage, tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, config=stage.config())
    with stage:
        with exporter:
            run_for_a_while(stage, exporter)
        output("bash", "-euc", block("sh", "Starting a ledger anew"), cwd=tmp_path)
        assert (tmp_path / "old-ledger" / "creatify-exporter.db").exists()
        with exporter.start():
            assert set(counter_series(exporter.scrape()).values()) == {0}


def test_one_workspace_begins_anew_and_the_other_goes_on(stage: Stage, tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, config=stage.config())
    with stage:
        with exporter:
            before = run_for_a_while(stage, exporter)
        on_sqlite(tmp_path, block("sql", "Starting a ledger anew"))
        with exporter.start():
            after = counter_series(exporter.scrape())
    assert set(of("marketing", after).values()) == {0}
    assert of("other", after) == of("other", before)


def renamed(config: dict[str, object]) -> dict[str, object]:
    copy: dict[str, object] = yaml.safe_load(yaml.safe_dump(config).replace("name: marketing", "name: brand"))
    assert copy != config
    return copy


def test_a_renamed_workspace_keeps_its_counters(stage: Stage, tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, config=stage.config())
    with stage:
        with exporter:
            before = run_for_a_while(stage, exporter)
        on_sqlite(tmp_path, block("sql", "Renaming a workspace"))
        exporter.configure(renamed(stage.config()))
        with exporter.start():
            after = counter_series(exporter.scrape())
    assert of("brand", after) == of("marketing", before)
    assert of("other", after) == of("other", before)


def test_a_ledger_moved_to_postgresql_goes_on_there(stage: Stage, tmp_path: Path, postgres: Postgres) -> None:
    exporter = Exporter(tmp_path, config=stage.config())
    with stage:
        with exporter:
            before = run_for_a_while(stage, exporter)
        url = postgres.create_database()
        exporter.configure(stage.config(ledger={"url": url}))
        with exporter.start():
            eventually(lambda: exporter.get("/-/ready").status_code == 200, 20, "the new ledger to answer")

        script = block("python", "From SQLite to PostgreSQL")
        output(sys.executable, "-c", script, cwd=tmp_path, env=os.environ | {"LEDGER_URL": url})
        with exporter.start():
            assert counter_series(exporter.scrape()) == before
            stage.time.jump(30)
            later = counter_series(exporter.scrape())
            assert later != before
        # The statements for one workspace serve in psql as well.
        for heading in ("Renaming a workspace", "Starting a ledger anew"):
            with psycopg.connect(url) as connection:
                connection.execute(block("sql", heading).encode())
        exporter.configure(renamed(stage.config(ledger={"url": url})))
        with exporter.start():
            assert of("brand", counter_series(exporter.scrape())) == of("marketing", later)


def test_prometheus_shares_the_workspaces_out_among_exporters(tmp_path: Path) -> None:
    names = [f"workspace-{number}" for number in range(6)]
    stage = Stage(*names, history=5)
    exporters = [Exporter(tmp_path / str(number), config=stage.config()) for number in range(2)]
    text = block("yaml", "Scaling out")
    for number, exporter in enumerate(exporters):
        text = text.replace(f"exporter-{number}:9877", f"127.0.0.1:{exporter.port}")
    text = text.replace("scrape_interval: 60s", "scrape_interval: 1s").replace(
        "scrape_timeout: 30s", "scrape_timeout: 1s"
    )
    assert "exporter-" not in text

    def scraped(prometheus: Prometheus) -> Callable[[], bool]:
        return lambda: sorted(prometheus.values("creatify_up == 1", "workspace")) == [(name,) for name in names]

    with stage, exporters[0], exporters[1], Prometheus(tmp_path / "prometheus", text) as prometheus:
        eventually(scraped(prometheus), 60, "every workspace scraped, each by one exporter")
        targets = [target["labels"]["instance"] for target in prometheus.targets()]
    assert sorted(instance.split("/")[1] for instance in targets) == names
    assert len({instance.split("/")[0] for instance in targets}) == 2

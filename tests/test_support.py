"""The helpers that start real servers for other tests."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import packages
from tests.support.exporter import Exporter
from tests.support.packages import require
from tests.support.postgres import Postgres
from tests.support.processes import eventually
from tests.support.prometheus import Alertmanager, Prometheus, Webhook

pytestmark = pytest.mark.process


@pytest.fixture
def target() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(b'answers{kind="a"} 42\nanswers{kind="b"} 43\n')

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_prometheus_scrapes_answers_and_alerts_through_alertmanager(tmp_path: Path, target: str) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(
        "groups: [{name: all, rules: [{alert: Answered, expr: answers == 42}, {record: r, expr: answers}]}]"
    )
    with Webhook() as webhook:
        route = {"receiver": "test", "group_wait": "0s", "group_interval": "1s"}
        receivers = [{"name": "test", "webhook_configs": [{"url": webhook.url}]}]
        alertmanager = Alertmanager(tmp_path / "alertmanager", {"route": route, "receivers": receivers})
        config = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "test", "static_configs": [{"targets": [target]}]}],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager.port}"]}]}]},
        }
        with alertmanager, Prometheus(tmp_path / "prometheus", config) as prometheus:
            prometheus.wait_for_scrapes(2)
            assert prometheus.values("answers", "kind") == {("a",): 42, ("b",): 43}
            assert len(prometheus.query("answers[1m]")[0].points) >= 2
            assert prometheus.query("scalar(answers{kind='a'})")[0].value == 42
            now = prometheus.query("time()")[0].value
            assert prometheus.query_range("answers", now - 60, now, 1)
            assert {labels["kind"] for labels in prometheus.series("answers")} == {"a", "b"}
            assert prometheus.label_values("kind", "answers") == ["a", "b"]
            assert {rule["name"] for rule in prometheus.rules()} == {"Answered", "r"}
            eventually(prometheus.firing, 20, "the alert fires")
            webhook.wait_for(lambda body: body["status"] == "firing", 20)
            assert webhook.alerts("firing") == {"Answered"}
            assert alertmanager.alerts()
            prometheus.reload({"global": {"scrape_interval": "1s"}})
            eventually(lambda: not prometheus.targets(), 10, "no target left")
        assert not prometheus.running()
        assert not alertmanager.running()


def test_prometheus_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nonsense"):
        Prometheus(tmp_path, {"nonsense": True}).start()


def test_postgres_checks_passwords_and_can_go_away_and_come_back() -> None:
    with Postgres() as postgres:
        url = postgres.create_database()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE t AS SELECT 7 AS n")
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(postgres.url("postgres", "wrong"))
        for end in (postgres.stop, postgres.crash):
            end()
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(url)
            postgres.start()
            with psycopg.connect(url) as connection:
                assert connection.execute("SELECT n FROM t").fetchall() == [(7,)]
        with psycopg.connect(url) as connection:
            postgres.end_sessions()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        postgres.drop_database(url.rpartition("/")[2])
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)
    assert not postgres.root.exists()


def test_a_missing_program_skips_locally_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.PACKAGES, "no-such-program", "no-such-package")
    monkeypatch.setattr(packages, "install", lambda package: f"{package} cannot be installed here")
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="no-such-package cannot be installed"):
        require("no-such-program")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-package cannot be installed"):
        require("no-such-program")


def test_the_exporter_runs_answers_and_stops(tmp_path: Path) -> None:
    with Exporter(tmp_path, "--demo") as exporter:
        scrape = exporter.scrape()
        assert scrape.value("creatify_up") == 1
        assert ("gemini-2.5-pro", "done") in scrape.values("creatify_text_generator_tasks", "model", "status")
        assert exporter.scrape(openmetrics=True).families["creatify_up"].type == "gauge"
        assert exporter.memory() > 10_000_000
        assert exporter.threads() >= 1
        assert exporter.open_files() > 3
        assert exporter.cpu_seconds() > 0
        assert exporter.stop() == 0
    assert "Traceback" not in exporter.log()

"""The command line, in this process; tests/test_process.py has what needs one of its own."""

import json
import os
import re
import signal
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import structlog
import yaml

from creatify_exporter import __version__, cli
from creatify_exporter.demo import CREDENTIALS
from creatify_exporter.ledger import Ledger
from creatify_exporter.reasons import BUILT_IN
from tests.support.exporter import parse
from tests.support.processes import eventually, free_port
from tests.support.records import SECOND, commit, record
from tests.support.simulation import SimulatedApi, Simulation
from tests.support.upstream import Upstream

NOW = 1_760_000_000.0
FLAGS = {
    "--config.file", "--config.check", "--config.auto-reload-interval", "--web.listen-address",
    "--web.telemetry-path", "--web.config.file", "--web.enable-lifecycle", "--web.scrape-timeout-offset",
    "--log.level", "--log.format", "--version", "--once",
    "--reasons", "--demo", "--help",
}  # fmt: skip

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test an empty directory, no credentials, and leave no logging behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in [name for name in os.environ if name.startswith("CREATIFY_")]:
        monkeypatch.delenv(name)
    yield
    structlog.reset_defaults()


@pytest.fixture
def api() -> Iterator[SimulatedApi]:
    """A workspace with 50 tasks, whose time stands still."""
    simulation = Simulation(5, NOW, history=50, record_size=600, media_share=0)
    with SimulatedApi({CREDENTIALS: simulation}, lambda: NOW) as api:
        yield api


def configured(url: str, *keys: str, **sections: Any) -> str:
    """Write a configuration with a workspace for each API key, and return the flag that names it."""
    workspaces = [
        {"name": f"w{number}", "api_id": CREDENTIALS[0], "api_key": key}
        for number, key in enumerate(keys or CREDENTIALS[1:])
    ]
    config = {"workspaces": workspaces, "api": {"base_url": url}, **sections}
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return "--config.file=config.yaml"


def exit_code(*arguments: str) -> int:
    """Run the program; argparse exits by an exception."""
    try:
        return cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)


# Flags


def test_help_names_every_flag_in_80_columns(capsys: Capture) -> None:
    assert exit_code("--help") == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert set(re.findall(r"--[a-z][a-z.-]+", text)) | {"--help"} == FLAGS
    for default in (":9877", "/metrics", "500ms", "info", "logfmt"):
        assert f"(default: {default})" in re.sub(r"\s+", " ", text)


def test_version_says_what_runs(capsys: Capture) -> None:
    assert exit_code("--version") == 0
    assert re.fullmatch(
        rf"creatify-exporter {re.escape(__version__)} \(revision \S+, python 3\.\d+\.\d+\)\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--no.such.flag"], "unrecognized arguments"),
        (["--conf=x", "--demo"], "unrecognized arguments"),  # no guessing at what is meant
        (["stray"], "unrecognized arguments"),
        (["--config.file"], "expected one argument"),
        (["--web.listen-address=9877"], "must be :PORT"),
        (["--web.listen-address", "host:99999"], "--web.listen-address"),
        (["--web.telemetry-path=metrics"], "must be a path"),
        (["--web.telemetry-path=/-/healthy"], "must be a path"),
        (["--web.scrape-timeout-offset=soon"], "--web.scrape-timeout-offset"),
        (["--log.level=loud"], "invalid choice"),
        (["--log.format=xml"], "invalid choice"),
        (["--demo=yes"], "ignored explicit argument"),
        ([], "use --config.file, CREATIFY_API_ID and CREATIFY_API_KEY, or --demo"),
        (["--once"], "use --config.file"),
        (["--reasons"], "use --config.file"),
        (["--config.check"], "use --config.file"),
        (["--demo", "--config.file=config.yaml"], "leave out --config.file"),
        (["--once", "--reasons", "--demo"], "give one of them"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(capsys: Capture, arguments: list[str], complaint: str) -> None:
    assert exit_code(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("usage: creatify-exporter")
    assert complaint in shown.err


# --config.check


def test_a_valid_configuration_passes_the_check(capsys: Capture) -> None:
    assert exit_code(configured("https://api.creatify.ai"), "--config.check") == 0
    assert capsys.readouterr() == ("the configuration is valid\n", "")
    assert exit_code("--config.file", "config.yaml", "--config.check") == 0
    assert not Path("creatify-exporter.db").exists()


def test_credentials_of_the_environment_pass_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREATIFY_API_ID", "id")
    Path("key").write_text("key\n")
    monkeypatch.setenv("CREATIFY_API_KEY_FILE", "key")
    assert exit_code("--config.check") == 0


def test_the_check_prints_every_error_with_its_path_and_no_secret(capsys: Capture) -> None:
    flag = configured("http://api.creatify.ai", "the-secret-key", listing={"min_interval": "1h"}, surprise=1)
    assert exit_code(flag, "--config.check") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert {line.partition(":")[0] for line in shown.err.splitlines()} == {
        "api.base_url",
        "listing.min_interval",
        "surprise",
    }
    assert "the-secret-key" not in shown.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--config.file=missing.yaml"], "missing.yaml"),
        (["--demo", "--web.config.file=missing.yaml"], "missing.yaml"),
    ],
)
def test_a_file_that_is_missing_is_named(capsys: Capture, arguments: list[str], error: str) -> None:
    assert exit_code(*arguments) == 1
    assert error in capsys.readouterr().err


def test_the_errors_of_both_configurations_are_printed_at_once(capsys: Capture) -> None:
    Path("web.yaml").write_text("surprise: 1\n")
    flag = configured("https://api.creatify.ai", wonder=1)
    assert exit_code(flag, "--web.config.file=web.yaml", "--config.check") == 1
    errors = capsys.readouterr().err.splitlines()
    assert {line.rpartition(":")[0] for line in errors} == {"wonder", "web.yaml: surprise"}


# --once


def test_credentials_of_the_environment_make_one_workspace_on_the_real_api(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREATIFY_API_ID", "id")
    Path("key").write_text("key\n")
    monkeypatch.setenv("CREATIFY_API_KEY_FILE", "key")
    with Upstream() as proxy:
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert exit_code("--once") == 1
        assert set(proxy.connects) == {"api.creatify.ai:443"}
    assert parse(capsys.readouterr().out).values("creatify_up", "workspace") == {("default",): 0}


def test_once_prints_the_metrics_and_writes_nothing(capsys: Capture, api: SimulatedApi) -> None:
    assert exit_code(configured(api.url), "--once") == 0
    shown = capsys.readouterr()
    scrape = parse(shown.out)
    assert scrape.value("creatify_up", workspace="w0") == 1
    assert sum(scrape.values("creatify_text_generator_tasks", "model", "status").values()) == 50
    assert set(scrape.values("creatify_exporter_listing_errors_total", "cause").values()) == {0}
    assert not [name for name in scrape.families if "submitted" in name or "ledger_tasks" in name]
    assert shown.err == ""
    assert os.listdir() == ["config.yaml"]


def test_once_reads_the_ledger_that_is_there_and_leaves_it_alone(capsys: Capture, api: SimulatedApi) -> None:
    ledger = Ledger("sqlite:///creatify-exporter.db")
    commit(ledger.book("w0"), [])
    commit(ledger.book("w0"), [record("a", created=SECOND)], at=SECOND)
    book = ledger.book("w0")
    assert book.totals is not None
    book.answered(book.totals, 0)
    commit(book, [record("a", created=SECOND)], at=2 * SECOND)
    ledger.close()
    before = Path("creatify-exporter.db").read_bytes()
    assert exit_code(configured(api.url), "--once") == 0
    scrape = parse(capsys.readouterr().out)
    assert scrape.value("creatify_text_generator_tasks_submitted_total", model="m") == 1
    assert Path("creatify-exporter.db").read_bytes() == before


def test_once_exits_with_1_when_a_workspace_failed_and_prints_all_the_same(capsys: Capture, api: SimulatedApi) -> None:
    assert exit_code(configured(api.url, CREDENTIALS[1], "the-wrong-key"), "--once", "--log.format=json") == 1
    shown = capsys.readouterr()
    assert parse(shown.out).values("creatify_up", "workspace") == {("w0",): 1, ("w1",): 0}
    logged = {one["event"]: one for one in map(json.loads, shown.err.splitlines())}
    failed = logged["listing failed"]
    assert (failed["level"], failed["workspace"], failed["cause"]) == ("warning", "w1", "auth")
    assert logged.keys() <= {"listing failed", "balance not read"}
    assert "the-wrong-key" not in shown.err


def test_once_shows_the_demo_without_anything_else(capsys: Capture) -> None:
    assert exit_code("--demo", "--once") == 0
    scrape = parse(capsys.readouterr().out)
    assert scrape.value("creatify_up", workspace="demo") == 1
    assert scrape.value("creatify_exporter_ledger_up") == 1
    assert os.listdir() == []


@pytest.mark.parametrize(("level", "lines"), [("warn", 1), ("error", 0)])
def test_the_log_has_nothing_less_severe_than_asked_for(capsys: Capture, level: str, lines: int) -> None:
    flag = configured(f"http://127.0.0.1:{free_port()}")
    assert exit_code(flag, "--once", "--log.level", level) == 1
    shown = capsys.readouterr().err.splitlines()
    assert sum(bool(re.match(r"ts=\S+ level=warning event=\"listing failed\" ", line)) for line in shown) == lines
    assert all("level=warning" in line for line in shown[lines:])


# --reasons


def test_reasons_prints_a_table_and_writes_nothing(capsys: Capture, api: SimulatedApi) -> None:
    assert exit_code(configured(api.url), "--reasons") == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split() == ["REASON", "OWNER", "COUNT", "SHARE", "EXAMPLE", "(MASKED)"]
    reasons = [row.split() for row in rows if not row.startswith(" ")]
    assert {reason for reason, *_ in reasons} <= BUILT_IN.keys()
    listed = api.workspaces[CREDENTIALS].truth(NOW).listed
    failed = sum(tasks for (_, status), tasks in listed.items() if status == "failed")
    assert sum(int(count) for _, _, count, *_ in reasons) == failed > 0
    assert os.listdir() == ["config.yaml"]


def test_reasons_exits_with_1_when_a_workspace_cannot_be_listed(capsys: Capture, api: SimulatedApi) -> None:
    assert exit_code(configured(api.url, "wrong"), "--reasons") == 1
    shown = capsys.readouterr()
    assert shown.out == "No failed tasks are listed.\n"
    assert "cause=auth" in shown.err


# The ledger at the start


def no_ledger(path: Path) -> None:
    path.write_bytes(b"This is no database at all. " * 99)


def newer_ledger(path: Path) -> None:
    ledger = Ledger(f"sqlite:///{path}")
    ledger.open()
    ledger.close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE ledger_version SET version = 99")
    connection.close()


@pytest.mark.parametrize("once", [["--once"], []])
@pytest.mark.parametrize("spoil", [no_ledger, newer_ledger])
def test_a_ledger_that_cannot_be_used_stops_the_start(
    capsys: Capture, spoil: Callable[[Path], None], once: list[str]
) -> None:
    spoil(Path("creatify-exporter.db"))
    before = Path("creatify-exporter.db").read_bytes()
    assert exit_code(configured("https://api.creatify.ai"), *once) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(
        r'ts=\S+ level=error event="the ledger cannot be used" error="ledger sqlite:///creatify-exporter\.db: .+"\n',
        shown.err,
    )
    assert Path("creatify-exporter.db").read_bytes() == before


def test_errors_at_the_start_obey_the_log_format(capsys: Capture) -> None:
    flag = configured("https://api.creatify.ai", wonder=1, surprise=1)
    assert exit_code(flag, "--log.format=json") == 1
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(one["level"], one["event"]) for one in logged] == [("error", "invalid configuration")] * 2
    assert {one["path"] for one in logged} == {"wonder", "surprise"}


def test_an_address_that_is_taken_stops_the_start(capsys: Capture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert exit_code("--demo", f"--web.listen-address=127.0.0.1:{port}") == 1
    assert "cannot listen" in capsys.readouterr().err


# Serving


def test_the_program_serves_reloads_and_ends(capsys: Capture, api: SimulatedApi) -> None:
    """Here for the wiring; what signals do to a process of its own is in test_process.py."""
    port, failures = free_port(), list[BaseException]()
    url = f"http://127.0.0.1:{port}"

    def drive() -> None:
        try:
            with requests.Session() as session:
                eventually(lambda: session.get(f"{url}/-/healthy", timeout=5).ok, 20, "an answer")
                assert 'creatify_up{workspace="w0"} 1.0' in session.get(f"{url}/metrics", timeout=20).text
                assert "w0" in session.get(url, timeout=20).text
                assert session.get(f"{url}/-/ready", timeout=20).ok
                configured(api.url, ledger={"url": "sqlite:///another.db"})
                refused = session.post(f"{url}/-/reload", timeout=20)
                assert (refused.status_code, "ledger.url" in refused.text) == (500, True)
                assert "last_reload_successful 0.0" in session.get(f"{url}/metrics", timeout=20).text
                configured(api.url, *CREDENTIALS[1:] * 2)
                os.kill(os.getpid(), signal.SIGHUP)
                both = eventually(
                    lambda: "w1" in (text := session.get(f"{url}/metrics", timeout=20).text) and text, 20, "a reload"
                )
                assert "last_reload_successful 1.0" in str(both)
                Path("config.yaml").write_text("surprise: 1\n")
                os.kill(os.getpid(), signal.SIGHUP)
                eventually(
                    lambda: "last_reload_successful 0.0" in session.get(f"{url}/metrics", timeout=20).text,
                    20,
                    "refusal",
                )
        except BaseException as failure:  # noqa: BLE001 - raised below
            failures.append(failure)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    flag = configured(api.url)
    driver = threading.Thread(target=drive)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in handlers:
        signal.signal(number, signal.SIG_IGN)  # should the exporter not be there to hear it
    driver.start()
    try:
        assert exit_code(flag, f"--web.listen-address=127.0.0.1:{port}", "--web.enable-lifecycle") == 0
    finally:
        driver.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert failures == []
    log = capsys.readouterr().err
    events = re.findall(r'(?m)event=("[^"]*"|\S+)', log)
    assert events == ["listening", '"reload refused"', "reloaded", '"reload refused"', "stopped"]
    assert CREDENTIALS[1] not in log

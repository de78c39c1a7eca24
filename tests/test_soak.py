"""Nothing leaks and nothing falls over in the long run; `make soak` runs the long form."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import requests
import trustme
import yaml

from tests.support.exporter import Exporter, Scrape, parse
from tests.support.load import Scraping
from tests.support.processes import eventually
from tests.support.stage import Stage, Watch, credentials

pytestmark = [pytest.mark.process, pytest.mark.soak, pytest.mark.timeout(3600)]


def configurations(stage: Stage) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield one configuration after the other, and whether it is valid; every third is not."""
    alone = stage.config()
    alone["workspaces"] = alone["workspaces"][:1]
    renewed = stage.config(api={"timeout": "21s"})
    rules = stage.config(failure_reasons={"rules": [{"reason": "brand_policy", "match": "brand"}]})
    wrong = [
        stage.config(listing={"max_age": "long"}),
        stage.config(ledger={"url": "sqlite:///other.db"}),
        stage.config() | {"nonsense": True},
    ]
    invalid = cycle(wrong)
    for first, second in cycle([(stage.config(), alone), (renewed, rules)]):
        yield first, True
        yield second, True
        yield next(invalid), False


def test_reloads_under_fire_fail_no_scrape_and_leak_nothing(tmp_path: Path, soak: bool) -> None:
    warm_up, reloads = (100, 1000) if soak else (30, 90)
    with (
        Stage("main", "guest", window=150) as stage,
        Exporter(tmp_path, "--web.enable-lifecycle", "--log.level=error", config=stage.config()) as exporter,
    ):
        stage.baseline()
        exporter.scrape()
        stage.time.run(5)
        before = exporter.threads(), exporter.open_files(), exporter.memory()
        with Scraping(exporter, threads=2, workspace="main") as scraping:
            for number, (config, valid) in zip(range(reloads), configurations(stage), strict=False):
                exporter.configure(config)
                if number == warm_up:
                    before = exporter.threads(), exporter.open_files(), exporter.memory()
                if number % 3 == 0:
                    scraping.wait_for(1)
                if number % 10 == 9:
                    exporter.signal(signal.SIGHUP)
                else:
                    answer = exporter.session.post(exporter.url + "/-/reload", timeout=30)
                    assert answer.status_code == (200 if valid else 500), answer.text
        assert scraping.lost == 0
        assert scraping.answers > reloads / 3
        exporter.configure(stage.config())
        assert exporter.session.post(exporter.url + "/-/reload", timeout=30).ok
        threads, files, memory = before
        eventually(lambda: exporter.threads() <= threads + 2, 20, "no thread is left over")
        eventually(lambda: exporter.open_files() <= files + 5, 20, "no file is left open")
        assert exporter.memory() < 1.1 * memory
        assert exporter.running()
        assert "Traceback" not in exporter.log()


def test_what_is_rotated_is_taken_by_itself_fails_no_scrape_and_leaks_nothing(tmp_path: Path, soak: bool) -> None:
    """A key, the configuration and the certificate, in turn, as an operator's tools swap them: by a rename."""
    authority, rotations = trustme.CA(), 150 if soak else 15
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def put(name: str, content: str) -> None:
        (tmp_path / "next").write_text(content)
        os.replace(tmp_path / "next", tmp_path / name)

    def certify() -> None:
        put("server.pem", authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes().decode())

    tls = {"cert_file": "server.pem", "key_file": "server.pem"}
    (tmp_path / "web.yaml").write_text(yaml.safe_dump({"tls_server_config": tls}))
    (tmp_path / "key").write_text("key-0")
    certify()
    with Stage("main", rate=1.0) as stage:
        api_id = credentials("main")[0]
        keys = {(api_id, f"key-{number}"): stage.simulations["main"] for number in range(rotations + 1)}
        stage.api.workspaces = {**stage.api.workspaces, **keys}
        config = stage.config(workspaces=[{"name": "main", "api_id": api_id, "api_key_file": "key"}])
        flags = [f"--web.config.file={tmp_path / 'web.yaml'}", "--config.auto-reload-interval=100ms"]
        with Exporter(tmp_path, *flags, "--log.level=warn", config=config, ca_file=tmp_path / "ca.pem") as exporter:
            stage.baseline()
            exporter.scrape()
            stage.time.run(5)
            gauge = "creatify_exporter_config_last_reload_success_timestamp_seconds"
            before, certificates = (exporter.threads(), exporter.open_files(), exporter.memory()), 0
            with Scraping(exporter, threads=2, workspace="main") as scraping:
                for number in range(rotations):
                    if number == rotations // 5:
                        before = exporter.threads(), exporter.open_files(), exporter.memory()
                    reloaded = once(exporter).value(gauge)
                    if number % 3 == 0:
                        put("key", f"key-{number + 1}")
                    elif number % 3 == 1:
                        put("config.yaml", yaml.safe_dump(config | {"listing": {"settle": number}}))
                    else:
                        certify()
                        certificates += 1
                    eventually(partial(other_than, exporter, gauge, reloaded), 20, "it is taken")
                    assert once(exporter).value("creatify_exporter_config_last_reload_successful") == 1
            stage.time.run(0)
            assert scraping.answers > rotations
            # A connection that is kept open may end with the certificate that it began with.
            assert scraping.lost <= 2 * certificates
            exact = stage.wait_until_exact(exporter)
            errors = exact.values("creatify_exporter_listing_errors_total", "cause")
            assert set(errors.values()) == {0}
            threads, files, memory = before
            eventually(lambda: exporter.threads() <= threads + 2, 20, "no thread is left over")
            eventually(lambda: exporter.open_files() <= files + 5, 20, "no file is left open")
            assert exporter.memory() < 1.1 * memory
            assert exporter.log() == ""


def other_than(exporter: Exporter, gauge: str, value: float | None) -> bool:
    return once(exporter).value(gauge) != value


def once(exporter: Exporter) -> Scrape:
    """Scrape on a connection of its own, which no renewed certificate ends."""
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(exporter.url + "/metrics", verify=exporter.session.verify, timeout=30)
    return parse(answer.text)


def test_memory_stays_where_it_is(tmp_path: Path, soak: bool) -> None:
    block, blocks = (1000, 10) if soak else (100, 4)
    means = []
    with (
        Stage(window=200, history=200) as stage,
        Exporter(tmp_path, config=stage.config()) as exporter,
    ):
        watch = Watch()
        stage.time.run(5)
        for _ in range(blocks):
            samples = []
            for number in range(block):
                answer = exporter.get("/metrics")
                assert answer.status_code == 200
                if number % 10 == 0:
                    watch.check(answer.text)
                    samples.append(exporter.memory())
            means.append(sum(samples) / len(samples))
        assert means[-1] < 1.05 * means[1], [round(mean / 1e6, 1) for mean in means]
        assert "level=warning" not in exporter.log()

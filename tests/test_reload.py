"""Reload: what is in force after a file changed, whichever way it changed; the exporter's parts in this process."""

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
import yaml
from structlog.testing import capture_logs

from creatify_exporter.config import Config, ConfigError, Tls, load
from creatify_exporter.ledger import Ledger
from creatify_exporter.reload import Reloader, Source
from creatify_exporter.server import WebServer, _try
from creatify_exporter.service import Service
from creatify_exporter.web import application
from creatify_exporter.webauth import Authentication

HASH = "$2b$04$" + "a" * 53


class Rig:
    """A configuration in files, and what a reload changes; nothing listens and nothing is listed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config, self.web, self.key = directory / "config.yaml", directory / "web.yaml", directory / "key"
        self.key.write_text("key-1")
        self.write()
        self.web.write_text(yaml.safe_dump({"basic_auth_users": {"one": HASH}}))
        self.loads = 0
        self.source = Source(self.load, self.web)
        self.ledger = Ledger("sqlite://")
        config, web = self.source.read()
        authentication = Authentication(web.users)
        self.service = Service(config, self.ledger)
        self.reloader = Reloader(self.source, config, self.service, authentication)
        self.reloader.server = WebServer(application(self.service, authentication), ("", 0))

    def write(self, **sections: Any) -> None:
        workspaces = [{"name": "w", "api_id": "id", "api_key_file": "key"}]
        self.config.write_text(yaml.safe_dump({"workspaces": workspaces, **sections}))

    def load(self) -> Config:
        self.loads += 1
        return load(self.config, {})


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    structlog.reset_defaults()
    rig = Rig(tmp_path)
    yield rig
    rig.service.stop()
    rig.ledger.close()


def swap(rig: Rig) -> None:
    """Change the key as Kubernetes does: the name stays, a symbolic link behind it points elsewhere."""
    for version in ("1", "2"):
        (rig.directory / version).mkdir()
        (rig.directory / version / "key").write_text(f"key-{version}")
    (rig.directory / "data").symlink_to("1")
    rig.key.unlink()
    rig.key.symlink_to(Path("data") / "key")
    assert not rig.source.changed(), "the content is the same"
    (rig.directory / "next").symlink_to("2")
    os.replace(rig.directory / "next", rig.directory / "data")


def rename(rig: Rig) -> None:
    (rig.directory / "new").write_text("key-2")
    os.replace(rig.directory / "new", rig.key)


CHANGES: dict[str, Callable[[Rig], object]] = {
    "the configuration": lambda rig: rig.write(listing={"min_interval": "1s"}),
    "a secret": lambda rig: rig.key.write_text("key-2"),
    "a mounted secret": swap,
    "a file replaced by a rename": rename,
    "the users": lambda rig: rig.web.write_text(yaml.safe_dump({"basic_auth_users": {"two": HASH}})),
    "a file that goes away": lambda rig: rig.key.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_content_is_noticed_once(rig: Rig, change: str) -> None:
    assert not rig.source.changed()
    CHANGES[change](rig)
    assert rig.source.changed()
    if change == "a file that goes away":
        with pytest.raises(ConfigError):
            rig.source.read()
    else:
        rig.source.read()
    assert not rig.source.changed()


def test_a_file_that_is_written_anew_with_the_same_content_is_no_change(rig: Rig) -> None:
    rig.key.write_text("key-1")
    os.utime(rig.key, (1, 1))
    assert not rig.source.changed()


def test_a_file_that_changes_while_it_is_loaded_is_loaded_again(rig: Rig) -> None:
    late = ["key-3", "key-2"]

    def racing() -> Config:
        loaded = rig.load()
        if late:
            rig.key.write_text(late.pop())
        return loaded

    source, keys = Source(racing, rig.web), []
    for _ in range(3):
        keys.append(source.read()[0].workspaces[0].api_key.get_secret_value())
        assert source.changed() == (len(keys) < 3)
    assert keys == ["key-1", "key-2", "key-3"]


@pytest.mark.parametrize("obstacle", ["no process", "a path that is not in UTF-8"])
def test_certificates_that_cannot_be_tried_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    directory = tmp_path / os.fsdecode(b"certificates" if obstacle == "no process" else b"\xff")
    directory.mkdir()
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(directory / "cert")
    issued.private_key_pem.write_to_path(directory / "key")
    tls = Tls(cert_file=directory / "cert", key_file=directory / "key")

    async def exhausted(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    if obstacle == "no process":
        monkeypatch.setattr(asyncio, "create_subprocess_exec", exhausted)
    with pytest.raises(ConfigError, match=r"tls_server_config: the files cannot be tried \("):
        asyncio.run(_try(tls))


def watched(rig: Rig, *steps: Callable[[], object]) -> list[dict[str, Any]]:
    """Watch the files while the steps are taken, each when the one before was looked at; return the log."""

    async def run() -> None:
        looks = asyncio.Event()
        changed = rig.source.changed
        loop = asyncio.get_running_loop()

        def look() -> bool:
            loop.call_soon_threadsafe(looks.set)
            return changed()

        rig.source.changed = look  # type: ignore[method-assign]
        watching = asyncio.create_task(rig.reloader.watch(0.001))
        for step in steps:
            for _ in range(3):
                looks.clear()
                await asyncio.wait_for(looks.wait(), 20)
            step()
        for _ in range(3):
            looks.clear()
            await asyncio.wait_for(looks.wait(), 20)
        watching.cancel()

    with capture_logs() as logs:
        asyncio.run(run())
    return [dict(one) for one in logs]


def test_what_changed_is_put_in_force_and_what_is_refused_is_logged_once(rig: Rig) -> None:
    logs = watched(
        rig,
        lambda: rig.key.write_text("key-2"),
        lambda: rig.write(surprise=1),
        lambda: rig.write(surprise=2),
        lambda: rig.write(listing={"max_age": "1m"}),
    )
    assert [one["event"] for one in logs] == ["reloaded", "reload refused", "reload refused", "reloaded"]
    assert rig.service.exporter_view().reload_successful
    assert "key-2" not in str(logs)


def test_a_refused_change_is_told_by_the_gauge(rig: Rig) -> None:
    watched(rig, lambda: rig.write(surprise=1))
    assert not rig.service.exporter_view().reload_successful


def test_nothing_is_loaded_while_nothing_changes(rig: Rig) -> None:
    before = rig.loads
    assert watched(rig) == []
    assert rig.loads == before

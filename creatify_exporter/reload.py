"""Reload: both configurations, put in force together or not at all; by request, or because a file changed."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from creatify_exporter.config import Config, ConfigError, NoConfigurationError, WebConfig, load_web
from creatify_exporter.configfile import Reader
from creatify_exporter.server import WebServer
from creatify_exporter.service import Service
from creatify_exporter.webauth import Authentication

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class Source:
    """Where the configuration comes from: what `load` reads, and the file of the web configuration if there is one."""

    def __init__(self, load: Callable[[], Config], web_file: Path | None) -> None:
        self._load = load
        self._web_file = web_file
        self._files: Mapping[Path, bytes | None] = {}

    def read(self, former: Config | None = None) -> tuple[Config, WebConfig]:
        """Load both, in place of the `former` one if there is one; raise ConfigError with all errors of both."""
        config = _result(self._load)
        web = _result(lambda: load_web(self._web_file) if self._web_file else WebConfig())
        self._files = {**config.files, **web.files}
        errors = [error for one in (config, web) if isinstance(one, ConfigError) for error in one.errors]
        if former and isinstance(config, Config) and config.ledger.url != former.ledger.url:
            errors.append(("ledger.url", "cannot change while the exporter runs; restart it"))
        if errors or isinstance(config, ConfigError) or isinstance(web, ConfigError):
            raise ConfigError(errors)
        return config, web

    def changed(self) -> bool:
        """Tell whether the content of a file is another one than at the last `read`, which may have failed."""
        now = Reader()
        for path in self._files:
            with suppress(ValueError):
                now.read(str(path))
        return now.files != self._files


def _result(load: Callable[[], T]) -> T | ConfigError:
    try:
        return load()
    except NoConfigurationError:
        raise
    except ConfigError as error:
        return error


@dataclass
class Reloader:
    """Put new configurations in force, in `server` too, once there is one; `config` is the one at the start."""

    source: Source
    config: Config
    service: Service
    authentication: Authentication
    server: WebServer = field(init=False)

    def __post_init__(self) -> None:
        self._lock = asyncio.Lock()

    async def reload(self) -> None:
        """Read both configurations and put them in force; raise ConfigError and keep the old ones on any error."""
        async with self._lock:
            try:
                config, web = await asyncio.to_thread(self.source.read, self.config)
                await self.server.replace(web.tls)
            except ConfigError as error:
                self.service.reload_failed()
                _log.error("reload refused", errors=str(error))
                raise
            self.authentication.replace(web.users)
            self.service.configure(config)
            _log.info("reloaded")

    async def reload_on_signal(self) -> None:
        """Reload; what is wrong is in the log."""
        with suppress(ConfigError):
            await self.reload()

    async def watch(self, interval: float) -> None:
        """Reload when the content of a file changed, looking every `interval` seconds; returns when cancelled.

        Content is compared, not time stamps, as mounted secrets are swapped by a symbolic link. What is refused is
        logged once, and tried again when it changes again.
        """
        while True:
            await asyncio.sleep(interval)
            if await asyncio.to_thread(self.source.changed):
                await self.reload_on_signal()

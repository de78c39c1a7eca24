"""Reload: both configurations, put in force together or not at all; by request, or because a file changed."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import structlog

from creatify_exporter.config import Config, ConfigError, Tls, WebConfig
from creatify_exporter.service import Service
from creatify_exporter.webauth import Authentication

_TRIES = 5

_log = structlog.get_logger(__name__)


class Configuration(NamedTuple):
    """Both configurations, and the files that they come from."""

    main: Config
    web: WebConfig
    files: frozenset[Path]


class Source:
    """Where the configuration comes from.

    `load` reads both, beside the one in force if there is one, or raises ConfigError with all errors of both.
    """

    def __init__(self, load: Callable[[Config | None], Configuration]) -> None:
        self._load = load
        self._content: dict[Path, bytes | None] = {}

    def read(self, former: Config | None = None) -> Configuration:
        """Load, and remember the content of the files; raise ConfigError."""
        # Once more while a file changes meanwhile: what is remembered is what was loaded.
        for _ in range(_TRIES):
            before = self._content
            error = None
            try:
                loaded = self._load(former)
                files = loaded.files
            except ConfigError as refused:
                error, files = refused, refused.files
            self._content = _content(files)
            if self._content == before:
                break
        if error:
            raise error
        return loaded

    def changed(self) -> bool:
        """Tell whether the content of a file is another one than at the last `read`, which may have failed."""
        return _content(self._content) != self._content


def _content(files: Iterable[Path]) -> dict[Path, bytes | None]:
    """Return a digest of each file's content, None where it cannot be read."""
    found: dict[Path, bytes | None] = {}
    for path in files:
        try:
            found[path] = hashlib.sha256(path.read_bytes()).digest()
        except OSError:
            found[path] = None
    return found


class Reloader:
    """Put new configurations in force; `config` is the one at the start.

    `replace_tls` has the server use other TLS settings, and raises ConfigError when they cannot be used.
    """

    def __init__(
        self,
        source: Source,
        config: Config,
        service: Service,
        authentication: Authentication,
        replace_tls: Callable[[Tls | None], Awaitable[None]],
    ) -> None:
        self._source = source
        self._config = config
        self._service = service
        self._authentication = authentication
        self._replace_tls = replace_tls
        self._lock = asyncio.Lock()

    async def reload(self) -> None:
        """Read both configurations and put them in force; raise ConfigError and keep the old ones on any error."""
        async with self._lock:
            try:
                configuration = await asyncio.to_thread(self._source.read, self._config)
                await self._replace_tls(configuration.web.tls)
            except ConfigError as error:
                self._service.reload_failed()
                _log.error("reload refused", errors=str(error))
                raise
            self._authentication.replace(configuration.web.users)
            self._service.configure(configuration.main)
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
            if await asyncio.to_thread(self._source.changed):
                await self.reload_on_signal()

"""Reload: both configurations, put in force together or not at all."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from creatify_exporter.config import Config, ConfigError, WebConfig
from creatify_exporter.server import WebServer
from creatify_exporter.service import Service
from creatify_exporter.webauth import Authentication

_log = structlog.get_logger(__name__)


class Reloader:
    """Put new configurations in force; `load` returns both or raises ConfigError with all errors of both."""

    def __init__(
        self,
        load: Callable[[], tuple[Config, WebConfig]],
        service: Service,
        authentication: Authentication,
        server: WebServer,
    ) -> None:
        self._load = load
        self._service = service
        self._authentication = authentication
        self._server = server
        self._lock = asyncio.Lock()

    async def reload(self) -> None:
        """Read both configurations and put them in force; raise ConfigError and keep the old ones on any error."""
        async with self._lock:
            try:
                config, web_config = await asyncio.to_thread(self._load)
                await self._server.replace(web_config.tls)
            except ConfigError as error:
                self._service.reload_failed()
                _log.error("reload refused", errors=str(error))
                raise
            self._authentication.replace(web_config.users)
            self._service.configure(config)
            _log.info("reloaded")

    async def reload_on_signal(self) -> None:
        """Reload; what is wrong is in the log."""
        with suppress(ConfigError):
            await self.reload()

"""The command line: flags, logging, signals, and what is put together for each of them."""

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from creatify_exporter import __revision__, __version__, once
from creatify_exporter.config import (
    Config,
    ConfigError,
    NoConfigurationError,
    WebConfig,
    load,
    parse_duration,
)
from creatify_exporter.database import LedgerError, LedgerMissingError, LedgerUnusableError
from creatify_exporter.demo import CREDENTIALS, demo, spike_times
from creatify_exporter.ledger import Ledger
from creatify_exporter.reload import Reloader, Source
from creatify_exporter.server import WebServer, parse_listen_address
from creatify_exporter.service import Service
from creatify_exporter.web import application, parse_telemetry_path
from creatify_exporter.webauth import Authentication

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_GRACE = 2.0  # seconds that answers under way get at the end

_log = structlog.get_logger("exporter")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the exporter; return its exit code: 0, 1 when something is wrong, 2 for wrong usage."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    if flags.demo and flags.config_file:
        parser.error("--demo brings its own configuration: leave out --config.file")
    if flags.once and flags.reasons:
        parser.error("--once and --reasons are two different tasks: give one of them")
    _set_up_logging(flags.log_level, flags.log_format)
    with contextlib.ExitStack() as stack:
        load_config = partial(load, flags.config_file, os.environ)
        if flags.demo:
            load_config = partial(_demo_config, stack.enter_context(demo()).url)
        try:
            return _run(flags, Source(load_config, flags.web_config_file), stack)
        except NoConfigurationError as error:
            parser.error(f"{error}\nuse --config.file, CREATIFY_API_ID and CREATIFY_API_KEY, or --demo")
        except ConfigError as error:
            for path, problem in error.errors:
                _log.error("invalid configuration", path=path, problem=problem)
        except LedgerUnusableError as error:
            _log.error("the ledger cannot be used", error=str(error))
        return 1


def _run(flags: argparse.Namespace, source: Source, stack: contextlib.ExitStack) -> int:
    if flags.config_check:
        return _check(flags, source)
    config, web_config = source.read()
    if flags.reasons:
        report, complete = once.reasons(config)
        print(report, end="")
        return 0 if complete else 1
    ledger = Ledger(_ledger_url(flags, config), read_only=flags.once and not flags.demo)
    stack.callback(ledger.close)
    try:
        ledger.open()
    except LedgerMissingError:
        _log.debug("there is no ledger; its counters are left out")
    except LedgerUnusableError:
        raise
    except LedgerError as error:
        _log.error("the ledger is out of reach; trying on", error=str(error))
    if flags.once:
        answer, complete = asyncio.run(once.exposition(config, ledger, writes=flags.demo))
        sys.stdout.buffer.write(answer)
        return 0 if complete else 1
    asyncio.run(_serve(flags, source, config, web_config, ledger))
    return 0


def _check(flags: argparse.Namespace, source: Source) -> int:
    """Print every error of both configurations, and what a start would say of the ledger."""
    try:
        config, _ = source.read()
        with contextlib.closing(Ledger(_ledger_url(flags, config))) as ledger:
            ledger.check()
    except NoConfigurationError:
        raise
    except (ConfigError, LedgerUnusableError) as error:
        print(error, file=sys.stderr)
        return 1
    except LedgerError as error:
        print(f"{error}\nthe exporter would start all the same, and try on", file=sys.stderr)
    print("the configuration is valid")
    return 0


async def _serve(
    flags: argparse.Namespace, source: Source, config: Config, web_config: WebConfig, ledger: Ledger
) -> None:
    service, authentication = Service(config, ledger), Authentication(web_config.users)
    reloader = Reloader(source, config, service, authentication)
    app = application(
        service,
        authentication,
        telemetry_path=flags.web_telemetry_path,
        reload=reloader.reload if flags.web_enable_lifecycle else None,
        timeout_offset=flags.web_scrape_timeout_offset,
    )
    reloader.server = server = WebServer(app, flags.web_listen_address, web_config.tls)
    stop, loop, running = asyncio.Event(), asyncio.get_running_loop(), set[asyncio.Task[Any]]()

    def start(work: Coroutine[Any, Any, Any]) -> None:
        task = loop.create_task(work)
        running.add(task)
        task.add_done_callback(running.discard)

    loop.add_signal_handler(signal.SIGHUP, lambda: start(reloader.reload_on_signal()))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    _log.info("listening", url=f"{server.url.rstrip('/')}{flags.web_telemetry_path}", version=__version__)
    if flags.demo:
        _log.info("the demo has a failure spike soon", **spike_times())
        # The first listing is the baseline: after this one a visitor sees counters in motion.
        start(service.scrape(None, config.api.timeout, openmetrics=False))
    if flags.config_auto_reload_interval:
        start(reloader.watch(flags.config_auto_reload_interval))
    await stop.wait()
    service.stop()
    await server.stop(_GRACE)
    _log.info("stopped")


def _demo_config(url: str) -> Config:
    api_id, api_key = CREDENTIALS
    return Config.model_validate(
        {
            "workspaces": [{"name": "demo", "api_id": api_id, "api_key": api_key}],
            "api": {"base_url": url},
            "exposition": {"zero_hold": "0s"},
        }
    )


def _ledger_url(flags: argparse.Namespace, config: Config) -> str:
    return "sqlite://" if flags.demo else config.ledger.url.get_secret_value()


def _set_up_logging(level: str, log_format: str) -> None:
    renderer: Any = structlog.processors.JSONRenderer()
    if log_format == "logfmt":
        renderer = structlog.processors.LogfmtRenderer(key_order=["ts", "level", "event"], bool_as_flag=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", key="ts"),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _typed(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse tell what is wrong in the words of `parse`."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="creatify-exporter",
        description="Prometheus exporter for Creatify's text generator.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # or a long --version would be wrapped
        allow_abbrev=False,
    )

    def flag(name: str, help_text: str, **options: Any) -> None:
        dest = name.removeprefix("--").replace(".", "_").replace("-", "_")
        parser.add_argument(name, dest=dest, help=help_text, **options)

    def setting(name: str, default: str, help_text: str, parse: Callable[[str], Any] = str, **options: Any) -> None:
        flag(name, f"{help_text} (default: {default})", default=default, type=_typed(parse), **options)

    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}
    duration: dict[str, Any] = {"parse": parse_duration, "metavar": "DURATION"}
    flag("--config.file", "configuration file (YAML)", **file)
    flag("--config.check", "validate the configuration, print every error, and exit", action="store_true")
    setting("--config.auto-reload-interval", "30s", "how often to look for changed files; 0s: never", **duration)
    setting("--web.listen-address", ":9877", "address to serve on", parse_listen_address, metavar="ADDRESS")
    setting("--web.telemetry-path", "/metrics", "path of the metrics", parse_telemetry_path, metavar="PATH")
    flag("--web.config.file", "TLS and users, in the exporter toolkit's format", **file)
    flag("--web.enable-lifecycle", "allow reloading by POST /-/reload", action="store_true")
    setting("--web.scrape-timeout-offset", "500ms", "taken off Prometheus' timeout", **duration)
    setting("--log.level", "info", "least severe level to log", choices=tuple(_LEVELS))
    setting("--log.format", "logfmt", "format of the log", choices=("logfmt", "json"))
    build = f"creatify-exporter {__version__} (revision {__revision__}, python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=build)
    flag("--once", "list once, print the metrics, write nothing, and exit", action="store_true")
    flag("--reasons", "list once, print a table of the failure reasons, and exit", action="store_true")
    flag("--demo", "serve a simulated API with a throw-away ledger", action="store_true")
    return parser

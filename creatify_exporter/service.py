"""What runs: all workspaces, and the answers made of them; lives in the event loop."""

import asyncio
import platform
import threading
from collections import defaultdict
from collections.abc import Callable

from creatify_exporter import __revision__, __version__
from creatify_exporter import config as config_
from creatify_exporter.api import Client
from creatify_exporter.attempt import Clock
from creatify_exporter.config import Config
from creatify_exporter.ledger import Ledger
from creatify_exporter.metrics import ExporterView, WorkspaceView, render
from creatify_exporter.reasons import Classifier
from creatify_exporter.workspace import Round, Tally, Workspace

_BALANCE_MOMENT = 0.1  # seconds

_Contents = tuple[list[WorkspaceView], ExporterView | None]


class Service:
    """All workspaces, and the answers made of them."""

    def __init__(self, config: Config, ledger: Ledger, *, clock: Clock | None = None, writes: bool = True) -> None:
        self._ledger = ledger
        self._clock = clock or Clock()
        self._writes = writes
        self._workspaces: dict[str, Workspace] = {}
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._rendering: dict[tuple[frozenset[str] | None, bool], tuple[_Contents, asyncio.Task[bytes]]] = {}
        self._asking: threading.Thread | None = None
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Put `config` in force: workspaces whose credentials and API stay the same go on as they are."""
        self._reloaded_at = self._clock.now()
        self._reload_successful = True
        classify = classifier(config)
        former, self._workspaces = self._workspaces, {}
        for one in config.workspaces:
            tally = self._tallies[one.name]
            client = client_of(config, one, tally.request)
            if one.name in former and former[one.name].client == client:
                workspace = former.pop(one.name)
            else:
                book = self._ledger.book(one.name)
                workspace = Workspace(one.name, client, book, tally, self._clock, writes=self._writes)
            workspace.configure(config, classify)
            self._workspaces[one.name] = workspace
        for workspace in former.values():
            workspace.retire()

    def reload_failed(self) -> None:
        """Take note that a new configuration was refused; the one in force stays."""
        self._reload_successful = False

    async def scrape(
        self, names: frozenset[str] | None, timeout: float, openmetrics: bool, *, seen: bool = True
    ) -> bytes:
        """Return the exposition of the workspaces `names` (None: of everything) within `timeout` seconds.

        Starts a listing of each, or joins the one under way. What is not done in time is answered with what the
        newest finished listing gave. Unless it will be `seen`, an answer is nobody's first one.
        """
        chosen = [one for one in self._workspaces.values() if names is None or one.name in names]
        rounds = [one.begin() for one in chosen]
        await _finished([one for one in rounds if one], timeout)
        views = [one.view(waited_for) for one, waited_for in zip(chosen, rounds, strict=True)]
        if seen:
            for one, view in zip(chosen, views, strict=True):
                one.answered(view)
        exporter = self.exporter_view() if names is None else None
        return await self._rendered((names, openmetrics), (views, exporter))

    async def _rendered(self, key: tuple[frozenset[str] | None, bool], contents: _Contents) -> bytes:
        """Render an answer; scrapes that wait for the same one share it."""
        former, answer = self._rendering.get(key, (None, None))
        if answer is None or former != contents:
            answer = asyncio.create_task(asyncio.to_thread(render, *contents, openmetrics=key[1]))
            self._rendering[key] = contents, answer
            answer.add_done_callback(lambda _: self._rendering.pop(key, None))
        return await asyncio.shield(answer)

    def views(self) -> list[WorkspaceView]:
        """Return what is known of each workspace, in the order of the configuration; starts no listing."""
        return [one.view() for one in self._workspaces.values()]

    def exporter_view(self) -> ExporterView:
        """Return what is known of the exporter itself."""
        return ExporterView(
            self._ledger.up,
            self._reload_successful,
            self._reloaded_at,
            __version__,
            __revision__,
            platform.python_version(),
        )

    def ready(self) -> bool:
        """Return whether the ledger answered last time; when not, ask it again for the next time."""
        if not self._ledger.up and not (self._asking and self._asking.is_alive()):
            self._asking = threading.Thread(target=self._ledger.ping, name="ledger", daemon=True)
            self._asking.start()
        return self._ledger.up

    def stop(self) -> None:
        """Let the waiting scrapes have what is there, and break off the listings."""
        for workspace in self._workspaces.values():
            workspace.retire()


def classifier(config: Config) -> Classifier:
    """Return what names the failure reasons under `config`."""
    return Classifier([(rule.reason, rule.match, rule.owner) for rule in config.failure_reasons.rules])


def client_of(config: Config, workspace: config_.Workspace, on_request: Callable[[str, str], None]) -> Client:
    """Return what reads `workspace`; a listing by another client is not this workspace's."""
    return Client(
        workspace.api_id.get_secret_value(),
        workspace.api_key.get_secret_value(),
        config.api.base_url,
        config.api.timeout,
        config.api.max_response_size,
        config.api.authorities,
        on_request,
    )


async def _finished(rounds: list[Round], timeout: float) -> None:
    """Wait for the listings, at most `timeout` seconds, and for balances that are a moment behind."""
    loop = asyncio.get_running_loop()
    latest = loop.time() + timeout
    if rounds:
        await asyncio.wait([one.listing for one in rounds], timeout=timeout)
    # A short listing is often done a moment before the balance; without this moment that would come and go.
    if late := [one.balance_read for one in rounds if one.balance_read and one.listing.done()]:
        await asyncio.wait(late, timeout=max(min(_BALANCE_MOMENT, latest - loop.time()), 0))

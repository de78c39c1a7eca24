"""A real Prometheus, a real Alertmanager and a webhook for tests."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
import yaml

from tests.support.packages import require
from tests.support.processes import Daemon, eventually, free_port
from tests.support.servers import InThread


@dataclass(frozen=True)
class Series:
    """One series of an answer: labels (with `__name__`, if any) and points of (Unix seconds, value)."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def value(self) -> float:
        """Return the last value."""
        return self.points[-1][1]


class _Service(Daemon):
    def __init__(self, directory: Path, config: Mapping[str, Any] | str, flags: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory / f"{type(self).__name__.lower()}.log")
        self.root, self.flags, self.port = directory, flags, free_port()
        self.config_file = directory / f"{type(self).__name__.lower()}.yml"
        self.configure(config)
        self.url = f"http://127.0.0.1:{self.port}"
        self.session = requests.Session()
        self.session.trust_env = False

    def configure(self, config: Mapping[str, Any] | str) -> None:
        """Write the configuration file."""
        self.config_file.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config)))

    def ready(self) -> bool:
        return self.session.get(f"{self.url}/-/ready", timeout=5).ok

    def reload(self, config: Mapping[str, Any] | str) -> None:
        """Put another configuration in force."""
        self.configure(config)
        response = self.session.post(f"{self.url}/-/reload", timeout=10)
        assert response.ok, response.text

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.session.close()


class Prometheus(_Service):
    """Run Debian's Prometheus in a directory; `config` is prometheus.yml as text or as a mapping."""

    def __init__(self, directory: Path, config: Mapping[str, Any] | str, *flags: str) -> None:
        (self.program,) = require("prometheus")
        super().__init__(directory, config, flags)

    def command(self) -> Sequence[str]:
        return [
            self.program,
            f"--config.file={self.config_file}",
            f"--storage.tsdb.path={self.root / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--web.enable-lifecycle",
            *self.flags,
        ]

    def environment(self) -> Mapping[str, str]:
        # These stores are small: few collections of garbage cost less.
        return os.environ | {"GOGC": "400"}

    def api(self, path: str, **parameters: object) -> Any:
        """Return `data` of an answer of the HTTP API, such as `api("targets")`; fail with its error."""
        given: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
        answer = self.session.get(f"{self.url}/api/v1/{path}", params=given, timeout=30).json()
        assert answer["status"] == "success", (path, parameters, answer.get("error"))
        return answer["data"]

    def query(self, expression: str, at: float | None = None) -> list[Series]:
        """Return the series of an instant query; of a range selector like `up[5m]` the raw samples."""
        return _series(self.api("query", query=expression, time=at))

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """Return the series of a range query."""
        return _series(self.api("query_range", query=expression, start=start, end=end, step=step))

    def values(self, expression: str, *labels: str, at: float | None = None) -> dict[tuple[str, ...], float]:
        """Return the values of an instant query by the values of some labels; no two may fall together."""
        series = self.query(expression, at)
        found = {tuple(s.labels.get(label, "") for label in labels): s.value for s in series}
        assert len(found) == len(series), f"{expression} has several series per {labels}"
        return found

    def series(self, *selectors: str) -> list[dict[str, str]]:
        """Return the label sets that match."""
        return list(self.api("series", **{"match[]": selectors}))

    def label_values(self, label: str, *selectors: str) -> list[str]:
        """Return the values of a label."""
        return list(self.api(f"label/{label}/values", **{"match[]": selectors or None}))

    def rules(self) -> list[dict[str, Any]]:
        """Return all rules of all groups."""
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that are pending or firing."""
        return list(self.api("alerts")["alerts"])

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.alerts() if alert["state"] == "firing"}

    def targets(self) -> list[dict[str, Any]]:
        """Return the active targets."""
        return list(self.api("targets")["activeTargets"])

    def wait_for_scrapes(self, count: int = 1, within: float = 30.0) -> None:
        """Wait until every target has been scraped that often, successfully, since Prometheus started."""

        def scraped() -> bool:
            targets = self.targets()
            healthy = all(target["health"] == "up" for target in targets)
            samples = self.query("count_over_time(up[1h])") if targets and healthy else []
            return len(samples) >= len(targets) > 0 and all(s.value >= count for s in samples)

        eventually(scraped, within, f"{count} scrapes of every target")


def _series(data: Any) -> list[Series]:
    def points(raw: Sequence[Any]) -> list[tuple[float, float]]:
        return [(float(moment), float(value)) for moment, value in raw]

    if data["resultType"] in ("scalar", "string"):
        return [Series({}, points([data["result"]]))]
    return [Series(result["metric"], points(result.get("values") or [result["value"]])) for result in data["result"]]


class Alertmanager(_Service):
    """Run Debian's Alertmanager in a directory; `config` is alertmanager.yml as text or as a mapping."""

    def __init__(self, directory: Path, config: Mapping[str, Any] | str, *flags: str) -> None:
        (self.program,) = require("prometheus-alertmanager")
        super().__init__(directory, config, flags)

    def command(self) -> Sequence[str]:
        return [
            self.program,
            f"--config.file={self.config_file}",
            f"--storage.path={self.root / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--cluster.listen-address=",
            *self.flags,
        ]

    def alerts(self) -> list[dict[str, Any]]:
        """Return the active alerts."""
        return list(self.session.get(f"{self.url}/api/v2/alerts", timeout=10).json())


class Webhook(InThread):
    """Collect what Alertmanager sends to `url`; `notifications` are the bodies in order."""

    def __init__(self) -> None:
        self.notifications: list[dict[str, Any]] = []
        notifications = self.notifications

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                notifications.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Stay silent."""

        super().__init__(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def alerts(self, status: str) -> set[str]:
        """Return the names of the alerts received so far with a status, `firing` or `resolved`."""
        return {
            alert["labels"]["alertname"]
            for notification in list(self.notifications)
            for alert in notification["alerts"]
            if alert["status"] == status
        }

    def wait_for(self, accepted: Callable[[dict[str, Any]], bool], within: float) -> dict[str, Any]:
        """Return the first notification that is accepted."""

        def first() -> dict[str, Any] | None:
            return next(filter(accepted, list(self.notifications)), None)

        found = eventually(first, within, "a notification")
        assert found is not None
        return found

"""The real exporter as a process of its own."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support.processes import Daemon, free_port

ROOT = Path(__file__).resolve().parents[2]
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


@dataclass(frozen=True)
class Scrape:
    """Hold the families of one answer by name (of counters without `_total`, as parsers give them)."""

    families: Mapping[str, Metric]
    text: str

    def values(self, sample: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Return the values of samples of a name by the values of some labels; no two may fall together."""
        found: dict[tuple[str, ...], float] = {}
        for family in self.families.values():
            for each in family.samples:
                if each.name == sample:
                    key = tuple(each.labels.get(label, "") for label in labels)
                    assert key not in found, f"several samples of {sample} have {key}"
                    found[key] = each.value
        return found

    def value(self, sample: str, **labels: str) -> float | None:
        """Return the value of the one sample of a name that carries these labels, or None."""
        found = [
            each.value
            for family in self.families.values()
            for each in family.samples
            if each.name == sample and labels.items() <= each.labels.items()
        ]
        assert len(found) < 2, f"several samples of {sample} carry {labels}"
        return found[0] if found else None


def parse(text: str, *, openmetrics: bool = False) -> Scrape:
    """Parse an exposition."""
    families = list((parse_openmetrics if openmetrics else parse_text)(text))
    assert len({family.name for family in families}) == len(families), "a family appears twice"
    return Scrape({family.name: family for family in families}, text)


class Exporter(Daemon):
    """Run `exporter.py` in a directory (also its working directory, so the default ledger lies there).

    `config` is written to config.yaml and passed on; `environment` is added to one without CREATIFY_ variables.
    """

    def __init__(
        self,
        directory: Path,
        *flags: str,
        config: Mapping[str, Any] | str | None = None,
        environment: Mapping[str, str] | None = None,
        ca_file: Path | None = None,
        python: str = sys.executable,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        super().__init__(directory / "exporter.log")
        self.flags, self.port, self.python, self.added = list(flags), free_port(), python, environment or {}
        self.config_file = directory / "config.yaml"
        if config is not None:
            self.configure(config)
            self.flags.append(f"--config.file={self.config_file}")
        self.url = f"{'https' if ca_file else 'http'}://127.0.0.1:{self.port}"
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = str(ca_file) if ca_file else True

    def configure(self, config: Mapping[str, Any] | str) -> None:
        """Write the configuration file; a running exporter sees it after a reload."""
        self.config_file.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config)))

    def command(self) -> Sequence[str]:
        address = f"--web.listen-address=127.0.0.1:{self.port}"
        return [self.python, str(ROOT / "exporter.py"), address, *self.flags]

    def environment(self) -> Mapping[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CREATIFY_", "COV"))}
        return inherited | dict(self.added)

    def ready(self) -> bool:
        return self.get("/-/healthy", timeout=5).status_code in (200, 401)

    def get(self, path: str, timeout: float = 30, **options: Any) -> requests.Response:
        """Return the answer to a GET."""
        return self.session.get(self.url + path, timeout=timeout, **options)

    def scrape(self, path: str = "/metrics", *, openmetrics: bool = False, scrape_timeout: float = 10) -> Scrape:
        """Return what Prometheus would get, parsed."""
        headers = {"X-Prometheus-Scrape-Timeout-Seconds": str(scrape_timeout)}
        if openmetrics:
            headers["Accept"] = OPENMETRICS
        response = self.get(path, headers=headers, timeout=scrape_timeout + 20)
        assert response.status_code == 200, response.text
        return parse(response.text, openmetrics=openmetrics)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.session.close()

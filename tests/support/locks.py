"""The lock files, read.

Usage: python -m tests.support.locks PYLOCK     prints the wheels for Linux that a pylock.toml knows, for `make lock`
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT: Mapping[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WHEELS = ROOT / "requirements.wheels"


@dataclass(frozen=True)
class Pin:
    """One version that a lock admits, where its marker holds."""

    name: str
    version: Version
    marker: Marker | None
    hashes: frozenset[str]

    def holds(self, environment: Mapping[str, str]) -> bool:
        """Tell whether it is installed there."""
        return self.marker is None or self.marker.evaluate(dict(environment))


def pins(lock: Path) -> list[Pin]:
    """Return what a lock file pins."""
    found = []
    for entry in lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        line, *hashes = re.split(r"\s+--hash=sha256:", entry)
        requirement = Requirement(line)
        (only,) = requirement.specifier
        assert only.operator == "=="
        name = canonicalize_name(requirement.name)
        found.append(Pin(name, Version(only.version), requirement.marker, frozenset(h.strip() for h in hashes)))
    return found


def group(name: str) -> Iterator[Requirement]:
    """Yield the requirements of a dependency group of the project."""
    for entry in PROJECT["dependency-groups"][name]:
        if isinstance(entry, str):
            yield Requirement(entry)
        else:
            yield from group(entry["include-group"])


def roots() -> dict[str, list[Requirement]]:
    """Return what the project asks for, by lock file."""
    project = PROJECT["project"]
    runs = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["postgres"])]
    return {
        "requirements.lock": runs,
        "requirements-build.lock": list(group("build")),
        "requirements-dev.lock": [*runs, *group("dev")],
    }


def supported() -> list[str]:
    """Return the versions of Python that the project says it supports, such as `3.11`."""
    prefix = "Programming Language :: Python :: "
    return [text.removeprefix(prefix) for text in PROJECT["project"]["classifiers"] if text.startswith(f"{prefix}3.")]


def wheels() -> dict[str, str]:
    """Return the names of the wheels for Linux by hash, as `make lock` noted them."""
    lines = WHEELS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("  ") for line in lines)


def _print_wheels(pylock: Path) -> None:
    for package in tomllib.loads(pylock.read_text(encoding="utf-8"))["packages"]:
        for wheel in package.get("wheels", ()):
            name = wheel["url"].rpartition("/")[2]
            if re.search(r"-any\.whl$|manylinux", name):
                print(f"{wheel['hashes']['sha256']}  {name}")


if __name__ == "__main__":
    _print_wheels(Path(sys.argv[1]))

"""The supported Pythons of this machine.

Usage: python -m tests.support.pythons     prints version and path of each other one than this, for `make test-all`
"""

import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.commands import run
from tests.support.locks import supported
from tests.support.packages import install

DEBIAN = Path("/usr/bin/python3")
_ASK = "import ensurepip, platform, venv; print(platform.python_version())"


def _candidates() -> Iterator[Path]:
    yield DEBIAN
    for version in supported():
        yield from sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
        if found := shutil.which(f"python{version}"):
            yield Path(found)


def interpreters() -> dict[str, Path]:
    """Return each supported Python that can make an environment, by its full version."""
    if DEBIAN.exists() and run(DEBIAN, "-c", "import ensurepip").returncode != 0 and (why := install("python3-venv")):
        print(f"{DEBIAN} is left out: {why}", file=sys.stderr)
    found: dict[str, Path] = {}
    for place in _candidates():
        # A version manager's stand-in may be on PATH and still refuse to run.
        answer = run(place, "-c", _ASK) if place.exists() else None
        version = answer.stdout.strip() if answer and answer.returncode == 0 else ""
        if version.rpartition(".")[0] in supported():
            found.setdefault(version, place)
    return found


if __name__ == "__main__":
    for version, place in interpreters().items():
        if version != platform.python_version():
            print(version, place)

"""Prometheus exporter for Creatify's text generator."""

import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent


@cache
def revision() -> str:
    """Return the git revision this code was built from, with `-dirty` after a changed one, or `unknown`.

    A build (setup.py) leaves it in a file beside this one; a checkout asks git.
    """
    built = _HERE / "REVISION"
    if built.is_file():
        return built.read_text(encoding="ascii").strip()
    if not (_HERE.parent / ".git").exists():
        return "unknown"
    try:
        answer = subprocess.run(
            ["/usr/bin/env", "git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=_HERE,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip() or "unknown"

"""Commands that run to their end."""

import subprocess
from collections.abc import Mapping
from pathlib import Path


def run(
    *command: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it said and how it ended."""
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, check=False, capture_output=True, text=True)


def output(
    *command: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> str:
    """Run a command that must succeed, and return its standard output."""
    ended = run(*command, cwd=cwd, env=env, timeout=timeout)
    assert ended.returncode == 0, f"{command} exited {ended.returncode}:\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout

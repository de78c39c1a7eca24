"""Programs from Debian that tests use: found, installed when root, else the test is skipped (fails in CI).

Usage: python -m tests.support.packages     installs what is missing, before tests run side by side and wait for it
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "postgres": "postgresql",
    "initdb": "postgresql",
    "chromium": "chromium",
    "node": "nodejs",
    "npm": "npm",
    "systemd-analyze": "systemd",
    "kubectl": "kubernetes-client",
}


def find(program: str) -> str | None:
    """Return the path of an installed program; PostgreSQL's are not on the PATH in Debian."""
    if PACKAGES.get(program) == "postgresql":
        versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda p: p.parts[4].zfill(3))
        if versions:
            return str(versions[-1])
    return shutil.which(program)


@contextmanager
def _no_services(policy: Path = Path("/usr/sbin/policy-rc.d")) -> Iterator[None]:
    """Keep packages from starting their services, which tests start by themselves."""
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if made:
            policy.unlink()


@cache
def install(package: str) -> str | None:
    """Install a Debian package; return why that did not work."""
    if os.geteuid() != 0:
        return f"{package} is not installed, and only root can install it"
    if shutil.which("apt-get") is None:
        return f"{package} is not installed, and there is no apt-get here"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "creatify-exporter-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _no_services():
            for command in (["update"], ["install", "--yes", "--no-install-recommends", package]):
                done = subprocess.run(
                    ["apt-get", "-qq", *command],
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=600,
                    check=False,
                )
        if done.returncode != 0:
            return f"apt-get install {package} failed: {done.stderr.strip()[-300:]}"
    return None


def require(*programs: str) -> tuple[str, ...]:
    """Return the paths of programs; skip the test without them, or fail it when `CI` is `true`."""
    paths = []
    for program in programs:
        path, reason = find(program), None
        if path is None:
            reason = install(PACKAGES[program])
            path = find(program)
        if path is None:
            message = f"{program} is needed: {reason or 'its package brought no such program'}"
            if os.environ.get("CI") == "true":
                pytest.fail(message)
            pytest.skip(message)
        paths.append(path)
    return tuple(paths)


if __name__ == "__main__":
    for each in sorted({package for program, package in PACKAGES.items() if find(program) is None}):
        print(f"Installing {each} ...", install(each) or "done")

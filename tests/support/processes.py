"""Real processes in tests: started with a deadline, logs in a file, ended by the handle that started them."""

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

import psutil


def free_port() -> int:
    """Return a port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


T = TypeVar("T")


def eventually(check: Callable[[], T], within: float, what: str, every: float = 0.05) -> T:
    """Return the first true result of a check; an OSError counts as not yet; fail after `within` seconds."""
    deadline, last = time.monotonic() + within, "nothing"
    while True:
        try:
            result = check()
        except OSError as error:  # requests' errors are OSErrors too
            last = type(error).__name__
        else:
            if result:
                return result
            last = repr(result)[:500]
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within} s: {what}; last seen: {last}")
        time.sleep(every)


class Daemon:
    """Run one program until stopped, its output appended to `log_file`."""

    stop_signal = signal.SIGTERM

    def __init__(self, log_file: Path) -> None:
        self.log_file = log_file
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> Sequence[str]:
        """Return the command line."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str] | None:
        """Return the environment; None: that of the tests."""
        return None

    def directory(self) -> Path:
        """Return the working directory."""
        return self.log_file.parent

    def ready(self) -> bool:
        """Say whether the program answers; may raise OSError."""
        raise NotImplementedError

    def launch(self) -> None:
        """Start the program and return at once."""
        assert self.process is None or self.process.poll() is not None, "runs already"
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self.environment(), cwd=self.directory(),
            )  # fmt: skip

    def start(self, within: float = 60.0) -> Self:
        """Start the program and wait until it answers."""
        self.launch()
        try:
            eventually(self._ready_or_dead, within, f"{type(self).__name__} ready")
        except BaseException:
            self.kill()
            raise
        return self

    def _ready_or_dead(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        assert code is None, f"{type(self).__name__} ended with {code}: {self.log()[-2000:]}"
        return self.ready()

    @property
    def pid(self) -> int:
        """Return the process id of the program."""
        assert self.process is not None
        return self.process.pid

    def running(self) -> bool:
        """Say whether the program runs."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, within: float = 10.0) -> int:
        """Wait for the end; return the exit code."""
        assert self.process is not None
        return self.process.wait(within)

    def stop(self, within: float = 20.0) -> int:
        """Ask the program to end; return its exit code; fail (and kill it) when it does not."""
        assert self.process is not None
        if self.running():
            self.process.send_signal(self.stop_signal)
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End the program at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def log(self) -> str:
        """Return everything that the program has printed."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def threads(self) -> int:
        """Return the number of threads."""
        return int(psutil.Process(self.pid).num_threads())

    def open_files(self) -> int:
        """Return the number of file descriptors."""
        return int(psutil.Process(self.pid).num_fds())

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def __enter__(self) -> Self:
        return self if self.running() else self.start()

    def __exit__(self, *_: object) -> None:
        if self.running():
            self.stop()

"""A private PostgreSQL cluster for tests: loopback and a unix socket, passwords checked (SCRAM) on loopback."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Self

import psycopg
from psycopg import sql

from tests.support.packages import require
from tests.support.processes import Daemon, free_port

USER, PASSWORD = "exporter", "pg-password-for-tests"


class Postgres(Daemon):
    """Run a PostgreSQL server of its own; as `postgres` (or `nobody`) when the tests run as root.

    It can be stopped and started again on the same port; `with` removes the data at the end.
    """

    stop_signal = signal.SIGINT  # fast shutdown: sessions are ended

    def __init__(self, *settings: str) -> None:
        self.initdb, self.program = require("initdb", "postgres")
        self.root = Path(tempfile.mkdtemp(prefix="pg-"))
        super().__init__(self.root / "postgres.log")
        self.settings, self.port, self._names = settings, free_port(), count(1)
        self._prefix: list[str] = []
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in known else "nobody")
            self._prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
            os.chown(self.root, user.pw_uid, user.pw_gid)
        password = self.root / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        try:
            self._initialise(password)
        except BaseException:
            shutil.rmtree(self.root)
            raise

    def _initialise(self, password: Path) -> None:
        arguments = [
            f"--pgdata={self.root / 'data'}", f"--username={USER}", f"--pwfile={password}", "--no-sync",
            "--auth-local=trust", "--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C",
        ]  # fmt: skip
        done = subprocess.run(
            [*self._prefix, self.initdb, *arguments],
            cwd=self.root, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def command(self) -> Sequence[str]:
        settings = [
            "listen_addresses=127.0.0.1", f"port={self.port}", f"unix_socket_directories={self.root}",
            "fsync=off", "max_connections=50", "shared_buffers=16MB", *self.settings,
        ]  # fmt: skip
        return [*self._prefix, self.program, "-D", str(self.root / "data"), *(f"--{s}" for s in settings)]

    def ready(self) -> bool:
        try:
            self._connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self.url("postgres"), autocommit=True, connect_timeout=5)

    def url(self, database: str, password: str = PASSWORD) -> str:
        """Return the URL of a database over loopback."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str | None = None) -> str:
        """Create a database, by default one with a new name; return its URL."""
        name = name or f"ledger_{next(self._names)}"
        with self._connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, ending its sessions."""
        with self._connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    def end_sessions(self) -> None:
        """Break every other connection to the server."""
        with self._connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )

    def crash(self) -> None:
        """Stop at once, as after a power cut (immediate shutdown)."""
        self.signal(signal.SIGQUIT)
        self.wait()

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except BaseException:
            shutil.rmtree(self.root)
            raise

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self.root)

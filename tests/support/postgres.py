"""A private PostgreSQL cluster for tests: loopback and a unix socket, passwords checked (SCRAM) on loopback."""

import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
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

    def create_database(self, name: str | None = None, *, encoding: str = "UTF8") -> str:
        """Create a database, by default one with a new name; return its URL."""
        name = name or f"ledger_{next(self._names)}"
        statement = sql.SQL("CREATE DATABASE {} ENCODING {} TEMPLATE template0")
        with self._connect() as connection:
            connection.execute(statement.format(sql.Identifier(name), sql.Literal(encoding)))
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


class Proxy:
    """A TCP proxy on loopback that can go silent: everything is acknowledged, and nothing gets through.

    `silence` may concern the answers alone: then what was asked still happens. `resume` lets all flow again.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._asking, self._answering = threading.Event(), threading.Event()
        self._stranded: list[threading.Event] = []
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def url(self, url: str) -> str:
        """Return the URL of a database through the proxy."""
        return url.replace(f":{self._target}/", f":{self.port}/")

    def silence(self, *, answers_only: bool = False) -> None:
        self._answering.clear()
        if not answers_only:
            self._asking.clear()

    def resume(self) -> None:
        self._asking.set()
        self._answering.set()

    def strand(self) -> None:
        """Let nothing more through on the connections that there are, for good; later ones work."""
        self.silence()
        self._stranded += [self._asking, self._answering]
        self._asking, self._answering = threading.Event(), threading.Event()
        self.resume()

    def lead_to(self, port: int) -> None:
        """End all connections; later ones lead to another server."""
        self._target = port
        self.lose_connections()

    def lose_connections(self) -> None:
        """End all connections."""
        sockets, self._sockets = self._sockets, []
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        self.resume()
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for event in (*self._stranded, self._asking, self._answering):
            event.set()
        self.lose_connections()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                self._start(self._pump, client, server, self._asking)
                self._start(self._pump, server, client, self._answering)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, flows: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                flows.wait()
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class RefusingServer:
    """Refuse every login with one SQLSTATE, in a language that nobody matches texts of."""

    def __init__(self, sqlstate: str, text: str) -> None:
        fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": text}
        body = b"".join(f"{name}{value}".encode() + bytes(1) for name, value in fields.items()) + bytes(1)
        self.logins = 0
        self._answer = b"E" + struct.pack("!I", len(body) + 4) + body
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"postgresql://exporter:geheim@127.0.0.1:{self.port}/ledger"

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.logins += 1
                with client:
                    while (message := client.recv(1024)) and message[4:8] == struct.pack("!I", 80877103):
                        client.sendall(b"N")  # no TLS
                    client.sendall(self._answer)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

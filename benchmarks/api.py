"""A stand-in for the Creatify API in a process of its own: it sends files as fast as the kernel can.

`/NAME/sse/text_generator/` answers with the file NAME of the directory. So the listing is made once, and what the
server costs counts for nobody.
"""

import os
import socketserver
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BALANCE = b'{"remaining_credits":"12345.67"}'


class _Handler(socketserver.StreamRequestHandler):
    """Answer GETs on one kept-alive connection."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            while self.rfile.readline() not in {b"\r\n", b""}:
                pass
            _, name, *rest = line.split()[1].decode().split("/")
            if rest[0] == "api":
                self._head(len(_BALANCE))
                self.connection.sendall(_BALANCE)
                continue
            with (Path(sys.argv[1]) / name).open("rb") as file:
                self._head(os.fstat(file.fileno()).st_size)
                self.connection.sendfile(file)

    def _head(self, length: int) -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        self.connection.sendall(head.encode())


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Leave alone what clients do when they end."""


@contextmanager
def serving(directory: Path) -> Iterator[str]:
    """Serve the files of `directory` as listings; yield the URL under which each file's name is a base URL."""
    command = [sys.executable, "-m", "benchmarks.api", str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


if __name__ == "__main__":
    with _Server(("127.0.0.1", 0), _Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()

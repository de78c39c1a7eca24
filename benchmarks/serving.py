"""Many clients at once on a running exporter: how long each answer takes."""

import asyncio
import statistics
import time
from itertools import chain
from typing import NamedTuple
from urllib.parse import urlsplit


class Latencies(NamedTuple):
    """Answers per second, and the median and the 99th percentile of their seconds."""

    rate: float
    p50: float
    p99: float


def latencies(url: str, clients: int, seconds: float) -> Latencies:
    """Let `clients` ask for `url` on connections of their own, each again once it was answered."""
    return asyncio.run(_latencies(url, clients, seconds))


async def _latencies(url: str, clients: int, seconds: float) -> Latencies:
    end = time.perf_counter() + seconds
    taken = sorted(chain.from_iterable(await asyncio.gather(*(_client(url, end) for _ in range(clients)))))
    return Latencies(len(taken) / seconds, statistics.median(taken), taken[len(taken) * 99 // 100])


async def _client(url: str, end: float) -> list[float]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    taken = []
    while (start := time.perf_counter()) < end:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 200"), head
        await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
        taken.append(time.perf_counter() - start)
    writer.close()
    await writer.wait_closed()
    return taken

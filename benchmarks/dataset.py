"""Listings of any size for benchmarks, made as fast as they can be read: 270 MB in a second or two.

A thousand simulated tasks are repeated under new ids. Nothing is drawn per task, so producing a listing costs
little beside reading it; texts, times and outcomes repeat after a thousand tasks, ids never do.
"""

from collections.abc import Iterator

from creatify_exporter.demo import joined
from tests.support.simulation import Simulation

START = 1_790_000_000.0
PERIOD = 1000
STEPS = 20


def listing(count: int, *, media: bool = False, short: bool = False, step: int = 0, seed: int = 1) -> Iterator[bytes]:
    """Return the chunks of a listing of `count` tasks; memory does not grow with it.

    2.7 kB a task (100,000 are 270 MB), with `media` 15.7 kB (20,000 are 315 MB), `short` 400 bytes.
    At step 0, 20 % of the tasks are pending; with each of up to 20 steps another 1 % of all finish.
    """
    share, size = (0.095 if media else 0.0), 0 if short else 2720
    simulation = Simulation(seed, START, history=PERIOD, record_size=size, media_share=share)
    rests = []
    for index, task in enumerate(simulation.tasks):
        record = task.record(task.created if index % 100 >= 100 - STEPS + step else task.finished)
        head, task_id, rest = record.partition(task.id.encode())
        assert (head, task_id) == (b'{"id":"', task.id.encode())
        rests.append(rest)
    return joined(b'{"id":"%08x-0000-4000-8000-%012x%b' % (seed, n, rests[n % PERIOD]) for n in range(count))

"""Listings for benchmarks have the sizes and the changes that the benchmarks speak of."""

import json
from collections import Counter
from typing import Any

import pytest

from benchmarks.dataset import listing


@pytest.mark.parametrize(
    ("media", "short", "bytes_per_task"), [(False, False, 2700), (True, False, 15_700), (False, True, 400)]
)
def test_tasks_are_as_large_as_promised(media: bool, short: bool, bytes_per_task: int) -> None:
    size = sum(map(len, listing(3000, media=media, short=short)))
    assert size / 3000 == pytest.approx(bytes_per_task, rel=0.05)


def tasks(step: int) -> dict[str, dict[str, Any]]:
    records = json.loads(b"".join(listing(2500, short=True, step=step)))
    return {record["id"]: record for record in records}


def test_ids_are_unique_and_each_step_finishes_one_per_cent_more() -> None:
    before = tasks(0)
    assert len(before) == 2500
    assert Counter(record["status"] for record in before.values())["pending"] == 500
    for step in (1, 2, 20):
        after = tasks(step)
        changed = [task for task in before if before[task] != after[task]]
        assert len(changed) == 25 * step
        assert {after[task]["status"] for task in changed} <= {"done", "failed"}
        assert {before[task]["status"] for task in changed} == {"pending"}

"""What holds for every test."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.support.postgres import Postgres

# How long one example takes says more about the machine and what else runs on it than about the code.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")
# The programs that tests start keep what they compile, as where they are installed, or each would compile it anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long form of the tests marked `soak`")


@pytest.fixture
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether the long form runs."""
    return bool(pytestconfig.getoption("--soak"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Run one PostgreSQL server for all tests that leave it running; each makes databases of its own."""
    with Postgres() as server:
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the modules that start processes first, and leave tests unmeasured that coverage says little about.

    Those modules take longest, and a worker should not begin one when the others have nothing left to do. Measuring
    takes as long as the tests themselves: it cannot see what other processes do, and what only a random example reaches
    is not well tested.
    """
    starting = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in starting)
    for item in items:
        module = item.getparent(pytest.Module)
        elsewhere = module is not None and module.get_closest_marker("process")
        if elsewhere or getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker("no_cover")

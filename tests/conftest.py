"""What holds for every test."""

import hypothesis
import pytest

# How long one example takes says more about the machine and what else runs on it than about the code.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long form of the tests marked `soak`")


@pytest.fixture
def soak(pytestconfig: pytest.Config) -> bool:
    """Whether the long form runs."""
    return bool(pytestconfig.getoption("--soak"))

"""The wall clock of a real process, set wrong and stepped from outside while it runs."""

from collections.abc import Mapping
from pathlib import Path

DAY = 86400.0
STEPS = (0.0, 3 * DAY, 3 * DAY, -3 * DAY, 0.0, 100 * DAY, -400 * DAY)
"""Seconds by which a clock is wrong, one after the other."""


class WrongClock:
    """The clock of every Python process that gets this environment; it is right at first."""

    def __init__(self, directory: Path, name: str = "clock") -> None:
        self._file = directory / f"{name}.wrong"
        self.environment: Mapping[str, str] = {
            "WRONG_CLOCK": str(self._file),
            "PYTHONPATH": str(Path(__file__).parent),
        }
        self.step(0)

    def step(self, offset: float) -> None:
        """Step the clock, so that it is wrong by so many seconds."""
        new = self._file.with_suffix(".new")
        new.write_text(str(offset), encoding="ascii")
        new.rename(self._file)

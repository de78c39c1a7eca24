"""The benchmarks run; how fast things are is not for tests to say."""

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main

pytestmark = pytest.mark.process


def test_a_row_compares_all_contenders_in_one_table_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "1k", "reasons", "--json", str(tmp_path / "figures.json")])
    table = capsys.readouterr().out
    costs = json.loads((tmp_path / "figures.json").read_text())["costs"]
    for contender in ("drain", "naive", "cold", "steady", "1% changed", "no ledger"):
        (cost,) = costs[f"1k {contender}"]
        assert cost["cpu"] > 0
        assert f"1k {contender} " in table
    assert {costs[f"1k {contender}"][0]["outcome"] for contender in ("naive", "cold", "steady", "no ledger")} == {1000}


def test_answers_and_the_start_are_measured_on_the_real_program(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "start"])
    table = capsys.readouterr().out
    assert "start to first answer" in table
    assert "idle CPU" in table


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["2k"])
    assert "no such part: 2k" in capsys.readouterr().err

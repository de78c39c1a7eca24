"""What runs the checks: the workflow, the hooks before a commit, and the program that CI calls."""

import os
import re
from typing import Any

import pytest
import yaml

from tests.support.commands import output
from tests.support.locks import ROOT, supported
from tests.support.pythons import interpreters
from tests.support.schemas import follows

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_valid_and_pins_each_action_by_its_commit(workflow: Any) -> None:
    assert follows("github-workflows", workflow)
    used = re.findall(r"uses: (\S+)(.*)", workflow.read_text(encoding="utf-8"))
    assert used
    assert [use for use, version in used if not re.search("@[0-9a-f]{40}$", use) or " # v" not in version] == []


def test_ci_may_read_the_repository_and_nothing_else() -> None:
    workflow = loaded(".github/workflows/ci.yml")
    assert workflow["permissions"] == {}
    assert [job["permissions"] for job in workflow["jobs"].values()] == [{"contents": "read"}]


def test_ci_runs_every_supported_python_and_everything_on_one() -> None:
    matrix = loaded(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    (whole,) = matrix["include"]
    assert sorted([*matrix["python"], whole["python"]]) == supported()
    assert (matrix["target"], whole["target"]) == (["test-portable"], "test")


def test_ci_run_is_a_program_for_which_a_test_that_cannot_run_fails() -> None:
    program = ROOT / ".ci" / "run"
    assert os.access(program, os.X_OK)
    assert re.search(r"(?m)^export CI=true\nexec make test-all$", program.read_text(encoding="utf-8"))


def test_the_hooks_before_a_commit_are_the_checks_of_make_lint() -> None:
    hooks = [hook for repository in loaded(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    checks = re.findall(r"(?m)^\t\$\(VENV\)/bin/(ruff format|ruff check|mypy|lint-imports)\b", MAKEFILE)
    assert [re.sub(r"\.venv/bin/| --\S+", "", hook["entry"]) for hook in hooks] == checks[:4]


def test_other_pythons_are_found_by_their_version() -> None:
    found = interpreters()
    assert found
    for version, python in found.items():
        assert output(python, "-c", "import platform; print(platform.python_version())").strip() == version

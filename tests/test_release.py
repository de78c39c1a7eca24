"""A release from a tag: the workflow is sound, and what it publishes is this version."""

import sys
import tarfile
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from creatify_exporter import __version__
from deploy import release
from tests.support.commands import output
from tests.support.schemas import follows

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
WORKFLOW: dict[str, Any] = yaml.safe_load((GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8"))


def test_the_linter_for_workflows_finds_nothing() -> None:
    output(Path(sys.executable).parent / "zizmor", "--offline", "--persona=pedantic", "--quiet", GITHUB)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("dependabot", "dependabot.yml"),
        ("github-issue-config", "ISSUE_TEMPLATE/config.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/bug.yml"),
        ("github-issue-forms", "ISSUE_TEMPLATE/failure-text.yml"),
    ],
)
def test_the_files_that_github_reads_follow_their_schemas(schema: str, path: str) -> None:
    assert follows(schema, GITHUB / path)


def test_no_job_can_write_more_than_it_publishes() -> None:
    assert WORKFLOW["permissions"] == {}
    writes = {
        name: sorted(what for what, right in job["permissions"].items() if right == "write")
        for name, job in WORKFLOW["jobs"].items()
    }
    assert writes == {
        "test": [],
        "build": [],
        "pypi": ["id-token"],
        "image": ["id-token", "packages"],
        "chart": ["id-token", "packages"],
        "release": ["contents"],
    }


def test_nothing_is_published_before_the_tests_have_passed() -> None:
    needs = {name: job.get("needs", []) for name, job in WORKFLOW["jobs"].items()}
    reached = {"test"}
    while (
        more := {name for name, need in needs.items() if reached & {*([need] if isinstance(need, str) else need)}}
        - reached
    ):
        reached |= more
    assert reached == set(needs)
    assert "CI" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_no_secret_but_the_token_of_the_run_is_used() -> None:
    assert "secrets." not in (GITHUB / "workflows" / "release.yml").read_text(encoding="utf-8")


def test_the_image_is_for_both_architectures_with_sbom_provenance_and_signature() -> None:
    steps = WORKFLOW["jobs"]["image"]["steps"]
    (build,) = [step["with"] for step in steps if step.get("id") == "build"]
    assert build["platforms"].split(",") == ["linux/amd64", "linux/arm64"]
    assert (build["sbom"], build["provenance"], build["push"]) == (True, "mode=max", True)
    assert any("cosign sign" in step.get("run", "") for step in steps)


def test_a_release_has_the_chart_the_dashboards_and_the_notes(tmp_path: Path) -> None:
    image = "registry.example/owner/creatify-exporter"
    assert release.main([f"v{__version__}", f"--image={image}", f"--output={tmp_path}"]) == 0
    dashboards = {path.name for path in (ROOT / "grafana" / "dashboards").glob("*.json")}
    chart = f"creatify-exporter-{__version__}.tgz"
    assert {path.name for path in tmp_path.iterdir()} == {"notes.md", chart, *dashboards}
    with helm.Chart.load(tmp_path / chart) as packed:
        rendered = packed.render({})["creatify-exporter/templates/statefulset.yaml"]
    assert f'image: "{image}:{__version__}"' in rendered
    with tarfile.open(tmp_path / chart) as archive:
        assert all(member.isfile() for member in archive.getmembers())


def test_a_tag_that_is_not_the_version_releases_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert release.main(["v9.9.9", "--image=x", f"--output={tmp_path / 'out'}"]) == 1
    assert f"the version {__version__}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n## [2.0.0] - 2026-02-03\n\n- New.\n\n## [1.0.0] - 2026-01-02\n\n- First.\n"
)


def test_the_notes_are_the_section_of_the_version() -> None:
    assert release.notes(CHANGELOG, "2.0.0") == "- New.\n"
    assert release.notes(CHANGELOG, "1.0.0") == "- First.\n"
    for absent in ("Unreleased", "3.0.0", "2.0"):
        with pytest.raises(ValueError, match="no dated section"):
            release.notes(CHANGELOG, absent)


def test_every_place_that_names_the_version_names_this_one() -> None:
    chart = yaml.safe_load((release.CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

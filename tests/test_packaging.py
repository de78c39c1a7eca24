"""What is built contains what it should, and works in an empty environment outside the repository."""

import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import creatify_exporter
from tests.support.commands import output, run
from tests.support.exporter import Exporter
from tests.support.processes import eventually

ROOT = Path(__file__).resolve().parents[1]
REVISION = "0123456789abcdef0123456789abcdef01234567"
VERSION = creatify_exporter.__version__


def tracked(*paths: str) -> set[str]:
    """Return the files of the work tree that are, or would be, under version control."""
    listed = output("git", "ls-files", "--cached", "--others", "--exclude-standard", *paths, cwd=ROOT)
    return {path for path in listed.splitlines() if (ROOT / path).is_file()}


def interpreters() -> dict[str, Path]:
    """Return the interpreters of this machine that are supported, by version."""
    found = {}
    for minor in (11, 12, 13):
        name = f"python3.{minor}"
        places = [
            Path(sys.executable) if sys.version_info[:2] == (3, minor) else None,
            *sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/{name}"), reverse=True),
            shutil.which(name),
        ]
        for place in places:
            # A version manager's stand-in may be on PATH and still refuse to run.
            if place is not None and run(place, "-c", "import venv, ensurepip").returncode == 0:
                found[name] = Path(place)
                break
    return found


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without what points back at the repository or measures coverage."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "COVERAGE"))}
    return kept | {"COLUMNS": "80"} | more


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution from a copy of the work tree, where there is no git to ask."""
    tree = tmp_path_factory.mktemp("tree")
    for path in tracked():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path)
    built = tmp_path_factory.mktemp("sdist")
    environment = clean_environment(CREATIFY_EXPORTER_REVISION=REVISION)
    output(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", built, tree, env=environment)
    (archive,) = built.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution, which is all that the build may need."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (tree,) = unpacked.iterdir()
    built = tmp_path_factory.mktemp("wheel")
    output(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", built, tree, env=clean_environment())
    (archive_path,) = built.iterdir()
    return archive_path


def test_the_source_distribution_has_all_that_a_user_needs(sdist: Path) -> None:
    assert sdist.name == f"creatify_exporter-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    wanted = tracked("creatify_exporter", "deploy", "docs", "grafana", "prometheus", "*.lock") | {
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "config.example.yaml",
        "exporter.py",
        "pyproject.toml",
        "setup.py",
    }
    assert wanted - names == set()
    assert not [name for name in names if re.search(r"(^|/)(\.venv|__pycache__|build)/|\.(pyc|db)$", name)]


def test_the_wheel_has_the_program_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"creatify_exporter-{VERSION}-py3-none-any.whl"
    info = f"creatify_exporter-{VERSION}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert {name for name in names if not name.startswith(f"{info}/")} == {
        "creatify_exporter/REVISION",
        *tracked("creatify_exporter"),
    }
    assert f"{info}/licenses/LICENSE" in names
    assert "creatify-exporter = creatify_exporter.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Provides-Extra: postgres" in metadata


def test_a_build_keeps_the_revision_it_was_made_from(sdist: Path, wheel: Path) -> None:
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"creatify_exporter-{VERSION}/creatify_exporter/REVISION")
        assert member is not None
        assert member.read().decode() == f"{REVISION}\n"
    with zipfile.ZipFile(wheel) as wheel_archive:
        assert wheel_archive.read("creatify_exporter/REVISION").decode() == f"{REVISION}\n"


def test_a_checkout_asks_git_for_its_revision() -> None:
    head = output("git", "rev-parse", "HEAD", cwd=ROOT).strip()
    script = "import creatify_exporter; print(creatify_exporter.revision())"
    assert output(sys.executable, "-c", script, cwd=ROOT).strip() in {head, f"{head}-dirty"}


def test_without_git_and_without_a_build_the_revision_is_unknown(tmp_path: Path) -> None:
    package = tmp_path / "creatify_exporter"
    package.mkdir()
    shutil.copy(ROOT / "creatify_exporter" / "__init__.py", package)
    script = "import creatify_exporter; print(creatify_exporter.revision())"
    assert output(sys.executable, "-c", script, cwd=tmp_path) == "unknown\n"
    # A repository that git refuses to read, or one without a commit.
    (tmp_path / ".git").mkdir()
    assert output(sys.executable, "-c", script, cwd=tmp_path) == "unknown\n"


class Installed(Exporter):
    """Run an installed program in a directory of its own, not the repository's."""

    def __init__(self, directory: Path, program: Path, *flags: str) -> None:
        super().__init__(directory, *flags)
        self.program = program

    def command(self) -> Sequence[str]:
        return [str(self.program), *super().command()[2:]]

    def environment(self) -> Mapping[str, str]:
        return clean_environment()


@pytest.mark.process
@pytest.mark.parametrize("interpreter", interpreters().items(), ids=lambda item: item[0])
def test_a_wheel_in_an_empty_environment_shows_the_demo(
    interpreter: tuple[str, Path], wheel: Path, tmp_path: Path
) -> None:
    _, python = interpreter
    environment = clean_environment()
    output(python, "-m", "venv", "--without-pip", tmp_path / "venv", env=environment)
    installed = tmp_path / "venv" / "bin"
    install = (sys.executable, "-m", "pip", "--python", installed / "python", "install", "--quiet", "--no-input")
    lock = ROOT / "requirements.lock"
    output(*install, "--require-hashes", "--requirement", lock, env=environment, timeout=280)
    output(*install, "--no-deps", "--no-index", wheel, env=environment)
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    program = installed / "creatify-exporter"

    said = output(program, "--version", cwd=empty, env=environment)
    assert VERSION in said
    assert REVISION in said
    help_text = output(program, "--help", cwd=empty, env=environment)
    assert "--config.file" in help_text
    assert max(len(line) for line in help_text.splitlines()) <= 80
    assert run(program, cwd=empty, env=environment).returncode == 2

    with Installed(empty, program, "--demo") as exporter:
        up = eventually(lambda: exporter.scrape().values("creatify_up", "workspace"), 30, "a listing")
        build = exporter.scrape().value("creatify_exporter_build_info", version=VERSION, revision=REVISION)
        stopped = exporter.stop()
    assert set(up.values()) == {1}
    assert build == 1
    assert stopped == 0, exporter.log()
    assert [path.name for path in empty.iterdir()] == [exporter.log_file.name]

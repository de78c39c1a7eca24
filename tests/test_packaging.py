"""What is built contains what it should, and works in an empty environment outside the repository."""

import ast
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
VERSION = creatify_exporter.__version__


def tracked(*paths: str) -> set[str]:
    """Return the files of the work tree that are, or would be, under version control."""
    listed = output("git", "ls-files", "--cached", "--others", "--exclude-standard", *paths, cwd=ROOT)
    return {path for path in listed.splitlines() if (ROOT / path).is_file()}


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without what points back at the repository or measures coverage."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "COVERAGE"))}
    return kept | {"COLUMNS": "80"} | more


def unpack(archive: Path, directory: Path) -> None:
    """Unpack a tar file; Python's own way differs between 3.11.2 and 3.14."""
    directory.mkdir(exist_ok=True)
    output("tar", "--extract", "--file", archive, "--directory", directory)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with one commit: the work tree as it is."""
    tree = tmp_path_factory.mktemp("repository")
    for path in tracked():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path)
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    output("git", "init", "--quiet", tree)
    output("git", "add", "--all", cwd=tree)
    output("git", *author, "commit", "--quiet", "--no-verify", "--message=all", cwd=tree)
    return tree


@pytest.fixture(scope="module")
def revision(repository: Path) -> str:
    return output("git", "rev-parse", "HEAD", cwd=repository).strip()


@pytest.fixture(scope="module")
def sdist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source distribution as `make dist` does, from what git exports."""
    export, built = tmp_path_factory.mktemp("export"), tmp_path_factory.mktemp("sdist")
    output("git", "archive", "--output", export / "tree.tar", "HEAD", cwd=repository)
    unpack(export / "tree.tar", export / "tree")
    command = (sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", built, export / "tree")
    output(*command, env=clean_environment())
    (archive_path,) = built.iterdir()
    return archive_path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the source distribution, which is all that the build may need."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    unpack(sdist, unpacked)
    (tree,) = unpacked.iterdir()
    built = tmp_path_factory.mktemp("wheel")
    output(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", built, tree, env=clean_environment())
    (archive_path,) = built.iterdir()
    return archive_path


def test_the_source_distribution_has_all_that_a_user_needs(sdist: Path) -> None:
    assert sdist.name == f"creatify_exporter-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    wanted = tracked("creatify_exporter", "deploy", "docs", "grafana", "prometheus", "*.lock", "*.wheels") | {
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
        *tracked("creatify_exporter"),
    }
    assert f"{info}/licenses/LICENSE" in names
    assert "creatify-exporter = creatify_exporter.cli:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Provides-Extra: postgres" in metadata


def test_a_build_knows_the_revision_it_was_made_from(sdist: Path, wheel: Path, revision: str) -> None:
    with tarfile.open(sdist) as archive:
        member = archive.extractfile(f"creatify_exporter-{VERSION}/creatify_exporter/__init__.py")
        assert member is not None
        assert revision in member.read().decode()
    with zipfile.ZipFile(wheel) as wheel_archive:
        assert revision in wheel_archive.read("creatify_exporter/__init__.py").decode()


def test_a_checkout_does_not_know_its_revision() -> None:
    assert creatify_exporter.__revision__ == "unknown"


def test_the_image_writes_its_revision_where_git_does(tmp_path: Path, revision: str) -> None:
    (command,) = re.findall(r"sed -i .*(?= \\\n)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    (tmp_path / "creatify_exporter").mkdir()
    shutil.copy(ROOT / "creatify_exporter" / "__init__.py", tmp_path / "creatify_exporter")
    said = []
    for value in (revision, "unknown"):
        output("sh", "-c", command, cwd=tmp_path, env={**os.environ, "REVISION": value})
        script = "import creatify_exporter; print(creatify_exporter.__revision__)"
        said.append(output(sys.executable, "-c", script, cwd=tmp_path, env=clean_environment()).strip())
    assert said[0] == revision


@pytest.mark.parametrize("module", ["exporter.py", "creatify_exporter/__init__.py", "setup.py"])
def test_what_an_old_python_reads_is_in_its_grammar(module: str) -> None:
    tree = ast.parse((ROOT / module).read_text(encoding="ascii"), feature_version=(3, 4))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr)]


@pytest.mark.parametrize("program", ["exporter.py", "setup.py"])
def test_a_python_that_is_too_old_is_told_so_in_a_word(program: str) -> None:
    for python in sorted(Path.home().glob(".pyenv/versions/*/bin/python")):
        version = python.parts[-3]
        if int(version.split(".")[0]) < 3 or int(version.split(".")[1]) < 11:
            ended = run(python, ROOT / program, "--version", env=clean_environment(PYTHONDONTWRITEBYTECODE="1"))
            said = f"creatify-exporter needs Python 3.11 or later; this is Python {version}\n"
            assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", said)


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
@pytest.mark.every_python
def test_a_wheel_in_an_empty_environment_shows_the_demo(wheel: Path, revision: str, tmp_path: Path) -> None:
    environment = clean_environment()
    output(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", env=environment)
    installed = tmp_path / "venv" / "bin"
    install = (sys.executable, "-m", "pip", "--python", installed / "python", "install", "--quiet", "--no-input")
    lock = ROOT / "requirements.lock"
    output(*install, "--no-deps", "--require-hashes", "--requirement", lock, env=environment, timeout=280)
    output(*install, "--no-deps", "--no-index", wheel, env=environment)
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    program = installed / "creatify-exporter"

    said = output(program, "--version", cwd=empty, env=environment)
    assert VERSION in said
    assert revision in said
    help_text = output(program, "--help", cwd=empty, env=environment)
    assert "--config.file" in help_text
    assert max(len(line) for line in help_text.splitlines()) <= 80
    assert run(program, cwd=empty, env=environment).returncode == 2

    with Installed(empty, program, "--demo") as exporter:
        up = eventually(lambda: exporter.scrape().values("creatify_up", "workspace"), 30, "a listing")
        build = exporter.scrape().value("creatify_exporter_build_info", version=VERSION, revision=revision)
        stopped = exporter.stop()
    assert set(up.values()) == {1}
    assert build == 1
    assert stopped == 0, exporter.log()
    assert [path.name for path in empty.iterdir()] == [exporter.log_file.name]

"""The image, built for real and run as its user on a read-only root."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from creatify_exporter import __version__
from tests.support.commands import output, run
from tests.support.exporter import Exporter
from tests.support.processes import eventually

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT.parent / "shared" / "tools" / "build-image"
TAG = "creatify-exporter:check"
ADDED_AT_MOST = 120  # megabytes

pytestmark = [pytest.mark.image, pytest.mark.process, pytest.mark.timeout(1800)]

BUILDAH = os.environ | {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}


def buildah(*arguments: str) -> str:
    return output("buildah", *arguments, env=BUILDAH).strip()


def why_not() -> str | None:
    """Build the image; return why that cannot be done here."""
    if os.geteuid() != 0:
        return "building and mounting an image needs root"
    if TOOL.exists():
        output(TOOL, "Dockerfile", ".", TAG, cwd=ROOT, timeout=1500)
        return None
    if shutil.which("buildah") is None:
        return "buildah is not installed"
    built = run("buildah", "build", "--tag", TAG, ".", cwd=ROOT, env=BUILDAH, timeout=1500)
    return f"buildah cannot build the image: {built.stderr.strip()[-300:]}" if built.returncode else None


@pytest.fixture(scope="module")
def image() -> str:
    """Return the tag of the image; where it cannot be built, skip the test, or fail it when `CI` is `true`."""
    if reason := why_not():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return TAG


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    name = buildah("from", "--pull-never", image)
    yield name
    buildah("rm", name)


@pytest.fixture(scope="module")
def root(container: str) -> Path:
    """Return where the image's files are, until the container goes."""
    return Path(buildah("mount", container))


@pytest.fixture(scope="module")
def base(image: str) -> Iterator[Path]:
    stand_in = "localhost/" if TOOL.exists() else ""
    name = buildah("from", "--pull-never", f"{stand_in}python:3.13-slim")
    yield Path(buildah("mount", name))
    buildah("rm", name)


def megabytes(path: Path) -> int:
    return int(output("du", "--summarize", "--block-size=1M", path).split()[0])


class Contained(Exporter):
    """Run the image's program as a container runtime would: its user, its directory, nothing writable but the volume.

    `buildah run` cannot make the root read-only, so a mount namespace of its own does.
    """

    SCRIPT = """
    mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"
    mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev"
    mount -t tmpfs -o uid=65534,gid=65534,mode=0750 tmpfs "$0/data"
    exec chroot --userspec=65534:65534 --groups= "$0" /bin/sh -c 'cd /data && exec creatify-exporter "$@"' "$@"
    """

    def __init__(self, directory: Path, root: Path, *flags: str, **credentials: str) -> None:
        super().__init__(directory, *flags)
        self.root, self.credentials = root, credentials

    def command(self) -> Sequence[str]:
        return ["unshare", "--mount", "sh", "-euc", self.SCRIPT, str(self.root), "sh", *super().command()[2:]]

    def environment(self) -> Mapping[str, str]:
        path = "/opt/creatify-exporter/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        return {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", **self.credentials}


def test_the_image_says_how_it_wants_to_be_run(image: str) -> None:
    settings = json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]
    assert settings["User"] == "65534:65534"
    assert settings["Entrypoint"] == ["creatify-exporter"]
    assert settings["ExposedPorts"] == {"9877/tcp": {}}
    assert settings["Volumes"] == {"/data": {}}
    assert settings["WorkingDir"] == "/data"
    assert settings["StopSignal"] == "SIGTERM"
    assert settings["Labels"]["org.opencontainers.image.version"] == __version__
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_the_program_starts_as_the_user_of_the_image(container: str) -> None:
    assert __version__ in buildah("run", container, "--", "creatify-exporter", "--version")
    assert buildah("run", container, "--", "id", "-u") == "65534"


def test_the_demo_serves_metrics_on_a_read_only_root_and_stops_at_once(root: Path, tmp_path: Path) -> None:
    with Contained(tmp_path, root, "--demo") as exporter:
        eventually(lambda: exporter.scrape().value("creatify_up", workspace="demo") == 1, 30, "a listing")
        assert exporter.stop(within=5) == 0, exporter.log()


def test_the_ledger_is_on_the_volume_by_default(root: Path, tmp_path: Path) -> None:
    """Nothing else is writable, so a start with credentials succeeds only if the ledger is there."""
    nowhere = {"https_proxy": "http://127.0.0.1:9"}
    with Contained(tmp_path, root, CREATIFY_API_ID="id", CREATIFY_API_KEY="key", **nowhere) as exporter:
        eventually(lambda: exporter.get("/-/ready").status_code == 200, 30, "the ledger to answer")
        assert exporter.scrape().value("creatify_exporter_ledger_up") == 1


def test_nothing_is_in_the_image_that_only_building_needs(root: Path) -> None:
    places = ("bin", "usr/bin", "usr/local/bin", "opt/creatify-exporter/bin")
    tools = ("cc", "gcc", "g++", "c++", "clang", "ld", "make", "cargo", "rustc")
    assert [f"{place}/{tool}" for place in places for tool in tools if (root / place / tool).exists()] == []
    assert not (root / "root/.cache").exists()
    assert not (root / "src").exists()
    assert shutil.which("pip", path=str(root / "opt/creatify-exporter/bin")) is None


def test_the_image_adds_little_to_its_base(root: Path, base: Path) -> None:
    assert megabytes(root) - megabytes(base) <= ADDED_AT_MOST

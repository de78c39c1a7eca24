"""What the lock files pin can be installed, next year and with an old pip, on every Python that is supported."""

from collections.abc import Iterable, Mapping
from importlib import metadata

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from tests.support.locks import PROJECT, ROOT, pins, roots, supported, wheels

PLATFORMS = {
    "linux-amd64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "linux-arm64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
# What the image and Debian 12 have: glibc 2.36.
GLIBC = 36


def environment(python: str, platform: Mapping[str, str]) -> dict[str, str]:
    """Return what markers see on a Python, such as `3.11`, on a platform."""
    here = {name: str(value) for name, value in default_environment().items()}
    version = {"python_version": python, "python_full_version": f"{python}.2", "implementation_version": f"{python}.2"}
    return here | {"os_name": "posix", "extra": ""} | version | dict(platform)


def missing(wanted: Iterable[Requirement], pinned: Mapping[str, Version], there: Mapping[str, str]) -> set[str]:
    """Return the requirements that no pin meets, of what is wanted and of all that that needs in turn."""
    problems, seen, left = set(), set(), [(requirement, "the project") for requirement in wanted]
    while left:
        requirement, wanted_by = left.pop()
        name = canonicalize_name(requirement.name)
        if not requirement.specifier.contains(pinned.get(name, "0a0"), prereleases=True) or name not in pinned:
            problems.add(f"{requirement} of {wanted_by}")
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue  # for another Python or platform than this one; the tests run on each
            for need in map(Requirement, needs):
                if need.marker is None or need.marker.evaluate({**there, "extra": extra}):
                    left.append((need, name))
    return problems


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", supported())
@pytest.mark.parametrize("lock", roots())
def test_a_lock_pins_all_that_its_pins_need(lock: str, python: str, platform: str) -> None:
    """So `pip install --no-deps` is enough, and no version that comes out later is looked at."""
    there = environment(python, PLATFORMS[platform])
    pinned = {pin.name: pin.version for pin in pins(ROOT / lock) if pin.holds(there)}
    assert missing(roots()[lock], pinned, there) == set()


def test_what_is_not_pinned_is_noticed() -> None:
    there = environment("3.11", PLATFORMS["linux-amd64"])
    pinned = {pin.name: pin.version for pin in pins(ROOT / "requirements.lock")}
    wanted = roots()["requirements.lock"]
    without = {name: version for name, version in pinned.items() if name not in {"psycopg-binary", "markupsafe"}}
    assert {problem.rpartition(" of ")[2] for problem in missing(wanted, without, there)} == {"psycopg", "jinja2"}
    assert len(missing(wanted, pinned | {"starlette": Version("0.1")}, there)) == 1


def test_what_is_installed_here_is_what_is_pinned() -> None:
    here = {name: str(value) for name, value in default_environment().items()}
    pinned = {pin.name: pin.version for pin in pins(ROOT / "requirements.lock") if pin.holds(here)}
    assert pinned == {name: Version(metadata.version(name)) for name in pinned}


def test_the_locks_agree_with_each_other() -> None:
    versions = [{pin.name: pin.version for pin in pins(ROOT / lock)} for lock in roots()]
    for lock in versions[:2]:
        assert {name: versions[2][name] for name in lock} == lock


def test_every_pin_has_hashes() -> None:
    for lock in roots():
        assert [pin.name for pin in pins(ROOT / lock) if not pin.hashes] == []


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("python", supported())
def test_the_lock_holds_wheels_of_all_that_runs(python: str, machine: str) -> None:
    """So the image needs no compiler, on amd64 and arm64."""
    there = environment(python, {**PLATFORMS["linux-amd64"], "platform_machine": machine})
    version = (3, int(python.partition(".")[2]))
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(GLIBC, 4, -1)] + [f"manylinux2014_{machine}"]
    tags = {*cpython_tags(version, platforms=platforms), *compatible_tags(version, f"cp3{version[1]}", platforms)}
    fitting = {digest for digest, name in wheels().items() if tags & parse_wheel_filename(name)[3]}
    running = [pin for pin in pins(ROOT / "requirements.lock") if pin.holds(there)]
    assert [pin.name for pin in running if not pin.hashes & fitting] == []


def test_the_supported_versions_are_those_that_may_install_it() -> None:
    assert PROJECT["project"]["requires-python"] == f">={supported()[0]}"
    assert supported() == ["3.11", "3.12", "3.13", "3.14"]

"""Write what a release has besides the Python distributions: the packaged chart, the dashboards, and the notes.

Usage: python -m deploy.release v0.2.0 --image=REGISTRY/OWNER/creatify-exporter --output=release
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import helm_python as helm

from creatify_exporter import __version__

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "deploy" / "helm" / "creatify-exporter"


def notes(changelog: str, version: str) -> str:
    """Return the changelog's section of a version, without its heading; raise `ValueError` without one."""
    found = re.search(rf"(?ms)^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## \[|\Z)", changelog)
    if found is None or not found[1].strip():
        raise ValueError(f"CHANGELOG.md has no dated section with entries for {version}")
    return found[1].strip() + "\n"


def package_chart(image: str, output: Path) -> Path:
    """Package the chart so that its default image is `image`; return the archive."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / CHART.name
        shutil.copytree(CHART, copy)
        values = copy / "values.yaml"
        text = values.read_text(encoding="utf-8")
        made, count = re.subn(r"(?m)^(  repository: )creatify-exporter$", rf"\g<1>{image}", text)
        if count != 1:
            raise ValueError("values.yaml does not name the image as expected")
        values.write_text(made, encoding="utf-8")
        return Path(helm.package(copy, destination=output))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files; return 1 when the tag, the version and the changelog do not agree."""
    parser = argparse.ArgumentParser(prog="python -m deploy.release")
    parser.add_argument("tag", help="the tag of the release, `v` and the version")
    parser.add_argument("--image", required=True, help="where the image is pushed, without a tag")
    parser.add_argument("--output", type=Path, required=True, help="a folder, made when missing")
    options = parser.parse_args(arguments)
    if options.tag != f"v{__version__}":
        print(f"the tag is {options.tag}, the version {__version__}", file=sys.stderr)
        return 1
    try:
        text = notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), __version__)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "notes.md").write_text(text, encoding="utf-8")
    for dashboard in (ROOT / "grafana" / "dashboards").glob("*.json"):
        shutil.copy(dashboard, options.output)
    package_chart(options.image, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The one build step that pyproject.toml cannot say: leave the git revision in what is built."""

import os
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

_PACKAGE = "creatify_exporter"


def _write_revision(root: str) -> None:
    """Write the file that `creatify_exporter.revision()` reads; without git, the environment tells."""
    here = runpy.run_path(f"{_PACKAGE}/__init__.py")["revision"]
    revision = os.environ.get("CREATIFY_EXPORTER_REVISION") or here()
    (Path(root) / _PACKAGE / "REVISION").write_text(f"{revision}\n", encoding="ascii")


class _BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            _write_revision(self.build_lib)


class _Sdist(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        _write_revision(base_dir)


setup(cmdclass={"build_py": _BuildPy, "sdist": _Sdist})

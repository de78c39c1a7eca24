"""Tell a Python that is too old so: versions of pip before 23.1 stumble over a dependency instead."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - old Pythons get here
    sys.exit("creatify-exporter needs Python 3.11 or later; this is Python " + sys.version.split()[0])

from setuptools import setup

setup()

"""Prometheus exporter for Creatify's text generator."""

import sys

# Old Pythons read this file before any other, so it keeps to what they understand.
if sys.version_info < (3, 11):  # noqa: UP036 - old Pythons get here
    sys.exit("creatify-exporter needs Python 3.11 or later; this is Python " + sys.version.split()[0])

__version__ = "0.2.0"

# `git archive` puts the commit here (.gitattributes), and so does the build of the image.
_COMMIT = "$Format:%H$"
__revision__ = "unknown" if _COMMIT.startswith("$") else _COMMIT

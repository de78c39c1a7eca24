"""The program; `creatify_exporter.cli` says what it does."""

import sys

from creatify_exporter.cli import main

if __name__ == "__main__":
    sys.exit(main())

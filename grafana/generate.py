"""Write the dashboard in every form in which somebody may want it.

Usage: python grafana/generate.py [--print]
"""

import json
import sys
from pathlib import Path

from creatify_dashboard.files import files

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write all files, or print them as one JSON object of paths and texts."""
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(json.dumps(files()))
        return
    for path, text in files().items():
        target = HERE / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The schemas of other programs' files, as check-jsonschema brings them along."""

from pathlib import Path

import check_jsonschema


def follows(schema: str, path: Path) -> bool:
    """Return whether a file follows a schema, such as `github-workflows`; what is wrong is printed."""
    return check_jsonschema.main(["--builtin-schema", f"vendor.{schema}", str(path)], standalone_mode=False) == 0

"""The schemas of other programs' files, as check-jsonschema brings them along."""

from pathlib import Path

import check_jsonschema


def follows(schema: str, path: Path) -> bool:
    """Return whether a file follows a schema, such as `github-workflows`; what is wrong is printed."""
    arguments = ["--builtin-schema", f"vendor.{schema}", str(path)]
    return bool(check_jsonschema.main(arguments, standalone_mode=False) == 0)

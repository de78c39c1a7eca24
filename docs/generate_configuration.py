"""Write what the model of the configuration says into docs/configuration.md and docs/config.schema.json.

Run `python -m docs.generate_configuration`; a test sees to it that doing so changes nothing.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from creatify_exporter import config
from creatify_exporter.configfile import Section, inner, keys

DOCS = Path(__file__).parent
REFERENCE = DOCS / "configuration.md"
SCHEMA = DOCS / "config.schema.json"


def duration_text(seconds: float) -> str:
    """Return seconds as a Prometheus duration, years and weeks only where they leave no rest."""
    left, text = round(seconds * 1000), ""
    for unit, length in config.DURATION_UNITS.items():
        milliseconds = round(length * 1000)
        if left >= milliseconds and (unit not in {"y", "w"} or left % milliseconds == 0):
            text, left = f"{text}{left // milliseconds}{unit}", left % milliseconds
    return text or "0s"


def size_text(size: int) -> str:
    """Return bytes as a size, in the largest binary unit that leaves no rest."""
    unit = next(u for u in ("TiB", "GiB", "MiB", "KiB", "B") if size % config.SIZE_UNITS[u] == 0)
    return f"{size // config.SIZE_UNITS[unit]}{unit}"


def kind(field: FieldInfo) -> str:
    """Return the name of the type of a field's values, as the reference calls it."""
    for alias, name in ((config.Duration, "duration"), (config.Size, "size")):
        if get_args(alias)[1] in field.metadata:
            return name
    origin = get_origin(field.annotation)
    if origin is Literal:
        return " or ".join(f"`{word}`" for word in get_args(field.annotation))
    if origin in {tuple, dict}:
        return "list" if origin is tuple else "mapping"
    names = {str: "text", SecretStr: "secret text", bool: "boolean", int: "whole number", Path: "file"}
    return names.get((get_args(field.annotation) or (field.annotation,))[0], "mapping")


def default(field: FieldInfo) -> Any:
    """Return the default of a field as it would be written in YAML."""
    value: Any = field.default
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if kind(field) == "duration":
        return duration_text(value)
    if kind(field) == "size":
        return size_text(value)
    return list(value) if isinstance(value, tuple) else value


def is_twin(key: str, field: FieldInfo) -> bool:
    """Tell whether a key names the file of a secret."""
    return field.annotation is SecretStr and key.endswith("_file")


def meaning(key: str, field: FieldInfo) -> str:
    """Return what a key is for, on one line."""
    if is_twin(key, field):
        return f"File that holds the secret, instead of `{key.removesuffix('_file')}`."
    section = inner(field)
    return " ".join((field.description or (section.__doc__ if section else None) or "").split())


def rows(section: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield path, type, default and meaning of every key below `section` that has a value of its own.

    The twins of secrets are left out: the reference says once what they are.
    """
    for key, field in keys(section).items():
        path, below = f"{prefix}{key}", inner(field)
        if not is_twin(key, field) and (not below or kind(field) == "list"):
            value = f"`{json.dumps(default(field))}`".replace('"', "") if not field.is_required() else "required"
            twin = ", or its twin" if field.is_required() and field.annotation is SecretStr else ""
            yield f"`{path}`", kind(field), f"{value}{twin}", meaning(key, field)
        if below:
            yield from rows(below, f"{path}{'[]' if kind(field) == 'list' else ''}.")


def table(section: type[Section]) -> str:
    """Return a Markdown table of every key below `section`."""
    lines = [("key", "type", "default", "meaning"), ("---",) * 4, *rows(section)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def reference(text: str) -> str:
    """Return the reference with its generated parts, those between comments, made anew."""
    for name, section in (("configuration", config.Config), ("web configuration", config.WebConfig)):
        start, end = f"<!-- generated: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(start)
        text = f"{before}{start}{table(section)}\n{end}{rest.partition(end)[2]}"
    return text


def lower_bound(field: FieldInfo) -> int:
    """Return the least whole number that a field admits."""
    return 0 if any(getattr(bound, "ge", None) == 0 for bound in field.metadata) else 1


def value_schema(key: str, field: FieldInfo) -> dict[str, Any]:
    """Return the JSON Schema of what may be written at a key."""
    if below := inner(field):
        items = section_schema(below)
        least = {"minItems": 1} if field.is_required() else {}
        return {"type": "array", "items": items} | least if kind(field) == "list" else items
    if is_twin(key, field):
        return {"type": "string", "minLength": 1}
    for alias, pattern in (
        (config.BaseUrl, r"^[Hh][Tt][Tt][Pp][Ss]?://[^/?#@\s\\]+[^?#@\s\\]*$"),
        (config.LedgerUrl, r"^(sqlite:///[^?]+|postgresql://[^?]*/[^?].*)$"),
    ):
        if get_args(alias)[1] in field.metadata:
            return {"type": "string", "pattern": rf"{pattern}|\$\{{"}
    from_environment = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"}
    several: dict[str, list[dict[str, Any]]] = {
        "duration": [{"type": "string", "pattern": f"^({config.DURATION}|0)$"}, {"const": 0}, from_environment],
        "size": [
            {"type": "string", "pattern": f"^{config.SIZE}$"},
            {"type": "integer", "minimum": 1},
            from_environment,
        ],
        "boolean": [{"type": "boolean"}, from_environment],
        "whole number": [{"type": "integer", "minimum": lower_bound(field)}, from_environment],
    }
    if get_origin(field.annotation) is Literal:
        return {"anyOf": [{"enum": list(get_args(field.annotation))}, from_environment]}
    return {"anyOf": several[kind(field)]} if kind(field) in several else {"type": ["string", "number", "boolean"]}


def section_schema(section: type[Section]) -> dict[str, Any]:
    """Return the JSON Schema of a mapping."""
    properties: dict[str, Any] = {}
    required, secrets = [], []
    for key, field in keys(section).items():
        value = value_schema(key, field)
        if not field.is_required() and not is_twin(key, field):
            value = {"anyOf": [value, {"type": "null"}]} | ({} if inner(field) else {"default": default(field)})
        properties[key] = {"description": meaning(key, field)} | value
        if is_twin(key, field):
            either = [{"required": [key.removesuffix("_file")]}, {"required": [key]}]
            secrets.append({"oneOf": either} if field.is_required() else {"not": {"allOf": either}})
        elif field.is_required() and field.annotation is not SecretStr:
            required.append(key)
    found = {"type": "object", "properties": properties, "required": required, "allOf": secrets}
    return {name: part for name, part in found.items() if part} | {"additionalProperties": False}


def schema() -> str:
    """Return the JSON Schema of the configuration, as text."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Creatify exporter"}
    return json.dumps(head | section_schema(config.Config), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    REFERENCE.write_text(reference(REFERENCE.read_text("utf-8")), "utf-8")
    SCHEMA.write_text(schema(), "utf-8")

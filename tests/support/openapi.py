"""Hypothesis strategies for the values that an OpenAPI file describes."""

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

LISTING = Path(__file__).parent.parent / "data/api/text_generator.openapi.yaml"

texts = st.text(max_size=30) | st.sampled_from(['"},{"id":"', "}]", "[{", "\\", '\\"', "\ud800", "\N{SNOWMAN}\n" * 99])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
_PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "video"])},
    optional={"text": texts, "data": st.just("aGVsbG8=" * 40), "mime_type": st.just("image/png")},
)
# What the schema says in words only.
_IN_WORDS = {"content": texts | st.lists(_PARTS, max_size=3)}
_FORMATS = {"uuid": st.uuids().map(str), "date-time": st.datetimes().map(lambda time: time.isoformat() + "Z")}
_SCALARS: dict[str, st.SearchStrategy[Any]] = {
    "number": st.floats(0, 1000) | st.integers(0, 1000),
    "integer": st.integers(),
    "string": texts,
}


def values(document: dict[str, Any], schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for the JSON values of `schema`, whose references lead into `document`."""
    if "allOf" in schema:
        return values(document, schema["allOf"][0])
    if "$ref" in schema:
        return values(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return st.lists(values(document, schema["items"]), max_size=4)
    if kind == "object" and "properties" in schema:
        fields = {
            name: _IN_WORDS[name] if name in _IN_WORDS else values(document, one)
            for name, one in schema["properties"].items()
        }
        required = {name: fields.pop(name) for name in schema.get("required", ())}
        return st.fixed_dictionaries(required, optional=fields)
    if kind == "object":
        return st.dictionaries(texts, anything, max_size=3)
    return _FORMATS.get(schema.get("format", ""), _SCALARS.get(kind or "", anything))


def listings() -> st.SearchStrategy[list[dict[str, Any]]]:
    """Return a strategy for lists of tasks as documented."""
    document = yaml.safe_load(LISTING.read_text())
    answer = document["paths"]["/sse/text_generator/"]["get"]["responses"]["200"]
    return values(document, answer["content"]["application/json"]["schema"])

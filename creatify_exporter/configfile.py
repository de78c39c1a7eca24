"""From a YAML file, the environment and files of secrets to a typed model, or to all that is wrong at once.

A value in YAML is read as the text that was written, and the type of its key decides what the text means. So `name: no`
is the name "no", a key of digits keeps its zeros, and `${NAME}` serves keys of every type. No message repeats a value:
it may be a secret, or come from the environment.
"""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic.functional_validators import field_validator, model_validator

MAX_FILE_SIZE = 2**20

_Location = tuple[str | int, ...]
_Document = TypeVar("_Document", bound="Document")

_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_SHOWN_KEY = re.compile("[A-Za-z_-]{1,30}")  # a credential in the place of a key has digits or is longer
_PARSER_TOKEN = re.compile(r"'(?:\\t|<[a-z ]+>|[^\w\s])'")
_YAML_TYPES = {"null", "bool", "int", "float", "timestamp", "merge", "value", "str", "seq", "map"}
_MESSAGES = {  # by pydantic's type of error, or its first word
    "missing": "is missing",
    "invalid": "must be a key of plain text",
    "string": "must be text",
    "bool": "must be true or false",
    "int": "must be a whole number",
    "path": "must be the path of a file",
    "model": "must be a mapping",
    "dict": "must be a mapping",
    "tuple": "must be a list",
    "greater_than": "must be greater than 0",
    "greater_than_equal": "must not be negative",
    "less_than_equal": "must not be longer than 1d",
    "literal": "must be {expected}",
    "value": "{error}",
}


class ConfigError(Exception):
    """Tell everything that is wrong with a configuration.

    `errors` holds pairs of a dotted path, like `workspaces[0].api_id`, and a message, in no particular order; `files`
    is what was in the files that were looked at, None for missing ones, by the names that the configuration gives them.
    """

    def __init__(self, errors: Iterable[tuple[str, str]], files: Mapping[Path, bytes | None] | None = None) -> None:
        self.errors = tuple(errors)
        self.files = files or {}
        super().__init__("\n".join(f"{path}: {message}" for path, message in self.errors))


class _SecretFile(str):
    """The name of the file that holds a secret."""


class Reader:
    """Read the files that a configuration names, relative to `directory`, and keep what was in them."""

    def __init__(self, directory: Path = Path(), environ: Mapping[str, str] | None = None) -> None:
        self.directory, self.environ = directory, environ
        self.files: dict[Path, bytes | None] = {}
        self.names: set[str] = set()  # of workspaces, which must differ

    def read(self, name: str) -> tuple[Path, bytes]:
        """Return path and content of a file; raise ValueError."""
        path = self.directory / name
        self.files[path] = None
        try:
            with path.open("rb") as file:
                data = self.files[path] = file.read(MAX_FILE_SIZE + 1)
        except OSError as error:
            raise ValueError(f"the file cannot be read: {error.strerror}") from None
        except ValueError:  # NUL, or a character that no name can have
            raise ValueError("must be the path of a file") from None
        if len(data) > MAX_FILE_SIZE:
            raise ValueError("the file is larger than 1 MiB")
        return path, data

    def content(self, path: Path) -> bytes:
        """Return what was in a file when it was read; raise ValueError if it was not, and cannot be."""
        found = self.files.get(path)
        return self.read(str(path))[1] if found is None else found

    def value_of(self, value: object) -> object:
        """Return a value with its variables replaced, and what is in the file of a secret; raise ValueError."""
        if isinstance(value, ValueError):
            raise value
        if not isinstance(value, str) or (environ := self.environ) is None:
            text = value
        elif missing := [name for name in _VARIABLE.findall(value) if name and name not in environ]:
            raise ValueError(f"the environment variable {missing[0]} is not set")
        else:
            text = _VARIABLE.sub(lambda match: environ[match[1]] if match[1] else "$", value)
        if isinstance(value, _SecretFile):
            # What is not UTF-8 becomes surrogates, which pydantic refuses.
            return self.read(str(text))[1].decode("utf-8-sig", "surrogateescape").rstrip("\r\n")
        return text


def reader(context: object) -> Reader:
    """Return the reader of the file being validated, or one for a model that is built in code."""
    return context if isinstance(context, Reader) else Reader()


def resolved(value: Any, info: ValidationInfo) -> Any:
    """Return what a value in the file stands for; raise ValueError."""
    return reader(info.context).value_of(value)


class Section(BaseModel):
    """A mapping in the configuration; a `SecretStr` key has a twin `<key>_file` besides."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True, use_attribute_docstrings=True
    )
    _resolve = field_validator("*", mode="before")(resolved)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty_keys_and_find_twins(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = keys(cls)
        values = {key: value for key, value in values.items() if value is not None or key not in known}
        for name in cls.model_fields:
            if (twin := f"{name}_file") in known and twin in values:
                file = values.pop(twin)
                if name in values:
                    values[name] = ValueError(f"is given besides {twin}: only one of them may be")
                else:
                    values[name] = _SecretFile(file) if isinstance(file, str) else file
        return values


class Document(Section):
    """The mapping that a whole file holds."""

    _files: Mapping[Path, bytes | None] = {}

    @property
    def files(self) -> Mapping[Path, bytes | None]:
        """Return what was in the files that it was read from, by the names that the configuration gives them."""
        return self._files


def keys(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the key in the file; the twin of a secret comes right after it."""
    found = {}
    for name, value in section.model_fields.items():
        found[str(value.validation_alias or name)] = value
        if value.annotation is SecretStr:
            found[f"{name}_file"] = value
    return found


def inner(value: FieldInfo | None) -> type[Section] | None:
    """Return the section that a field holds, or holds a list of."""
    annotation = value and (get_args(value.annotation) or (value.annotation,))[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def read(
    model: type[_Document], path: Path, environ: Mapping[str, str] | None = None, shown: Callable[[str], str] = str
) -> _Document:
    """Return the YAML file at `path` as a `model`, with variables from `environ` if given; raise ConfigError.

    `shown` says how the path of an error is shown.
    """
    source = Reader(path.parent, environ)
    try:
        tree = _parsed(source.read(path.name)[1])
    except ValueError as error:
        raise ConfigError([(str(path), str(error))], source.files) from None
    return validated(model, tree, source, str(path), shown)


def validated(
    model: type[_Document], tree: object, source: Reader, name: str, shown: Callable[[str], str]
) -> _Document:
    """Return plain data as a `model`; raise ConfigError with every error, `name` being the path of the whole."""
    try:
        valid = model.model_validate(tree, context=source, by_name=False, by_alias=True)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        errors = [_explained(model, tree, one["type"], one["loc"], one.get("ctx", {})) for one in details]
        told = [(shown(_dotted(at)) if at else name, message) for at, message in errors]
        raise ConfigError(told, source.files) from None
    valid._files = source.files
    return valid


def _parsed(data: bytes) -> object:
    """Return YAML as mappings, lists, None, and text as it is written; raise ValueError."""

    @cache  # an alias of many aliases is followed once
    def plain(node: yaml.Node) -> object:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _YAML_TYPES:
            problem = "tags are not supported (put text that begins with ! in quotes)"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [plain(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            names = [key.value if isinstance(key, yaml.ScalarNode) else "" for key, _ in node.value]
            names = [name if name.isprintable() else "" for name in names]
            twice = {name: ValueError("is given twice") for name, count in Counter(names).items() if name and count > 1}
            return {name: plain(value) for name, (_, value) in zip(names, node.value, strict=True)} | twice
        return None if node.tag.endswith(":null") else node.value

    try:
        node = yaml.compose(data, Loader=yaml.SafeLoader)
        return plain(node) if node else {}
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # Only the parser's own tokens may be quoted, nothing of the file.
        quotes = re.search("[\"']", _PARSER_TOKEN.sub("", problem))
        raise ValueError(where + ("not valid YAML" if quotes else problem)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError):  # the scanner lets errors of chr() and int() through
        raise ValueError("not valid YAML: it holds a character that is not allowed") from None


def _explained(
    model: type[Section], tree: Any, kind: str, at: _Location, details: Mapping[str, Any]
) -> tuple[_Location, str]:
    """Return where an error of pydantic is in the file, and what to say of it."""
    at = tuple(part for part in at if part != "[key]")
    if not at:
        return at, _MESSAGES["model"]
    *parents, key = at
    section = model
    for part in parents:
        tree, section = tree[part], inner(keys(section).get(str(part))) or section
    if kind == "extra_forbidden":
        similar = difflib.get_close_matches(str(key), keys(section), 1)
        return at, f"is unknown to this exporter{f'; did you mean {similar[0]}?' if similar else ''}"
    twin = f"{key}_file"
    if key not in tree and twin in tree:  # what is wrong with a secret from a file is wrong there
        at = (*parents, twin)
    return at, (_MESSAGES.get(kind) or _MESSAGES[kind.partition("_")[0]]).format(**details)


def _dotted(at: _Location) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{p if _SHOWN_KEY.fullmatch(p) else '<key>'}" for p in at)
    return "".join(parts).removeprefix(".")

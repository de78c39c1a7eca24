"""Typed configuration from YAML, environment and secret files.

A value in YAML is read as the text that was written, and the type of its key decides what the text means. So `name: no`
is the name "no", a key of digits keeps its zeros, and `${NAME}` serves keys of every type. No message repeats a value:
it may be a secret, or come from the environment.
"""

import difflib
import re
import ssl
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator, field_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from creatify_exporter.reasons import check_rule

MAX_FILE_SIZE = 2**20
DURATION_UNITS = {"y": 31_536_000, "w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1, "ms": 0.001}
DURATION = r"(?=[0-9])" + "".join(rf"(?:([0-9]{{1,12}}){unit})?" for unit in DURATION_UNITS)
SIZE_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE_UNITS |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = rf"([0-9]{{1,15}})({'|'.join(SIZE_UNITS)})?"

Location = tuple[str | int, ...]
_Model = TypeVar("_Model", bound="Section")

_VARIABLE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_WORKSPACE_NAME = re.compile("(?=.*\\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,128}")
_HEADER_VALUE = re.compile("[!-~](?:[ -~]*[!-~])?")
_URL_TEXT = re.compile(r"[!$-;=A-\[\]_a-z~]+")  # printable ASCII, but none of "#<>?@\^`{|}
_LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|::1")
_USER = re.compile("[^:\x00-\x1f\x7f-\x9f]+")
_BCRYPT = re.compile(r"\$2[aby]\$(?:0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")
_SHOWN_KEY = re.compile(r"\w[\w.@+-]{0,29}")
_PARSER_TOKEN = re.compile(r"'(?:\\t|<[a-z ]+>|[^\w\s])'")
_YAML_TYPES = {"null", "bool", "int", "float", "timestamp", "merge", "value", "str", "seq", "map"}
_MESSAGES = {  # by the first word of pydantic's type of error
    "missing": "is missing",
    "string": "must be text",
    "bool": "must be true or false",
    "int": "must be a whole number",
    "path": "must be the path of a file",
    "model": "must be a mapping",
    "dict": "must be a mapping",
    "tuple": "must be a list",
    "greater": "must be greater than 0",
    "less": "must not be longer than 1d",
    "literal": "must be {expected}",
    "value": "{error}",
}


class ConfigError(Exception):
    """Tell everything that is wrong with a configuration.

    `errors` holds pairs of a dotted path, like `workspaces[0].api_id`, and a message, in the order of the document.
    """

    def __init__(self, errors: Iterable[tuple[str, str]]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(f"{path}: {message}" for path, message in self.errors))


class NoConfigurationError(ConfigError):
    """Tell that there is neither a configuration file nor credentials in the environment."""


class _SiblingError(ValueError):
    """What is wrong with the key `key`, found out at a key beside it."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__(message)


def parse_duration(text: str) -> float:
    """Return the seconds of a Prometheus duration such as `1h30m`; raise ValueError."""
    if not (match := re.fullmatch(DURATION, "0s" if text == "0" else text)):
        raise ValueError("must be a duration like 30s, 1h30m or 500ms")
    seconds = sum(int(n or 0) * unit for n, unit in zip(match.groups(), DURATION_UNITS.values(), strict=True))
    if seconds > 292 * DURATION_UNITS["y"]:
        raise ValueError("must not be longer than 292y")
    return float(seconds)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as `64MiB` or `500kB`, a bare number being bytes; raise ValueError."""
    if not (match := re.fullmatch(SIZE, text)):
        raise ValueError("must be a size like 64MiB or 2GiB")
    return int(match[1]) * SIZE_UNITS[match[2] or "B"]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        raise ValueError(f"the file cannot be read: {error.strerror}") from None


def _read_text(path: Path) -> str:
    if len(data := _read(path)) > MAX_FILE_SIZE:
        raise ValueError("the file is larger than 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("the file is not UTF-8 text") from None


def _file(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or not value:
        return value or None
    path = Path((info.context or {}).get("directory", ""), value)
    _read(path)
    return path


def _certificates(path: Path | None) -> Path | None:
    try:
        if path:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError:
        raise ValueError("must hold certificates in PEM format") from None
    return path


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in {"http", "https"}
            and bool(parts.hostname)
            and parts.port != 0
            and bool(_URL_TEXT.fullmatch(url))
        )
    except ValueError:
        return False


def _is_ledger_url(text: str) -> bool:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        return False
    if url.drivername == "sqlite":
        return url.database not in {None, "", ":memory:"} and not (url.host or url.username or url.query)
    return url.drivername == "postgresql" and bool(url.database)


def _must(demand: str, check: Callable[[str], object]) -> AfterValidator:
    def validate(value: Any) -> Any:
        if not check(value.get_secret_value() if isinstance(value, SecretStr) else value):
            raise ValueError(f"must {demand}")
        return value

    return AfterValidator(validate)


Duration = Annotated[float, BeforeValidator(lambda v: v if isinstance(v, float) else parse_duration(str(v)))]
Size = Annotated[int, BeforeValidator(lambda v: parse_size(str(v)))]
File = Annotated[Path, BeforeValidator(_file)]
Certificates = Annotated[Path | None, BeforeValidator(_file), AfterValidator(_certificates)]
Credential = Annotated[
    SecretStr, _must("be printable ASCII, at least one character, no spaces at its ends", _HEADER_VALUE.fullmatch)
]
WorkspaceName = Annotated[str, _must("be 1 to 128 characters, none a control character", _WORKSPACE_NAME.fullmatch)]
BaseUrl = Annotated[str, _must("be an http(s) URL without user, query and fragment", _is_base_url)]
LedgerUrl = Annotated[SecretStr, _must("be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DB", _is_ledger_url)]
User = Annotated[str, _must("belong to a name without colon and control characters", _USER.fullmatch)]
PasswordHash = Annotated[str, _must("be a bcrypt hash with a cost of 4 to 16", _BCRYPT.fullmatch)]


class Section(BaseModel):
    """A mapping in the configuration; a `SecretStr` key has a twin `<key>_file` besides."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True, use_attribute_docstrings=True
    )


class Workspace(Section):
    """One pair of credentials."""

    name: WorkspaceName
    """Value of the label `workspace`; unique, at most 128 characters."""
    api_id: Credential
    """Sent as `X-API-ID`."""
    api_key: Credential
    """Sent as `X-API-KEY`."""

    @field_validator("name")
    @classmethod
    def _is_unique(cls, name: str, info: ValidationInfo) -> str:
        if name in (names := (info.context or {}).get("names", set())):
            raise ValueError("is the name of another workspace, too")
        names.add(name)
        return name


class Api(Section):
    """How the Creatify API is asked."""

    base_url: Annotated[BaseUrl, AfterValidator(lambda url: url.rstrip("/"))] = "https://api.creatify.ai"
    """Where the API is; the paths of its endpoints are added."""
    timeout: Annotated[Duration, Field(gt=0, le=86_400)] = 60.0
    """Time for one whole listing, from the first byte to the last one of its last page; at most 1d."""
    max_response_size: Annotated[Size, Field(gt=0)] = 2 * 2**30
    """Largest listing that is read, after decompression, all pages together."""
    remaining_credits: bool = True
    """Whether to read the balance of each workspace."""
    allow_http: bool = False
    """Whether `base_url` may be `http://` to another host than loopback: credentials then travel in the clear."""
    ca_file: Certificates = None
    """PEM bundle of certificate authorities that are trusted besides the system's."""

    @field_validator("allow_http")
    @classmethod
    def _keeps_credentials_secret(cls, allow_http: bool, info: ValidationInfo) -> bool:
        url = urlsplit(info.data.get("base_url", ""))
        if url.scheme == "http" and not allow_http and not _LOOPBACK.fullmatch(url.hostname or ""):
            raise _SiblingError("base_url", "must be https://, unless api.allow_http is true")
        return allow_http


class Listing(Section):
    """When the list is read, and how long a listing is good for."""

    min_interval: Duration = 0.0
    """Least time between the starts of two listings of a workspace; not above `max_age`."""
    max_age: Annotated[Duration, Field(gt=0)] = 300.0
    """Age at which a listing is too old, so that `creatify_up` turns 0."""

    @field_validator("max_age")
    @classmethod
    def _outlasts_the_interval(cls, max_age: float, info: ValidationInfo) -> float:
        if info.data.get("min_interval", 0.0) > max_age:
            raise _SiblingError("min_interval", "must not be longer than listing.max_age")
        return max_age


class Ledger(Section):
    """Where the counters are kept."""

    url: LedgerUrl = SecretStr("sqlite:///creatify-exporter.db")
    """`sqlite:///FILE`, from the working directory (`sqlite:////FILE` from the root), or for several replicas
    `postgresql://USER:PASSWORD@HOST/DB`. A reload cannot change it."""
    retention: Annotated[Duration, Field(gt=0)] = 90.0 * 86_400
    """How long a task that is no longer listed is remembered."""
    count_existing: bool = False
    """Whether the first listing of a workspace counts, instead of being the baseline."""


class Labels(Section):
    """Bounds of label values."""

    max_models: Annotated[int, Field(gt=0)] = 100
    """Models per workspace that get a label value of their own; later ones are `other`."""


class Rule(Section):
    """A failure reason of your own."""

    reason: str
    """Value of the label `reason`: a built-in name or a new one."""
    match: str
    """RE2 regular expression, searched for in the failure text."""

    @field_validator("reason", "match")
    @classmethod
    def _is_usable(cls, value: str, info: ValidationInfo) -> str:
        if problem := check_rule(**{"reason": "other", "match": "x", str(info.field_name): value}):
            raise ValueError(problem)
        return value


class FailureReasons(Section):
    """How failure texts become reasons."""

    rules: tuple[Rule, ...] = ()
    """Rules of your own; the first match wins, before the built-in ones."""


class Exposition(Section):
    """How counters are shown."""

    zero_hold: Duration = 180.0
    """How long a counter series that joins later stays at 0, so that every Prometheus sees it start there: at least
    twice the scrape interval plus the scrape timeout. With 0s the second answer shows the value."""


class Config(Section):
    """The configuration of the exporter."""

    workspaces: Annotated[tuple[Workspace, ...], _must("have at least one entry", len)]
    """The workspaces to watch, at least one."""
    api: Api = Api()
    listing: Listing = Listing()
    ledger: Ledger = Ledger()
    labels: Labels = Labels()
    failure_reasons: FailureReasons = FailureReasons()
    exposition: Exposition = Exposition()


class Tls(Section):
    """TLS of the exporter's own server."""

    cert_file: File
    """PEM certificate of the server, with its chain."""
    key_file: File
    """PEM key of the certificate, not encrypted."""
    client_ca_file: Certificates = None
    """PEM certificates of the authorities that sign those of the clients."""
    client_auth_type: Literal["NoClientCert", "RequireAndVerifyClientCert"] = "NoClientCert"
    """Whether clients must show a certificate; if so, `client_ca_file` is needed."""
    min_version: Literal["TLS12", "TLS13"] = "TLS12"
    """Oldest version of TLS that is spoken."""

    @property
    def client_auth(self) -> bool:
        """Tell whether clients must show a certificate."""
        return self.client_auth_type == "RequireAndVerifyClientCert"

    @field_validator("key_file")
    @classmethod
    def _fits_the_certificate(cls, key_file: Path, info: ValidationInfo) -> Path:
        try:
            if cert_file := info.data.get("cert_file"):
                # An empty password keeps OpenSSL from asking for one at the terminal.
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
        except ssl.SSLError:
            raise ValueError("must be the unencrypted PEM key of the PEM certificate in cert_file") from None
        return key_file

    @field_validator("client_auth_type")
    @classmethod
    def _has_an_authority(cls, client_auth_type: str, info: ValidationInfo) -> str:
        wanted = client_auth_type == "RequireAndVerifyClientCert"
        if "client_ca_file" in info.data and wanted != bool(info.data["client_ca_file"]):
            raise _SiblingError("client_ca_file", "must go with client_auth_type: RequireAndVerifyClientCert")
        return client_auth_type


class WebConfig(Section):
    """How the exporter's own server is protected, in the format of the Prometheus exporter toolkit."""

    model_config = ConfigDict(validate_by_name=True)
    tls: Annotated[Tls | None, BeforeValidator(lambda v: None if v == {} else v)] = Field(
        default=None, validation_alias="tls_server_config"
    )
    """HTTPS instead of HTTP, with these certificates."""
    users: dict[User, PasswordHash] = Field(default={}, validation_alias="basic_auth_users", repr=False)
    """Users that may read, with the bcrypt hashes of their passwords; without any, everybody may."""


class _Document:
    """Plain data from outside, with the errors found in it so far."""

    def __init__(self, name: str, directory: Path, environ: Mapping[str, str] | None = None) -> None:
        self.name, self.directory, self.environ = name, directory, environ
        self.tree: Any = None
        self.errors: dict[Location, str] = {}
        self.order: dict[Location, int] = {(): 0}
        self.twins: dict[Location, Location] = {}

    def read(self, path: Path) -> None:
        """Parse the YAML file at `path` into `tree`."""
        try:
            text = _read_text(path)
        except ValueError as error:
            raise ConfigError([(self.name, str(error))]) from None
        try:
            if node := yaml.compose(text, Loader=yaml.SafeLoader):
                self.tree = self._plain(node, (), set())
        except yaml.MarkedYAMLError as error:
            mark, problem = error.problem_mark, ", ".join(filter(None, (error.context, error.problem)))
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            # Only the parser's own tokens may be quoted, nothing of the file.
            quoted = re.search("[\"']", _PARSER_TOKEN.sub("", problem))
            self.errors[()] = where + ("not valid YAML" if quoted else problem)
        except RecursionError:
            self.errors[()] = "nested too deeply"
        except (yaml.YAMLError, ValueError, OverflowError):  # the scanner lets errors of chr() and int() through
            self.errors[()] = "not valid YAML: it holds a character that is not allowed"

    def _plain(self, node: yaml.Node, at: Location, seen: set[int]) -> object:
        self.order[at] = len(self.order)
        if id(node) in seen:
            return self._fail(at, "aliases are not supported (put text that begins with * in quotes)")
        seen.add(id(node))
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _YAML_TYPES:
            return self._fail(at, "tags are not supported (put text that begins with ! in quotes)")
        if isinstance(node, yaml.ScalarNode):
            return None if node.tag.endswith(":null") else self._text(node.value, at)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, (*at, index), seen) for index, item in enumerate(node.value)]
        mapping: dict[str, object] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and not _NO_TEXT.search(key.value) else ""
            if not name or name in mapping:
                self._fail((*at, name), "is given twice" if name else "must be a key of plain text")
            mapping[name] = self._plain(value, (*at, name), seen)
        return mapping

    def _text(self, text: str, at: Location) -> str:
        if (environ := self.environ) is not None:
            if missing := [name for name in _VARIABLE.findall(text) if name and name not in environ]:
                return self._fail(at, f"the environment variable {missing[0]} is not set")
            text = _VARIABLE.sub(lambda match: environ[match[1]] if match[1] else "$", text)
        return self._fail(at, "must not hold NUL or surrogates") if _NO_TEXT.search(text) else text

    def _fail(self, at: Location, message: str) -> str:
        self.errors.setdefault(at, message)
        return ""

    def validate(self, model: type[_Model]) -> _Model:
        """Return the tree as a `model`; raise ConfigError with every error, in the order of the document."""
        valid = None
        if () not in self.errors:
            self._resolve(model, self.tree, ())
            try:
                context = {"directory": self.directory, "names": set()}
                valid = model.model_validate(self.tree, context=context, by_name=False, by_alias=True)
            except ValidationError as error:
                for detail in error.errors(include_url=False, include_input=False):
                    at, message = _explain(model, detail["type"], detail["loc"], detail.get("ctx", {}))
                    self._fail(self.twins.get(at, at), message)
        if valid is None or self.errors:
            errors = sorted(self.errors.items(), key=lambda error: self._position(error[0]))
            raise ConfigError((_dotted(at) or self.name, message) for at, message in errors)
        return valid

    def _position(self, at: Location) -> int:
        return self.order[at] if at in self.order else self._position(at[:-1])

    def _resolve(self, model: type[Section], tree: object, at: Location) -> None:
        """Put the secrets that `_file` twins name into the tree; a key without a value is as good as none."""
        if not isinstance(tree, dict):
            return
        for name, field in model.model_fields.items():
            key, section = str(field.validation_alias or name), _section(field)
            value = tree.get(key)
            if field.annotation is SecretStr:
                self._read_secret(tree, key, at)
            elif value is None and not field.is_required():
                tree.pop(key, None)
            elif section and isinstance(value, list):
                for index, item in enumerate(value):
                    self._resolve(section, item, (*at, key, index))
            elif section:
                self._resolve(section, value, (*at, key))

    def _read_secret(self, tree: dict[str, object], name: str, at: Location) -> None:
        path, twin = tree.pop(f"{name}_file", None), (*at, f"{name}_file")
        if tree.get(name) is None:
            tree.pop(name, None)
        if path is None:
            return
        self.twins[*at, name] = twin
        if name in tree:
            self._fail(twin, "is given besides the secret itself: only one of them may be")
        elif isinstance(path, str) and path:
            try:
                tree[name] = _read_text(self.directory / path).rstrip("\r\n")
            except ValueError as error:
                self._fail(twin, str(error))
        else:
            self._fail(twin, "must be the path of a file")


def _section(field: FieldInfo | None) -> type[Section] | None:
    annotation = field and (get_args(field.annotation) or (field.annotation,))[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def keys(section: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a section by the key in the file; the twin of a secret comes right after it."""
    found = {}
    for name, field in section.model_fields.items():
        found[str(field.validation_alias or name)] = field
        if field.annotation is SecretStr:
            found[f"{name}_file"] = field
    return found


def _dotted(at: Location) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{p if _SHOWN_KEY.fullmatch(p) else '<key>'}" for p in at)
    return "".join(parts).removeprefix(".")


def _explain(model: type[Section], kind: str, at: Location, context: Mapping[str, Any]) -> tuple[Location, str]:
    if isinstance(error := context.get("error"), _SiblingError):
        return (*at[:-1], error.key), str(error)
    if kind != "extra_forbidden":
        return tuple(part for part in at if part != "[key]"), _MESSAGES[kind.partition("_")[0]].format(**context)
    key, known = str(at[-1]), keys(model)
    for part in at[:-1]:
        known = keys(section) if (section := _section(known.get(str(part)))) else known
    if model is WebConfig:
        return at, "is not supported by this exporter"
    similar = difflib.get_close_matches(key, known, 1)
    return at, f"is unknown; did you mean {similar[0]}?" if similar else "is unknown"


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Return the configuration in the YAML file at `path`, or without one that of the environment.

    `environ` also gives the values of `${NAME}`. Raise ConfigError, or NoConfigurationError where there is neither.
    """
    if path is not None:
        document = _Document(str(path), path.parent, environ)
        document.read(path)
        if document.tree is None:
            document.errors.setdefault((), "the file is empty")
        return document.validate(Config)
    names = {key: f"CREATIFY_{key.upper()}" for key in keys(Workspace) if key != "name"}
    credentials = {key: environ[name] for key, name in names.items() if environ.get(name)}
    if not credentials:
        raise NoConfigurationError([("configuration", "neither a file nor CREATIFY_API_ID and CREATIFY_API_KEY")])
    document = _Document("environment", Path())
    document.tree = {"workspaces": [{"name": "default"} | credentials]}
    try:
        return document.validate(Config)
    except ConfigError as error:
        raise ConfigError((names[path.rpartition(".")[2]], message) for path, message in error.errors) from None


def load_web(path: Path) -> WebConfig:
    """Return the web configuration in the YAML file at `path`; raise ConfigError."""
    document = _Document(str(path), path.parent)
    document.read(path)
    document.tree = {} if document.tree is None else document.tree
    return document.validate(WebConfig)

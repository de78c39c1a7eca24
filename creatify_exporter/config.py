"""The configuration: what can be set, with which defaults, and what is admitted."""

import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, SecretStr, ValidationInfo
from pydantic.functional_validators import AfterValidator, BeforeValidator, field_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from creatify_exporter.configfile import (
    ConfigError,
    Document,
    Reader,
    Section,
    keys,
    read,
    reader,
    resolved,
    validated,
)
from creatify_exporter.reasons import check_rule

__all__ = ["Config", "ConfigError", "NoConfigurationError", "WebConfig", "load", "load_web", "parse_duration"]

DURATION_UNITS = {"y": 31_536_000, "w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1, "ms": 0.001}
DURATION = r"(?=[0-9])" + "".join(rf"(?:([0-9]{{1,12}}){unit})?" for unit in DURATION_UNITS)
SIZE_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE_UNITS |= {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = rf"([0-9]{{1,15}})({'|'.join(SIZE_UNITS)})?"

_WORKSPACE_NAME = re.compile("(?=.*\\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,128}")
_HEADER_VALUE = re.compile("[!-~](?:[ -~]*[!-~])?")
_URL_TEXT = re.compile(r"[!$-;=A-\[\]_a-z~]+")  # printable ASCII, but none of "#<>?@\^`{|}
LOOPBACK = re.compile(r"localhost|127(?:\.[0-9]{1,3}){3}|::1")
_USER = re.compile("[^:\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_BCRYPT = re.compile(r"\$2[aby]\$(?:0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")


def local_host(address: str) -> str:
    """Return how a URL on this machine names an address that we listen on."""
    if address in {"::", "0.0.0.0"}:  # noqa: S104 - compared, not bound
        return "localhost"
    return f"[{address}]" if ":" in address else address


class NoConfigurationError(ConfigError):
    """Tell that there is neither a configuration file nor credentials in the environment."""


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


def _file(value: object, info: ValidationInfo) -> object:
    return reader(info.context).read(value)[0] if value and isinstance(value, str) else value or None


def _certificates(path: Path | None, info: ValidationInfo) -> Path | None:
    if path:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=_text_of(path, info.context))
        except (ssl.SSLError, ValueError):  # the latter for an empty text
            raise ValueError("must hold certificates in PEM format") from None
    return path


def _text_of(path: Path, context: object) -> str:
    """Return a file as `ssl` takes it: certificates are ASCII, comments may be anything."""
    return reader(context).content(path).decode("ascii", "ignore")


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
    return url.drivername == "postgresql" and bool(url.database) and text.isprintable()


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
    SecretStr,
    _must("be printable ASCII, at least one character, no spaces at its ends", _HEADER_VALUE.fullmatch),
]
WorkspaceName = Annotated[str, _must("be 1 to 128 characters, none a control character", _WORKSPACE_NAME.fullmatch)]
BaseUrl = Annotated[str, _must("be an http(s) URL without user, query and fragment", _is_base_url)]
LedgerUrl = Annotated[
    SecretStr,
    _must("be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DB", _is_ledger_url),
]
User = Annotated[str, _must("belong to a name without colon and control characters", _USER.fullmatch)]
PasswordHash = Annotated[
    str, BeforeValidator(resolved), _must("be a bcrypt hash with a cost of 4 to 16", _BCRYPT.fullmatch)
]


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
        if name in (names := reader(info.context).names):
            raise ValueError("is the name of another workspace, too")
        names.add(name)
        return name


class Api(Section):
    """How the Creatify API is asked."""

    allow_http: bool = False
    """Whether `base_url` may be `http://` to another host than loopback: credentials then travel in the clear."""
    base_url: Annotated[BaseUrl, AfterValidator(lambda url: url.rstrip("/"))] = "https://api.creatify.ai"
    """Where the API is; the paths of its endpoints are added."""
    timeout: Annotated[Duration, Field(gt=0, le=86_400)] = 60.0
    """Time for one whole listing, from the first byte to the last one of its last page; at most 1d."""
    max_response_size: Annotated[Size, Field(gt=0)] = 2 * 2**30
    """Largest listing that is read, after decompression, all pages together."""
    remaining_credits: bool = True
    """Whether to read the balance of each workspace."""
    ca_file: Certificates = None
    """PEM bundle of certificate authorities that are trusted besides the system's."""
    _authorities: str = ""

    def model_post_init(self, context: object) -> None:
        """Keep what is in `ca_file`: what was validated is put in force, whatever becomes of the file."""
        if self.ca_file:
            self._authorities = _text_of(self.ca_file, context)

    @property
    def authorities(self) -> str:
        """Return what is in `ca_file`, an empty text without one."""
        return self._authorities

    @field_validator("base_url")
    @classmethod
    def _keeps_credentials_secret(cls, base_url: str, info: ValidationInfo) -> str:
        url = urlsplit(base_url)
        if (
            url.scheme == "http"
            and not info.data.get("allow_http", True)
            and not LOOPBACK.fullmatch(url.hostname or "")
        ):
            raise ValueError("must be https://, unless api.allow_http is true")
        return base_url


class Listing(Section):
    """When the list is read, and how long a listing is good for."""

    max_age: Annotated[Duration, Field(gt=0)] = 300.0
    """Age at which a listing is too old, so that `creatify_up` turns 0."""
    min_interval: Duration = 0.0
    """Least time between the starts of two listings of a workspace; not above `max_age`."""
    settle: Annotated[int, Field(ge=0)] = 10
    """How many tasks that left the list unfinished are asked for by id after a listing; 0: none."""

    @field_validator("min_interval")
    @classmethod
    def _fits_the_age(cls, min_interval: float, info: ValidationInfo) -> float:
        if min_interval > info.data.get("max_age", min_interval):
            raise ValueError("must not be longer than listing.max_age")
        return min_interval


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
    owner: Literal["caller", "account", "upstream", "unknown"] = "unknown"
    """Who has to act: `caller` (what was sent is wrong), `account` (credits or permissions of the workspace),
    `upstream` (Creatify or the model provider) or `unknown`."""

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


class Config(Document):
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
    client_auth_type: Literal["NoClientCert", "RequireAndVerifyClientCert"] = "NoClientCert"
    """Whether clients must show a certificate; if so, `client_ca_file` is needed."""
    client_ca_file: Certificates = None
    """PEM certificates of the authorities that sign those of the clients."""
    min_version: Literal["TLS12", "TLS13"] = "TLS12"
    """Oldest version of TLS that is spoken."""
    _contents: tuple[bytes, ...] = ()

    def model_post_init(self, context: object) -> None:
        """Keep what is in the files: renewed ones make other settings of it."""
        files = filter(None, (self.cert_file, self.key_file, self.client_ca_file))
        self._contents = tuple(map(reader(context).content, files))

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

    @field_validator("client_ca_file")
    @classmethod
    def _goes_with_the_type(cls, client_ca_file: Path | None, info: ValidationInfo) -> Path | None:
        wanted = info.data.get("client_auth_type")
        if wanted and (wanted == "RequireAndVerifyClientCert") != bool(client_ca_file):
            raise ValueError("must go with client_auth_type: RequireAndVerifyClientCert")
        return client_ca_file


class WebConfig(Document):
    """How the exporter's own server is protected, in the format of the Prometheus exporter toolkit."""

    model_config = ConfigDict(validate_by_name=True)
    tls: Annotated[Tls | None, BeforeValidator(lambda v: None if v == {} else v)] = Field(
        default=None, validation_alias="tls_server_config"
    )
    """HTTPS instead of HTTP, with these certificates."""
    users: dict[User, PasswordHash] = Field(default={}, validation_alias="basic_auth_users", repr=False)
    """Users that may read, with the bcrypt hashes of their passwords; without any, everybody may."""


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Return the configuration in the YAML file at `path`, or without one that of the environment.

    `environ` also gives the values of `${NAME}`. Raise ConfigError, or NoConfigurationError where there is neither.
    """
    if path is not None:
        return read(Config, path, environ)
    names = {key: f"CREATIFY_{key.upper()}" for key in keys(Workspace) if key != "name"}
    credentials = {key: environ[name] for key, name in names.items() if environ.get(name)}
    if not credentials:
        raise NoConfigurationError([("configuration", "neither a file nor CREATIFY_API_ID and CREATIFY_API_KEY")])
    workspace = {"name": "default"} | credentials
    return validated(
        Config, {"workspaces": [workspace]}, Reader(), "environment", lambda at: names[at.rpartition(".")[2]]
    )


def load_web(path: Path) -> WebConfig:
    """Return the web configuration in the YAML file at `path`; raise ConfigError, whose paths begin with that file."""
    return read(WebConfig, path, shown=lambda at: f"{path}: {at}")

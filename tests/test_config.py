import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import trustme
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from creatify_exporter.config import (
    Config,
    ConfigError,
    NoConfigurationError,
    WebConfig,
    Workspace,
    load,
    load_web,
    parse_duration,
    parse_size,
)
from creatify_exporter.configfile import MAX_FILE_SIZE, Reader, Section, inner, keys
from docs import generate_configuration as generate

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "config"
EXAMPLE = ROOT / "config.example.yaml"
LEAST = "workspaces: [{name: a, api_id: i, api_key: k}]\n"
ENVIRON = {
    "DURATION": "1h30m",
    "EMPTY": "",
    "FILE": "../files/api_key",
    "ID": "id-from-environment",
    "LINES": "planted\nplanted",
    "LITERAL": "${ID}",
    "NAME": "sales: 'north'",
    "NO": "no",
    "NUMBER": "7",
    "REASON": "brand_policy",
    "SECRET": "planted-secret",
    "SIZE": "64MiB",
}


def cases(name: str) -> list[Any]:
    """The cases of a file: `=== NAME`, a configuration, `>>>`, and what it is or what is wrong with it."""
    blocks = re.findall(
        r"^=== (\w+)\n(.*?)\n>>>\n(.*?)\n*(?=^===|\Z)", (DATA / name).read_text(), re.DOTALL | re.MULTILINE
    )
    return [pytest.param(text, expected, id=case) for case, text, expected in blocks]


def plain(section: Section, *, exclude_defaults: bool = False) -> Any:
    """A section as data to compare, its secrets laid open."""

    def laid_open(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: laid_open(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [laid_open(item) for item in value]
        return value.get_secret_value() if isinstance(value, SecretStr) else value

    return laid_open(section.model_dump(exclude_defaults=exclude_defaults))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for configurations, with the files that they name."""
    root = tmp_path_factory.mktemp("config")
    (root / "files").symlink_to(DATA / "files")
    directory = root / "here"
    directory.mkdir()
    authority = trustme.CA()
    server, other = authority.issue_cert("localhost"), authority.issue_cert("other.example")
    private_key = load_pem_private_key(server.private_key_pem.bytes(), None)
    encrypted = private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    for name, data in {
        "server.crt": b"".join(part.bytes() for part in server.cert_chain_pems),
        "server.key": server.private_key_pem.bytes(),
        "other.key": other.private_key_pem.bytes(),
        "encrypted.key": encrypted,
        "clients.crt": authority.cert_pem.bytes(),
        "text": b"planted",
    }.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def path(directory: Path) -> Path:
    """Where a configuration is written."""
    return directory / "config.yaml"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path, text: str | bytes) -> ConfigError:
    """What is wrong with a configuration; checks that no value is in it, nor in what led to it."""
    with pytest.raises(ConfigError) as caught:
        load(written(path, text), ENVIRON)
    error = caught.value
    assert "plant" not in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    return error


def setting(path: Path, key: str, value: str) -> Any:
    """What a value, as YAML, of one key means."""
    section, name = key.split(".")
    found = getattr(getattr(load(written(path, f"{LEAST}{section}: {{{name}: {value}}}\n"), {}), section), name)
    return found.get_secret_value() if isinstance(found, SecretStr) else found


class TestFiles:
    @pytest.mark.parametrize(("text", "errors"), cases("refused.txt"))
    def test_a_bad_file_is_refused_with_every_error_and_its_path_and_no_value(
        self, path: Path, text: str, errors: str
    ) -> None:
        shown = str(refusal(path, text)).replace(str(path), "FILE")
        assert sorted(shown.splitlines()) == sorted(errors.splitlines())

    @pytest.mark.parametrize(("text", "expected"), cases("accepted.txt"))
    def test_a_good_file_says_what_is_written_beside_it(self, path: Path, text: str, expected: str) -> None:
        config = plain(load(written(path, text), ENVIRON), exclude_defaults=True)
        got = json.dumps(config, default=lambda file: os.path.relpath(file, path.parent))
        assert json.loads(got) == json.loads(expected)

    @pytest.mark.parametrize(("text", "errors"), cases("web_refused.txt"))
    def test_a_bad_web_file_is_refused_with_the_name_of_the_file_every_error_and_its_path_and_no_value(
        self, path: Path, text: str, errors: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load_web(written(path, text))
        shown = str(caught.value).splitlines()
        assert [line for line in shown if not line.startswith(f"{path}: ")] == []
        assert sorted(line.removeprefix(f"{path}: ") for line in shown) == sorted(errors.splitlines())
        assert not re.search(r"plant|\$2", str(caught.value))

    @pytest.mark.parametrize(("text", "expected"), cases("web_accepted.txt"))
    def test_a_good_web_file_says_what_is_written_beside_it(self, path: Path, text: str, expected: str) -> None:
        config = load_web(written(path, text))
        got = json.dumps(plain(config), default=lambda file: file.relative_to(path.parent).as_posix())
        assert json.loads(got) == json.loads(expected)

    def test_no_case_is_left_out(self) -> None:
        for name in ("refused.txt", "accepted.txt", "web_refused.txt", "web_accepted.txt"):
            assert len(cases(name)) == (DATA / name).read_text().count("\n>>>\n")

    @pytest.mark.parametrize(
        "data",
        [
            b"\xef\xbb\xbf" + LEAST.encode(),
            (LEAST + "api: {timeout: 60s}\n").replace("\n", "\r\n").encode(),
            LEAST.encode("utf-16"),
            LEAST.encode() + b"#" * (MAX_FILE_SIZE - len(LEAST)),
            b"a: &a {name: a, api_id: i, api_key: k}\n".replace(b"a: ", b"workspaces: [", 1).replace(b"}", b"}]"),
        ],
        ids=["byte_order_mark", "crlf", "utf16", "just_1_mib", "anchor"],
    )
    def test_every_form_of_yaml_is_read(self, path: Path, data: bytes) -> None:
        config = load(written(path, data), {})
        assert config.workspaces == load(written(path, LEAST), {}).workspaces

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (LEAST.encode() + b"# plant\xe9d", "not valid YAML: it holds a character that is not allowed"),
            (
                b"workspaces: [{name: a, api_id: planted\x00}]",
                "not valid YAML: it holds a character that is not allowed",
            ),
            (b'a: "\\UFFFFFFFF"', "not valid YAML: it holds a character that is not allowed"),
            (b"%YAML 1." + b"9" * 5000 + b"\n---\n", "not valid YAML: it holds a character that is not allowed"),
            (b"a: " + b"[" * 1000, "nested too deeply"),
            (b"workspaces: &a [*a]", "nested too deeply"),
            (LEAST.encode() + b"#" * (MAX_FILE_SIZE - len(LEAST) + 1), "the file is larger than 1 MiB"),
        ],
        ids=["latin1", "control_character", "escape", "huge_number", "deep", "alias_of_itself", "above_1_mib"],
    )
    def test_what_is_no_yaml_is_an_error_of_the_file(self, path: Path, data: bytes, message: str) -> None:
        assert refusal(path, data).errors == ((str(path), message),)

    def test_an_alias_stands_for_its_anchor_however_many_there_are(self, path: Path) -> None:
        bomb = "".join(
            f"{name}: &{name} [{', '.join(['*' + former] * 9)} ]\n"
            for former, name in zip("abcdefgh", "bcdefghi", strict=True)
        )
        text = "workspaces: [{name: a, api_id: &z x, api_key: *z }]\n"
        assert load(written(path, text), {}).workspaces[0].api_key.get_secret_value() == "x"
        assert len(refusal(path, f"{text}a: &a x\n{bomb}").errors) == 9

    def test_a_missing_file_and_a_directory_are_errors_that_name_it(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.yaml", tmp_path):
            for read in (lambda path: load(path, {}), load_web):
                with pytest.raises(ConfigError) as caught:
                    read(path)
                assert [where for where, _ in caught.value.errors] == [str(path)]
                assert caught.value.files.keys() == {path}

    def test_relative_files_are_those_beside_the_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "key").write_text("from-file\n")
        (tmp_path / "config.yaml").write_text("workspaces: [{name: a, api_id: i, api_key_file: key}]\n")
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        config = load(Path("../config.yaml"), {})
        assert config.workspaces[0].api_key.get_secret_value() == "from-file"
        assert config.files.keys() == {Path("../config.yaml"), Path("../key")}

    @pytest.mark.parametrize(
        ("content", "secret"),
        [(b"key", "key"), (b"key\n", "key"), (b"key\r\n\n", "key"), (b"\xef\xbb\xbfkey", "key"), (b"a b", "a b")],
    )
    def test_a_secret_is_the_text_of_its_file_without_the_line_breaks_at_its_end(
        self, tmp_path: Path, content: bytes, secret: str
    ) -> None:
        (tmp_path / "key").write_bytes(content)
        config = load(written(tmp_path / "config.yaml", LEAST.replace("api_key: k", "api_key_file: key")), {})
        assert config.workspaces[0].api_key.get_secret_value() == secret

    @pytest.mark.parametrize(
        "content", [b"", b"\n", b" planted", b"planted ", b"plant\xe9d", b"a\nplanted", b"x" * 2**21]
    )
    def test_what_cannot_be_sent_is_no_secret(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "key").write_bytes(content)
        error = refusal(tmp_path / "config.yaml", LEAST.replace("api_key: k", "api_key_file: key"))
        assert [at for at, _ in error.errors] == ["workspaces[0].api_key_file"]


class TestFilesLookedAt:
    """For reloading by itself: every file that an outcome hangs on, by the name given, which a link may bear."""

    def test_a_configuration_tells_its_files(self, tmp_path: Path) -> None:
        for name, text in {"id": "i", "key": "k", "url": "sqlite:///x.db"}.items():
            (tmp_path / name).write_text(text)
        (tmp_path / "link").symlink_to("key")
        (tmp_path / "ca").write_bytes(trustme.CA().cert_pem.bytes())
        text = """
        workspaces: [{name: a, api_id_file: id, api_key_file: link}, {name: b, api_id: i, api_key_file: key}]
        ledger: {url_file: url}
        api: {ca_file: ca}
        """
        config = load(written(tmp_path / "config.yaml", text), {})
        assert config.files.keys() == {tmp_path / name for name in ("config.yaml", "id", "link", "key", "url", "ca")}

    def test_what_is_validated_of_a_file_is_what_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first, second = (trustme.CA().cert_pem.bytes() for _ in range(2))
        (tmp_path / "ca").write_bytes(first)
        read = Reader.read

        def replaced_at_once(reader: Reader, name: str) -> tuple[Path, bytes]:
            found = read(reader, name)
            if name == "ca":
                (tmp_path / "ca").write_bytes(second)
            return found

        monkeypatch.setattr(Reader, "read", replaced_at_once)
        text = "workspaces: [{name: a, api_id: i, api_key: k}]\napi: {ca_file: ca}"
        config = load(written(tmp_path / "config.yaml", text), {})
        assert config.files[tmp_path / "ca"] == config.api.authorities.encode() == first

    def test_so_does_an_error_and_counts_what_is_missing(self, tmp_path: Path) -> None:
        text = "workspaces: [{name: a, api_id_file: id, api_key_file: '${KEY}'}, 7]\napi: {ca_file: ca, timeout: x}"
        (tmp_path / "key").write_text("k")
        with pytest.raises(ConfigError) as caught:
            load(written(tmp_path / "config.yaml", text), {"KEY": str(tmp_path / "key")})
        assert caught.value.files.keys() == {tmp_path / name for name in ("config.yaml", "id", "key", "ca")}

    def test_so_does_a_file_that_is_no_yaml(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "config.yaml", "a: [").files.keys() == {tmp_path / "config.yaml"}

    def test_so_do_the_variables_for_credentials(self, tmp_path: Path) -> None:
        (tmp_path / "id").write_text("i")
        environ = {"CREATIFY_API_ID_FILE": str(tmp_path / "id"), "CREATIFY_API_KEY": "k"}
        assert load(None, environ).files.keys() == {tmp_path / "id"}
        with pytest.raises(ConfigError) as caught:
            load(None, environ | {"CREATIFY_API_KEY": "", "CREATIFY_API_KEY_FILE": "/none"})
        assert caught.value.files.keys() == {tmp_path / "id", Path("/none")}

    def test_so_does_a_web_configuration(self, path: Path) -> None:
        clients = "client_ca_file: clients.crt, client_auth_type: RequireAndVerifyClientCert"
        tls = f"tls_server_config: {{cert_file: server.crt, key_file: KEY, {clients}}}"
        files = {path, path.parent / "server.crt", path.parent / "clients.crt"}
        assert load_web(written(path, tls.replace("KEY", "server.key"))).files.keys() == files | {
            path.parent / "server.key"
        }
        with pytest.raises(ConfigError) as caught:
            load_web(written(path, tls.replace("KEY", "none")))
        assert caught.value.files.keys() == files | {path.parent / "none"}

    def test_one_built_in_code_has_none(self) -> None:
        assert WebConfig().files == {}


class TestKeysInMessages:
    """A key that is unknown is shown where it can hardly be a credential, so that it is found."""

    @pytest.mark.parametrize("key", ["apis", "time_out", "baseUrl", "API-KEY", "x" * 30])
    def test_a_short_key_of_letters_is_shown(self, path: Path, key: str) -> None:
        assert [at for at, _ in refusal(path, f"{LEAST}{key}: x").errors] == [key]

    @pytest.mark.parametrize(
        "key",
        ["0f6d2a91-b9b1-4e5b", "planted1", "x" * 31, "planted.x", "$2y$10$planted", "http://planted", "a b", "é", '""'],
    )
    def test_any_other_key_is_not(self, path: Path, key: str) -> None:
        ((at, message),) = refusal(path, f"{LEAST}api: {{'': 1, ? {key} : x}}".replace("'': 1, ", "")).errors
        assert (at, message) == ("api.<key>", "is unknown to this exporter")

    def test_what_a_key_is_like_is_told_of_the_keys_of_its_section(self, path: Path) -> None:
        errors = refusal(path, f"{LEAST}api: {{retentoin: 1d, api_key_fil: x, timeout5: 1s}}").errors
        assert errors == (
            ("api.retentoin", "is unknown to this exporter"),
            ("api.api_key_fil", "is unknown to this exporter"),
            ("api.<key>", "is unknown to this exporter; did you mean timeout?"),
        )


ADMITTED: list[tuple[str, dict[str, Any]]] = [
    ("api.base_url", {
        "https://x": "https://x", "HTTPS://x/a/": "HTTPS://x/a", "'http://[::1]:8000'": "http://[::1]:8000",
        "http://LOCALHOST": "http://LOCALHOST", "http://127.8.9.1:1/": "http://127.8.9.1:1", "https://x:65535": "https://x:65535",
    }),
    ("api.timeout", {"1ms": 0.001, "1d": 86_400}),
    ("api.max_response_size", {"1": 1, "64MiB": 2**26}),
    ("api.remaining_credits", {"false": False, "no": False, "on": True}),
    ("listing.min_interval", {"0": 0, "5m": 300}),
    ("listing.settle", {"0": 0, "1": 1, "500": 500}),
    ("listing.max_age", {"1ms": 0.001, "2d": 172_800}),
    ("ledger.url", {
        "sqlite:////data/ledger.db": "sqlite:////data/ledger.db",
        "'postgresql:///db?host=/run/postgresql'": "postgresql:///db?host=/run/postgresql",
        "'postgresql://u:p%40@h:1/d'": "postgresql://u:p%40@h:1/d",
    }),
    ("ledger.retention", {"1y2w3d4h5m6s7ms": 33_019_506.007}),
    ("ledger.count_existing", {"true": True}),
    ("labels.max_models", {"1": 1}),
    ("exposition.zero_hold", {"0s": 0, "500ms": 0.5}),
]  # fmt: skip
DURATION_TEXT = "must be a duration like 30s, 1h30m or 500ms"
REFUSED: list[tuple[str, str, list[str]]] = [
    ("api.base_url", "must be an http(s) URL without user, query and fragment", [
        "api.creatify.ai", "//api.creatify.ai", "ftp://x", "https://", "https://user:planted@x", "'https://x?planted=1'",
        "'https://x#planted'", "https://x:99999", "https://x:0", "'https://[::1'", "https://a b", "https://é.example",
        "https://x\\y", "https://:80", "HTTPS://", '""',
    ]),
    ("api.base_url", "must be https://, unless api.allow_http is true", [
        "http://x", "http://127.0.0.1.example.com", "http://127.0.0", "http://localhosts", "http://1127.0.0.1",
    ]),
    ("api.timeout", DURATION_TEXT, ["30", "soon", '""', "-1s", "planted"]),
    ("api.timeout", "must not be longer than 1d", ["1d1ms"]),
    ("api.timeout", "must be greater than 0", ["0", "0s"]),
    ("api.max_response_size", "must be a size like 64MiB or 2GiB", ["1.5GiB", "-1GiB", "64 megabytes", "[1]"]),
    ("api.max_response_size", "must be greater than 0", ["0"]),
    ("api.remaining_credits", "must be true or false", ["maybe", "[true]", "2"]),
    ("api.allow_http", "must be true or false", ["maybe"]),
    ("api.ca_file", "the file cannot be read: Is a directory", ["../files"]),
    ("api.ca_file", "the file cannot be read: No such file or directory", ["planted.pem"]),
    ("api.ca_file", "must be the path of a file", ["[a]", '"a\\0"']),
    ("api.ca_file", "must hold certificates in PEM format", ["../files/api_key", "../files/empty"]),
    ("listing.min_interval", DURATION_TEXT, ["1.5s", "[1s]"]),
    ("listing.min_interval", "must not be longer than listing.max_age", ["5m1ms"]),
    ("listing.settle", "must not be negative", ["-1"]),
    ("listing.settle", "must be a whole number", ["1.5", "ten", "[1]", '""']),
    ("listing.max_age", DURATION_TEXT, ["5 m", "s"]),
    ("listing.max_age", "must be greater than 0", ["0s"]),
    ("ledger.url", "must be sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DB", [
        "planted", "sqlite://", "sqlite:///", "'sqlite:///:memory:'", "sqlite://planted.db", "'sqlite:///x.db?mode=planted'",
        "'mysql://u:planted@h/d'", "'postgres://u:planted@h/d'", "'postgresql+asyncpg://u:planted@h/d'",
        "'postgresql://u:planted@h'", "'postgresql://u:planted@h:port/d'", "'postgresql://u:planted@[::1/d'", '""',
        '"postgresql://u:plan\\0ted@h/d"',
    ]),
    ("ledger.retention", DURATION_TEXT, ["1h1d", "1m1m"]),
    ("ledger.retention", "must be greater than 0", ["0"]),
    ("ledger.count_existing", "must be true or false", ["2"]),
    ("labels.max_models", "must be greater than 0", ["0", "-1"]),
    ("labels.max_models", "must be a whole number", ["many", "1.5", "9" * 9999]),
    ("exposition.zero_hold", DURATION_TEXT, ["-1s", "٣s", "3"]),
    ("exposition.zero_hold", "must not be longer than 292y", ["293y"]),
]  # fmt: skip


BEYOND_A_SCHEMA = {  # what only the program finds
    "": [
        "duplicate_key",
        "duplicate_section",
        "merge_key",
        "secret_file_bad_value",
        "secret_file_empty",
        "secret_file_missing",
        "variables_unset",
    ],
    "api.base_url": [
        "'https://[::1'",
        "http://1127.0.0.1",
        "http://127.0.0",
        "http://127.0.0.1.example.com",
        "http://localhosts",
        "http://x",
        "https://:80",
        "https://x:0",
        "https://x:99999",
        "https://é.example",
    ],
    "api.ca_file": ['"a\\0"', "../files", "../files/api_key", "../files/empty", "planted.pem"],
    "api.timeout": ["0", "0s", "1d1ms"],
    "exposition.zero_hold": ["293y"],
    "ledger.retention": ["0"],
    "ledger.url": [
        '"postgresql://u:plan\\0ted@h/d"',
        "'postgresql://u:planted@[::1/d'",
        "'postgresql://u:planted@h:port/d'",
        "'sqlite:///:memory:'",
    ],
    "listing.max_age": ["0s"],
    "listing.min_interval": ["5m1ms"],
}


class TestValues:
    @pytest.mark.parametrize(("key", "values"), ADMITTED, ids=[key for key, _ in ADMITTED])
    def test_a_value_means_what_it_says(self, path: Path, key: str, values: dict[str, Any]) -> None:
        assert {value: setting(path, key, value) for value in values} == values

    @pytest.mark.parametrize(("key", "message", "values"), REFUSED)
    def test_a_wrong_value_is_refused_where_it_is(self, path: Path, key: str, message: str, values: list[str]) -> None:
        section, name = key.split(".")
        for value in values:
            assert refusal(path, f"{LEAST}{section}: {{{name}: {value}}}").errors == ((key, message),), value

    def test_every_setting_is_among_them(self) -> None:
        sections = {section: inner(field) for section, field in keys(Config).items()}
        every = {f"{section}.{key}" for section, model in sections.items() if model for key in model.model_fields}
        elsewhere = {key for key in every if key.startswith(("workspaces.", "failure_reasons."))}
        assert {key for key, *_ in REFUSED} == every - elsewhere
        assert {key for key, *_ in ADMITTED} == every - elsewhere - {"api.ca_file", "api.allow_http"}

    @pytest.mark.parametrize("name", ["x" * 128, "a b", "日本", "a\u200db", "-"])
    def test_a_workspace_can_have_any_name_that_a_label_shows(self, path: Path, name: str) -> None:
        assert load(written(path, LEAST.replace("name: a", f'name: "{name}"')), {}).workspaces[0].name == name

    def test_a_setting_is_not_compared_with_one_that_is_wrong(self, path: Path) -> None:
        error = refusal(path, f"{LEAST}listing: {{min_interval: soon, max_age: 500ms}}\napi: {{base_url: x}}")
        assert [at for at, _ in error.errors] == ["api.base_url", "listing.min_interval"]

    def test_http_to_another_host_is_allowed_by_a_key_of_its_own(self, path: Path) -> None:
        text = f"{LEAST}api: {{base_url: 'http://x', allow_http: yes}}"
        assert load(written(path, text), {}).api.base_url == "http://x"

    def test_a_rule_names_its_owner(self, path: Path) -> None:
        rules = "{reason: a, match: b, owner: OWNER}, {reason: c, match: d}"
        text = f"{LEAST}failure_reasons: {{rules: [{rules}]}}"
        for owner in ("caller", "account", "upstream", "unknown"):
            config = load(written(path, text.replace("OWNER", owner)), {})
            assert [rule.owner for rule in config.failure_reasons.rules] == [owner, "unknown"]
        expected = "must be 'caller', 'account', 'upstream' or 'unknown'"
        assert refusal(path, text.replace("OWNER", "planted")).errors == (("failure_reasons.rules[0].owner", expected),)


class TestEnvironment:
    @pytest.mark.parametrize(
        ("environ", "api_id", "api_key"),
        [
            ({"CREATIFY_API_ID": "i", "CREATIFY_API_KEY": "k"}, "i", "k"),
            ({"CREATIFY_API_ID": "$$${X}", "CREATIFY_API_KEY": "k", "CREATIFY_API_KEY_FILE": ""}, "$$${X}", "k"),
            ({"CREATIFY_API_ID_FILE": "{files}/api_id", "CREATIFY_API_KEY": "k"}, "id-from-file", "k"),
            (
                {"CREATIFY_API_ID_FILE": "{files}/api_id", "CREATIFY_API_KEY_FILE": "{files}/api_key"},
                "id-from-file",
                "key-from-file",
            ),
        ],
    )
    def test_credentials_in_the_environment_make_one_workspace_named_default(
        self, environ: dict[str, str], api_id: str, api_key: str
    ) -> None:
        config = load(None, {name: value.replace("{files}", str(DATA / "files")) for name, value in environ.items()})
        (workspace,) = config.workspaces
        credentials = workspace.api_id.get_secret_value(), workspace.api_key.get_secret_value()
        assert (workspace.name, *credentials) == ("default", api_id, api_key)
        assert plain(config) == plain(Config(workspaces=config.workspaces))

    @pytest.mark.parametrize("environ", [{}, {"CREATIFY_API_ID": "", "CREATIFY_API_KEY": ""}, {"CREATIFY": "x"}])
    def test_neither_file_nor_credentials_is_an_error_of_its_own(self, environ: dict[str, str]) -> None:
        with pytest.raises(NoConfigurationError, match="CREATIFY_API_ID and CREATIFY_API_KEY"):
            load(None, environ)

    @pytest.mark.parametrize(
        ("environ", "errors"),
        [
            ({"CREATIFY_API_ID": "planted"}, "CREATIFY_API_KEY: is missing"),
            ({"CREATIFY_API_KEY": "planted"}, "CREATIFY_API_ID: is missing"),
            ({"CREATIFY_API_ID": "planted", "CREATIFY_API_KEY": ""}, "CREATIFY_API_KEY: is missing"),
            (
                {"CREATIFY_API_ID": "a\nplanted", "CREATIFY_API_KEY_FILE": "/planted/none"},
                "CREATIFY_API_KEY_FILE: the file cannot be read: No such file or directory\n"
                "CREATIFY_API_ID: must be printable ASCII, at least one character, no spaces at its ends",
            ),
            (
                {"CREATIFY_API_ID": "planted", "CREATIFY_API_ID_FILE": "x", "CREATIFY_API_KEY": "k"},
                "CREATIFY_API_ID: is given besides api_id_file: only one of them may be",
            ),
        ],
    )
    def test_errors_name_the_variable_and_not_its_value(self, environ: dict[str, str], errors: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(None, environ)
        assert not isinstance(caught.value, NoConfigurationError)
        assert sorted(str(caught.value).splitlines()) == sorted(errors.splitlines())

    def test_a_file_goes_before_credentials_in_the_environment(self, path: Path) -> None:
        config = load(written(path, LEAST), {"CREATIFY_API_ID": "i", "CREATIFY_API_KEY": "k"})
        assert [workspace.name for workspace in config.workspaces] == ["a"]


class TestModel:
    def test_a_configuration_can_be_built_in_code(self) -> None:
        config = Config.model_validate(
            {"workspaces": [{"name": "a", "api_id": "$${x}", "api_key": "k"}], "exposition": {"zero_hold": "0s"}}
        )
        assert config.exposition.zero_hold == 0.0
        assert config.workspaces[0].api_id.get_secret_value() == "$${x}"
        assert config == Config.model_validate(config.model_dump())

    def test_it_cannot_be_changed(self) -> None:
        config = load(EXAMPLE, {})
        with pytest.raises(ValueError, match="frozen"):
            config.api.__setattr__("timeout", 1.0)

    def test_secrets_are_not_shown(self, path: Path) -> None:
        text = "workspaces: [{name: a, api_id: planted, api_key: planted}]\nledger: {url: 'postgresql://u:planted@h/d'}"
        config = load(written(path, text), {})
        assert "plant" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
        web = load_web(
            written(path, "basic_auth_users: {a: $2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG}")
        )
        assert "$2y$" not in f"{web!r} {web}"

    def test_web_settings_can_be_built_in_code(self) -> None:
        assert WebConfig().tls is None
        assert WebConfig(users={"a": "$2b$04$" + "a" * 53}).users == {"a": "$2b$04$" + "a" * 53}

    def test_client_certificates_are_wanted_by_type(self, path: Path) -> None:
        wanted = []
        for more in ("", ", client_ca_file: clients.crt, client_auth_type: RequireAndVerifyClientCert"):
            tls = load_web(
                written(path, f"tls_server_config: {{cert_file: server.crt, key_file: server.key{more}}}")
            ).tls
            assert tls
            wanted.append(tls.client_auth)
        assert wanted == [False, True]


class TestExampleAndDocuments:
    def test_the_example_is_valid_as_it_stands_and_shows_the_defaults(self) -> None:
        config = load(EXAMPLE, {})
        assert plain(config) == plain(Config(workspaces=config.workspaces))

    def test_the_example_has_every_key(self) -> None:
        def missing(section: type[Section], tree: dict[str, Any], prefix: str) -> Iterator[str]:
            for key, field in keys(section).items():
                value, below = tree.get(key, ...), inner(field)
                if value is ...:
                    yield f"{prefix}{key}"
                elif below:
                    yield from missing(
                        below, (value or [{}])[0] if isinstance(value, list) else value, f"{prefix}{key}."
                    )

        in_comments = {
            "workspaces.api_id_file",
            "workspaces.api_key_file",
            "ledger.url_file",
            "failure_reasons.rules.reason",
            "failure_reasons.rules.match",
            "failure_reasons.rules.owner",
        }
        text = EXAMPLE.read_text()
        assert set(missing(Config, yaml.safe_load(text), "")) == in_comments
        for path in in_comments:
            assert re.search(rf"#.*\b{path.rpartition('.')[2]}: ", text)

    def test_what_the_example_has_in_comments_is_valid_too(self, tmp_path: Path) -> None:
        text = EXAMPLE.read_text().replace("rules: []", "rules:").replace("/run/secrets", str(DATA / "files"))
        text = re.sub(r"^  # ([- ] )", r"  \1", text, flags=re.MULTILINE).replace("sales_api_key", "api_key")
        (tmp_path / "config.yaml").write_text(text)
        config = load(tmp_path / "config.yaml", {"SALES_API_ID": "i"})
        assert [workspace.name for workspace in config.workspaces] == ["marketing", "sales"]
        assert [rule.reason for rule in config.failure_reasons.rules] == ["brand_policy"]

    def test_the_reference_and_the_schema_are_as_generated(self) -> None:
        text = generate.REFERENCE.read_text("utf-8")
        assert generate.reference(text) == text, "run: python -m docs.generate_configuration"
        assert generate.schema() == generate.SCHEMA.read_text("utf-8"), "run: python -m docs.generate_configuration"

    def test_every_key_is_described(self) -> None:
        for section in (Config, WebConfig):
            assert [path for path, *_, meaning in generate.rows(section) if not meaning] == []

    def test_the_examples_of_the_reference_are_valid(self, path: Path) -> None:
        for block in re.findall(r"```yaml\n(.*?)```", generate.REFERENCE.read_text("utf-8"), re.DOTALL):
            if block.startswith("workspaces"):
                text = block.replace("/run/secrets/marketing_api_key", "../files/api_key")
                assert load(written(path, text), {"MARKETING_API_ID": "i"}).workspaces
            elif not block.startswith("#"):
                assert load_web(written(path, block)).users

    def test_the_schema_admits_the_good_files_and_refuses_most_bad_ones(self) -> None:
        validator = jsonschema.Draft202012Validator(json.loads(generate.SCHEMA.read_text("utf-8")))
        validator.check_schema(validator.schema)

        def admits(text: str | bytes) -> bool:
            return validator.is_valid(json.loads(json.dumps(yaml.safe_load(text), default=str)))

        assert admits(EXAMPLE.read_bytes())
        assert [case.id for case in cases("accepted.txt") if not admits(case.values[0])] == []
        for key, values in ADMITTED:
            for value in values:
                assert admits(LEAST + "{}: {{{}: {}}}".format(*key.split("."), value)), f"{key}: {value}"
        bad = [("", str(case.id), str(case.values[0])) for case in cases("refused.txt")]
        for key, _, wrong in REFUSED:
            bad += [(key, value, LEAST + "{}: {{{}: {}}}".format(*key.split("."), value)) for value in wrong]
        admitted: dict[str, list[str]] = {}
        for key, name, text in bad:
            with contextlib.suppress(yaml.YAMLError, ValueError):  # not YAML in the first place
                if admits(text):
                    admitted.setdefault(key, []).append(name)
        assert {key: sorted(names) for key, names in admitted.items()} == BEYOND_A_SCHEMA


class TestUnits:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("0", 0),
            ("0s", 0),
            ("30s", 30),
            ("1h30m", 5400),
            ("90d", 7_776_000),
            ("1w", 604_800),
            ("1y", 31_536_000),
            ("500ms", 0.5),
            ("1y2w3d4h5m6s7ms", 33_019_506.007),
            ("01m", 60),
            ("292y", 292 * 31_536_000),
        ],
    )
    def test_a_duration_reads_as_in_prometheus(self, text: str, seconds: float) -> None:
        assert parse_duration(text) == pytest.approx(seconds)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "1",
            "1.5s",
            "s",
            "1s1m",
            "1s1s",
            "-1s",
            "+1s",
            " 1s",
            "1s ",
            "1 s",
            "1S",
            "1us",
            "٣s",
            "1s\n",
            "293y",
            "0x1s",
        ],
    )
    def test_what_prometheus_does_not_read_is_no_duration(self, text: str) -> None:
        with pytest.raises(ValueError, match="must "):
            parse_duration(text)

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("1KiB", 1024),
            ("64MiB", 67_108_864),
            ("2GiB", 2_147_483_648),
            ("1TiB", 2**40),
            ("1kB", 1000),
            ("1KB", 1000),
            ("3MB", 3_000_000),
            ("2GB", 2 * 10**9),
            ("1TB", 10**12),
        ],
    )
    def test_a_size_is_a_number_with_a_binary_or_decimal_unit(self, text: str, size: int) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "B", "1.5GiB", "-1", "1 MiB", "1mib", "1M", "1Mi", "1e3", "1MiB\n", "٣"])
    def test_anything_else_is_no_size(self, text: str) -> None:
        with pytest.raises(ValueError, match="must be a size"):
            parse_size(text)

    @given(st.integers(0, 292 * 365 * 86_400_000))
    def test_a_duration_survives_being_written(self, milliseconds: int) -> None:
        assert round(parse_duration(generate.duration_text(milliseconds / 1000)) * 1000) == milliseconds

    @given(st.integers(1, 10**15))
    def test_a_size_survives_being_written(self, size: int) -> None:
        assert parse_size(generate.size_text(size)) == size

    @given(st.text(max_size=20))
    def test_no_text_makes_the_parsers_fail_otherwise_or_repeat_it(self, text: str) -> None:
        for parse in (parse_duration, parse_size):
            try:
                result = f"{parse(text)}"
            except ValueError as error:
                result = str(error)
            assert re.match(r"must |[0-9]", result)


SECRET = "planted-5ecret"  # neither a key that is shown nor the name of a variable
KEYS = st.sampled_from(
    sorted({key for section in Section.__subclasses__() for key in keys(section)} | {"x", "<<", "~"})
)
SCALARS = st.one_of(
    st.sampled_from(
        ["30s", "1GiB", "true", "null", "0", "-1", "", "${SECRET}", "$", "${", "sqlite:///x", "https://x", "(a"]
    ),
    st.sampled_from(["", "!", "&", "*", "%", "${", "https://u:", "sqlite:///", "$2y$10$"]).map(
        lambda start: start + SECRET
    ),
    st.text(max_size=12),
    st.booleans(),
    st.none(),
    st.floats(),
    st.integers(),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6), max_leaves=12
)
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        "workspaces": st.lists(st.dictionaries(st.sampled_from([*keys(Workspace)]), SCALARS), max_size=3),
        **{
            key: st.dictionaries(KEYS, TREES, max_size=4)
            for key in [*keys(Config), *keys(WebConfig)]
            if key != "workspaces"
        },
    },
)


FRAGMENTS = [
    SECRET,
    "${SECRET}",
    "a: ",
    "- ",
    "---\n",
    "...\n",
    "\r\n",
    "%YAML 1.1\n",
    "%TAG ! ",
    "!!str ",
    "!!binary ",
]
FRAGMENTS += ["\\u", "\\U", "\\x", "<<: ", "workspaces: ", "name: ", "é", "0"]


class TestAnything:
    def check(self, text: bytes, path: Path) -> None:
        path.write_bytes(text)
        for read in (lambda path: load(path, ENVIRON | {"SECRET": SECRET}), load_web):
            shown = ""
            try:
                read(path)
            except ConfigError as error:
                shown = str(error)
            assert SECRET not in shown

    @given(tree=TREES | SECTIONS, flow=st.booleans())
    @settings(max_examples=80, deadline=None)
    def test_any_document_is_read_or_refused_without_its_values(
        self, tree: Any, flow: bool, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        text = yaml.safe_dump(tree, default_flow_style=flow, allow_unicode=True)
        self.check(text.encode("utf-8", "surrogatepass"), tmp_path_factory.getbasetemp() / "anything.yaml")

    @given(
        st.lists(
            st.sampled_from([*"\n\n  -:?,[]{}#&*!|>'\"%@`\\~$\t\0\x85\ufeff\u2028", *FRAGMENTS]),
            max_size=30,
        ).map("".join)
    )
    @settings(max_examples=200, deadline=None)
    def test_any_text_is_read_or_refused_without_its_values(
        self, tmp_path_factory: pytest.TempPathFactory, text: str
    ) -> None:
        self.check(text.encode(), tmp_path_factory.getbasetemp() / "anything.yaml")

    @given(st.binary(max_size=200))
    @settings(max_examples=100, deadline=None)
    def test_any_bytes_are_read_or_refused(self, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
        self.check(data, tmp_path_factory.getbasetemp() / "anything.yaml")

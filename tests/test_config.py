import json
import os
import re
import shutil
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
    MAX_FILE_SIZE,
    Config,
    ConfigError,
    NoConfigurationError,
    Section,
    WebConfig,
    Workspace,
    keys,
    load,
    load_web,
    parse_duration,
    parse_size,
)
from docs import generate_configuration as generate

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data" / "config"
EXAMPLE = ROOT / "config.example.yaml"
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
BEYOND_A_SCHEMA = {
    *("alias", "duplicate_key", "duplicate_section", "merge_key", "utf16"),
    *("base_url_07", "base_url_08", "base_url_09", "base_url_11", "base_url_13"),
    *("ledger_url_03", "ledger_url_10", "ledger_url_11"),
    *("ca_file_directory", "ca_file_missing", "ca_file_no_certificates"),
    *("secret_file_bad_value", "secret_file_empty", "secret_file_missing", "variables_unset"),
    *("http_elsewhere", "http_lookalike", "interval_above_age"),
}


def named(folder: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((DATA / folder).glob("*.yaml"))]


def plain(section: Section, *, exclude_defaults: bool = False) -> Any:
    """A section as data to compare, its secrets laid open."""

    def laid_open(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: laid_open(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return [laid_open(item) for item in value]
        return value.get_secret_value() if isinstance(value, SecretStr) else value

    return laid_open(section.model_dump(exclude_defaults=exclude_defaults))


def errors_of(text: str | bytes, tmp_path: Path) -> tuple[tuple[str, str], ...]:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, ENVIRON)
    return caught.value.errors


@pytest.fixture(scope="module")
def web_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the certificates and keys that the web configurations name."""
    directory = tmp_path_factory.mktemp("web")
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


class TestFiles:
    @pytest.mark.parametrize("path", named("bad"))
    def test_a_bad_file_is_refused_with_every_error_and_its_path_and_no_value(self, path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            load(path, ENVIRON)
        assert str(caught.value).replace(str(path), "FILE") == path.with_suffix(".txt").read_text().rstrip("\n")
        assert "plant" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None or caught.value.__suppress_context__

    @pytest.mark.parametrize("path", named("good"))
    def test_a_good_file_says_what_is_written_beside_it(self, path: Path) -> None:
        config = load(path, ENVIRON)
        got = json.loads(
            json.dumps(plain(config, exclude_defaults=True), default=lambda file: os.path.relpath(file, DATA))
        )
        assert got == json.loads(path.with_suffix(".json").read_text())

    @pytest.mark.parametrize("path", named("web_bad"))
    def test_a_bad_web_file_is_refused_with_every_error_and_its_path_and_no_value(
        self, path: Path, web_directory: Path
    ) -> None:
        copy = Path(shutil.copy(path, web_directory))
        with pytest.raises(ConfigError) as caught:
            load_web(copy)
        assert str(caught.value).replace(str(copy), "FILE") == path.with_suffix(".txt").read_text().rstrip("\n")
        assert "plant" not in str(caught.value)
        assert "$2" not in str(caught.value)

    @pytest.mark.parametrize("path", named("web_good"))
    def test_a_good_web_file_says_what_is_written_beside_it(self, path: Path, web_directory: Path) -> None:
        config = load_web(Path(shutil.copy(path, web_directory)))
        got = json.dumps(plain(config), default=lambda file: file.relative_to(web_directory).as_posix())
        assert json.loads(got) == json.loads(path.with_suffix(".json").read_text())

    def test_every_expectation_belongs_to_a_file(self) -> None:
        expectations = {path for folder in ("bad", "good", "web_bad", "web_good") for path in (DATA / folder).iterdir()}
        assert {path for path in expectations if not path.with_suffix(".yaml").exists()} == set()

    def test_a_missing_file_and_a_directory_are_errors_that_name_it(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.yaml", tmp_path):
            for read in (lambda path: load(path, {}), load_web):
                with pytest.raises(ConfigError) as caught:
                    read(path)
                assert [where for where, _ in caught.value.errors] == [str(path)]

    def test_a_file_above_1_mib_is_refused(self, tmp_path: Path) -> None:
        start = b"workspaces: [{name: a, api_id: i, api_key: k}]\n#"
        (message,) = errors_of(start + b"x" * (MAX_FILE_SIZE - len(start) + 1), tmp_path)
        assert message[1] == "the file is larger than 1 MiB"

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

    def test_a_secret_is_read_anew_at_every_load(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("workspaces: [{name: a, api_id: i, api_key_file: key}]\n")
        loaded = []
        for key in ("first", "second"):
            (tmp_path / "key").write_text(key)
            loaded.append(load(tmp_path / "config.yaml", {}))
        assert loaded[0] != loaded[1]
        assert loaded[1] == load(tmp_path / "config.yaml", {})


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
        assert config == Config(workspaces=config.workspaces)

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
                "CREATIFY_API_ID_FILE: is given besides the secret itself: only one of them may be",
            ),
        ],
    )
    def test_errors_name_the_variable_and_not_its_value(self, environ: dict[str, str], errors: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load(None, environ)
        assert not isinstance(caught.value, NoConfigurationError)
        assert str(caught.value) == errors

    def test_a_file_goes_before_credentials_in_the_environment(self) -> None:
        config = load(DATA / "good" / "least.yaml", {"CREATIFY_API_ID": "i", "CREATIFY_API_KEY": "k"})
        assert [workspace.name for workspace in config.workspaces] == ["a"]


class TestModel:
    def test_a_configuration_can_be_built_in_code(self) -> None:
        config = Config.model_validate(
            {"workspaces": [{"name": "a", "api_id": "i", "api_key": "k"}], "exposition": {"zero_hold": "0s"}}
        )
        assert config.exposition.zero_hold == 0.0
        assert config == Config.model_validate(config.model_dump())

    def test_it_cannot_be_changed(self) -> None:
        config = load(EXAMPLE, {})
        with pytest.raises(ValueError, match="frozen"):
            config.api.__setattr__("timeout", 1.0)

    def test_secrets_are_not_shown(self) -> None:
        config = load(DATA / "good" / "credentials_from_files.yaml", {})
        shown = f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
        assert not re.search("from-file|pw@", shown)
        assert "$2y$" not in repr(load_web(DATA / "web_good" / "users.yaml"))

    def test_web_settings_can_be_built_in_code(self) -> None:
        assert WebConfig().tls is None
        assert WebConfig(users={"a": "$2b$04$" + "a" * 53}).users == {"a": "$2b$04$" + "a" * 53}

    def test_client_certificates_are_wanted_by_type(self, web_directory: Path) -> None:
        wanted = []
        for name in ("tls", "clients"):
            tls = load_web(Path(shutil.copy(DATA / "web_good" / f"{name}.yaml", web_directory))).tls
            assert tls
            wanted.append(tls.client_auth)
        assert wanted == [False, True]


class TestExampleAndDocuments:
    def test_the_example_is_valid_as_it_stands_and_shows_the_defaults(self) -> None:
        config = load(EXAMPLE, {})
        assert config == Config(workspaces=config.workspaces)

    def test_the_example_has_every_key(self) -> None:
        def missing(section: type[Section], tree: dict[str, Any], prefix: str) -> Iterator[str]:
            for key, field in keys(section).items():
                inner, path = generate.inner(field), f"{prefix}{key}"
                if key not in tree:
                    yield path
                elif inner:
                    yield from missing(
                        inner, (tree[key] or [{}])[0] if isinstance(tree[key], list) else tree[key], f"{path}."
                    )

        in_comments = {
            "workspaces.api_id_file",
            "workspaces.api_key_file",
            "ledger.url_file",
            "failure_reasons.rules.reason",
            "failure_reasons.rules.match",
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

    def test_the_examples_of_the_reference_are_valid(self, tmp_path: Path, web_directory: Path) -> None:
        for block in re.findall(r"```yaml\n(.*?)```", generate.REFERENCE.read_text("utf-8"), re.DOTALL):
            if block.startswith("workspaces"):
                path = tmp_path / "config.yaml"
                path.write_text(block.replace("/run/secrets/marketing_api_key", str(DATA / "files" / "api_key")))
                load(path, {"MARKETING_API_ID": "i"})
            elif not block.startswith("#"):
                (web_directory / "web.yaml").write_text(block)
                assert load_web(web_directory / "web.yaml").users

    def test_the_schema_admits_the_good_files_and_refuses_most_bad_ones(self) -> None:
        validator = jsonschema.Draft202012Validator(json.loads(generate.SCHEMA.read_text("utf-8")))
        validator.check_schema(validator.schema)
        for path in (EXAMPLE, *(DATA / "good").glob("*.yaml")):
            tree = json.loads(json.dumps(yaml.safe_load(path.read_bytes()), default=str))
            assert [error.message for error in validator.iter_errors(tree)] == [], path.name
        admitted = set()
        for path in (DATA / "bad").glob("*.yaml"):
            try:
                if validator.is_valid(yaml.safe_load(path.read_bytes())):
                    admitted.add(path.stem)
            except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
                continue  # not YAML in the first place
        assert admitted == BEYOND_A_SCHEMA


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


SECRET = "plantedsecret"
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

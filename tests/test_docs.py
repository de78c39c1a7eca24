"""What the documents say is so: links lead somewhere, examples are valid, commands exist, metrics are ours."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python as helm
import promql_parser
import pytest
import trustme
import yaml
from prometheus_client.parser import text_string_to_metric_families

from creatify_exporter import __version__, cli, config
from creatify_exporter.metrics import METRICS
from tests.support.commands import output
from tests.support.exporter import Exporter
from tests.support.kubernetes import CHART, render, validate_manifest
from tests.support.packages import require
from tests.support.processes import eventually

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "SECURITY.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/*.md"),
    ]
)

_FENCE = re.compile(r"(?ms)^(?P<indent> *)```(?P<kind>\S*)\n(?P<text>.*?)^ *```$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    """Return the fenced blocks of these kinds, of all kinds when none is named."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            inner = re.sub(rf"(?m)^{match['indent']}", "", match["text"])
            found.append(Block(document, line, match["kind"], inner))
    return [block for block in found if not kinds or block.kind in kinds]


def prose(document: Path) -> str:
    """Return a document without its fenced blocks."""
    return _FENCE.sub("", document.read_text(encoding="utf-8"))


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


# Links


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ +(.+?) *$", prose(document))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings]
    made = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain]
    explicit = re.findall(r"<a (?:name|id)=\"([^\"]+)\"", document.read_text(encoding="utf-8"))
    return {*made, *explicit}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document))
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_document_can_be_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)\)", prose(ROOT / "README.md")))
    assert {name_of(document) for document in ROOT.glob("docs/*.md")} == {
        link for link in linked if link.endswith(".md")
    }


# YAML


def prepared(text: str, directory: Path) -> tuple[str, Mapping[str, str]]:
    """Return a configuration whose secret files and environment variables exist, and that environment."""

    def made(match: re.Match[str]) -> str:
        name = re.sub(r"\W+", "_", match["path"]).strip("_")
        url = "postgresql://user:password@db.example/creatify"
        (directory / name).write_text(f"{url if 'url' in match['key'] else 'value'}\n")
        return f"{match['key']}: {directory / name}"

    environment = {variable: (url_or_value(variable)) for variable in re.findall(r"(?<!\$)\$\{(\w+)\}", text)}
    return re.sub(r"(?P<key>\b(?:api_id|api_key|url)_file): *(?P<path>[^\s#,]*[^\s#,}])", made, text), environment


def url_or_value(variable: str) -> str:
    return "postgresql://user:password@db.example/creatify" if "URL" in variable else "value"


def check_exporter_configuration(text: str, directory: Path) -> None:
    if "workspaces" not in (yaml.safe_load(text) or {}):
        text += "\nworkspaces: [{name: any, api_id: id, api_key: key}]\n"
    ready, environment = prepared(text, directory)
    path = directory / "config.yaml"
    path.write_text(ready, encoding="utf-8")
    config.load(path, environment)


def check_web_configuration(text: str, directory: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(directory / "key_file")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert_file")
    authority.cert_pem.write_to_path(directory / "client_ca_file")
    text = re.sub(r"\b(cert_file|key_file|client_ca_file): *[^\s#]+", rf"\1: {directory}/\1", text)
    path = directory / "web.yaml"
    path.write_text(text, encoding="utf-8")
    config.load_web(path)


def check_prometheus(text: str, directory: Path) -> None:
    (promtool,) = require("promtool")
    document = yaml.safe_load(text)
    document.pop("rule_files", None)  # named relative to where Prometheus runs
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    output(promtool, "check", "config", "--syntax-only", path)


def check_rules(text: str, directory: Path) -> None:
    (promtool,) = require("promtool")
    path = directory / "rules.yml"
    path.write_text(text, encoding="utf-8")
    output(promtool, "check", "rules", "--lint=all", "--lint-fatal", path)


def check_alertmanager(text: str, directory: Path) -> None:
    (amtool,) = require("amtool")
    path = directory / "alertmanager.yml"
    path.write_text(text, encoding="utf-8")
    output(amtool, "check-config", path)


def check_collector(text: str, directory: Path) -> None:
    """The receiver's scrape configuration is Prometheus', and a pipeline names only what is declared."""
    document = yaml.safe_load(text)
    assert set(document) == {"receivers", "exporters", "service"}
    check_prometheus(yaml.safe_dump(document["receivers"]["prometheus"]["config"]), directory)
    for pipeline in document["service"]["pipelines"].values():
        assert set(pipeline["receivers"]) == set(document["receivers"])
        assert set(pipeline["exporters"]) == set(document["exporters"])


def check_object(text: str, directory: Path) -> None:
    validate_manifest(yaml.safe_load(text))


def check_chart_values(text: str, directory: Path) -> None:
    assert render(yaml.safe_load(text))


YAML_CHECKS: tuple[tuple[set[str], Callable[[str, Path], None]], ...] = (
    ({"apiVersion"}, check_object),
    ({"service"}, check_collector),
    ({"scrape_configs", "global"}, check_prometheus),
    ({"groups"}, check_rules),
    ({"route", "receivers"}, check_alertmanager),
    ({"tls_server_config", "basic_auth_users"}, check_web_configuration),
    (set(config.Config.model_fields), check_exporter_configuration),
    (set(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))), check_chart_values),
)


@pytest.mark.parametrize("block", blocks("yaml", "yml"), ids=str)
def test_every_yaml_example_is_valid(block: Block, tmp_path: Path) -> None:
    keys = set(yaml.safe_load(block.text) or {"workspaces"})
    check = next((check for known, check in YAML_CHECKS if keys & known), None)
    assert check is not None, f"no check knows a document with {sorted(keys)}"
    check(block.text, tmp_path)


def test_the_example_configuration_passes_config_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, environment = prepared((ROOT / "config.example.yaml").read_text(encoding="utf-8"), tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main([f"--config.file={path}", "--config.check"]) == 0


# Commands


def _only(*allowed: str) -> Callable[[list[str]], None]:
    def check(arguments: list[str]) -> None:
        assert arguments[0] in allowed, arguments

    return check


def check_exporter_flags(arguments: list[str]) -> None:
    """Every flag is one that the program has."""
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.split("=")[0] in flags(), argument


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "exporter.py":
        check_exporter_flags(arguments[1:])
    else:
        assert arguments[0] == "-m", arguments
        module = ROOT / arguments[1].replace(".", "/")
        in_repository = module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        assert in_repository or arguments[1] in {"venv", "pip"}, arguments


def check_make(arguments: list[str]) -> None:
    output("make", "--dry-run", *arguments, cwd=ROOT)


def check_paths(arguments: list[str]) -> None:
    """Every path into this repository is there."""
    for argument in arguments:
        path = re.sub(r"^/opt/creatify-exporter/?", "", argument)
        if re.match(r"(deploy|prometheus|grafana|docs|tests|benchmarks|requirements)\b", path):
            assert (ROOT / path).exists(), argument


def check_docker(arguments: list[str]) -> None:
    check_paths(arguments)
    verb, *rest = arguments
    if verb == "build":
        declared = re.findall(r"(?m)^ARG (\w+)", (ROOT / "Dockerfile").read_text())
        given = [rest[i + 1].split("=")[0] for i, word in enumerate(rest) if word == "--build-arg"]
        assert set(given) <= set(declared)
        assert rest[-1] == "."
    elif verb == "run":
        image = rest.index("creatify-exporter", rest.index("--name") + 2 if "--name" in rest else 0)
        check_exporter_flags(rest[image + 1 :])
    else:
        assert verb in {"compose", "volume", "kill"}, arguments


def check_helm(arguments: list[str]) -> None:
    """The chart is there, and renders with what `--set` says."""
    check_paths(arguments)
    verb, *rest = arguments
    name, chart, *options = rest
    assert (verb in {"install", "upgrade"}, chart) == (True, str(CHART.relative_to(ROOT)))
    values: dict[str, Any] = {}
    for option in options:
        flag, _, given = option.partition("=")
        assert flag in {"--set", "--namespace", "--values"}, option
        if flag == "--set":
            values = {**values, **helm.parse_set_string(given)}
    assert render(values, name)


def check_curl(arguments: list[str]) -> None:
    """What is asked for is an endpoint of the exporter or of Prometheus."""
    urls = [argument for argument in arguments if re.match(r"https?://", argument)]
    assert urls, arguments
    for url in urls:
        path = re.sub(r"https?://[^/]+|\?.*", "", url) or "/"
        assert path in ENDPOINTS or path.startswith("/api/v1/"), url


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "creatify-exporter": check_exporter_flags,
    "curl": check_curl,
    "docker": check_docker,
    "helm": check_helm,
    "export": lambda arguments: None,
    "install": check_paths,
    "kill": _only("-HUP"),
    "kubectl": check_paths,
    "make": check_make,
    "pre-commit": _only("install"),
    "mkdir": check_paths,
    "mv": check_paths,
    "pip": check_paths,
    "promtool": check_paths,
    "pytest": check_paths,
    "python": check_python,
    "python3": check_python,
    "systemctl": _only("daemon-reload", "enable", "reload", "restart"),
}

ENDPOINTS = {"/", "/metrics", "/-/healthy", "/-/ready", "/-/reload", "/sd"}


def commands(block: Block) -> Iterator[list[str]]:
    joined = re.sub(r"\\\n\s*", " ", block.text)
    for line in joined.splitlines():
        for part in re.split(r"\s*(?:\||&&|;)\s+", line):
            words = shlex.split(part, comments=True)
            if words:
                yield words


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_every_command_exists_and_names_things_that_exist(block: Block) -> None:
    output("bash", "-n", "-c", block.text)
    for program, *arguments in commands(block):
        check = COMMANDS.get(Path(program).name)
        assert check is not None, f"no check knows {program}"
        check(arguments)


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {"sh", "yaml", "promql", "sql", "python", "json", "alloy", "text", ""}
    assert [(str(block), block.kind) for block in blocks() if block.kind not in kinds] == []


ALLOY = {
    "prometheus.scrape": {"targets", "job_name", "scrape_interval", "scrape_timeout", "forward_to"},
    "prometheus.remote_write": {"endpoint"},
    "endpoint": {"url"},
}


def test_every_alloy_example_names_components_and_arguments_that_exist() -> None:
    (block,) = blocks("alloy")
    declared, inside = set(), [""]
    for line in block.text.splitlines():
        if opened := re.fullmatch(r' *([a-z_.]+)(?: "(\w+)")? \{', line):
            assert opened[1] in ({*ALLOY} - {"endpoint"} if inside == [""] else ALLOY[inside[-1]]), line
            inside.append(opened[1])
            declared.add(f"{opened[1]}.{opened[2]}")
        elif line.strip() == "}":
            inside.pop()
        elif line:
            assert re.match(r" *(\w+) *= [\"\[]", line), line
            assert line.split()[0] in ALLOY[inside[-1]], line
    assert inside == [""]
    for target in re.findall(r"forward_to += \[([\w.]+)\.receiver\]", block.text):
        assert target in declared


def test_the_recipes_rules_say_what_they_promise(tmp_path: Path) -> None:
    """100 credits used in a day at 0.05 are 5 dollars; the balance fell by 400 in spite of a refill: 3/4 by others."""
    (promtool,) = require("promtool")
    rules = [block.text for block in blocks("yaml") if block.document.name == "recipes.md" and "groups:" in block.text]
    assert len(rules) == 2
    files = [tmp_path / f"{number}.yml" for number, _ in enumerate(rules)]
    for path, text in zip(files, rules, strict=True):
        path.write_text(text, encoding="utf-8")
    half = 1440
    series = {
        'creatify_text_generator_credits_used_total{workspace="w",model="m"}': "0x1440 " + "0+0.0694444444x1440",
        'creatify_remaining_credits{workspace="w"}': f"1000x{half} 1000-0.2777777778x720 5800-0.2777777778x719",
    }
    queries = {"workspace:creatify_cost_dollars:increase1d": 5, "workspace:creatify_other_products:ratio1d": 0.75}
    test = {
        "rule_files": [str(path) for path in files],
        "evaluation_interval": "30m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f"round({name}, 0.05)",
                        "eval_time": "48h",
                        "exp_samples": [{"labels": '{workspace="w"}', "value": value}],
                    }
                    for name, value in queries.items()
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test), encoding="utf-8")
    output(promtool, "test", "rules", tmp_path / "test.yml")


# Metrics


def series_names() -> set[str]:
    """Return every name of ours that a series or a recorded rule can have."""
    names = {metric.name for metric in METRICS}
    for metric in METRICS:
        if metric.type == "histogram":
            names |= {f"{metric.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_metric_that_a_document_names_is_one_that_we_have(document: Path) -> None:
    named = set(re.findall(r"(?<![\w:])creatify_[a-z_]*[a-z]\b(?!/)", document.read_text(encoding="utf-8")))
    modules = {"creatify_exporter", "creatify_up"}
    without_total = {name.removesuffix("_total") for name in series_names()}
    assert named - series_names() - without_total - modules == set()


@pytest.mark.parametrize("block", blocks("promql"), ids=str)
def test_every_query_is_valid(block: Block) -> None:
    for part in re.split(r"(?m)^#.*\n|\n\n+", block.text):
        # A query goes on as long as its lines are indented.
        for query in re.split(r"\n(?=[^\s)])", part.strip()):
            if query:
                promql_parser.parse(query)


def test_every_json_example_is_valid() -> None:
    for block in blocks("json"):
        json.loads(block.text)


@pytest.mark.process
def test_the_sample_in_the_readme_is_what_the_demo_shows(tmp_path: Path) -> None:
    (sample,) = [block for block in blocks("text") if block.document.name == "README.md"]

    def series(text: str) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        families = text_string_to_metric_families(text)
        return {(each.name, tuple(sorted(each.labels.items()))) for family in families for each in family.samples}

    wanted = series(sample.text)
    assert len(wanted) >= 10
    with Exporter(tmp_path, "--demo") as demo:
        eventually(lambda: wanted <= series(demo.scrape().text), 60, "every series of the sample")


def test_every_panel_that_the_runbook_names_is_in_the_dashboard() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    named = {re.sub(r"\s+", " ", name) for name in re.findall(r"(?<!\*)\*(\w[^*]*)\*(?!\*)", text)}
    dashboard = (ROOT / "grafana/dashboards/creatify-text-generator.json").read_text(encoding="utf-8")
    assert len(named) >= 10
    assert named - set(re.findall(r'"title": "([^"]+)"', dashboard)) == set()


# Flags, endpoints, targets


@cache
def help_text() -> str:
    return output(sys.executable, ROOT / "exporter.py", "--help")


def flags() -> set[str]:
    """Return the flags that `--help` tells."""
    return set(re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?", help_text()))


def table(document: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    text = (ROOT / document).read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?m)(?:^\|.*\n)+", text)
    assert rows is not None
    return [re.split(r" *(?<!\\)\| *", row)[1:-1] for row in rows[0].splitlines()[2:]]


def test_the_documented_flags_are_those_of_the_help_text() -> None:
    documented = [row[0].strip("`") for row in table("docs/operation.md", "## Flags")]
    assert sorted(documented) == sorted(flags())


def test_the_documented_defaults_are_those_of_the_help_text() -> None:
    text = re.sub(r"\s+", " ", help_text())
    for flag, default, *_ in table("docs/operation.md", "## Flags"):
        options = re.search(re.escape(flag.strip("`")) + r" (?:(?! --).)*\(default: ([^)]+)\)", text)
        assert (options[1] if options else "") == default.strip("`"), flag


@pytest.mark.process
def test_the_documented_endpoints_are_those_that_answer(tmp_path: Path) -> None:
    documented = {row[0].strip("`") for row in table("docs/operation.md", "## Endpoints")}
    assert documented == ENDPOINTS
    with Exporter(tmp_path, "--demo") as demo:
        answers = {path: demo.get(path).status_code for path in documented}
        assert demo.get("/-/nothing").status_code == 404
    assert answers == dict.fromkeys(documented, 200) | {"/-/reload": 405}


def test_every_make_target_explains_itself_and_no_other_is_documented() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"(?m)^\.PHONY: (.+)$", makefile)
    helped = re.findall(r"(?m)^([a-z-]+):.* ## \S", makefile)
    assert sorted(helped) == sorted(phony.split())
    assert [line.split()[1] for line in output("make", "help", cwd=ROOT).splitlines()] == helped
    for document in DOCUMENTS:
        named = re.findall(r"(?m)(?:`|^)make ([a-z-]+)", document.read_text(encoding="utf-8"))
        assert set(named) <= set(helped), document


# The rest


def tracked() -> list[Path]:
    """Return the files of the repository, with those that are not committed yet."""
    names = output("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_the_layout_names_every_module() -> None:
    (layout,) = [block for block in blocks("text") if block.document.name == "development.md"]
    named = re.findall(r"(?m)^  (\w+\.py) ", layout.text)
    assert sorted(named) == sorted(path.name for path in ROOT.glob("creatify_exporter/[a-z]*.py"))


def test_the_tests_of_every_module_are_where_the_document_says() -> None:
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    (place,) = re.findall(r"(?s)The tests of a module are in .+?\n\n", text)
    moved = {
        module: file
        for modules, file in re.findall(r"((?:`\w+`(?: and )?)+) in `(test_[\w*]+\.py)`", place)
        for module in re.findall(r"`(\w+)`", modules)
    }
    modules = {path.stem for path in ROOT.glob("creatify_exporter/[a-z]*.py")}
    assert set(moved) == {module for module in modules if not (ROOT / "tests" / f"test_{module}.py").exists()}
    for file in moved.values():
        assert [*ROOT.glob(f"tests/{file}")], file


def defines(sources: Iterable[str], name: str) -> bool:
    """Tell whether one of these modules defines a name; of a dotted one every part."""

    def defined(part: str, source: str) -> bool:
        pattern = rf"(?m)^ *(?:(?:class|(?:async )?def) {part}\b|{part}\b[^=(\n]*[:=])|self\.{part}\b"
        return bool(re.search(pattern, source))

    return any(all(defined(part, source) for part in name.split(".")) for source in sources)


def test_the_places_of_changes_are_where_the_table_says() -> None:
    files = [path.relative_to(ROOT) for path in tracked()]
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    alerts = (ROOT / "prometheus" / "alerts.yml").read_text(encoding="utf-8")

    def exists(place: str) -> bool:
        return any(f"/{place.rstrip('/')}/" in f"/{path}/" for path in files)

    def sources(place: str) -> list[str]:
        """Return the modules in a directory or of a name: where the exporter has one of it, that one."""
        found = [path for path in files if path.suffix == ".py" and f"/{place}/" in f"/{path}/"]
        ours = [path for path in found if path.parts[0] == "creatify_exporter"]
        return [(ROOT / path).read_text(encoding="utf-8") for path in ours or found]

    everywhere = [*sources("creatify_exporter"), *sources("grafana")]
    rows = table("docs/development.md", "## Where to change what")
    assert len(rows) >= 30
    for cell in (cell for _, *cells in rows for cell in cells):
        listed = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?: \([^)`]*\))?(?:, |\b|$)?)+)", cell)
        named = re.findall(r"`([\w.]+)`[\w ]* \(((?:`[\w/]+\.py`(?:, )?)+)\)", cell)
        places = [(file, name) for file, names in listed for name in re.findall(r"`([\w.]+)`", names)]
        places += [(file, name) for name, files_ in named for file in re.findall(r"`([^`]+)`", files_)]
        for file, name in places:
            assert defines(sources(file), name), (file, name)
        for word in {*re.findall(r"`([^`]+)`", cell)} - {name for _, name in places}:
            if word.startswith("Creatify"):
                assert f"alert: {word}\n" in alerts, word
            elif word.startswith("--"):
                assert word in flags(), word
            elif not word.startswith("make "):
                in_chart = re.search(rf"(?m)^ *{word.rpartition('.')[2]}:", values)
                assert exists(word) or defines(everywhere, word) or in_chart, word


def test_the_changelog_tells_this_version() -> None:
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_file_names_the_host_of_a_package_registry() -> None:
    hosts = [
        *("pypi:org", "pythonhosted:org", "npmjs:org", "npmjs:com", "yarnpkg:com", "docker:io", "docker:com"),
        *("ghcr:io", "quay:io", "gcr:io", "deb.debian:org", "crates:io", "conda.anaconda:org"),
    ]
    host = re.compile(rb"|".join(re.escape(name.replace(":", ".")).encode() for name in hosts))
    files = tracked()
    assert len(files) > 20
    assert [name_of(path) for path in files if host.search(path.read_bytes())] == []

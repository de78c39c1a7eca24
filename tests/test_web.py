"""The endpoints, asked in this process; the server around them is test_web_process.py's subject."""

import base64
import gzip
import hashlib
import json
import re

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from creatify_exporter.config import ConfigError
from creatify_exporter.metrics import WorkspaceView
from creatify_exporter.web import (
    OPENMETRICS,
    TEXT,
    allows_gzip,
    parse_telemetry_path,
    prefers_openmetrics,
    scrape_timeout,
)
from tests.support.asgi import ask_once, header
from tests.support.webhost import FakeSite, app_of

PROMETHEUS_2_42 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_3_PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.7," + PROMETHEUS_3
)
PROMETHEUS_3_CLASSIC = "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.2"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


class TestRoutes:
    @pytest.mark.parametrize("path", ["/metrics", "/", "/-/healthy", "/-/ready", "/sd"])
    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
    def test_other_methods_are_refused_with_those_allowed(self, path: str, method: str) -> None:
        answer = ask_once(app_of(FakeSite()), path, method=method)
        assert answer.status == 405
        assert sorted(answer.headers["allow"].split(", ")) == ["GET", "HEAD"]

    @pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS"])
    @pytest.mark.parametrize("lifecycle", [True, False])
    def test_reload_is_refused_with_other_methods_whatever_the_lifecycle_flag(
        self, method: str, lifecycle: bool
    ) -> None:
        site = FakeSite(lifecycle=lifecycle)
        answer = ask_once(app_of(site), "/-/reload", method=method)
        assert (answer.status, answer.headers["allow"], site.reloads) == (405, "POST", 0)

    @pytest.mark.parametrize("path", ["/metric", "/metrics/", "//metrics", "/sd/", "/-/", "", "*", "/\0", "/\ufffd"])
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_anything_else_is_not_found(self, path: str, method: str) -> None:
        assert ask_once(app_of(FakeSite()), path, method=method).status == 404

    @pytest.mark.parametrize("path", ["/metrics", "/", "/-/healthy", "/-/ready", "/sd"])
    def test_head_tells_the_length_of_get(self, path: str) -> None:
        app = app_of(FakeSite())
        got, head = ask_once(app, path), ask_once(app, path, method="HEAD")
        assert (head.status, head.headers) == (got.status, got.headers)
        assert int(head.headers["content-length"]) == len(got.body)

    def test_nobody_sees_the_answer_to_head(self) -> None:
        site = FakeSite()
        for method in ("HEAD", "GET"):
            ask_once(app_of(site), "/metrics", method=method)
        assert site.seen == [False, True]

    @pytest.mark.parametrize("path", ["/metrics", "/", "/-/healthy", "/-/ready", "/sd", "/nowhere"])
    def test_every_answer_forbids_what_a_browser_could_do_with_it(self, path: str) -> None:
        headers = ask_once(app_of(FakeSite()), path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
        assert "script-src" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cache-control"] == "no-store"
        assert headers["server"] == "creatify-exporter"

    def test_the_telemetry_path_moves(self) -> None:
        app = app_of(FakeSite(telemetry_path="/deep/er"))
        assert ask_once(app, "/deep/er").body == b"creatify_up 1\n"
        assert ask_once(app, "/metrics").status == 404
        assert '<a href="deep/er">' in ask_once(app, "/").text

    def test_a_telemetry_path_of_the_root_takes_the_place_of_the_status_page(self) -> None:
        assert ask_once(app_of(FakeSite(telemetry_path="/")), "/").body == b"creatify_up 1\n"

    @pytest.mark.parametrize("path", ["", "metrics", "//evil", "/a//b", "/{x}", "/a b", "/a?b", "/sd", "/-/reload"])
    def test_a_telemetry_path_that_cannot_be_served_is_an_error(self, path: str) -> None:
        with pytest.raises(ValueError, match="must be a path like /metrics"):
            parse_telemetry_path(path)


class TestMetrics:
    @pytest.mark.parametrize(
        ("query", "names"),
        [
            (b"", None),
            (b"workspace=sales", {"sales"}),
            (b"workspace=sales&workspace=marketing&workspace=sales&other=1", {"sales", "marketing"}),
            (b"workspace=%73ales", {"sales"}),
        ],
    )
    def test_workspaces_are_selected_by_name(self, query: bytes, names: set[str] | None) -> None:
        site = FakeSite()
        assert ask_once(app_of(site), query=query).status == 200
        assert site.scrapes[0][0] == names

    @pytest.mark.parametrize(
        "query",
        [
            b"workspace=nobody",
            b"workspace=sales&workspace=nobody",
            b"workspace=",
            b"workspace=%00%ff%",
            b"workspace=\xff",
        ],
    )
    def test_an_unknown_workspace_is_not_found_and_not_echoed(self, query: bytes) -> None:
        site = FakeSite()
        answer = ask_once(app_of(site), query=query)
        assert (answer.status, answer.body) == (404, b"unknown workspace\n")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert site.scrapes == []

    @pytest.mark.parametrize(
        ("accept", "content_type"),
        [
            ([], TEXT),
            (["*/*"], TEXT),
            ([BROWSER], TEXT),
            ([PROMETHEUS_2_42], OPENMETRICS),
            ([PROMETHEUS_3], OPENMETRICS),
            ([PROMETHEUS_3_PROTOBUF], OPENMETRICS),
            ([PROMETHEUS_3_CLASSIC], TEXT),
            (PROMETHEUS_2_42.split(","), OPENMETRICS),
            (["application/openmetrics-text"], OPENMETRICS),
            (["Application/OpenMetrics-Text; Version=1.0.0; Q=1"], OPENMETRICS),
            (["application/openmetrics-text;q=0"], TEXT),
            (["application/openmetrics-text;q=0.000"], TEXT),
            (["application/openmetrics-text;q=nan"], TEXT),
            (["application/openmetrics-text;q=2"], TEXT),
            (["application/openmetrics-text;q=0.5,text/plain;q=0.5"], OPENMETRICS),
            (["application/openmetrics-text;q=0.5,text/plain;q=0.6"], TEXT),
            (["application/openmetrics-text;q=0.5,text/*;q=0.6"], TEXT),
            (["application/openmetrics-text;q=0.5,*/*;q=0.1,text/plain;q=0"], OPENMETRICS),
            (["application/openmetrics-textual"], TEXT),
        ],
    )
    def test_the_format_is_what_the_client_likes_best(self, accept: list[str], content_type: str) -> None:
        site = FakeSite()
        answer = ask_once(app_of(site), "/metrics", *header("Accept", accept))
        assert answer.headers["content-type"] == content_type
        assert site.scrapes[0][2] == (content_type == OPENMETRICS)
        assert answer.headers["vary"] == "Accept, Accept-Encoding"

    @given(st.text(st.characters(max_codepoint=255)) | st.from_regex(r"([a-z*/]{1,20}(;q=[0-9.]{0,5})?,?){0,5}"))
    def test_no_accept_header_is_too_odd(self, value: str) -> None:
        assert prefers_openmetrics(value) in {True, False}
        assert allows_gzip(value) in {True, False}

    @pytest.mark.parametrize(
        ("accepted", "compressed"),
        [
            ([], False),
            (["gzip"], True),
            (["gzip, deflate, br"], True),
            (["deflate", "x-gzip"], True),
            (["*"], True),
            (["gzip;q=0.1"], True),
            (["gzip;q=0"], False),
            (["gzip;q=0, *"], False),
            (["*;q=0"], False),
            (["identity"], False),
        ],
    )
    @pytest.mark.parametrize("size", [0, 1, 1000, 100_000])
    def test_answers_are_compressed_for_those_who_allow_it(
        self, accepted: list[str], compressed: bool, size: int
    ) -> None:
        site = FakeSite(body=b"#" * size)
        answer = ask_once(app_of(site), "/metrics", *header("Accept-Encoding", accepted))
        assert answer.headers.get("content-encoding") == ("gzip" if compressed else None)
        assert (gzip.decompress(answer.body) if compressed else answer.body) == site.body
        assert int(answer.headers["content-length"]) == len(answer.body)

    @pytest.mark.parametrize(
        ("header", "offset", "seconds"),
        [
            (None, 0.5, 9.5),
            ("", 0.5, 9.5),
            ("5", 0.5, 4.5),
            ("0.6", 0.5, 0.3),
            ("1", 5, 0.5),
            ("10", 0, 10),
            ("1e1", 0.5, 9.5),
            ("0", 0.5, 9.5),
            ("-3", 0.5, 9.5),
            ("nan", 0.5, 9.5),
            ("inf", 0.5, 9.5),
            ("1e999", 0.5, 9.5),
            ("soon", 0.5, 9.5),
            ("5\0", 0.5, 9.5),
            ("1e300", 0.5, 3599.5),
        ],
    )
    def test_the_answer_leaves_before_the_scrape_times_out(
        self, header: str | None, offset: float, seconds: float
    ) -> None:
        assert scrape_timeout(header, offset) == pytest.approx(seconds)

    @given(st.text() | st.floats().map(str), st.floats(0, 1e6))
    def test_the_time_for_a_scrape_is_always_positive_and_finite(self, header: str, offset: float) -> None:
        assert 0 < scrape_timeout(header, offset) <= 3600

    def test_the_scrape_is_told_its_time(self) -> None:
        site = FakeSite()
        ask_once(app_of(site, timeout_offset=2), "/metrics", ("X-Prometheus-Scrape-Timeout-Seconds", "12"))
        assert site.scrapes == [(None, 10.0, False)]

    def test_an_unexpected_error_tells_nothing(self) -> None:
        site = FakeSite(failure=RuntimeError("a secret"))
        with structlog.testing.capture_logs() as logs:
            answer = ask_once(app_of(site))
        assert (answer.status, answer.body) == (500, b"internal error\n")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert logs == [{"event": "request failed", "error": "RuntimeError", "log_level": "error"}]

    def test_an_answer_in_openmetrics_is_what_its_content_type_says(self) -> None:
        site = FakeSite(body=b"# TYPE creatify_up gauge\ncreatify_up 1.0\n# EOF\n")
        answer = ask_once(app_of(site), "/metrics", ("Accept", PROMETHEUS_2_42))
        assert [family.name for family in text_string_to_metric_families(answer.text)] == ["creatify_up"]


class TestOperation:
    def test_healthy_asks_nobody(self) -> None:
        site = FakeSite(failure=RuntimeError(), is_ready=False)
        assert ask_once(app_of(site), "/-/healthy").status == 200
        assert site.scrapes == []

    @pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
    def test_ready_when_the_ledger_answers(self, ready: bool, status: int) -> None:
        assert ask_once(app_of(FakeSite(is_ready=ready)), "/-/ready").status == status

    def test_reload_needs_the_lifecycle_flag(self) -> None:
        site = FakeSite()
        answer = ask_once(app_of(site), "/-/reload", method="POST")
        assert (answer.status, site.reloads) == (403, 0)
        assert "--web.enable-lifecycle" in answer.text

    def test_reload_reloads(self) -> None:
        site = FakeSite(lifecycle=True)
        assert ask_once(app_of(site), "/-/reload", method="POST").status == 200
        assert site.reloads == 1

    def test_an_invalid_configuration_is_told_with_all_its_errors(self) -> None:
        errors = [("workspaces[0].api_id", "is missing"), ("api.timeout", "must be a duration like 30s")]
        answer = ask_once(app_of(FakeSite(lifecycle=True, failure=ConfigError(errors))), "/-/reload", method="POST")
        assert answer.status == 500
        assert answer.text == "workspaces[0].api_id: is missing\napi.timeout: must be a duration like 30s\n"
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"

    def test_a_failing_reload_tells_nothing(self) -> None:
        answer = ask_once(app_of(FakeSite(lifecycle=True, failure=OSError("/secret"))), "/-/reload", method="POST")
        assert (answer.status, answer.body) == (500, b"internal error\n")


class TestServiceDiscovery:
    def test_each_workspace_is_a_target_of_its_own(self) -> None:
        answer = ask_once(app_of(FakeSite()), "/sd", ("Host", "exporter-0:9877"))
        assert answer.headers["content-type"] == "application/json"
        assert json.loads(answer.body) == [
            {
                "targets": ["exporter-0:9877"],
                "labels": {"__param_workspace": name, "instance": f"exporter-0:9877/{name}"},
            }
            for name in ("marketing", "sales")
        ]

    def test_path_and_scheme_are_told_where_prometheus_would_not_guess_them(self) -> None:
        site = FakeSite(telemetry_path="/m", workspaces=[WorkspaceView(name="a")])
        answer = ask_once(app_of(site), "/sd", ("Host", "e"), scheme="https")
        assert json.loads(answer.body)[0]["labels"] == {
            "__param_workspace": "a",
            "instance": "e/a",
            "__metrics_path__": "/m",
            "__scheme__": "https",
        }

    @pytest.mark.parametrize("host", ["a", "10.0.0.1:80", "[::1]:9877", "[fe80::1]", "a_b-c.example:65535"])
    def test_the_host_is_that_of_the_request(self, host: str) -> None:
        assert json.loads(ask_once(app_of(FakeSite()), "/sd", ("Host", host)).body)[0]["targets"] == [host]

    @pytest.mark.parametrize(
        "host", ["", "a b", "a/b", "\xff", "a:port", "<script>", "[::1", "a" * 300, "user@a", "a\r"]
    )
    @pytest.mark.parametrize(
        ("server", "target"),
        [
            (("127.0.0.1", "9877"), "127.0.0.1:9877"),
            (("::1", "9877"), "[::1]:9877"),
            (("::", "9877"), "localhost:9877"),
        ],
    )
    def test_a_host_that_is_none_gives_way_to_the_address(
        self, host: str, server: tuple[str, str], target: str
    ) -> None:
        answer = ask_once(app_of(FakeSite()), "/sd", ("Host", host), server=server)
        assert json.loads(answer.body)[0]["targets"] == [target]


class TestStatusPage:
    def test_it_is_renewed_unless_it_is_paused_and_starts_no_listing(self) -> None:
        site = FakeSite()
        answers = [ask_once(app_of(site), "/", query=query) for query in (b"", b"pause")]
        assert [answer.headers.get("refresh") for answer in answers] == ["30", None]
        assert [answer.headers["content-type"] for answer in answers] == ["text/html; charset=utf-8"] * 2
        assert site.scrapes == []

    def test_it_links_to_every_endpoint(self) -> None:
        app = app_of(FakeSite())
        links = set(re.findall(r'href="([^"?:]*)[?"]', ask_once(app, "/").text))
        assert links >= {"metrics", "-/healthy", "-/ready", "sd"}
        assert [ask_once(app, f"/{link}").status for link in links if link and link != "./"] == [200] * 4

    def test_the_policy_allows_its_style_and_nothing_else(self) -> None:
        answer = ask_once(app_of(FakeSite()), "/")
        [style] = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = (
            "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["content-security-policy"] == policy.format(digest)

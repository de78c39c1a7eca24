"""The status page: what it says in every state; the browser's view of it is test_status_browser.py's subject."""

import re
import sys
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from creatify_exporter.status import duration, number, page_of, render_page, utc
from tests.support.statuses import COUNTED, EXPORTER, FAILED, NOW, STATES, down, first, listing, totals, well


class _Text(HTMLParser):
    """Collect the words that a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = ""
        self._style = False

    def handle_starttag(self, tag: str, _attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        self.shown += "" if tag == "wbr" else " "

    def handle_endtag(self, _tag: str) -> None:
        self._style = False
        self.shown += " "

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.shown += data


def page(state: str, *, paused: bool = False) -> str:
    views, exporter = STATES[state]
    return render_page(views, exporter, metrics="metrics", now=NOW, paused=paused)


def text(state: str) -> str:
    parser = _Text()
    parser.feed(page(state))
    return " ".join(parser.shown.split())


@pytest.mark.parametrize(
    ("state", "level", "said"),
    [
        ("first", "waiting", ["Waiting for the first listing", "No listing yet.", "no listing to tell from"]),
        ("well", "good", ["Both workspaces work", "2 of 2", "Credits left 30,096", "since counting began"]),
        ("one-down", "bad", ["1 of 5 workspaces not working: sales-emea", "Check api_id and api_key", "1 h 6 min ago"]),
        ("all-down", "bad", ["No workspace works", "0 of 2", "No connection to the API", 'cause="timeout"']),
        (
            "ledger-down",
            "bad",
            [
                "Listings work, but nothing is being counted",
                "out of reach",
                "last reload refused",
                "24 \u2013 marketing",
            ],
        ),
        (
            "back-off",
            "bad",
            ["no request for listings for another 25 s", "no request for the balance for another 1 min"],
        ),
        ("stale", "bad", ["No recent listing", "nobody has asked for metrics lately", "Listed 1 h 6 min ago"]),
        ("no-failures", "good", ["The workspace works", "Nothing has failed.", "Oldest unfinished none"]),
        ("no-models", "good", ["No task is listed.", "nothing has finished yet", "Credits left 0"]),
        (
            "clock-off",
            "warning",
            [
                "the ages below are wrong by as much",
                "clock is 2 h behind that of the API",
                "Unsettled tasks 7",
                "Clock 2 h behind",
                "Malformed records 3",
                "Clock right",
                "Unsettled tasks 0",
            ],
        ),
        ("many", "good", ["All 20 workspaces work", "20 models of workspace-19", "20 of 20"]),
    ],
)
def test_each_state_is_told_in_words(state: str, level: str, said: list[str]) -> None:
    shown = text(state)
    assert f'<header class="{level}">' in page(state)
    assert [words for words in said if words not in shown] == []


def test_what_needs_somebody_comes_first() -> None:
    views = [well("a"), first("b"), down("c"), well("d", up=False), well("e")]
    shown = page_of(views, EXPORTER, metrics="metrics", now=NOW, paused=False)
    assert [(card.view.name, card.state) for card in shown.cards] == [
        *(("c", "down"), ("d", "stale"), ("b", "waiting"), ("a", "up"), ("e", "up")),
    ]


def test_figures_are_those_of_the_newest_listings_and_of_the_ledger() -> None:
    models = ["a", "b"]
    views = [
        well("one", models, listing=listing(models, done=10, failed={"overloaded": 3, "other": 2})),
        well("two", ["a"], listing=listing(["a"], done=4, failed={"overloaded": 1}), totals=totals(["a"], 0.75, {})),
        down("three", totals=None),
    ]
    shown = page_of(views, EXPORTER, metrics="metrics", now=NOW, paused=False)
    assert dict(shown.tasks.counts) == {"done": 19, "failed": 6, "pending": 6, "running": 15}
    assert shown.tasks.failed_share == 24.0
    assert NOW - (shown.tasks.oldest or 0) == 210
    assert shown.oldest == ("one", "b")
    assert (shown.credits_used, shown.credits_left) == (10_385.0, 30_096.0)
    rows = [(one.name, one.listed, one.counted, one.most) for one in shown.reasons]
    assert rows[:2] == [("overloaded", 4, 88, "one"), ("other", 2, 0, "one")]
    assert {name: counted for name, _, counted, *_ in rows if counted} == COUNTED


@pytest.mark.parametrize("state", ["well", "many", "markup"])
def test_a_bar_is_as_long_as_its_parts_and_the_longest_reason_fills_its_cell(state: str) -> None:
    bars = [
        re.findall(r"(?:x=\"([\d.]+)%\" )?width=\"([\d.]+)%\"", bar) for bar in re.findall("<svg.*?</svg>", page(state))
    ]
    of_tasks = [bar for bar in bars if bar[0][0]]
    assert len(of_tasks) > 1
    for bar in of_tasks:
        ends = [0.0, *(float(x) + float(width) for x, width in bar)]
        assert [float(x) for x, _ in bar] == pytest.approx(ends[:-1], abs=0.01)
        assert ends[-1] == pytest.approx(100, abs=0.01)
    assert max(float(width) for [(x, width)] in (bar for bar in bars if len(bar) == 1) if not x) == 100


def test_each_reason_says_who_has_to_act() -> None:
    shown = text("well")
    assert "content_blocked You: what was sent is wrong" in shown
    assert "insufficient_credits Your Creatify account" in shown
    assert f"quota_exceeded Creatify or the model provider {2 * FAILED['quota_exceeded']}" in shown


@pytest.mark.parametrize(
    ("changes", "empty_in"),
    [
        ({}, 9 * 86400 * 15_048 / 10_384.25),
        ({"balance": 0.0}, 0),
        ({"balance": None}, None),
        ({"totals": None}, None),
        ({"totals": totals(["a"], 0, {})}, None),
        ({"totals": totals(["a"], 50, {}, days=0.03)}, None),
        ({"totals": totals(["a"], 0.001, {})}, None),
    ],
)
def test_when_credits_run_out_is_told_only_where_it_can_be(changes: dict[str, Any], empty_in: float | None) -> None:
    [card] = page_of([well(**changes)], EXPORTER, metrics="metrics", now=NOW, paused=False).cards
    assert card.empty_in == pytest.approx(empty_in)


def test_text_from_outside_stays_text() -> None:
    shown = page("markup")
    assert "<script" not in shown
    assert "<b>" not in shown
    assert shown.count("&lt;script&gt;") >= 6
    assert "?workspace=%3Cscript%3Ealert%281%29%3C/script%3E" in shown


@pytest.mark.parametrize("state", STATES)
def test_nothing_has_to_be_opened_as_its_renewal_would_close_it_again(state: str) -> None:
    shown = page(state)
    assert "<details" not in shown
    targets = re.findall(r'href="#([^"]+)"', shown)
    assert len(targets) == sum(bool(view.listing and view.listing.cells) for view in STATES[state][0])
    assert all(shown.count(f'id="{target}"') == 1 for target in targets)


@pytest.mark.parametrize("state", STATES)
def test_the_page_needs_neither_scripts_nor_inline_styles(state: str) -> None:
    shown = page(state)
    assert not re.search(r"<script|\sstyle=|\son[a-z]+=|javascript:|src=", shown)
    assert len(re.findall("<h1", shown)) == 1


def test_twenty_workspaces_of_twenty_models_take_less_than_100_ms() -> None:
    page("many")  # which compiles the template
    took, tracing = [], sys.gettrace()
    sys.settrace(None)  # measuring coverage takes as long again
    try:
        for _ in range(10):
            begin = time.process_time()
            page("many")
            took.append(time.process_time() - begin)
    finally:
        sys.settrace(tracing)
    assert min(took) < 0.1, took


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((-5, "0 s"), (0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h")),
        *((3661, "1 h 1 min"), (3601, "1 h"), (86_400, "1 d"), (90_000, "1 d 1 h"), (40 * 86_400, "40 d")),
    ],
)
def test_time_spans_have_at_most_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.5, "0.50"),
        (12.0, "12"),
        (999.999, "1,000.00"),
        (1234.5, "1,234"),
        (-3.25, "-3.25"),
        (1e9, "1,000,000,000"),
    ],
)
def test_numbers_are_grouped(value: float, words: str) -> None:
    assert number(value) == words


def test_points_in_time_are_utc() -> None:
    assert utc(NOW) == "2026-11-25 01:26:40 UTC"


def test_a_paused_page_says_how_to_go_on() -> None:
    assert '<a href="?pause">Pause</a>' in page("well")
    assert "It stays as it is." in page("well", paused=True)

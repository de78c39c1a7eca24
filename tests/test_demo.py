"""The simulated API of the demo and of the tests: it follows Creatify's schema and is deterministic."""

import gc
import http.client
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from creatify_exporter.demo import API_ID, API_KEY, CREDENTIALS, LIST_PATH, SPIKE, demo
from tests.support.simulation import SimulatedApi, Simulation, Truth

API = Path(__file__).parent / "data" / "api"
START = 1_790_000_000.25
HEADERS = {"X-API-ID": API_ID, "X-API-KEY": API_KEY}


def component(file: str, name: str) -> Draft202012Validator:
    """Return a validator for a component of an OpenAPI 3.0 document (none of them uses `nullable`)."""
    document = yaml.safe_load((API / file).read_text())
    formats = FormatChecker(formats=())
    formats.checks("uuid", raises=ValueError)(lambda value: isinstance(value, str) and len(value) == 36)
    formats.checks("date-time", raises=ValueError)(lambda value: datetime.fromisoformat(str(value)).tzinfo is not None)
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return Draft202012Validator(schema, format_checker=formats)


def listed_by(chunks: Iterator[bytes]) -> list[dict[str, Any]]:
    records = json.loads(b"".join(chunks))
    assert isinstance(records, list)
    return records


def listed(simulation: Simulation, now: float) -> list[dict[str, Any]]:
    return listed_by(simulation.listing(now))


def test_every_record_follows_the_openapi_schema_at_every_age() -> None:
    schema = component("text_generator.openapi.yaml", "TextGenResponse")
    simulation = Simulation(3, START, rate=4, history=400, media_share=0.05)
    for now in (START, START + 7.5, START + 60):
        for record in listed(simulation, now):
            schema.validate(record)


def test_the_schema_check_itself_refuses_what_is_wrong() -> None:
    schema = component("text_generator.openapi.yaml", "TextGenResponse")
    record = listed(Simulation(3, START, history=1), START + 600)[-1]
    for change in ({"id": "x"}, {"created_at": "soon"}, {"status": "lost"}, {"credits_used": "1"}):
        assert not schema.is_valid(record | change), change


def test_records_are_as_large_and_as_mixed_as_real_ones() -> None:
    simulation = Simulation(5, START, history=3000, media_share=0)
    assert len(b"".join(simulation.listing(START + 120))) / 3000 == pytest.approx(2700, rel=0.08)
    with_media = Simulation(5, START, history=1000, media_share=0.1)
    body = b"".join(with_media.listing(START + 120))
    assert len(body) / 1000 == pytest.approx(15_700, rel=0.25)
    parts = [
        part["type"]
        for record in json.loads(body)
        for message in record["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
    ]
    assert set(parts) == {"text", "image", "video"}


def test_failure_texts_include_blank_missing_and_unknown_ones() -> None:
    records = listed(Simulation(5, START, history=6000, record_size=0), START + 120)
    texts = {record.get("failed_reason", "missing") for record in records if record["status"] == "failed"}
    assert {"", "missing", "The storyboard could not be woven"} <= texts
    assert len(texts) > 40
    assert not any("#" in text for text in texts)
    assert all("failed_reason" not in record for record in records if record["status"] != "failed")


def test_same_seed_and_times_give_the_same_bytes() -> None:
    runs = [
        [b"".join(Simulation(seed, START, rate=3, history=50).listing(START + t)) for t in (0, 5, 40)]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 400), max_size=12))
def test_any_steps_lead_to_the_same_history(steps: list[float]) -> None:
    stepped, at_once = (Simulation(9, START, rate=1, history=20, window=150) for _ in range(2))
    for step in sorted(steps):
        stepped.advance(START + step)
    end = START + 400
    assert b"".join(stepped.listing(end)) == b"".join(at_once.listing(end))
    assert stepped.truth(end) == at_once.truth(end)
    assert stepped.balance(end) == at_once.balance(end)


def test_time_never_runs_backwards() -> None:
    simulation = Simulation(9, START, rate=5)
    later = b"".join(simulation.listing(START + 50))
    assert b"".join(simulation.listing(START + 10)) == later


def recount(seen: dict[str, dict[str, Any]]) -> Truth:
    """Count from listed records alone, as somebody without the simulation's own account would."""
    truth = Truth()
    for record in seen.values():
        model, status = record["model_name"], record["status"]
        created, updated = (datetime.fromisoformat(record[key]) for key in ("created_at", "updated_at"))
        truth.submitted[model] += 1
        truth.listed[model, status] += 1
        truth.hundredths[model] += round(record["credits_used"] * 100)
        if status in ("done", "failed"):
            truth.finished[model, status] += 1
            truth.microseconds[model, status] += round((updated - created).total_seconds() * 1_000_000)
        if status == "failed":
            truth.failures[model, record.get("failed_reason")] += 1
    return truth


def without_zeros(truth: Truth) -> Truth:
    return truth.since(Truth())


def test_the_truth_is_what_listings_show_over_time() -> None:
    simulation = Simulation(11, START, rate=5, history=100)
    seen: dict[str, dict[str, Any]] = {}
    for second in range(0, 300, 20):
        now = START + second
        seen |= {record["id"]: record for record in listed(simulation, now)}
        truth = simulation.truth(now)
        assert without_zeros(recount(seen)) == truth
    assert sum(truth.submitted.values()) > 1300
    assert truth.credits["gemini-2.5-pro"] == truth.hundredths["gemini-2.5-pro"] / 100


def test_a_window_drops_the_oldest_tasks_but_not_their_share_of_the_truth() -> None:
    whole, window = Simulation(11, START, rate=5), Simulation(11, START, rate=5, window=40)
    end = START + 300
    assert listed(window, end) == listed(whole, end)[:40]
    assert window.truth(end).finished == whole.truth(end).finished
    assert sum(window.truth(end).listed.values()) == 40


def test_tasks_never_go_back_and_charges_only_rise() -> None:
    simulation = Simulation(11, START, rate=5, history=20)
    order = ["pending", "running", "done", "failed"]
    last: dict[str, dict[str, Any]] = {}
    early = 0
    for second in range(60):
        for record in listed(simulation, START + second):
            before = last.get(record["id"], record)
            assert order.index(record["status"]) >= order.index(before["status"])
            assert {before["status"], record["status"]} != {"done", "failed"}
            assert record["credits_used"] >= before["credits_used"]
            assert record["updated_at"] >= before["updated_at"] >= record["created_at"]
            early += record["status"] == "running" and record["credits_used"] > 0
            last[record["id"]] = record
    assert early > 0


def test_the_balance_falls_by_what_is_used_and_is_refilled() -> None:
    simulation = Simulation(11, START, rate=10, history=100)
    balances = []
    for minute in range(40):
        now = START + 60 * minute
        balances.append(simulation.balance(now))
        used = sum(simulation.truth(now).credits.values())
        assert math.isclose((5000 - used - balances[-1]) % 4500, 0, abs_tol=1e-6) or math.isclose(
            (5000 - used - balances[-1]) % 4500, 4500, abs_tol=1e-6
        )
    steps = [after - before for before, after in pairwise(balances)]
    assert min(balances) > 0
    assert any(step > 0 for step in steps)
    assert sum(step < 0 for step in steps) > 30
    component("remaining_credits.openapi.yaml", "RemainingCredits").validate({"remaining_credits": balances[-1]})


def ratio(simulation: Simulation, begin: float, end: float, model: str | None = None) -> float:
    earlier, later = simulation.truth(begin), simulation.truth(end)
    growth = later.since(earlier).finished
    counts = Counter[str]()
    for (name, status), count in growth.items():
        counts[status] += count if model in (None, name) else 0
    return counts["failed"] / counts.total()


def test_failures_are_a_few_per_cent_without_a_spike() -> None:
    simulation = Simulation(2, START, rate=20)
    assert 0.05 < ratio(simulation, START, START + 600) < 0.08


def test_a_spike_can_be_made_from_outside() -> None:
    simulation = Simulation(2, START, rate=20)
    simulation.spike(START + 100, 60, "gemini-2.5-flash", ratio=0.9)
    before = simulation.truth(START + 105)
    assert 0.6 < ratio(simulation, START + 105, START + 160, "gemini-2.5-flash") < 0.95
    overloaded = simulation.truth(START + 160).since(before).failures
    assert "The model is overloaded" in str(max(overloaded, key=overloaded.__getitem__)[1])
    assert ratio(simulation, START + 180, START + 300) < 0.1


def test_a_new_model_appears_after_the_start() -> None:
    simulation = Simulation(4, START, rate=10, history=500)
    new = "gemini-3.1-pro-preview"
    assert new not in simulation.truth(START + 14).submitted
    assert simulation.truth(START + 30).submitted[new] > 0


@pytest.fixture
def api() -> Iterator[SimulatedApi]:
    with SimulatedApi({CREDENTIALS: Simulation(1, START, history=50)}, lambda: START + 5) as api:
        yield api


def test_each_endpoint_answers_with_what_the_simulation_says(api: SimulatedApi) -> None:
    (simulation,) = api.workspaces.values()
    response = requests.get(api.url + "/sse/text_generator/", headers=HEADERS, timeout=5)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.json() == listed(simulation, START + 5)
    balance = requests.get(api.url + "/api/remaining_credits/", headers=HEADERS, timeout=5).json()
    component("remaining_credits.openapi.yaml", "RemainingCredits").validate(balance)
    assert balance == {"remaining_credits": simulation.balance(START + 5)}
    newest = listed(simulation, START + 5)[0]
    assert requests.get(f"{api.url}{LIST_PATH}{newest['id']}/", headers=HEADERS, timeout=5).json() == newest
    assert [status for _, status in api.requests] == [200] * 3


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/sse/text_generator/", {}, 401),
        ("/sse/text_generator/", {"X-API-ID": API_ID}, 401),
        ("/sse/text_generator/", {"X-API-KEY": API_KEY}, 401),
        ("/sse/text_generator/", {"X-API-ID": API_ID, "X-API-KEY": "wrong"}, 401),
        ("/api/remaining_credits/", {"X-API-ID": "wrong", "X-API-KEY": API_KEY}, 401),
        ("/sse/text_generator", HEADERS, 404),
        ("/", HEADERS, 404),
        ("/sse/text_generator/no-such-task/", HEADERS, 404),
    ],
)
def test_wrong_credentials_and_paths_are_refused_in_json(
    api: SimulatedApi, path: str, headers: dict[str, str], status: int
) -> None:
    response = requests.get(api.url + path, headers=headers, timeout=5)
    assert (response.status_code, list(response.json())) == (status, ["detail"])


def test_workspaces_are_told_apart_by_their_credentials() -> None:
    workspaces = {(name, "key"): Simulation(n, START, history=10 * n) for n, name in enumerate("abc", 1)}
    with SimulatedApi(workspaces, lambda: START) as api:
        sizes = [
            len(
                requests.get(
                    api.url + "/sse/text_generator/",
                    headers={"X-API-ID": name, "X-API-KEY": "key"},
                    timeout=5,
                ).json()
            )
            for name in "abc"
        ]
    assert sizes == [10, 20, 30]


def test_faults_can_be_injected_and_taken_back(api: SimulatedApi) -> None:
    def fault(path: str) -> tuple[int, dict[str, str]] | None:
        return (503, {"Retry-After": "7"}) if path == "/sse/text_generator/" else None

    api.fault = fault
    refused = requests.get(api.url + "/sse/text_generator/", headers=HEADERS, timeout=5)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "7")
    assert requests.get(api.url + "/api/remaining_credits/", headers=HEADERS, timeout=5).status_code == 200
    api.fault = None
    assert requests.get(api.url + "/sse/text_generator/", headers=HEADERS, timeout=5).status_code == 200


def refused(connection: http.client.HTTPConnection) -> None:
    connection.request("GET", "/sse/text_generator/", headers=HEADERS)
    connection.getresponse()


def test_connections_are_kept_alive_and_broken_when_the_api_stops() -> None:
    with SimulatedApi({CREDENTIALS: Simulation(1, START, history=5)}, lambda: START) as api:
        address = urlsplit(api.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=5)
        sockets = set()
        for _ in range(3):
            connection.request("GET", "/sse/text_generator/", headers=HEADERS)
            assert len(json.loads(connection.getresponse().read())) == 5
            sockets.add(connection.sock)
        assert len(sockets) == 1
    with closing(connection), pytest.raises((http.client.HTTPException, OSError)):
        refused(connection)


def test_a_client_that_goes_away_leaves_no_trace(api: SimulatedApi, capfd: pytest.CaptureFixture[str]) -> None:
    api.workspaces = {CREDENTIALS: Simulation(1, START, history=2000)}
    with requests.get(api.url + "/sse/text_generator/", headers=HEADERS, timeout=5, stream=True) as response:
        assert response.raw.read(10)
    assert requests.get(api.url + "/sse/text_generator/", headers=HEADERS, timeout=5).status_code == 200
    assert capfd.readouterr().err == ""


def test_a_listing_is_streamed_never_built() -> None:
    simulation = Simulation(1, START, history=4000)
    simulation.advance(START + 60)
    gc.collect()
    tracemalloc.start()
    try:
        size = sum(len(chunk) for chunk in simulation.listing(START + 60))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 10_000_000
    assert peak < 2_000_000


def test_the_history_may_be_empty_and_arrivals_sparse() -> None:
    simulation = Simulation(1, START, rate=0.001)
    assert b"".join(simulation.listing(START)) == b"[]"
    assert simulation.truth(START) == Truth()


def test_a_task_that_left_the_window_is_answered_by_its_id_and_a_deleted_one_is_not() -> None:
    simulation = Simulation(11, START, rate=5, window=10, deleted_share=0.5)
    ids = [life.id for life in simulation.tasks]
    simulation.advance(START + 20)
    lives = list(simulation.tasks)
    later = START + 120
    simulation.advance(later)
    assert not {life.id for life in lives} & {record["id"] for record in listed(simulation, later)}
    assert ids == []
    for life in lives:
        answer = simulation.one(life.id, later)
        assert (answer is None) == (life.deleted < math.inf)
        assert answer is None or json.loads(answer)["status"] == life.outcome
    assert 0 < sum(life.deleted < math.inf for life in lives) < 10
    assert simulation.one("no-such-task", later) is None


def test_three_minutes_of_the_demo_show_everything_in_motion() -> None:
    now = START
    statuses, models, texts, gone = set[str](), set[str](), set[str](), 0
    with demo(lambda: now) as api:
        (simulation,) = api.workspaces.values()
        balance = simulation.balance(now)
        before: list[dict[str, Any]] = []
        for now in (START + step for step in range(0, 181, 5)):
            records = listed_by(simulation.listing(now))
            statuses |= {record["status"] for record in records}
            models |= {record["model_name"] for record in records}
            texts |= {record.get("failed_reason", "") for record in records if record["status"] == "failed"}
            left = {one["id"] for one in before if one["status"] in ("pending", "running")} - {
                one["id"] for one in records
            }
            gone += len(left)
            before = records
            assert simulation.balance(now) <= balance
            balance = simulation.balance(now)
    assert statuses == {"pending", "running", "done", "failed"}
    assert len(models) == 4
    assert len(texts) >= 5
    assert gone > 0, "tasks leave the list unfinished, to be asked for by their id"


def test_the_demo_has_a_failure_spike_soon_after_its_start() -> None:
    now = START
    with demo(lambda: now) as api:
        (simulation,) = api.workspaces.values()
        finished = Counter[tuple[bool, str]]()
        seen = set[str]()
        for now in (START + step for step in range(0, 400, 10)):
            spiking = SPIKE.begin + 30 < now - START < SPIKE.end
            for record in listed_by(simulation.listing(now)):
                if record["model_name"] == SPIKE.model and record["status"] in ("done", "failed"):
                    finished[spiking, record["status"]] += record["id"] not in seen
                    seen.add(record["id"])
    assert finished[True, "failed"] > 5 * finished[True, "done"]
    assert SPIKE.end < 600

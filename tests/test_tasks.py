"""One record becomes one task, whatever its fields hold (design section 7)."""

import math
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from creatify_exporter.tasks import (
    MAX_CREDITS,
    MAX_MODEL_LENGTH,
    NANO,
    STATUSES,
    UNKNOWN,
    Record,
    Task,
    TaskReader,
    microseconds,
    model_of,
    nanocredits,
)

FIELDS = Record.__struct_fields__
GOOD: dict[str, Any] = {
    "id": "task-1",
    "model_name": "gemini-2.5-pro",
    "status": "done",
    "credits_used": 1.25,
    "created_at": "2026-10-03T13:43:28.855601-07:00",
    "updated_at": "2026-10-03T13:43:30.105602-07:00",
}
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def classify(text: object) -> str:
    return "none" if text is None else "some"


def read(**fields: Any) -> Task | None:
    return next(iter(TaskReader(classify)([Record(**{**GOOD, **fields})])), None)


def task(**fields: Any) -> Task:
    found = read(**fields)
    assert found is not None
    return found


def test_a_record_becomes_a_task() -> None:
    assert task() == Task(
        "task-1", "gemini-2.5-pro", "done", None, 1_250_000_000, GOOD["created_at"], GOOD["updated_at"]
    )
    assert task().created() == 1_791_060_208_855_601
    assert task().times()[1] == 1_250_001


@pytest.mark.parametrize("task_id", ["a", "A-b_9", "0", "-", "x" * 64, "5f1f3fc8-4a0b-4f21-8f6c-7c5f9f3a2f10"])
def test_a_plain_id_is_used(task_id: str) -> None:
    assert task(id=task_id).id == task_id


@pytest.mark.parametrize(
    "task_id", [None, "", "x" * 65, "a b", "a\n", "a.b", "é", "a\x00", "٣", 7, 7.0, True, [], {}, ["a"], "\ud800"]
)
def test_a_record_without_a_usable_id_is_none(task_id: object) -> None:
    assert read(id=task_id) is None


def test_what_is_no_object_is_no_task() -> None:
    assert TaskReader(classify)([None]) == []


@pytest.mark.parametrize("status", STATUSES)
def test_a_known_status_stays(status: str) -> None:
    assert task(status=status).status == status


@pytest.mark.parametrize("status", [None, "", "DONE", "done ", "cancelled", "unknown", 1, True, [], {}, ["done"]])
def test_any_other_status_is_unknown(status: object) -> None:
    assert task(status=status).status == UNKNOWN


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        ("failed", "whatever", "some"),
        ("failed", None, "none"),
        ("done", "whatever", None),
        ("running", "whatever", None),
        ("odd", "whatever", None),
    ],
)
def test_only_a_failed_task_has_a_reason(status: str, text: object, reason: str | None) -> None:
    assert task(status=status, failed_reason=text).reason == reason


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("gemini-2.5-pro", "gemini-2.5-pro"),
        ("  padded\t\n", "padded"),
        ("", UNKNOWN),
        (" \n ", UNKNOWN),
        (None, UNKNOWN),
        (7, UNKNOWN),
        (["gemini"], UNKNOWN),
        ({}, UNKNOWN),
        (False, UNKNOWN),
        ("tab\tand\nline", "tab�and�line"),
        ("nul\x00del\x7fnel\x85", "nul�del�nel"),  # NEL is white space
        ("unpaired \ud83d surrogate", "unpaired � surrogate"),
        ('quote " backslash \\ brace }', 'quote " backslash \\ brace }'),
        ("日本語 🎬", "日本語 🎬"),
        ("m" * 128, "m" * 128),
        ("m" * 255, "m" * 128),
        ("m" * 127 + " " + "n" * 9, "m" * 127),
        (" " * 500 + "late", "late"),
    ],
)
def test_a_model_name_becomes_a_label(name: object, label: str) -> None:
    reader = TaskReader(classify)
    for _ in range(2):  # the second time it is remembered
        (found,) = reader([Record(**{**GOOD, "model_name": name})])
        assert found.model == label


def test_more_models_than_are_remembered_are_told_apart() -> None:
    reader, seen = TaskReader(classify), Counter[str]()
    for number in [*range(1500), *range(1500)]:
        (found,) = reader([Record(id="a", model_name=f" model {number}")])
        seen[found.model] += 1
    assert seen == {f"model {number}": 2 for number in range(1500)}


@given(st.text(st.characters(), max_size=300))
def test_a_label_is_trimmed_short_and_printable(name: str) -> None:
    label = model_of(name)
    assert 0 < len(label) <= MAX_MODEL_LENGTH
    assert label == label.strip()
    assert not any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 for char in label)
    assert label.encode().decode() == label
    assert model_of(label) == label


@pytest.mark.parametrize(
    ("value", "nano"),
    [
        (0, 0),
        (-0.0, 0),
        (1, NANO),
        (0.1, 100_000_000),
        (0.3, 300_000_000),
        (1.005, 1_005_000_000),
        (1e-9, 1),
        (4e-10, 0),
        (5e-324, 0),
        (MAX_CREDITS, MAX_CREDITS * NANO),
        (999_999.999999999, 999_999_999_999_999),
        ("0.5", 500_000_000),
        ("5", 5 * NANO),
        ("5.", 5 * NANO),
        (".5", 500_000_000),
        (" 0.25\n", 250_000_000),
        ("0.123456789", 123_456_789),
        ("000000000000000000000000000000000000001.5", 1_500_000_000),
        ("0." + "3" * 40, 333_333_333),
        ("1000000", MAX_CREDITS * NANO),
    ],
)
def test_credits_are_whole_billionths(value: object, nano: int) -> None:
    assert nanocredits(value) == nano


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, -1, -0.5, math.nan, math.inf, -math.inf, 1_000_000.000001, 1_000_001, 10**400,
        -(10**400), "", " ", "-1", "+1", "1e3", "1e999", "NaN", "inf", "0x10", "1,5", "1_000", "1 0", "½", "٣", "1.2.3",
        ".", "1000001", "9" * 99, "9" * 10_000, "0" * 200, "lots", "\ud800", [], {}, [1], {"a": 1},
    ],
)  # fmt: skip
def test_credits_that_are_no_number_from_0_to_a_million_are_ignored_and_counted(value: object) -> None:
    reader = TaskReader(classify)
    (found,) = reader([Record(**{**GOOD, "credits_used": value})])
    assert found.credits == 0
    # Without a value there is nothing to ignore.
    assert reader.ignored_credits == (0 if value in (None, "") else 1)


def test_ignored_credits_are_counted_over_all_batches_and_only_of_tasks() -> None:
    reader = TaskReader(classify)
    for _ in range(2):
        reader(
            [Record(id="a", credits_used=-0.5), Record(id="b", credits_used=0.5), Record(id=7, credits_used=-1), None]
        )
    assert reader.ignored_credits == 2


@given(st.integers(0, MAX_CREDITS * NANO))
def test_nine_decimals_are_exact_as_a_number_and_as_text(nano: int) -> None:
    exact = Decimal(nano) / NANO
    assert nanocredits(float(exact)) == nano
    assert nanocredits(f"{exact:f}") == nano


@given(st.lists(st.integers(0, 10**7), max_size=50))
def test_a_sum_of_hundredths_does_not_drift(hundredths: list[int]) -> None:
    assert sum(nanocredits(one / 100) or 0 for one in hundredths) == sum(hundredths) * NANO // 100


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00z", 0),
        ("1970-01-01t00:00:00Z", 0),
        ("1970-01-01 00:00:00+00:00", 0),
        ("1970-01-01T00:00:00", 0),
        ("1970-01-01T00:00:00.000001", 1),
        ("1970-01-01T00:00:00.5Z", 500_000),
        ("1970-01-01T00:00:00.123456789Z", 123_456),
        ("1969-12-31T23:59:59.999999Z", -1),
        ("1969-12-31T17:00:00-07:00", 0),
        ("2023-11-07T05:31:56Z", 1_699_335_116_000_000),
        ("2026-10-03T13:43:28.855601-07:00", 1_791_060_208_855_601),
        ("0001-01-01T00:00:00+14:00", -62_135_596_800_000_000 - 14 * 3_600_000_000),
        ("9999-12-31T23:59:59.999999-14:00", 253_402_300_799_999_999 + 14 * 3_600_000_000),
    ],
)
def test_a_time_stamp_is_read_to_the_microsecond(stamp: str, expected: int) -> None:
    assert microseconds(stamp) == expected


@pytest.mark.parametrize(
    "stamp",
    [
        None, "", "yesterday", "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-01T25:00:00Z", "\ud800", [], {},
        "2026-01-01T00:00:60Z", "2026-01-01T00:00:00+99:00", "10000-01-01T00:00:00Z", "0000-01-01T00:00:00Z", True,
        "2026-11-23", "2026-W48-1T00:00:00", "20261123T070000Z",
        1.7e9, "2026-01-01T00:00:00 UTC", "1700000000", 1_700_000_000, math.nan, "2026-01-01T00:00:00Z" * 99, "٢٠٢٦",
    ],
)  # fmt: skip
def test_a_broken_time_stamp_is_none(stamp: object) -> None:
    assert microseconds(stamp) is None


@given(
    st.datetimes(timezones=st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))),
)
def test_a_time_stamp_survives_the_way_there_and_back(moment: datetime) -> None:
    found = microseconds(moment.isoformat())
    assert found is not None
    assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=found) - moment == timedelta()


@pytest.mark.parametrize(
    ("created", "updated", "duration"),
    [
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", 0),
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:02.5Z", 2_500_000),
        ("2026-01-01T00:00:00Z", "2026-01-01T02:00:00+02:00", 0),
        ("2026-01-01T00:00:00", "2026-01-01T00:00:01Z", 1_000_000),
        ("2026-01-01T00:00:01Z", "2026-01-01T00:00:00Z", None),
        (None, "2026-01-01T00:00:00Z", None),
        ("2026-01-01T00:00:00Z", "broken", None),
        (1, 2, None),
    ],
)
def test_a_duration_is_what_the_api_reports_and_never_negative(
    created: object, updated: object, duration: int | None
) -> None:
    assert task(created_at=created, updated_at=updated).times()[1] == duration


@given(st.sampled_from(FIELDS), ANY_JSON)
def test_an_odd_field_spoils_nothing_but_itself(field: str, value: object) -> None:
    found = read(**{field: value})
    if found is None:
        assert field == "id"
        return
    touched = {"model_name": "model", "credits_used": "credits"}.get(field, field)
    for name in ("id", "model", "status", "credits", "created_at", "updated_at"):
        if name != touched:
            assert getattr(found, name) == getattr(task(), name)


@given(st.fixed_dictionaries(dict.fromkeys(FIELDS, ANY_JSON) | {"id": st.sampled_from(["a", "b-1"])}))
def test_no_values_in_any_fields_raise_or_leave_their_range(fields: dict[str, Any]) -> None:
    (found,) = TaskReader(classify)([Record(**fields)])
    assert found.status in {*STATUSES, UNKNOWN}
    assert 0 <= found.credits <= MAX_CREDITS * NANO
    assert (found.reason is None) == (found.status != "failed")
    created, duration = found.times()
    assert created is None or abs(created) < 2**63
    assert duration is None or 0 <= duration < 2**63


def test_a_decoder_takes_any_value_in_any_field() -> None:
    values: list[object] = [None, 1, 1.5, "x", [], {"a": [1]}, True]
    records = [{field: one} for field in FIELDS for one in values]
    for record in msgspec.json.decode(msgspec.json.encode(records), type=list[Record]):
        TaskReader(classify)([record])

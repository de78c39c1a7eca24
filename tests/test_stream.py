import gc
import itertools
import json
import math
import os
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from creatify_exporter import stream
from creatify_exporter.stream import MalformedBodyError, Page
from creatify_exporter.tasks import Record, nanocredits
from tests.support import openapi

FIELDS = Record.__struct_fields__
WHOLE = 1 << 30


LISTS = int(os.environ.get("FUZZ_LISTS", "60"))
"""How many random lists are read; more by hand and in CI."""


def chunks(body: bytes, *sizes: int) -> Iterator[bytes]:
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(body):
            return
        yield body[start : start + size]
        start += size


def plain(value: Any) -> Any:
    """Make values comparable: a container is a container, NaN is itself."""
    if isinstance(value, dict | list):
        return "container"
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def fields(record: Record | None) -> dict[str, Any] | None:
    return None if record is None else {name: plain(getattr(record, name)) for name in FIELDS}


def outcome(body: bytes, *sizes: int) -> list[dict[str, Any] | None] | str:
    """Return what a page says of `body` in chunks of so many bytes: its records, or that it is malformed."""
    try:
        return [fields(record) for batch in Page(chunks(body, *(sizes or [WHOLE]))) for record in batch]
    except MalformedBodyError:
        return "malformed"


def expected(elements: list[Any]) -> list[dict[str, Any] | None]:
    return [
        {name: plain(element.get(name)) for name in FIELDS} if isinstance(element, dict) else None
        for element in elements
    ]


def small_windows(size: int) -> Any:
    """Make the fast path cut batches from tiny buffers."""
    return mock.patch.multiple(stream, _WINDOW=size, _MIN_WINDOW=max(size // 8, 1))


def tolerant_only() -> Any:
    return mock.patch.object(stream, "_MAX_GUESSES", 0)


def task(number: int, **more: Any) -> dict[str, Any]:
    content = [
        {"role": "user", "content": f'say "{number}" \\ {{[}}]'},
        {"role": "model", "parts": [{"id": 1}, {"id": 2}]},
    ]
    return {"id": f"t{number}", "model_name": "m", "messages": content, "status": "done", "credits_used": 0.5, **more}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), ("\n ,\t", " :\r\n")])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("size", [1, 7, 100, WHOLE])
def test_every_layout_gives_the_same_records(separators: tuple[str, str], indent: int | None, size: int) -> None:
    tasks = [task(number) for number in range(50)]
    body = json.dumps(tasks, separators=separators, indent=indent).encode()
    with small_windows(1024):
        assert outcome(body, size) == expected(tasks)


@pytest.mark.parametrize("size", [1, WHOLE])
@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b"[]", []),
        (b" \n[ ] \r\n", []),
        (b'\xef\xbb\xbf[{"id":1}]', [1]),
        (b'[{},{"id":null},{ }]', [None, None, None]),
        (b'[{"\\u0069d":3}]', [3]),
        (b'[{"id":1,"id":2}]', [2]),
        (b'[{"id":[1,{"a":[]}]}]', ["container"]),
        (b'[{"id":{}},{"id":{"a":{"b":"}"}}}]', ["container", "container"]),
        (b'[{"id":-0},{"id":-0.0},{"id":1E+2},{"id":1e-400}]', [0, 0, 100, 0]),
        (b'[{"id":true},{"id":false}]', [True, False]),
    ],
)
def test_well_formed_bodies_give_their_records(body: bytes, ids: list[Any], size: int) -> None:
    records = outcome(body, size)
    assert [record and record["id"] for record in records if isinstance(record, dict)] == ids


@pytest.mark.parametrize("size", [1, WHOLE])
@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (b"NaN", "nan"),
        (b"Infinity", "inf"),
        (b"-Infinity", "-inf"),
        (b"1e999", "inf"),
        (b"-1e999", "-inf"),
        (b"1" * 100_000, "inf"),
        (b"-" + b"1" * 100_000, "-inf"),
        (b"1" * 400, int("1" * 400)),
        (b'"\\ud800"', "\ud800"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"a\x00\n\x1fb"', "a\x00\n\x1fb"),
        (b'"\xff"', "\ufffd"),
        (b'"\\q"', "\\q"),
        (b'"\\u12"', "\\u12"),
        (b'"' + b"\\\\" * 1000 + b'\\""', "\\" * 1000 + '"'),
        (b'"a\\\\"', "a\\"),
        (b'"\\"}],\\\\\\"{"', '"}],\\"{'),
        (b'"' + b'a\\"' * 3000 + b'"', 'a"' * 3000),
        (b'"' + b"a" * 30_000 + b'\\q"', "a" * 30_000 + "\\q"),
        (b"[" * 20_000 + b"]" * 20_000, "container"),
        (b'{"a":[],"b":[' * 999 + b'"\\q","]"' + b"]}" * 999, "container"),
        (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, "container"),
        (b'[1,"]",{"a":[{},[]],"b":1e999}, [NaN ,-Infinity]]', "container"),
        (b'{"\\ud800":"\xff","b":[1 , 2]}', "container"),
    ],
)
def test_odd_values_are_read_and_their_neighbours_too(value: bytes, seen: Any, size: int) -> None:
    body = b'[{"id":"a"},{"id":' + value + b',"x":' + value + b'},{"x":' + value + b"},7," + value + b',{"id":"b"}]'
    records = outcome(body, size)
    assert isinstance(records, list)
    assert [record and record["id"] for record in records[:3]] == ["a", seen, None]
    assert records[3] is None
    assert records[5] == {**dict.fromkeys(FIELDS), "id": "b"}


MALFORMED = {
    "empty": b"",
    "space": b" \n ",
    "half a BOM": b"\xef\xbb",
    "HTML": b"<!DOCTYPE html><html></html>",
    "text": b"Internal Server Error",
    "text literal": b'"text"',
    "number": b"12",
    "null": b"null",
    "two arrays": b"[][]",
    "bytes after": b'[{"id":1}]x',
    "unclosed array": b'[{"id":1}',
    "only opened": b"[",
    "comma at the end": b'[{"id":1},',
    "no element after the comma": b'[{"id":1},]',
    "no element before the comma": b'[,{"id":1}]',
    "no comma": b'[{"id":1}{"id":2}]',
    "no comma between members": b'[{"id":1 "x":2}]',
    "no comma between elements": b'[{"x":[1 2]}]',
    "no colon": b'[{"id" 1}]',
    "no value": b'[{"id":}]',
    "no key": b"[{1:2}]",
    "comma before the brace": b'[{"id":1,}]',
    "comma before the bracket": b'[{"x":[1,]}]',
    "comma after the brace": b'[{"x":{,"a":1}}]',
    "comma in a nested object": b'[{"x":{"a":1,}}]',
    "array closed by a brace": b'[{"x":[1}}]',
    "object closed by a bracket": b'[{"id":1]]',
    "list closed by a brace": b'[{"id":1}}',
    "nested object closed by a bracket": b'[{"x":{"a":{}]}]',
    "cut in a string": b'[{"id":"a',
    "cut in an escape": b'[{"id":"a\\',
    "cut in a literal": b'[{"id":tru',
    "cut in a number": b'[{"id":1.',
    "wrong literal": b'[{"id":nil}]',
    "leading zero": b'[{"id":01}]',
    "no digit after the point": b'[{"x":1.}]',
    "plus": b'[{"x":+1}]',
    "hexadecimal": b'[{"x":0x1}]',
    "NUL between tokens": b'[{"id":1\x00}]',
    "form feed": b'[\x0c{"id":1}]',
    "comment": b'[{"id":1} /* no */]',
    "no results": b'{"detail":"no"}',
    "empty object": b"{}",
    "results null": b'{"results":null}',
    "results an object": b'{"results":{"id":1}}',
    "results twice": b'{"results":[],"results":[]}',
    "results cut": b'{"results":[{"id":1}]',
    "envelope closed by a bracket": b'{"results":[]]',
    "next a number": b'{"next":1,"results":[]}',
    "next a list": b'{"next":["a"],"results":[]}',
    "next too long": b'{"next":"' + b"a" * 8191 + b'","results":[]}',
    "colon before the key": b'{:"next":1,"results":[]}',
    "envelope without a colon": b'{"results" []}',
    "wrong value in the envelope": b'{"count":[1,],"results":[]}',
    "envelope with garbage": b'{"results":[],x}',
    "bytes after the envelope": b'{"results":[]} {}',
}


@pytest.mark.parametrize("size", [1, 5, WHOLE])
@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bodies_are_refused_however_they_are_cut(body: bytes, size: int) -> None:
    assert outcome(body, size) == "malformed"


@pytest.mark.parametrize("body", [b"[" * 2000 + b"," + b"]" * 2000, b'{"a":' * 2000 + b"}" * 2000], ids=["[", "{"])
def test_what_is_wrong_deep_inside_is_refused(body: bytes) -> None:
    assert outcome(b'[{"x":' + body + b"}]") == "malformed"


def test_the_error_never_holds_the_body() -> None:
    for body in MALFORMED.values():
        secret = body.replace(b"id", b"PLANTED").replace(b"text", b"PLANTED")
        with pytest.raises(MalformedBodyError) as caught:
            list(Page([secret]))
        assert "PLANTED" not in str(caught.value)
        assert caught.value.__context__ is None


def test_a_long_link_is_refused_before_it_is_in_memory() -> None:
    page = Page(repeated(b'{"next":"', b"a" * 65536, b'"}', 1000))
    with pytest.raises(MalformedBodyError):
        peak_of(page)
    assert len(page._buffer) < 200_000


def test_an_envelope_is_the_same_in_every_two_pieces() -> None:
    body = b'{ "count" : 1 , "next" : "a" , "results" : [ { "id" : "x" } , { "id" : 2 } ] , "previous" : null }'
    for cut in range(len(body) + 1):
        page = Page([body[:cut], body[cut:]])
        assert [record and record.id for batch in page for record in batch] == ["x", 2], cut
        assert page.next == "a"


@pytest.mark.parametrize("size", [1, WHOLE])
@pytest.mark.parametrize(
    ("body", "link"),
    [
        (b'{"results":[{"id":1},{"id":2}]}', None),
        (b'{"count":2,"next":"http://a/?p=2","previous":null,"results":[{"id":1},{"id":2}]}', "http://a/?p=2"),
        (b'{"results" : [ {"id":1},{"id":2} ] , "next" : "\\u0061", "x": {"results":[{"id":9}]} }', "a"),
        (b'{"next":null,"results":[{"id":1},{"id":2}]}', None),
        (b'{"next":"","results":[{"id":1},{"id":2}]}', None),
        (b'{"next" : "' + b"a" * 8190 + b'","results":[{"id":1},{"id":2}]}', "a" * 8190),
        (b'[{"id":1},{"id":2,"next":"b"}]', None),
    ],
)
def test_an_envelope_is_read_like_an_array_and_tells_the_next_page(body: bytes, link: str | None, size: int) -> None:
    page = Page(chunks(body, size))
    assert [record and record.id for batch in page for record in batch] == [1, 2]
    assert page.next == link


@pytest.mark.parametrize("first", ["id", "model_name", "extra"])
def test_most_records_take_the_fast_path(first: str) -> None:
    tasks = [{first: "x", **task(number), "response_text": "lorem ipsum " * 200} for number in range(2000)]
    body = json.dumps(tasks).encode()
    batches = list(Page(chunks(body, 65536)))
    assert [fields(record) for batch in batches for record in batch] == expected(tasks)
    assert len(batches) < 2 + 1.5 * len(body) / stream._WINDOW


def test_one_odd_record_slows_down_only_its_neighbours() -> None:
    tasks: list[Any] = [task(number, response_text="lorem ipsum " * 200) for number in range(2000)]
    tasks[1000]["response_text"] = "\ud800"
    batches = list(Page(chunks(json.dumps(tasks).encode(), 65536)))
    assert sum(map(len, batches)) == 2000
    assert sum(len(batch) == 1 for batch in batches) < 40


def test_records_that_all_look_alike_inside_cost_no_more_than_the_slow_path() -> None:
    nested = {"id": "x", "model_name": "m", "status": "done"}
    tasks = [{"id": "x", "model_name": "m", "messages": [nested] * 20, "status": "done"} for _ in range(300)]
    body = json.dumps(tasks).encode()
    with small_windows(4096):
        assert outcome(body, 1000) == expected(tasks)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["},{", '"},{"id":"', "}]", "[{", "\\", '\\"', "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)
records = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), json_values, max_size=9)
like_tasks = st.fixed_dictionaries({"id": json_values, "model_name": json_values}, optional={"messages": json_values})
layouts = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", ":\t")])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    elements = draw(st.lists(like_tasks | records | json_values, max_size=12))
    text = json.dumps(elements, separators=draw(layouts), ensure_ascii=draw(st.booleans()))
    return text.encode("utf-8", "surrogatepass")


@settings(max_examples=LISTS, deadline=None)
@given(body=bodies(), size=st.integers(1, 40), window=st.integers(8, 200))
def test_streamed_decoding_equals_decoding_the_whole(body: bytes, size: int, window: int) -> None:
    with tolerant_only():
        whole = outcome(body)
    assert whole == expected(json.loads(body.decode("utf-8", "replace")))
    assert outcome(body) == whole
    with small_windows(window):
        assert outcome(body, size) == whole


@settings(max_examples=LISTS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tasks=openapi.listings(),
    layout=layouts,
    ensure_ascii=st.booleans(),
    envelope=st.booleans(),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    window=st.integers(8, 2000),
)
def test_every_list_of_the_documented_schema_is_read(
    tasks: list[Any], layout: tuple[str, str], ensure_ascii: bool, envelope: bool, sizes: list[int], window: int
) -> None:
    page = {"count": len(tasks), "next": None, "previous": None, "results": tasks} if envelope else tasks
    text = json.dumps(page, separators=layout, ensure_ascii=ensure_ascii)
    body = text.encode("utf-8", "surrogatepass")
    seen = json.loads(body.decode("utf-8", "replace"))
    with small_windows(window):
        assert outcome(body, *sizes) == expected(seen["results"] if envelope else seen)
    assert outcome(body) == expected(seen["results"] if envelope else seen)


JSON_BYTES = b'{}[]",:\\ 0-.e\x00\xffnu"id'


@settings(max_examples=LISTS, deadline=None)
@given(
    body=bodies(),
    size=st.integers(1, 40),
    window=st.integers(8, 200),
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2), st.sampled_from(JSON_BYTES)), max_size=4),
)
@example(body=b'[{"id":1},{"id":2}]', size=1, window=8, edits=[(8, 1, 0x2C)])
def test_damaged_bodies_get_one_verdict_however_they_are_cut(
    body: bytes, size: int, window: int, edits: list[tuple[int, int, int]]
) -> None:
    damaged = bytearray(body)
    for place, kind, byte in edits:
        at = place % (len(damaged) + 1)
        damaged[at : at + (kind > 0)] = bytes([byte][: 2 - kind])
    body = bytes(damaged)
    with tolerant_only():
        whole = outcome(body)
    with small_windows(window):
        assert outcome(body, size) == whole
    try:
        strict = msgspec.json.decode(body, type=list[Record | None])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    else:
        assert whole == [fields(record) for record in strict]


@settings(max_examples=LISTS, deadline=None)
@given(
    body=st.binary(max_size=200) | st.lists(st.sampled_from(JSON_BYTES), max_size=60).map(bytes),
    prefix=st.sampled_from([b"", b"[", b"[{", b'{"results":[', b'[{"id":']),
    size=st.integers(1, 20),
)
def test_random_bytes_raise_nothing_but_malformed(body: bytes, prefix: bytes, size: int) -> None:
    assert outcome(prefix + body, size) == outcome(prefix + body)


def peak_of(page: Page) -> tuple[int, int]:
    """Return how many records came and the peak of memory in bytes."""
    tracemalloc.start()
    try:
        count = sum(len(batch) for batch in page)
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def repeated(head: bytes, piece: bytes, tail: bytes, count: int, per_chunk: int = 1) -> Iterator[bytes]:
    block = piece * per_chunk
    yield head
    for _ in range(count // per_chunk):
        yield block
    yield tail


def test_memory_does_not_grow_with_the_body() -> None:
    record = json.dumps(task(1, response_text="lorem ipsum " * 400)).encode() + b","
    count = 64_000_000 // len(record) // 20 * 20
    got, peak = peak_of(Page(repeated(b"[", record, record[:-1] + b"]", count, 20)))
    assert got == count + 1
    assert peak < 8_000_000


def test_memory_does_not_grow_with_a_body_without_a_pattern() -> None:
    rng = random.Random(1)
    records = [json.dumps({f"k{rng.random()}": number, "x": "y" * 2000}).encode() + b"," for number in range(2000)]
    got, peak = peak_of(Page([b"[", *records, b"{}]"]))
    assert got == 2001
    assert peak < 3_000_000


def test_space_around_the_list_takes_no_memory() -> None:
    space = [b" " * 65536] * 400
    got, peak = peak_of(Page([*space, b'[{"id":1}]', *space]))
    assert got == 1
    assert peak < 1_000_000


PIECES = {
    "text": b"x" * 1000,
    "escapes": b"\\n",
    "quotes": b"a" * 20 + b'\\"',
    "lone surrogates": b"\\ud800",
    "bad escapes": b"\\q",
    "broken UTF-8": b"\xff",
}


def huge(piece: bytes, size: int) -> Iterator[bytes]:
    """Return the chunks of a list: a record with one string of so many bytes, and a small one."""
    return repeated(b'[{"id":"a","messages":"', piece, b'"},{"id":"b"}]', size // len(piece), 60_000 // len(piece))


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_a_huge_record_takes_little_more_than_itself(piece: bytes) -> None:
    size = 12_000_000
    got, peak = peak_of(Page(huge(piece, size)))
    assert got == 2
    assert peak < 2 * size


@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_a_huge_string_keeps_no_other_thread_waiting(piece: bytes) -> None:
    """The time is what this process worked between two turns of the other thread: other processes do not count."""
    ended, longest = threading.Event(), [0.0]

    def take_turns() -> None:
        before = time.process_time()
        while not ended.wait(0.001):
            longest[0], before = max(longest[0], time.process_time() - before), time.process_time()

    thread = threading.Thread(target=take_turns)
    gc.disable()  # it keeps others waiting, too, and the longer the more other tests have left
    thread.start()
    try:
        assert [record.id for batch in Page(huge(piece, 60_000_000)) for record in batch if record] == ["a", "b"]
    finally:
        ended.set()
        thread.join()
        gc.enable()
    assert longest[0] < 0.06


@pytest.mark.parametrize("size", [WHOLE, 65536, 1000])
def test_of_a_huge_string_the_beginning_is_read_and_it_is_no_number(size: int) -> None:
    long = 300_000
    texts = {
        "failed_reason": "model overloaded" + "x" * long,
        "credits_used": "0.5" + "0" * long,
        "model_name": "\\u00e9" * (long // 2),
        "messages": "\\\\" * long + "]}",
    }
    members = ",".join(f'"{name}":"{text}"' for name, text in texts.items())
    body = f'[{{"id":"a",{members},"status":"failed"}},{{"id":"b"}}]'.encode()
    first, second = (record for batch in Page(chunks(body, size)) for record in batch if record)
    assert first.failed_reason.startswith("model overloadedxxx")
    assert len(first.failed_reason) > 8192
    assert first.credits_used.startswith("0.500")
    assert nanocredits(first.credits_used) is None
    assert set(first.model_name[:-1]) == {"é"}
    assert (first.id, first.status, second.id) == ("a", "failed", "b")

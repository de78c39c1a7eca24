"""From the bytes of one response body to records, in constant memory.

A body is cut where two records seem to meet, and a strict decoder proves the cut: `[` + slice + `]` is valid JSON only
if the slice ends where a record ends. What the strict decoder refuses (a wrong guess, deep nesting, huge numbers, lone
surrogates, broken UTF-8) gets a tolerant second look, record by record. The tolerant grammar accepts all that the
strict one accepts, with the same fields, so neither the verdict nor the records depend on where the stream was cut.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

import msgspec

from creatify_exporter.tasks import Record

_T = TypeVar("_T")

_WINDOW = 256 * 1024
_MIN_WINDOW = 4 * 1024
_MAX_BOUNDARY = 256
_MAX_GUESSES = 64

_STRICT = msgspec.json.Decoder(list[Record | None])
_FIELDS = frozenset(Record.__struct_fields__)
_LITERALS: dict[bytes, Any] = {b"true": True, b"false": False, b"null": None}

# Every repetition is possessive: nothing is tried twice, so neither time nor memory runs away with long tokens.
_SPACE = r"[ \t\n\r]*+"
_OPEN_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+'
# Running to the next quote is ten times as fast, and mostly no backslash stands before it.
_STRING = rf'(?>"[^"]*+"(?<!\\")|{_OPEN_STRING}")'
_NUMBER = r"-?+(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][-+]?+[0-9]++)?+"
_TOKENS = {
    ord("_"): _SPACE,
    ord("S"): _STRING,
    ord("O"): _OPEN_STRING,
    ord("V"): f"(?:{_STRING}|{_NUMBER}|true|false|null|NaN|-?+Infinity)",
    ord("K"): f"(?:{_SPACE}{_STRING}{_SPACE}:{_SPACE})",
}


def _compile(template: str) -> re.Pattern[bytes]:
    """Compile a pattern with `_`, S, O, V, K for space, string, unclosed string, scalar value, key and colon."""
    return re.compile(template.translate(_TOKENS).encode(), re.DOTALL)


_FIRST = _compile("_(?=(.))")
_MEMBER = _compile("_(S)_:_()(?:(V)_([,}]))?+")
# What follows shows that a number is all there.
_SCALAR = _compile(r"V(?=[ \t\n\r,}\]])")
_DELIMITER = _compile(r"_([,}\]])")
_BOUNDARY = _compile(r"(\}_(,)_\{_S)_:(?:_V_,_(S))?+")
# From inside an array or object up to the next bracket: right after its own opening one, or further on.
_STRETCHES = {
    (ord("["), True): _compile(r"_(?:\]|V_(?:,_V_)*+(?:\]|,_[{\[])|[{\[])"),
    (ord("["), False): _compile(r"_(?:\]|,_(?:V_(?:,_V_)*+(?:\]|,_[{\[])|[{\[]))"),
    (ord("{"), True): _compile(r"_(?:\}|K(?:V_(?:,KV_)*+(?:\}|,K[{\[])|[{\[]))"),
    (ord("{"), False): _compile(r"_(?:\}|,K(?:V_(?:,KV_)*+(?:\}|,K[{\[])|[{\[]))"),
}
# What is left of the buffer when it may only be too short for one of the above.
_UNFINISHED = _compile(r"_,?+_(?:K?+V_,_)*+(?:S_:?+_)?+(?:[-+.0-9A-Za-z]++_|S_|O\\?+)?+\Z")


class MalformedBodyError(ValueError):
    """Say that a body is no list of records; the message never quotes the body."""


class _IncompleteError(Exception):
    """Say that the buffer ends before the value does."""


class Page:
    """Iterate over the records of one body: a bare array, or an envelope with `results` and perhaps `next`.

    Batches come while the body streams; None stands for an element that is no JSON object. `next` is valid after the
    iteration and None for an array. The iteration raises MalformedBodyError, and whatever `chunks` raises.
    """

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.next: str | None = None
        self._chunks = iter(chunks)
        self._buffer = bytearray()
        self._ended = False

    def __iter__(self) -> Iterator[list[Record | None]]:
        self._fill(3)
        if self._buffer.startswith(b"\xef\xbb\xbf"):
            del self._buffer[:3]
        self._skip_space()
        if self._buffer.startswith(b"["):
            yield from self._array()
        elif self._buffer.startswith(b"{"):
            yield from self._envelope()
        else:
            raise MalformedBodyError("the body is neither a JSON array nor a JSON object")
        self._skip_space()
        if self._buffer:
            raise MalformedBodyError("the body goes on after its JSON value")

    def _envelope(self) -> Iterator[list[Record | None]]:
        buffer, found = self._buffer, False
        del buffer[:1]
        more = self._parse(_first, 0)[0] != b"}"
        while more:
            key, start = self._parse(_key, 0)
            if key == "results":
                if found or self._parse(_first, start)[0] != b"[":
                    raise MalformedBodyError("the page's results are not one array")
                found = True
                del buffer[:start]
                yield from self._array()
                end = 0
            else:
                end = self._parse(_value_end, start)
                if key == "next":
                    self.next = _link(bytes(buffer[start:end]))
            more, end = self._parse(_goes_on, end, b"}")
            del buffer[:end]
        if not found:
            raise MalformedBodyError("the body is a JSON object without results")

    def _array(self) -> Iterator[list[Record | None]]:
        """Yield the records of the array at the start of the buffer, and drop it from there.

        The buffer starts with `[` all the time: it takes the place of the comma after a batch, so nothing is moved.
        """
        buffer, window, boundary = self._buffer, _WINDOW, _Boundary()
        first, start = self._parse(_first, 1)
        more = first != b"]"
        if not more:
            del buffer[: start + 1]
        while more:
            self._fill(window)
            comma = boundary.last_comma(buffer, window)
            if comma > 0 and (batch := self._strict_batch(comma)) is not None:
                yield batch
                window = min(2 * window, _WINDOW)
                continue
            # After a refusal guess nearer, so that one odd record does not send a whole window to the slow path.
            window = max(window // 2, _MIN_WINDOW) if comma > 0 else min(2 * window, _WINDOW)
            record, end = self._parse(_element, 1)
            more, after = self._parse(_goes_on, end, b"]")
            if more:
                boundary.learn(buffer, end - 1)
                after -= 1
                buffer[after] = ord("[")
            del buffer[:after]
            yield [record]

    def _strict_batch(self, comma: int) -> list[Record | None] | None:
        """Decode the records up to the guessed comma and drop them from the buffer, or return None and leave it."""
        buffer = self._buffer
        buffer[comma] = ord("]")
        try:
            with memoryview(buffer) as view, view[: comma + 1] as records:
                batch = _STRICT.decode(records)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            buffer[comma] = ord(",")
            return None
        buffer[comma] = ord("[")
        del buffer[:comma]
        return batch

    def _parse(self, step: Callable[..., _T], position: int, *more: bytes) -> _T:
        """Return what `step` finds at `position`, with as much more of the body in the buffer as it needs."""
        while True:
            with suppress(_IncompleteError):
                return step(self._buffer, position, *more)
            if self._ended:
                raise MalformedBodyError("the body ends before its JSON value does")
            # Doubling keeps the work for one long value linear.
            self._fill(max(2 * len(self._buffer), _MIN_WINDOW))

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            self._buffer += chunk or b""

    def _skip_space(self) -> None:
        while True:
            self._fill(1)
            self._buffer[:] = self._buffer.lstrip(b" \t\n\r")
            if self._buffer or self._ended:
                return


class _Boundary:
    """What stands between two records, learned from some; finds where others may meet."""

    def __init__(self) -> None:
        self._text = b""
        self._comma = 0
        self._second_key = b""

    def learn(self, buffer: bytearray, brace: int) -> None:
        """Learn from the record that ends at `brace`, if the start of the next one is in the buffer."""
        if (found := _BOUNDARY.match(buffer, brace)) and found.end(1) - brace <= _MAX_BOUNDARY:
            self._text, self._comma, self._second_key = found[1], found.start(2) - brace, found[3]

    def last_comma(self, buffer: bytearray, end: int) -> int:
        """Return where the last comma between records may be before `end`, or -1.

        Nested objects often start with the same key as records, seldom with the same two.
        """
        for _ in range(_MAX_GUESSES if self._text else 0):
            end = buffer.rfind(self._text, 0, end)
            if end < 0:
                break
            if (found := _BOUNDARY.match(buffer, end)) and found[3] == self._second_key:
                return end + self._comma
        return -1


# Each of these takes the buffer and a position, and raises _IncompleteError if the buffer ends too soon.


def _first(buffer: bytearray, position: int) -> tuple[bytes, int]:
    """Return the first byte that is no space, and where it is."""
    found = _FIRST.match(buffer, position) or _refuse(buffer, position)
    return found[1], found.end()


def _element(buffer: bytearray, position: int) -> tuple[Record | None, int]:
    """Return the element of the list at `position`, None if it is no object, and where it ends."""
    first, position = _first(buffer, position)
    if first != b"{":
        return None, _value_end(buffer, position)
    position += 1
    first, start = _first(buffer, position)
    if first == b"}":
        return Record(), start + 1
    fields: dict[str, Any] = {}
    more = True
    while more:
        found = _MEMBER.match(buffer, position) or _refuse(buffer, position)
        start, end = found.span(3)
        more, position = found[4] == b",", found.end()
        if end < 0:  # no scalar value, or the buffer ends
            start, end = position, _value_end(buffer, position)
            more, position = _goes_on(buffer, end, b"}")
        key = _text(found[1])
        if key in _FIELDS:
            fields[key] = _value(bytes(buffer[start:end]))
    return Record(**fields), position


def _key(buffer: bytearray, position: int) -> tuple[str, int]:
    """Return the key at `position` and where its value starts."""
    found = _MEMBER.match(buffer, position) or _refuse(buffer, position)
    return _text(found[1]), found.end(2)


def _value_end(buffer: bytearray, start: int) -> int:
    """Return where the value at `start` ends; nesting has no limit."""
    if not buffer.startswith((b"{", b"["), start):
        return (_SCALAR.match(buffer, start) or _refuse(buffer, start)).end()
    opened, fresh, position = bytearray(buffer[start : start + 1]), True, start + 1
    while opened:
        found = _STRETCHES[opened[-1], fresh].match(buffer, position) or _refuse(buffer, position)
        position = found.end()
        bracket = buffer[position - 1]
        fresh = bracket in b"[{"
        if fresh:
            opened.append(bracket)
        else:
            opened.pop()
    return position


def _goes_on(buffer: bytearray, position: int, closing: bytes) -> tuple[bool, int]:
    """Tell whether a comma follows, or else the closing bracket, and where that ends."""
    found = _DELIMITER.match(buffer, position) or _refuse(buffer, position)
    if found[1] not in (b",", closing):
        raise MalformedBodyError("the body has a wrong bracket")
    return found[1] == b",", found.end()


def _refuse(buffer: bytearray, position: int) -> NoReturn:
    if _UNFINISHED.match(buffer, position):
        raise _IncompleteError
    raise MalformedBodyError("the body is not valid JSON")


def _value(token: bytes) -> Any:
    """Return what a value means; an array or object is no use to anybody, so an empty object stands for it."""
    if token.startswith(b'"'):
        return _text(token)
    if token.startswith((b"{", b"[")):
        return {}
    if token in _LITERALS:
        return _LITERALS[token]
    try:
        return int(token)
    except ValueError:  # a fraction, an exponent, NaN, or more digits than int() takes, which makes an infinity
        return float(token)


def _text(token: bytes) -> str:
    text = token.decode("utf-8", "replace")
    if "\\" in text:
        with suppress(ValueError):  # an escape that JSON does not know stays as it is
            return str(json.loads(text, strict=False))
    return text[1:-1]


def _link(token: bytes) -> str | None:
    link = _value(token)
    if link is not None and not isinstance(link, str):
        raise MalformedBodyError("the page's link to the next one is no text")
    return link or None

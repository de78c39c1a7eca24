"""From the bytes of one response body to records, in memory that does not grow with the body.

A body is cut where two records seem to meet, and a strict decoder proves the cut: `[` + slice + `]` is valid JSON only
if the slice ends where a record ends. If the strict decoder refuses it, the next record is taken alone: its end is
found by counting brackets outside strings, and a tolerant decoder reads what the strict one refuses (huge numbers,
lone surrogates, broken UTF-8, bad escapes, deep nesting). The tolerant decoder accepts all that the strict one
accepts, with the same fields, so neither the verdict nor the records depend on how the body was cut into pieces.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from creatify_exporter.tasks import Record

_T = TypeVar("_T")

_WINDOW = 256 * 1024
_MIN_WINDOW = 4 * 1024
_MAX_GUESSES = 64
_MAX_LINK = 8 * 1024
_MAX_DEPTH = 200
_MAX_TEXT = _WINDOW  # of one string; not less, or what a record says would depend on whether it came in a batch
_CUT = "\N{HORIZONTAL ELLIPSIS}".encode()  # so that what is cut is no number

_BATCH = msgspec.json.Decoder(list[Record | None])
_RECORD = msgspec.json.Decoder(Record)

_NO_SPACE = re.compile(rb"[^ \t\n\r]")
_NO_SCALAR = re.compile(rb"[^-+.0-9A-Za-z]")
_MARK = re.compile(rb'["\[\]{}]')
# Bounded, because the matcher remembers every round and keeps other threads waiting.
_TEXT = re.compile(rb'[^"\\]{0,9999}(?:\\.[^"\\]{0,999}){0,1000}', re.DOTALL)
_PIECE = re.compile(rb"[^\\]{0,9999}(?:\\.?[^\\]{0,999}){0,1000}", re.DOTALL)
_ESCAPE = re.compile(rb'\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})?')
# A brace, a comma, a brace and the first key; then, if the first value is short, the second key.
_BOUNDARY = re.compile(
    rb'(\}\s{0,64}(,)\s{0,64}\{\s{0,64}"[^"\\]{0,99}"\s{0,64}:)(?:\s*(?:"[^"\\]{0,99}"|[^"\\,]{1,99}),\s*("[^"\\]{0,99}"))?'
)


class MalformedBodyError(ValueError):
    """Say that a body is no list of records; the message never quotes the body."""


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
        first, start = self._token(0)
        del self._buffer[:start]
        if first == b"[":
            yield from self._array()
        elif first == b"{":
            yield from self._envelope()
        else:
            raise MalformedBodyError("the body is neither a JSON array nor a JSON object")
        if self._token(0)[0]:
            raise MalformedBodyError("the body goes on after its JSON value")

    def _envelope(self) -> Iterator[list[Record | None]]:
        """Yield the records of the envelope at the start of the buffer; the buffer starts with its brace or a comma."""
        buffer, found = self._buffer, False
        more = self._token(1)[0] != b"}"
        while more:
            key, start = self._key()
            end = 0
            if key == "results":
                if found or buffer[start : start + 1] != b"[":
                    raise MalformedBodyError("the page's results are not one array")
                found = True
                del buffer[:start]
                yield from self._array()
            else:
                end = self._value_end(start, _MAX_LINK if key == "next" else sys.maxsize)
                value = _load(_cut(buffer, start, end))
                if key == "next":
                    self.next = _link(value)
            more, end = self._goes_on(end, b"}")
            del buffer[: end - more]
        if not found:
            raise MalformedBodyError("the body is a JSON object without results")

    def _array(self) -> Iterator[list[Record | None]]:
        """Yield the records of the array at the start of the buffer, and drop it from there.

        The buffer starts with `[` all the time: it takes the place of the comma after a batch, so nothing is moved.
        """
        buffer, window, boundary = self._buffer, _WINDOW, _Boundary()
        first, start = self._token(1)
        more = first != b"]"
        if not more:
            del buffer[: start + 1]
        while more:
            self._fill(window)
            comma = boundary.last_comma(buffer, window)
            if comma > 0 and (batch := self._batch(comma)) is not None:
                yield batch
                window = min(2 * window, _WINDOW)
                continue
            # After a refusal guess nearer, so that one odd record does not send a whole window to the slow path.
            window = max(window // 2, _MIN_WINDOW) if comma > 0 else min(2 * window, _WINDOW)
            record, end = self._element()
            more, after = self._goes_on(end, b"]")
            if more:
                boundary.learn(buffer, end - 1)
                after -= 1
                buffer[after] = ord("[")
            del buffer[:after]
            yield [record]

    def _batch(self, comma: int) -> list[Record | None] | None:
        """Decode the records up to the guessed comma and drop them from the buffer, or return None and leave it."""
        buffer = self._buffer
        buffer[comma] = ord("]")
        batch = _strict(_BATCH, buffer, comma + 1)
        buffer[comma] = ord(",") if batch is None else ord("[")
        if batch is not None:
            del buffer[:comma]
        return batch

    def _element(self) -> tuple[Record | None, int]:
        """Return the first element of the array, None if it is no object, and where it ends."""
        first, start = self._token(1)
        end = self._value_end(start)
        token = _cut(self._buffer, start, end)
        record = _strict(_RECORD, token, len(token)) if first == b"{" else None
        if record is None:
            value = _load(token)
            if isinstance(value, dict):
                record = Record(**{name: value[name] for name in Record.__struct_fields__ if name in value})
        return record, end

    def _key(self) -> tuple[object, int]:
        """Return the first key of the object and where its value starts."""
        quote, start = self._token(1)
        end = self._value_end(start)
        colon, after = self._token(end)
        if (quote, colon) != (b'"', b":"):
            raise MalformedBodyError("the body has no key where one belongs")
        return _load(self._buffer[start:end]), self._token(after + 1)[1]

    def _goes_on(self, position: int, closing: bytes) -> tuple[bool, int]:
        """Tell whether a comma follows, or else the closing bracket, and where that ends."""
        found, position = self._token(position)
        if found not in (b",", closing):
            raise MalformedBodyError("the body is not valid JSON")
        return found == b",", position + 1

    def _token(self, position: int) -> tuple[bytes, int]:
        """Return the first byte from `position` on that is no space, empty at the body's end, and where it is."""
        while not (found := _NO_SPACE.search(self._buffer, position)):
            if self._ended:
                return b"", len(self._buffer)
            del self._buffer[position:]
            self._fill(position + 1)
        return found[0], found.start()

    def _value_end(self, start: int, limit: int = sys.maxsize) -> int:
        """Return where the value at `start` ends; refuse a longer one than `limit` without waiting for its end."""
        while (end := _value_end(self._buffer, start)) < 0 and not self._ended and len(self._buffer) - start <= limit:
            # Doubling keeps the work for one long value linear.
            self._fill(max(2 * len(self._buffer), _MIN_WINDOW))
        if (len(self._buffer) if end < 0 else end) - start > limit:
            raise MalformedBodyError("the page's link to the next one is too long")
        if end < 0:
            raise MalformedBodyError("the body ends before its JSON value does")
        return end

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size and not self._ended:
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            self._buffer += chunk or b""


class _Boundary:
    """What stands between two records, learned from some; guesses where others may meet."""

    def __init__(self) -> None:
        self._text = b""
        self._second_key: bytes | None = None

    def learn(self, buffer: bytearray, brace: int) -> None:
        """Learn from the record that ends at `brace`, if the start of the next one is in the buffer."""
        if found := _BOUNDARY.match(buffer, brace):
            self._text, self._second_key = found[1], found[3]

    def last_comma(self, buffer: bytearray, end: int) -> int:
        """Return where the last comma between records may be before `end`, or -1.

        Nested objects often start with the same key as records, seldom with the same two.
        """
        for _ in range(_MAX_GUESSES if self._text else 0):
            end = buffer.rfind(self._text, 0, end)
            if end < 0:
                break
            if (found := _BOUNDARY.match(buffer, end)) and found[3] == self._second_key:
                return found.start(2)
        return -1


# These return -1 if the buffer ends too soon.


def _value_end(buffer: bytearray, start: int) -> int:
    """Return where the value at `start` ends, if it is one."""
    first = bytes(buffer[start : start + 1])
    if first == b'"':
        return _string_end(buffer, start + 1)
    if first in (b"{", b"["):
        depth = 0
        for place in _brackets(buffer, start):
            depth += 1 if buffer[place] in b"{[" else -1
            if not depth:
                return place + 1
        return -1
    found = _NO_SCALAR.search(buffer, start)
    if found and found.start() == start:
        raise MalformedBodyError("the body is not valid JSON")
    return found.start() if found else -1


def _brackets(buffer: bytearray, position: int) -> Iterator[int]:
    """Yield where the brackets outside strings are."""
    return (place for place, _ in _marks(buffer, position, len(buffer)) if buffer[place] != ord('"'))


def _marks(buffer: bytearray, position: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where the strings, and the brackets outside them, begin and end."""
    while position >= 0 and (found := _MARK.search(buffer, position, end)):
        position = found.end()
        if found[0] == b'"':
            position = _string_end(buffer, position)
        yield found.start(), position


def _string_end(buffer: bytearray, start: int) -> int:
    """Return where the string ends whose first character is at `start`."""
    end = buffer.find(b'"', start)
    # Running to the next quote is ten times as fast, and mostly no backslash stands before it.
    if end >= 0 and buffer[end - 1] != ord("\\"):
        return end + 1
    for found in _TEXT.finditer(buffer, start) if end >= 0 else ():
        if buffer.startswith(b'"', found.end()):
            return found.end() + 1
    return -1


# These read values that are complete.


def _cut(buffer: bytearray, start: int, end: int) -> bytearray:
    """Return a slice without most of each string that is longer than `_MAX_TEXT`.

    A decoder would keep all other threads waiting over it, and nobody reads that much. No batch has such a string.
    """
    value = bytearray()
    for place, after in _marks(buffer, start, end) if end - start > _MAX_TEXT else ():
        if after - place > _MAX_TEXT:
            pieces = (found.end() for found in _TEXT.finditer(buffer, place + 1))
            value += buffer[start : next(stop for stop in pieces if stop - place > _MAX_TEXT // 2)] + _CUT
            start = after - 1
    return value + buffer[start:end]


def _strict(decoder: msgspec.json.Decoder[_T], buffer: bytearray, end: int) -> _T | None:
    """Decode the bytes up to `end` without a copy; return None for what is not strictly valid."""
    try:
        with memoryview(buffer) as view, view[:end] as part:
            return decoder.decode(part)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _link(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise MalformedBodyError("the page's link to the next one is no text")
    return value or None


def _integer(token: str) -> int | float:
    try:
        return int(token)
    except ValueError:  # more digits than int() takes
        return float(token)


_tolerant = json.JSONDecoder(strict=False, parse_int=_integer).decode


def _load(token: bytearray) -> Any:
    """Decode a value as tolerantly as can be; raise MalformedBodyError without the value in its context."""
    with suppress(ValueError, RecursionError):
        return _tolerant(_text(token))
    # A backslash that begins no escape stands for itself.
    mended = bytearray()
    for piece in _PIECE.finditer(token):  # at once, each replacement would take memory until the last one
        mended += _ESCAPE.sub(lambda found: found[0] if len(found[0]) > 1 else rb"\\", piece[0])
    with suppress(ValueError):
        return _tolerant(_text(_flat(mended)))
    raise MalformedBodyError("the body is not valid JSON")


def _flat(value: bytearray) -> bytearray:
    """Return a value with 0 for each container that is nested too deep for the decoder, once it was decoded alone."""
    parts, depth, start = [bytearray()], 0, 0
    for place in _brackets(value, 0):
        opens = value[place] in b"{["
        depth += opens
        if depth % _MAX_DEPTH == 0:
            end = place if opens else place + 1
            parts[-1] += value[start:end]
            start = end
            if opens:
                parts.append(bytearray())
            else:
                _tolerant(_text(parts.pop()))
                parts[-1] += b"0"
        depth -= not opens
    return parts[-1] + value[start:]


def _text(token: bytearray) -> str:
    return token.decode("utf-8", "replace")

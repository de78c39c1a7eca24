"""Failure texts, and the bounded set of reasons they become.

A failure text is upstream's free prose; a reason is a name from a closed set. Nothing of a text leaves this module
but its reason, and, for `--reasons` alone, a masked example. Rules and their order: docs/failure-reasons.md.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import islice
from typing import Final, NamedTuple
from unicodedata import normalize

import re2

BUILT_IN: Final = {
    "quota_exceeded": ("upstream", "A rate or quota limit of the model provider was hit."),
    "provider_billing": ("upstream", "The model provider's account has no money or no billing."),
    "insufficient_credits": ("account", "The Creatify workspace has no credits left."),
    "overloaded": ("upstream", "The model provider had no capacity."),
    "internal_error": ("upstream", "The model provider failed."),
    "timeout": ("upstream", "No answer came in time."),
    "token_limit": ("caller", "The prompt was too long, or the answer was cut at the token limit."),
    "content_blocked": ("caller", "The prompt or the answer was blocked: safety, prohibited content, recitation."),
    "invalid_request": ("caller", "The request was wrong: schema, missing or malformed fields, bad media."),
    "model_not_found": ("caller", "The model does not exist, or no longer."),
    "permission_denied": ("account", "A credential was missing, wrong or not allowed to do this."),
    "location_unsupported": ("caller", "The model provider does not serve this country or region."),
    "malformed_response": ("upstream", "The model answered with nothing usable."),
    "network_error": ("upstream", "A connection between systems failed."),
    "other": ("unknown", "A text that no rule knows."),
    "unspecified": ("unknown", "No text: missing, null or blank."),
}
"""The reasons of the built-in rules: who has to act, and what it means."""
OTHER: Final = "other"
UNSPECIFIED: Final = "unspecified"
UNKNOWN: Final = "unknown"

MAX_TEXT: Final = 4096
"""Characters of a text that are looked at."""
MAX_SEEN: Final = 16_384
"""Texts whose reason is remembered, by hash: about 2 MB."""
MAX_STATUSES: Final = 8
MAX_ECHOES: Final = 16
MAX_WORD: Final = 100
"""Bytes of a word of prose; what is longer is encoded data."""
MAX_MASKED: Final = 120
MAX_TOKEN: Final = 20
MAX_EXAMPLES: Final = 10
MAX_MASKINGS: Final = 10_000

_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}", re.ASCII)
_PLAIN_QUOTES: Final = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300d", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2039\u203a\u00b4", "'")
)
_QUOTES: Final = {"\u201c\u201d\u201e\u300c\u300d\u00ab\u00bb": b'"', "\u2018\u2019": b"'"}
_CONTROL: Final = r"\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
_UNPRINTABLE: Final = re.compile(f"[{_CONTROL}]")
_BLANK: Final = re.compile(rf"[\s{_CONTROL}]*")
_LAST_WORD: Final = re.compile(r"\S*\Z")
_SECRET: Final = re.compile(
    r"(?i)(?<![?&\w])((?:key|token|secret|password|passwd|pwd|authorization|cookie)s?\s?[=:]|bearer|basic)\s*\S+"
)
_APOSTROPHE: Final = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")
_TOKEN: Final = re.compile(r"[^\s()\[\]{}<>,;\"'|]+")
_NUMBER: Final = re.compile(r"(?<![A-Za-z])\d+(?:[.:,]\d+)*(?![A-Za-z\d])")
_ID: Final = re.compile(r"[A-Za-z0-9]*\d[A-Za-z0-9]*")

_STATUSES: Final = {
    "quota_exceeded": {429},
    "insufficient_credits": {402},
    "permission_denied": {401, 403, 407},
    "overloaded": {503, 529},
    "timeout": {408, 504, 522, 524, 598, 599},
    "network_error": {521, 523, 525, 526, 530},
    "invalid_request": {400, 404, 405, 406, 409, 410, 411, 412, 413, 414, 415, 416, 417, 422, 431},
    "internal_error": {500, 501, 502, 507, 520},
}
"""What a number in a status's place says; of several the first of these, as wrappers answer 400 or 500 for all."""

_ASKED: Final = {
    *("location_unsupported", "provider_billing", "insufficient_credits", "permission_denied", "quota_exceeded"),
    *("token_limit", "content_blocked", "model_not_found", "overloaded"),
}
_HIDES: Final = {
    "quota_exceeded": {"provider_billing", "insufficient_credits", "overloaded", "location_unsupported"},
    "insufficient_credits": {"provider_billing", "quota_exceeded"},
    "permission_denied": _ASKED - {"overloaded", "token_limit"},
    "overloaded": {"provider_billing", "timeout", "network_error", "model_not_found"},
    "timeout": {"permission_denied"},
    "model_not_found": {"invalid_request"},
    "invalid_request": _ASKED,
    "internal_error": _ASKED | {"internal_error", "invalid_request", "timeout", "malformed_response", "network_error"},
    "network_error": _ASKED | {"invalid_request", "timeout", "malformed_response"},
    "malformed_response": _ASKED,
    "other": _ASKED | {"invalid_request", "timeout", "malformed_response", "network_error"},
}
"""What a status is known to be sent for as well: there a specific cause in prose beats it."""

_LITTLE: Final = frozenset(
    b"is are was were be been being has have had the a an your you it its this that their our s does do did can ca"
    b" could will would currently temporarily momentarily already just still also".split()
)
_GAP: Final = "(?:[ :=-]+)"
_MARKS: Final = {
    b"/models": b"/models",
    b"openrouter": b"openrouter",
    b"platform.openai": b"openai",
    b"HARM_C": b"HARM_CATEGORY",
    b"'stop'": b"STOP_OR",
    b"'STOP'": b"STOP_OR",
    b"STOP,": b"STOP_OR",
}
"""What is left of an echo, by what is in it: the URL of a model, and what an answer may end with."""


def _options(encoding: object) -> re2.Options:
    options = re2.Options()
    options.encoding = encoding
    options.log_errors = False
    options.never_capture = True
    options.max_mem = 32 << 20
    return options


_UTF8: Final = _options(re2.Options.Encoding.UTF8)
_LATIN1: Final = _options(re2.Options.Encoding.LATIN1)
_ECHO_SIGNS: Final = (b'"', b"'", b":", b",", b"/", b"=", b"HARM_", b" says ")
"""Every echo has one of them; looking for them is faster than for echoes."""
_CODE: Final = re.compile(rb"[45]\d\d")
_CONTROLS: Final = bytes(32 if byte < 32 or byte == 127 else byte for byte in range(256))
_WORDS: Final = _CONTROLS.replace(b"\\", b" ")
_PROSE: Final = bytes(32 if byte in b"\"'_`*" else byte for byte in _WORDS.lower())


class _Rule(NamedTuple):
    part: str
    reason: str
    pattern: str


def _read(text: str) -> Iterator[_Rule]:
    """Yield the rules of a text in the form of `reasons.rules`."""
    part = reason = ""
    for line in text.splitlines():
        if line.startswith("["):
            part = line.strip("[]")
        elif not line.startswith(" "):
            reason = line
        elif (pattern := line.strip())[0] != "#":
            yield _Rule(part, reason, pattern.replace("N", r"[45]\d\d") if part == "number" else pattern)


def _whole_words(pattern: str) -> str:
    pattern = re.sub(r"[à-ž]", lambda found: f"(?:{found[0]}|{normalize('NFD', found[0])[0]}e?)", pattern)
    before = "" if not pattern.isascii() or re.match(r"\(?\^|\[|\\[\[(W]", pattern) else r"\b"
    after = "" if not pattern.isascii() or re.search(r"(\$\)?|[]*}])$", pattern) else r"\b"
    return f"{before}(?:{pattern}){after}"


class _Rules:
    """Some parts of the rules, as automata that say in one pass each which of them match a text.

    One automaton for all rules of prose would have too many states: its size is the product of theirs.
    """

    def __init__(self, *parts: str, gap: str = " ", size: int = 1_000) -> None:
        self._rules = [rule for rule in _ALL if rule.part in parts]
        self._sets: list[tuple[int, re2.Set]] = []
        for start in range(0, len(self._rules), size):
            automaton = re2.Set.SearchSet(_LATIN1)
            for part, _, pattern in self._rules[start : start + size]:
                automaton.Add((pattern if part == "number" else _whole_words(pattern.replace(" ", gap))).encode())
            automaton.Compile()
            self._sets.append((start, automaton))

    def matching(self, text: bytes) -> list[_Rule]:
        """Return the rules that match, in their order."""
        return [self._rules[start + i] for start, found in self._sets for i in sorted(found.Match(text) or ())]


def _one_of(*parts: str) -> bytes:
    return "|".join(rule.pattern for rule in _ALL if rule.part in parts).encode()


_ALL: Final = tuple(_read((files(__package__) / "reasons.rules").read_text("utf-8")))
_MACHINE: Final = _Rules("answer", "code", "status", "number", "class")
_SPECIFIC: Final = _Rules("specific", gap=_GAP, size=60)
_GENERIC: Final = _Rules("generic", "abroad", gap=_GAP, size=60)
_ECHOES: Final = re2.compile(_one_of("echo", "quoted"), _LATIN1)
_QUOTED: Final = re2.compile(_one_of("quoted"), _LATIN1)
_NUMBERS: Final = re2.compile(_one_of("number"), _LATIN1)


def check_rule(reason: str, match: str) -> str | None:
    """Return what is wrong with a rule of the user, or None."""
    if not _NAME.fullmatch(reason):
        return "reason must be at most 64 letters, digits and underscores, not beginning with a digit"
    if not match:
        return "match must not be empty"
    try:
        re2.compile(match.encode(), _UTF8)
    except UnicodeEncodeError:
        return "match is not valid Unicode"
    except re2.error as error:
        return f"match is not a valid RE2 pattern: {error.args[0].partition(b': ')[0].decode()}"
    return None


class Classifier:
    """Name the reason of a failure text; safe to share between threads."""

    def __init__(self, rules: Sequence[tuple[str, str, str]] = ()) -> None:
        """Take the user's rules, (reason, RE2 pattern, owner), which come before the built-in ones.

        Raises ValueError for a rule that `check_rule` objects to.
        """
        for reason, match, _ in rules:
            if error := check_rule(reason, match):
                raise ValueError(error)
        self._rules = [(reason, re2.compile(match.encode(), _UTF8)) for reason, match, _ in rules]
        self._seen: dict[int, str] = {}
        self.reasons = tuple(dict.fromkeys([*(reason for reason, *_ in rules), *BUILT_IN]))
        self.owners = _owners(rules)

    def __call__(self, text: object) -> str:
        """Return the reason of a failure text, any JSON value: one of `reasons`."""
        if not isinstance(text, str) or _BLANK.fullmatch(head := text[:MAX_TEXT]):
            return UNSPECIFIED
        # Only a hash is kept, so no upstream text stays in memory; Python's own is keyed anew in each process.
        key = hash(head)
        reason = self._seen.get(key)
        if reason is None:
            reason = self._classify(head)
            if len(self._seen) >= MAX_SEEN:
                self._seen.clear()
            self._seen[key] = reason
        return reason

    def _classify(self, head: str) -> str:
        data = head.encode("utf-8", "replace")
        if self._rules:
            sanitised = data.translate(_CONTROLS)
            for reason, pattern in self._rules:
                if pattern.search(sanitised):
                    return reason
        outside, quoted = _split(data if head.isascii() else _plain_quotes(data))
        status, final = _status(outside)
        if final:
            return status
        prose = _prose(outside)
        told = _SPECIFIC.matching(prose)
        if status:
            if not outside.isascii():
                told += [rule for rule in _GENERIC.matching(prose) if rule.part == "abroad"]
            return next((rule.reason for rule in told if rule.reason in _HIDES.get(status, ())), status)
        if told := told or _GENERIC.matching(prose):
            return told[0].reason
        return (quoted and _status(quoted, "class")[0]) or OTHER


def _owners(rules: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Return who has to act on each reason: the first rule of the user that says so decides."""
    owners = {reason: UNKNOWN for reason, *_ in rules} | {reason: owner for reason, (owner, _) in BUILT_IN.items()}
    return owners | {reason: owner for reason, _, owner in reversed(rules) if owner != UNKNOWN}


def _plain_quotes(data: bytes) -> bytes:
    for quotes, plain in _QUOTES.items():
        for quote in quotes:
            data = data.replace(quote.encode(), plain)
    return data


def _prose(data: bytes) -> bytes:
    """Return a text as the rules of prose see it."""
    longest = MAX_WORD
    if not data.isascii():
        data = data.decode("utf-8", "replace").lower().encode()
        longest = len(data)  # some languages put no blanks between words
    words = data.replace(b"n't", b" not").translate(_PROSE).split()
    return b" ".join([word for word in words if len(word) <= longest and word not in _LITTLE])


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Return a text without its echoes, and of those what may be an author's words."""
    if not any(sign in data for sign in _ECHO_SIGNS):
        return data, b""
    outside, quoted, end = [], [], 0
    for echo in islice(_ECHOES.finditer(data), MAX_ECHOES):
        part = echo.group()
        outside += [data[end : echo.start()], next((mark for sign, mark in _MARKS.items() if sign in part), b"")]
        quoted += [part] if _QUOTED.match(part) else []
        end = echo.end()
    return (b" ".join([*outside, data[end:]]) if outside else data), b" ".join(quoted)


def _status(data: bytes, *without: str) -> tuple[str, bool]:
    """Return the reason that a machine's words in a text give, or "", and whether it is final."""
    words = data.translate(_WORDS)
    for part, reason, _ in _MACHINE.matching(words):
        if part in without:
            continue
        if part != "number":
            return reason, part in ("answer", "code")
        places = islice(_NUMBERS.finditer(words), MAX_STATUSES)
        statuses = {int(_CODE.findall(place.group())[-1]) for place in places}
        if numbered := next((reason for reason, known in _STATUSES.items() if known & statuses), None):
            return numbered, False
    return "", False


def mask(text: str) -> str:
    """Return what may be shown of a failure text: one line of ASCII, at most 120 characters.

    Quoted strings, URLs, addresses, paths, values of keys that name a secret, numbers, ids, runs of 20 or more
    characters and whatever is not ASCII give way to placeholders. Words of prose stay.
    """
    head = text[:MAX_TEXT].translate(_PLAIN_QUOTES)
    if len(text) > MAX_TEXT:  # half a token could pass for a short word
        head = _LAST_WORD.sub("", head)
    head = _SECRET.sub(r"\1 <text>", _UNPRINTABLE.sub(" ", head))
    for quote in "\"'`":
        head = _mask_quoted(head, quote)
    masked = " ".join(map(_mask_word, head.split()))
    return masked if len(masked) <= MAX_MASKED else masked[: MAX_MASKED - 3] + "..."


def _mask_quoted(text: str, quote: str) -> str:
    """Replace what `quote` encloses; where that is unclear, all from the first to the last, or to the end."""
    if quote == "'":  # an apostrophe inside a word encloses nothing
        text = _APOSTROPHE.sub(" ", text)
    first, *rest = text.split(quote)
    if not rest:
        return text
    if len(rest) % 2:
        return f"{first}<text>"
    befores, afters = [first, *rest[1:-1:2]], rest[1::2]
    if "\\" + quote in text or any(s[-1:].isalnum() for s in befores) or any(s[:1].isalnum() for s in afters):
        return f"{first}<text>{rest[-1]}"
    return first + "".join(f"<text>{after}" for after in afters)


def _mask_word(word: str) -> str:
    if "://" in word or word.lower().startswith("www."):
        return "<url>"
    if "@" in word:
        return "<email>"
    if word.count("/") + word.count("\\") > 1:
        return "<path>"
    return _TOKEN.sub(_mask_token, word)


def _mask_token(match: re.Match[str]) -> str:
    token = match[0]
    if not token.isascii():
        return "<chars>"
    if len(token) >= MAX_TOKEN:
        return "<token>"
    return _ID.sub("<id>", _NUMBER.sub("<n>", token))


class Report:
    """Count failure texts by reason, with masked examples, in bounded memory: the table of `--reasons`."""

    def __init__(self, classify: Classifier) -> None:
        """Count the reasons that `classify` gives."""
        self._classify = classify
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, dict[str, None]] = {}

    def add(self, text: object) -> None:
        """Count the failure text of one failed task, any JSON value."""
        reason = self._classify(text)
        self._counts[reason] += 1
        examples = self._examples.setdefault(reason, {})
        wanted = MAX_EXAMPLES if reason == OTHER else 1
        # Thousands of texts that differ in what is masked only would all be masked for nothing.
        if isinstance(text, str) and len(examples) < wanted and self._counts[reason] <= MAX_MASKINGS:
            examples[mask(text)] = None

    def render(self) -> str:
        """Return the table, most frequent reason first, ending in a line break."""
        if not self._counts:
            return "No failed tasks are listed.\n"
        total = self._counts.total()
        rows = [("REASON", "OWNER", "COUNT", "SHARE", "EXAMPLE (MASKED)")]
        for reason, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0])):
            first, *more = self._examples[reason] or [""]
            owner = self._classify.owners[reason]
            rows += [(reason, owner, str(count), f"{count / total:.1%}", first)]
            rows += [("", "", "", "", example) for example in more]
        width = max(len(reason) for reason, *_ in rows)
        lines = (
            f"{reason:{width}}  {owner:8}  {count:>8}  {share:>6}  {example}".rstrip()
            for reason, owner, count, share, example in rows
        )
        return "\n".join(lines) + "\n"

"""Failure texts, and the bounded set of reasons they become.

A failure text is upstream's free prose; a reason is a name from a closed set. Nothing of a text leaves this module
but its reason, and, for `--reasons` alone, a masked example. Rules and their order: docs/failure-reasons.md.
"""

import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from itertools import islice
from typing import Final

import re2

BUILT_IN: Final = {
    "quota_exceeded": "A rate or quota limit of the model provider was hit.",
    "provider_billing": "The model provider's account has no money or no billing.",
    "insufficient_credits": "The Creatify workspace has no credits left.",
    "overloaded": "The model provider had no capacity.",
    "internal_error": "The model provider failed.",
    "timeout": "No answer came in time.",
    "token_limit": "The prompt was too long, or the answer was cut at the token limit.",
    "content_blocked": "The prompt or the answer was blocked: safety, prohibited content, recitation.",
    "invalid_request": "The request was wrong: schema, missing or malformed fields, bad media.",
    "model_not_found": "The model does not exist, or no longer.",
    "permission_denied": "A credential was missing, wrong or not allowed to do this.",
    "location_unsupported": "The model provider does not serve this country or region.",
    "malformed_response": "The model answered with nothing usable.",
    "network_error": "A connection between systems failed.",
    "other": "A text that no rule knows.",
    "unspecified": "No text: missing, null or blank.",
}
OTHER: Final = "other"
UNSPECIFIED: Final = "unspecified"

MAX_TEXT: Final = 4096
"""Characters of a text that are looked at."""
MAX_SEEN: Final = 16_384
"""Texts whose reason is remembered, by hash: about 2 MB."""
MAX_STATUSES: Final = 8
MAX_MASKED: Final = 120
MAX_TOKEN: Final = 20
MAX_EXAMPLES: Final = 10
MAX_MASKINGS: Final = 10_000

_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}", re.ASCII)
_PLAIN_QUOTES: Final = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300d", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2039\u203a\u00b4", "'")
)
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
    "internal_error": {500, 501, 502, 507, 520},
    "invalid_request": {400, 404, 405, 406, 409, 410, 411, 412, 413, 414, 415, 416, 417, 422, 431},
}
_LITTLE: Final = "is|are|was|were|be|been|has|have|had|the|an?|your|you|its|this|that|their|our|does|do|did|s"
_SPACE: Final = rf"([\s_:='-]+({_LITTLE})\b)*[\s_:='\"-]*"
# A number at the beginning, alone or before a status name; after a word for status; in a heading; before "error".
_STATUS: Final = r"""(?i)^\W{0,3}N\W*($|[^\w\s%]|\s?[{\[(<-]|\s(client|server)\serror|\s(?-i:[A-Z])) |
    \b(http|status|code|error|gemini|upstream)(\s?/\d(\.\d)?|[\s_-]?(error|status|code|is|was))*[\s"'`:=#([-]{0,6}N\b |
    ["']\s?N\s(?-i:[A-Z])|exceptions?\.\w+:\sN\b|\b(status|code)\sof\sN\b|>\s?N[<\s,:]|\(N\)\W*$|
    \bN[\s_-](error|response|status|(client|server)\serror)\b |
    \b(returned|got|received|with|respon\w+|failed|answered)(\s(an?|with|status|code|http))*\W{1,3}N\s*($|[^\w\s%]|from)
""".rstrip().replace("N", r"[45]\d\d")


def _pattern(alternatives: str) -> str:
    """Return the RE2 pattern that `alternatives`, in the notation of `reasons.rules`, stand for."""
    pattern = "|".join(part.strip() for part in re.split(r" \| |\n", alternatives) if part.strip(" |"))
    pattern = re.sub("… ?", lambda _: r"(\W{1,3}\S+){0,5}[\W_]{1,3}", pattern)
    pattern = re.sub(r" (?=\\[wS])", lambda _: _SPACE + r"[\s_-]+", pattern)
    pattern = re.sub(r"\bnot\b", lambda _: r"(no|(do|does|did|is|was|are|were|has|have|could)?n')t", pattern)
    return "(?i)" + pattern.replace(" ", _SPACE)


def _options(encoding: object) -> re2.Options:
    options = re2.Options()
    options.encoding = encoding
    options.log_errors = False
    options.never_capture = True
    options.max_mem = 64 << 20
    return options


def _load(lines: str) -> tuple[list[str], re2.Set]:
    """Return the reasons of some rules, and the automaton that says in one pass which of them match a text."""
    rules = re.findall(r"^(\w+):(.*(?:\n +.*)*)", lines, re.MULTILINE)
    automaton = re2.Set.SearchSet(_LATIN1)
    for _, alternatives in rules:
        automaton.Add(_pattern(alternatives).encode())
    automaton.Compile()
    return [reason for reason, _ in rules], automaton


_UTF8: Final = _options(re2.Options.Encoding.UTF8)
_LATIN1: Final = _options(re2.Options.Encoding.LATIN1)
_STAGES: Final = tuple(map(_load, (files(__package__) / "reasons.rules").read_text("utf-8").split("\n\n")[1:]))
_STATUS_PLACES: Final = re2.compile(re.sub(r" \|\n +", "|", _STATUS).encode(), _LATIN1)
_CONTROLS: Final = bytes(32 if byte < 32 or byte == 127 else byte for byte in range(256))
_CODE: Final = re.compile(rb"[45]\d\d")
# JSON inside a JSON string: its quotes and line breaks come escaped, once per level.
_PLAIN: Final = _CONTROLS.replace(b"\\", b" ")
_DIGITLESS: Final = _PLAIN.replace(b"123456789", b"1" * 9)


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

    def __init__(self, rules: Sequence[tuple[str, str]] = ()) -> None:
        """Take the user's rules, (reason, RE2 pattern), which come before the built-in ones.

        Raises ValueError for a rule that `check_rule` objects to.
        """
        for reason, match in rules:
            if error := check_rule(reason, match):
                raise ValueError(error)
        self._rules = [(reason, re2.compile(match.encode(), _UTF8)) for reason, match in rules]
        self._seen: dict[int, str] = {}
        self.reasons = tuple(dict.fromkeys([*(reason for reason, _ in rules), *BUILT_IN]))

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
        if self._rules:
            sanitised = head.encode("utf-8", "replace").translate(_CONTROLS)
            for reason, pattern in self._rules:
                if pattern.search(sanitised):
                    return reason
        words = head.encode("ascii", "replace")
        digitless = words.translate(_DIGITLESS)
        for reasons, automaton in _STAGES:
            if matches := automaton.Match(digitless):
                first: int = min(matches)
                return reasons[first]
        places = islice(_STATUS_PLACES.finditer(words.translate(_PLAIN)), MAX_STATUSES)
        statuses = {int(_CODE.findall(place.group())[-1]) for place in places}
        return next((reason for reason, known in _STATUSES.items() if known & statuses), OTHER)


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
        rows = [("REASON", "COUNT", "SHARE", "EXAMPLE (MASKED)")]
        for reason, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0])):
            first, *more = self._examples[reason] or [""]
            rows += [(reason, str(count), f"{count / total:.1%}", first), *(("", "", "", example) for example in more)]
        width = max(len(reason) for reason, *_ in rows)
        lines = (
            f"{reason:{width}}  {count:>8}  {share:>6}  {example}".rstrip() for reason, count, share, example in rows
        )
        return "\n".join(lines) + "\n"

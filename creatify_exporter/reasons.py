"""Failure texts, and the bounded set of reasons they become.

A failure text is upstream's free prose; a reason is a name from a closed set. Nothing of a text leaves this module
but its reason, and, for `--reasons` alone, a masked example. Rules and their order: docs/failure-reasons.md.
"""

import re
from collections import Counter
from collections.abc import Sequence
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
MAX_MASKED: Final = 120
MAX_TOKEN: Final = 20
MAX_EXAMPLES: Final = 10
MAX_MASKINGS: Final = 10_000

_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}", re.ASCII)
_PLAIN_QUOTES: Final = str.maketrans(
    dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u300c\u300d", '"')
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2039\u203a\u00b4", "'")
)
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_LAST_WORD: Final = re.compile(r"\S*\Z")
_SECRET: Final = re.compile(
    r"(?i)\b((?:key|token|secret|password|passwd|pwd|authorization|cookie)s?\s?[=:]|bearer|basic)\s*\S+"
)
_APOSTROPHE: Final = re.compile(r"(?<=[^\W\d_])'(?=[^\W\d_])")
_TOKEN: Final = re.compile(r"[^\s()\[\]{}<>,;\"'|]+")
_NUMBER: Final = re.compile(r"(?<![A-Za-z])\d+(?:[.:,]\d+)*(?![A-Za-z\d])")
_ID: Final = re.compile(r"[A-Za-z0-9]*\d[A-Za-z0-9]*")

# Alternatives are divided by " | " or a line's end; the first rule that matches wins. In them a space stands for any run of blanks,
# `_`, `-` and little words (so that RESOURCE_EXHAUSTED, ResourceExhausted and "the resource is exhausted" are one), `…` for up to
# three words. All but `(?-i:...)` ignores case. A gap any wider would let the automaton's states multiply.
_RULES: Final = (
    ("location_unsupported", r"""
        (location|country|countries|region|territory) (not|un) (supported|available) | geo(graphic(al)?)? (block|restrict)
        (not|un) (supported|available) (for use )?(in|for) (user'?s )?(current )?(country|region|location|area|territory)
        un supported (country|region|location|territory)"""),
    ("provider_billing", r"""
        billing… (disabled|inactive|suspended|closed|overdue|delinquent|not (enabled|active|set up|configured|found))
        (enabl(e|ing)|requires?|activate|set up) billing | billing (enabled|required|(hard |quota |account )?(limit|cap)\b)
        billing account for… disabled | billed users | (check|update) billing | spend(ing)? (cap|limit) | (?-i:insufficient_quota)
        pre (paid|pay(ment)?) (credit|balance|fund|account) | (credit|account|prepaid) balance (too )?(low|empty|deplet|exhaust|insufficient|negative|zero)
        insufficient (account )?(balance|funds) | (out of|\bno|enough) (money|funds)\b | \bunpaid\b | past due | arrear
        payment (method|failed|declined|overdue)
        (provider|google|gemini|vertex|openai|anthropic)\b( account| project| key| api|'s|s')*( \w+)? (out of|no|insufficient|not enough|not any) (credits?|money|balance|funds)\b"""),
    ("insufficient_credits", r"""
        (insufficient|enough|sufficient|out of|exceed\w*|exhausted|used up( all)?|\bany|need|more)( \w+)? credits?\b
        \b(no|zero|0)( more| remaining| available| \w+)? credits?( left| remaining| available|\W|$)
        credits?( \w+)? (exhausted|depleted|used up|ran out|run out|insufficient|exceeded|finished|too low|not (enough|sufficient))
        credits?\W+(left|remaining)?\W*0\b | credit limit | payment required"""),
    ("permission_denied", r"""
        api key (\(?\S+\)? )?(provided )?(not (valid|found|supported|provided|set|authori[sz]ed)|invalid|expired|(reported )?leaked|revoked|disabled|missing|required|incorrect|restrict|suspended|deleted)
        (invalid|incorrect|missing|expired|wrong|\bno|\bbad|\bvalid)( x)? api key | (?-i:API_KEY_) | requests? (to|from)… (is|are) blocked
        service disabled | not (been )?used in project | (consumer|project)… (suspended|denied access) | not have( any)?( \w+)? permission"""),
    ("quota_exceeded", r"""
        exhausted (your )?(capacity|quota) | quotas? (exceeded|exhausted|reached|limit|metric|failure|will reset)
        (exceed\w*|exhaust\w*|out of|over|insufficient|reached|hit)( \w+)? quota | tokens? per (min|day|hour|sec) | token (rate|quota)"""),
    ("token_limit", r"""
        token count… (exceed\w*|(only )?supports?|too|greater|larger|over)
        exceed\w*( max(imum)?| allowed| limit| number| input| output| total| available| supported| model'?s)* (tokens?\b|context)
        context (length|window|size|limit) | too many (input |output |prompt |total )?tokens
        (prompt|input|conversation|context|history|messages?) (far |much )?too long | (?-i:MAX_TOKENS|MaxTokens)
        finish reason\W{0,12}(max tokens|length)\b | token limit | limit of \S+ (input |output )?tokens
        (max(imum)?|allowed) (number of )?(input |output |prompt |context )?tokens? (allowed|reached|exceeded|limit)
        (output|response|answer|completion|generation|text)( \w+)? (truncated|cut off|cut short)"""),
    ("content_blocked", r"""
        block(ed)? reason\W{1,12}(block(ed)? reason\W)?(safety|other|blocklist|prohibited|image|jailbreak|model armor|spii|recitation)
        (?-i:PROHIBITED_CONTENT|RECITATION|BLOCKLIST|\bSPII\b|IMAGE_SAFETY|IMAGE_OTHER|FinishReasonSafety|FinishReasonRecitation|MODEL_ARMOR)
        reason\W{0,12}(finish reason\W)?(safety|recitation|content filter)\b | blocked\W{1,4}true
        \b(prompt|content|response|candidate|answer|output|request|message|image)s? block(ed|s\b) | block(ed|ing|s)? (by|due to|because|for)
        safety (filter|setting|system|polic|reason|check|guideline|violation|block|concern|issue) | content (policy|filter|management|moderation|violat)
        usage (polic|guideline) | violat\w+… (polic|guideline|terms|responsible) | responsible ai | due to (recitation|copyright)
        (prohibited|inappropriate|harmful|unsafe|sensitive|offensive|disallowed|copyrighted) (content|material|words|text|image)
        (flagged|rejected) (as|for|by)( \w+)? (moderation|safety|polic|content|harm|inappropriate)"""),
    ("invalid_request", r"""
        invalid json payload | json schema | function (response|call) (turn|part) | thought signature | unable to submit request | parse\b… request"""),
    ("malformed_response", r"""
        malformed (function|response|json|tool|output|answer|arguments|reply|completion) | (?-i:UNEXPECTED_TOOL_CALL|TOO_MANY_TOOL_CALLS|NO_IMAGE)
        (\bno|\bempty|\bzero|without( any)?|return\w* 0)( \w+)? (candidates?|content|response|output|text|parts?|choices|answer|completion|reply)(…(returned|generated|received|produced|found|available)|\W|$)
        return\w* (empty|no|nothing|blank|none)\b | (response|answer|output|content|candidates?|completion|reply|result)( from \w+| text)? (empty|blank|missing)
        none (was|were)? returned | nothing usable | not return( any| valid| usable)? | jsondecode | expecting value: line | unterminated string
        unexpected (token|end of|character)… json | (invalid|pars(e|ing)|decode|decoding|unparse?able|broken|not valid)( \w+)?( \w+)? (json|response|output|answer|completion)\b
        (finish|stop) reason\W{0,12}(finish reason\W)?(other|unspecified|unexpected) | (ended|finished|stopped) without | (response|output|answer)( \w+)? not (match|conform|contain|follow)"""),
    ("model_not_found", r"""
        models?\b\W{0,4}([\w./:@-]+\W{1,3})?(could )?(not|no longer) (found|exist|available|supported|recogni|known) | models?/\S+ not found
        model (\S+ )?(deprecated|discontinued|retired|decommissioned|shut down) | no model (named|called|with)
        (unknown|no such|unrecogni[sz]ed|invalid|nonexistent|non existing|un supported) model\b | call listmodels
        not found for api version | model (name|id)( \S+)? (invalid|unknown) | requested entity not found | not found\b… \S*/models/"""),
    ("overloaded", r"""
        overloaded | (high|heavy|peak|increased|unusual\w*) (demand|load|traffic|volume|usage) | currently experiencing
        (\bno|\bat|over|insufficient|out of|lack of|enough|limited|full|max(imum)?|exceed\w*)( \w+)? capacity\b
        capacity( \w+)? (exceeded|exhausted|constraint|limit|reached|unavailable|not available|issue|shortage)
        (server|system|service|model)s? (too )?busy | (currently|temporarily|momentarily) (un|not )available"""),
    ("quota_exceeded", r"""
        resources? exhausted | too many (concurrent|requests) | rate limit | throttl | requests per (min|day|second|hour)
        (daily|hourly|monthly|weekly|usage|request|concurren\w+|tpm|rpm|rpd)( \w+)? limits?( \w+)? (reached|exceeded|hit)
        (reached|exceed\w*|hit)( \w+)? (daily|hourly|monthly|weekly|usage|request|concurren\w+)( \w+)? limit"""),
    ("timeout", r"deadline (exceeded|expired)"),
    ("permission_denied", r"""
        permission( \S+)? denied | unauthenticated | unauthori[sz]ed | \bforbidden\b | access (denied|forbidden|not configured)
        (authentication|authori[sz]ation)( \w+)? (failed|error|required|invalid|missing|not|denied) | reauth | not authori[sz]ed | not allowed to access
        (credential|token)s? (not (provided|found|valid)|invalid|expired|missing|revoked) | (default|valid) credentials
        (invalid|missing|expired|wrong|bad|validate|resolve|refresh)( \w+)? (credential|token\b|grant|secret|signature|authentication)
        (need|no|required|insufficient|missing|lacks?)( \w+)? (permission|scope)s?\b"""),
    ("invalid_request", r"(?-i:INVALID_ARGUMENT|InvalidArgument|FAILED_PRECONDITION|FailedPrecondition|OUT_OF_RANGE|OutOfRange|UNIMPLEMENTED|ALREADY_EXISTS)"),
    ("timeout", r"""
        tim(ed|ing|es) out | (?-i:Timeout(Error|Exception)?\b|ETIMEDOUT|ESOCKETTIMEDOUT|_TIMEOUT) | time limit (exceeded|reached|expired)
        (gateway|request|read|connect(ion)?|write|pool|operation|upstream|response|server|idle|client) time out\b
        time out (error|exceeded|occurred|expired|while|waiting|after|reached|limit) | (took|taking|taken) too long
        (exceeded|out of)( \w+)? time\b | not (respond|answer|finish|complete)( \w+)? (in|within)( \w+)? time"""),
    ("network_error", r"""
        connection( got| unexpectedly| forcibly| to \S+)? (reset|refused|aborted|closed|error|failed|failure|lost|terminat|broken|dropped|interrupted|not established)
        (fail\w*|unable|not|error)( to)? (re)? (connect|reach|resolve|establish) | socket (hang up|closed|error) | broken pipe | getaddrinfo
        (?-i:ECONN|ENOTFOUND|EAI_AGAIN|EPIPE|EHOSTUNREACH|ENETUNREACH|RST_STREAM|GOAWAY|ERR_NETWORK|UND_ERR) | eof occurred | server disconnected
        remote (end )?closed | remotely closed | name (resolution|or service not known) | nodename nor | \bdns\b
        no (such host|route to host|connection established|address associated) | handshake (fail|error)
        (certificate|tls|ssl)… (verif|fail|error|expired|handshake|invalid|alert) | un expected eof | max retries exceeded
        (network|host|endpoint|origin) (unreachable|error|failure|changed|down|problem|issue|connection lost) | remote protocol error
        incomplete (chunked )?read | chunkedencoding | peer closed | disconnect/reset | fetch failed | failed to fetch | (connect|connection|read|write)error
        proxy error | tunnel connection | stream (removed|reset|closed)"""),
    ("overloaded", r"""
        (?-i:\bUNAVAILABLE\b) | service (temporarily |currently )?un available | under maintenance
        (server|api|model|backend|provider|upstream|engine)( \S+)? (un available|not available at the moment|down for maintenance)"""),
    ("invalid_request", r"""
        (invalid|bad|malformed|wrong|un supported|illegal|unexpected)( \w+)? (request|argument|param|value|field|input|image|ur[li]|mime|media|file|format|schema|role|base64|message|body|payload|enum|audio|video|content type|type|property|name|encoding)
        un processable | (field|param(eter)?|argument|property|value|key)s?( \w+)? (required|missing|invalid|not (specified|set|allowed))
        (missing|unknown|unrecogni[sz]ed|required|duplicate)( \w+)? (field|param(eter)?|argument|name|property|key)\b | required oneof
        cannot find field | not specified | validation (error|failed) | failed validation | precondition | not (acceptable|a valid) | method not allowed
        must be (one of|in|between|less|greater|at (least|most)|non|set|specified|provided|positive|unique|string|array|object|followed|within|of type|valid|present|smaller|larger|equal)\b
        must (not be|contain|have at|alternate|include|specify|start with|end with) | (should|can|may) not be (empty|blank|null|negative) | length required
        (payload|request|body|file|image|video|audio|entity|attachment|upload)( \w+)? (size )?(too (large|big|long)|exceed\w*) | not support(ed)?\b
        (unable to|can not|could not|failed to) (identify|fetch|process|decode|read|load|download)( \w+)? (input|image|file|video|audio|media|content|url) | not found
        (file|image|video|url|document)( \S+)? not (found|exist|in active)"""),
    ("internal_error", r"""
        internal( server| service| system| api)? (error|failure|exception|problem|fault) | bad gateway | server error | backend error | server had error
        not implemented | (?-i:StatusCode\.INTERNAL|DATA_LOSS|DataLoss|INTERNAL_ERROR) | (status\W{1,6}|5..\W{1,4}|^\W*|code\W{1,6}|grpc\W{1,3}|13 )(?-i:INTERNAL\b)
        (provider|upstream)( \w+)? (error|failure|failed) | error (from|in|at)( model)? (provider|upstream|backend|server)\b"""),
)
_STATUSES: Final = {
    "quota_exceeded": (429,), "insufficient_credits": (402,), "permission_denied": (401, 403, 407),
    "overloaded": (503, 529),
    "timeout": (408, 504, 522, 524, 598, 599), "network_error": (521, 523, 525, 526, 530), "internal_error": (500, 501, 502, 507, 520),
    "invalid_request": (400, 404, 405, 406, 409, 410, 411, 412, 413, 414, 415, 416, 417, 422, 431),
}  # fmt: skip
_LITTLE: Final = "is|are|was|were|be|been|has|have|had|the|an?|your|you|its|this|that|their|our|does|do|did|s"
_SPACE: Final = rf"([\s_-]+({_LITTLE})\b)*[\s_-]*"
# A number at the beginning, alone or before a status name; after a word for status; before "error"; in a heading.
_STATUS: Final = r"""(?i)
    ^\W{0,3}N\W*($|[^\w\s%]|\s?[{\[(<-]|\s(client|server)\serror|\s(?-i:[A-Z_]{4})) |
    \b(http|status|code|errno|error)(\s?/\d(\.\d)?|[\s_-]?(error|status|code|response|with|is|was))*[\s\"'`:=#(\[-]{0,6}N\b |
    \b(status|code)\sof\sN\b | >\s?N[<\s,:] | \bN[\s_-](error|response|status|(client|server)\serror)\b |
    \b(returned|got|received|with|responded|response|failed|answered)(\s(an?|with|status|code|http))*
    \W{1,3}N\s*($|[^\w\s%]|error|response|status|from)""".replace("N", r"[45]\d\d")


def _pattern(lines: str) -> str:
    """Return the RE2 pattern that `lines`, in the notation of the rules, stand for."""
    pattern = "|".join(line.strip() for line in lines.strip().split("\n")).replace(" | ", "|")
    pattern = re.sub("… ?", lambda _: r"(\W{1,3}\S+){0,3}\W{1,3}", pattern)
    pattern = re.sub(r" (?=\\[wS])", lambda _: _SPACE + r"[\s_-]+", pattern)
    return "(?i)" + pattern.replace(" ", _SPACE)


def _options(encoding: object) -> re2.Options:
    options = re2.Options()
    options.encoding = encoding
    options.log_errors = False
    options.never_capture = True
    options.max_mem = 256 << 20
    return options


def _compile() -> re2.Set:
    """Return all built-in rules as one automaton: one pass over a text names every rule that matches."""
    rules = re2.Set.SearchSet(_options(re2.Options.Encoding.LATIN1))
    for _, lines in _RULES:
        rules.Add(_pattern(lines).encode())
    rules.Compile()
    return rules


_BUILT_IN_RULES: Final = _compile()
_STATUS_PLACES: Final = re2.compile(re.sub(r"\s*\n\s*|(?<=\|) | (?=\|)", "", _STATUS).encode(), _options(re2.Options.Encoding.LATIN1))
_CONTROLS: Final = bytes(32 if byte < 32 or byte == 127 else byte for byte in range(256))


def check_rule(reason: str, match: str) -> str | None:
    """Return what is wrong with a rule of the user, or None."""
    if not _NAME.fullmatch(reason):
        return "reason must be at most 64 letters, digits and underscores, not beginning with a digit"
    if not match:
        return "match must not be empty"
    try:
        re2.compile(match.encode(), _options(re2.Options.Encoding.UTF8))
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
        options = _options(re2.Options.Encoding.UTF8)
        self._rules = [(reason, re2.compile(match.encode(), options)) for reason, match in rules]
        self._seen: dict[int, str] = {}
        self.reasons = tuple(dict.fromkeys([*(reason for reason, _ in rules), *BUILT_IN]))

    def __call__(self, text: object) -> str:
        """Return the reason of a failure text, any JSON value: one of `reasons`."""
        if not isinstance(text, str) or not text or text.isspace():
            return UNSPECIFIED
        head = text[:MAX_TEXT]
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
        sanitised = head.encode("utf-8", "replace").translate(_CONTROLS)
        for reason, pattern in self._rules:
            if pattern.search(sanitised):
                return reason
        # JSON inside a JSON string: its line breaks and quotes come escaped, once per level.
        plain = sanitised.replace(b"\\n", b" ").replace(b"\\", b"").replace(b"n't", b" not").replace(b"annot", b"an not")
        if matches := _BUILT_IN_RULES.Match(plain):
            return _RULES[min(matches)][0]
        statuses = {int(re.findall(rb"\d{3}", match.group())[-1]) for match in _STATUS_PLACES.finditer(plain)}
        return next((reason for reason, known in _STATUSES.items() if not statuses.isdisjoint(known)), OTHER)


def mask(text: str) -> str:
    """Return what may be shown of a failure text: one line of ASCII, at most 120 characters.

    Quoted strings, URLs, addresses, paths, values of keys that name a secret, numbers, ids, runs of 20 or more characters and
    whatever is not ASCII give way to placeholders. Words of prose stay.
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
    """Replace what `quote` encloses; where it is unclear which one opens, all from the first to the last, or to the end."""
    if quote == "'":  # an apostrophe inside a word encloses nothing
        text = _APOSTROPHE.sub(" ", text)
    first, *rest = text.split(quote)
    if not rest:
        return text
    if len(rest) % 2:
        return f"{first}<text>"
    if "\\" + quote in text or any(outside[:1].isalnum() for outside in rest[1::2]):
        return f"{first}<text>{rest[-1]}"
    return first + "".join(f"<text>{outside}" for outside in rest[1::2])


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

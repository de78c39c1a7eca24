"""Tasks of the text generator, and how one JSON record becomes one."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec

STATUSES = ("pending", "running", "done", "failed")
FINISHED = ("done", "failed")
UNKNOWN = "unknown"

NANO = 1_000_000_000
"""Credits are kept as whole billionths, so that sums are exact."""

MAX_CREDITS = 1_000_000
MAX_MODEL_LENGTH = 128

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_DECIMAL = re.compile(r"\s*[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})\s*", re.ASCII)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Record(msgspec.Struct, gc=False):
    """The fields of one listed record that the exporter reads, as they came.

    Every value may be any JSON value: what is odd is mapped in `task_of`, not refused by the decoder.
    """

    id: Any = None
    model_name: Any = None
    status: Any = None
    failed_reason: Any = None
    credits_used: Any = None
    created_at: Any = None
    updated_at: Any = None

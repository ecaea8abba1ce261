"""What reading JSON of unknown origin with msgspec can raise: its own error, what is not UTF-8, nesting without end."""

from __future__ import annotations

import msgspec

MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

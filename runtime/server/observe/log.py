"""Logs: each line is a JSON object or plain text, and each request has a line.

The line of a request has its times, device and bundle. It names users only if the operator wants it, and never has
events or recommended items.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import msgspec

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.call import Call

LEVELS = ("debug", "info", "warning", "error")
FIELDS = "unipinrec_fields"
SHORT = 12  # digits of a hash, enough to tell bundles apart
requests = logging.getLogger("unipinrec.requests")
_encode = msgspec.json.Encoder(enc_hook=repr).encode


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is logged, and in which format.

    Attributes:
        format: json, or human.
        level: Lowest of `LEVELS` that is logged.
        users: Whether the line of a request names its users.
        probes: Whether successful health checks and scrapes are logged.
        process: Number of this process among several; every line has it.
    """

    format: Literal["json", "human"] = "json"
    level: str = "info"
    users: bool = False
    probes: bool = False
    process: int | None = None

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ConfigError(f"log level {self.level!r} is unknown; use one of {', '.join(LEVELS)}")
        if self.format not in ("json", "human"):
            raise ConfigError(f"log format {self.format!r} is unknown; use json or human")


@dataclass(frozen=True)
class RequestLog:
    """Writes a line for every request."""

    options: LogOptions

    def observe(self, call: Call) -> None:
        """Log a request that was answered; an error of the server has the level error."""
        level = logging.ERROR if call.status >= 500 and call.status not in (503, 504) else logging.INFO
        quiet = call.polled and call.status == 200 and not self.options.probes
        if requests.isEnabledFor(level) and not quiet:
            fields = request_fields(call, users=self.options.users)
            requests.log(level, "%s %s", call.route, call.status, extra={FIELDS: fields})


def request_fields(call: Call, *, users: bool = False) -> dict[str, Any]:
    """The fields of a request's line; of several slates their number, and the longest times."""
    fields: dict[str, Any] = {
        "request_id": call.id,
        "route": call.route,
        "status": call.status,
        "ms": round(call.seconds * 1e3, 3),
    }
    if call.token is not None:
        fields["token"] = call.token
    if call.code is not None:
        fields["error"] = call.code
    if call.codes_in_list:
        fields["errors_in_list"] = dict(Counter(call.codes_in_list))
    if users and call.users:
        fields["users"] = call.users
    if not call.slates:
        return fields
    slates, answers, first = call.slates, call.answers, call.slates[0]
    if len(slates) > 1:
        fields["slates"] = len(slates)
    fields["queue_ms"] = round(max(answer.started - answer.arrived for answer in answers) * 1e3, 3)
    for stage in ("encode", "retrieve", "rank"):
        fields[f"{stage}_ms"] = round(max(getattr(slate.stages_ms, stage) for slate in slates), 3)
    fields["batch"] = answers[0].batch
    fields["kv"], fields["kv_reason"] = first.kv, first.kv_reason
    fields["device"], fields["bundle"] = first.device, first.bundle[:SHORT]
    return fields


class _Formatter(logging.Formatter):
    """A record as one JSON object, or as a line of text that a traceback may follow."""

    def __init__(self, options: LogOptions) -> None:
        super().__init__()
        self._json = options.format == "json"
        self._process = {} if options.process is None else {"process": options.process}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        level, message = record.levelname.lower(), record.getMessage()
        fields: dict[str, Any] = getattr(record, FIELDS, {})
        traceback = self.formatException(record.exc_info) if record.exc_info else None
        if self._json:
            line = {"time": time, "level": level, "logger": record.name, "message": message, **self._process, **fields}
            return _encode(line | ({"exception": traceback} if traceback else {})).decode()
        process = "".join(f"[{index}] " for index in self._process.values())
        shown = "".join(f" {name}={value}" for name, value in fields.items() if name not in ("route", "status"))
        text = f"{time} {level:<7} {process}{message}{shown}"
        return f"{text}\n{traceback}" if traceback else text


def configure_logs(options: LogOptions, stream: TextIO | None = None) -> None:
    """Send the logs of this process, with uvicorn's, to a stream (by default standard error) in one format.

    uvicorn's own line of a request is left out, since `RequestLog` writes one; start it with `log_config=None`.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Formatter(options))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # of libraries only problems are logged
    for name in ("unipinrec", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(options.level.upper())
        logger.handlers, logger.propagate = [], True  # uvicorn adds its own handlers
    logging.getLogger("uvicorn.access").disabled = True

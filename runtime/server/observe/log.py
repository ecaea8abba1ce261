"""Logs: one JSON object a line for machines, or a line of text for people; one line for every request.

A line about a request says what it took and what served it. Whose it was is said only if the operator asks for it, and
what is in a history or among the answer never is.
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
QUIET = ("/health/live", "/health/ready", "/metrics")  # asked for every few seconds, and of no interest if well
FIELDS = "unipinrec_fields"
SHORT = 12  # digits of a hash that tell bundles apart
requests = logging.getLogger("unipinrec.requests")
_encode = msgspec.json.Encoder(enc_hook=repr).encode


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is logged, and how.

    Attributes:
        format: json, or human.
        level: The least of `LEVELS` that is logged.
        users: Whether a request's line names its user.
        probes: Whether health checks and scrapes that went well are logged.
        process: Which of the processes that serve together this is; every line names it.
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


class RequestLog:
    """Writes a line for every request."""

    def __init__(self, options: LogOptions) -> None:
        self.options = options

    def observe(self, call: Call) -> None:
        """Log a request that was answered: a server's fault as an error, all else as it should be."""
        level = logging.ERROR if call.status >= 500 and call.status not in (503, 504) else logging.INFO
        quiet = call.route in QUIET and call.status == 200 and not self.options.probes
        if requests.isEnabledFor(level) and not quiet:
            fields = request_fields(call, users=self.options.users)
            requests.log(level, "%s %s", call.route, call.status, extra={FIELDS: fields})


def request_fields(call: Call, *, users: bool = False) -> dict[str, Any]:
    """What is known of a request; of several slates the number, and the longest times."""
    fields: dict[str, Any] = {
        "request_id": call.id,
        "route": call.route,
        "status": call.status,
        "ms": round(call.seconds * 1e3, 3),
    }
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
    fields["queue_ms"] = round(max(one.started - one.arrived for one in answers) * 1e3, 3)
    for stage in ("encode", "retrieve", "rank"):
        fields[f"{stage}_ms"] = round(max(getattr(one.stages_ms, stage) for one in slates), 3)
    fields["batch"] = answers[0].batch
    fields["kv"], fields["kv_reason"] = first.kv, first.kv_reason
    fields["device"], fields["bundle"] = first.device, first.bundle[:SHORT]
    return fields


class JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def __init__(self, process: int | None = None) -> None:
        """Name a process in every line."""
        super().__init__()
        self._known = {} if process is None else {"process": process}

    def format(self, record: logging.LogRecord) -> str:
        """See the class; a traceback is in `exception`."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._known,
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line).decode()


class HumanFormatter(logging.Formatter):
    """A record as a line of text, with what is known of a request behind it."""

    def __init__(self, process: int | None = None) -> None:
        """Name a process in every line."""
        super().__init__()
        self._known = "" if process is None else f"[{process}] "

    def format(self, record: logging.LogRecord) -> str:
        """See the class; a traceback follows on lines of its own."""
        fields = getattr(record, FIELDS, {})
        known = "".join(f" {name}={value}" for name, value in fields.items() if name not in ("route", "status"))
        text = f"{_time(record)} {record.levelname.lower():<7} {self._known}{record.getMessage()}{known}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure_logs(options: LogOptions, stream: TextIO | None = None) -> None:
    """Send the logs of this process, uvicorn's included, to a stream (standard error unless given) in one format.

    uvicorn's own line for every request is left out, since `RequestLog` writes one; start it with `log_config=None`.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    formatter = JsonFormatter if options.format == "json" else HumanFormatter
    handler.setFormatter(formatter(options.process))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)  # libraries tell what is wrong, not what they do
    for name in ("unipinrec", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.setLevel(options.level.upper())
        logger.handlers, logger.propagate = [], True  # uvicorn gives its own to theirs
    logging.getLogger("uvicorn.access").disabled = True


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

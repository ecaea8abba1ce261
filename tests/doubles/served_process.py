"""A real `unipinrec serve` process on loopback."""

from __future__ import annotations

import http.client
import json
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from answers import STORED

HISTORY = [{"item": "item-1", "actions": ["click"]}]


@dataclass(kw_only=True)
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    port: int = 0
    tls: ssl.SSLContext | None = None
    lines: list[str] = field(default_factory=list)

    def connect(self) -> http.client.HTTPConnection:
        if self.tls is not None:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=60, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, *, token: str | None = None) -> tuple[int, Any]:
        connection = self.connect()
        try:
            headers = {} if token is None else {"authorization": f"Bearer {token}"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def scrape(self, *, token: str | None = None) -> str:
        connection = self.connect()
        try:
            connection.request("GET", "/metrics", headers={} if token is None else {"authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read().decode()
        finally:
            connection.close()

    def until(self, text: str) -> str:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            for line in list(self.lines):
                if text in line:
                    return line
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.01)
        raise AssertionError(f"no {text!r} in {''.join(self.lines)}")

    def found(self, text: str) -> list[str]:
        return [line for line in list(self.lines) if text in line]

    def ready(self) -> None:
        limit = time.monotonic() + 60
        while self.ask("GET", "/health/ready")[0] != 200:
            assert time.monotonic() < limit
            time.sleep(0.02)


@contextmanager
def started(
    *options: str | Path, bundle: Path = STORED, files: int | None = None, tls: ssl.SSLContext | None = None
) -> Iterator[Running]:
    words = [sys.executable, "-m", "unipinrec", "serve", str(bundle), "--port", "0", "--device", "cpu", "--log-format"]
    limit = ["prlimit", f"--nofile={files}"] if files else []
    process = subprocess.Popen([*limit, *words, "human", *map(str, options)], stderr=subprocess.PIPE, text=True)
    running = Running(process=process, tls=tls)
    stderr = process.stderr
    assert stderr is not None
    reader = threading.Thread(target=lambda: running.lines.extend(iter(stderr.readline, "")))
    reader.start()
    try:
        found = re.search(r"https?://(?:127|0)\.0\.0\.[01]:(\d+)", running.until("listening on"))
        assert found
        running.port = int(found[1])
        yield running
    finally:
        process.kill()
        process.wait(20)
        reader.join(20)
        stderr.close()

"""Shared by the fuzzers: one process fuzzes, guided by coverage (atheris, libFuzzer), another reports.

    python bench/fuzz_requests.py [--seconds 600] [--corpus DIR]      python bench/fuzz_requests.py FILE...

With files, it runs the target once on each, to reproduce a fault. `--corpus` keeps the interesting inputs, from which a
later run continues. Exits with 1 after a fault: an unexpected exception, or an input that takes more than ten seconds
or 2 GiB.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import card, finish

HANG_S, MEMORY_MIB = 10, 2048
CHILD = "--fuzz-in-this-process"


class Choices:
    """Choices read from bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def number(self, count: int) -> int:
        """One of so many."""
        self._place += 1
        return self._data[self._place - 1] % count if self._place <= len(self._data) else 0

    def one_of(self, *given: Any) -> Any:
        """One of these."""
        return given[self.number(len(given))]


def main(
    script: str, target: Callable[[bytes], None], seeds: Iterable[bytes], words: Iterable[str], longest: int
) -> None:
    """Fuzz `target` as the command line says; see the module.

    Args:
        script: File of the fuzzer.
        target: Raises an exception for a fault.
        seeds: Inputs to begin with.
        words: Worth inserting into inputs.
        longest: Bytes of an input.
    """
    if CHILD in sys.argv:
        _fuzz(target)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--no-result", action="store_true", help="do not write bench/results")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    for file in options.files:
        target(file.read_bytes())
        sys.stderr.write(f"{file}: nothing found\n")
    if not options.files:
        _report(Path(script), options, seeds, words, longest)


def _fuzz(target: Callable[[bytes], None]) -> None:
    import atheris  # noqa: PLC0415 - replaying a file does not need it

    atheris.Setup([sys.argv[0], *sys.argv[sys.argv.index(CHILD) + 1 :]], target)
    atheris.Fuzz()


def _report(
    script: Path, options: argparse.Namespace, seeds: Iterable[bytes], words: Iterable[str], longest: int
) -> None:
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        corpus = options.corpus or scratch / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        (scratch / "words").write_text("".join(f"{_quoted(word)}\n" for word in words))
        found = Path.cwd() / f"{script.stem}_found"
        found.mkdir(exist_ok=True)
        flags = [
            f"-max_total_time={options.seconds}",
            f"-timeout={HANG_S}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-max_len={longest}",
            f"-dict={scratch / 'words'}",
            f"-artifact_prefix={found}/",
        ]
        command = [sys.executable, str(script), CHILD, *flags, str(corpus)]
        log = _run(command)
        files = sorted(str(file) for file in found.iterdir())
        if not files:
            found.rmdir()
        document = {
            **card(script.stem),
            "seconds": options.seconds,
            **_figures(log),
            "corpus": len(list(corpus.iterdir())),
            "found": files,
        }
    if options.no_result:
        sys.stdout.write(f"{json.dumps(document)}\n")
    else:
        finish(document, script.stem)
    if files or not document["runs"]:
        sys.exit(f"found {files}; python {script} FILE runs one of them alone")


def _run(command: list[str]) -> list[str]:
    """Run the fuzzing process, pass on its output, and return it."""
    log = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            log.append(line)
    return log


def _figures(log: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {"runs": 0, "covered": 0, "features": 0}
    for line in log:
        runs, progress = re.match(r"Done (\d+) runs", line), re.match(r"#\d+\s.*cov: (\d+) ft: (\d+)", line)
        if runs:
            figures["runs"] = int(runs[1])
        if progress:
            figures["covered"], figures["features"] = int(progress[1]), int(progress[2])
    return figures


def _quoted(word: str) -> str:
    inside = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word.encode()
    )
    return f'"{inside}"'

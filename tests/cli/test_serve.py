from __future__ import annotations

import gc
import json
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from answers import STORED
from click.testing import CliRunner, Result

from unipinrec.cli import main
from unipinrec.runtime.serve import ServeOptions


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_help_has_examples() -> None:
    result = run("serve", "--help")
    assert result.exit_code == 0
    assert "unipinrec serve bundle/ --host 0.0.0.0" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--queue", "0"), "Invalid value for '--queue'"),
        (("--deadline-ms", "0"), "Invalid value for '--deadline-ms'"),
        (("--deadline-ms", "inf"), "Invalid value for '--deadline-ms': inf is not a finite number"),
        (("--max-wait-ms", "nan"), "Invalid value for '--max-wait-ms': nan is not a finite number"),
        (("--recall-share", "nan"), "Invalid value for '--recall-share': nan is not a finite number"),
        (("--threads", "9223372036854775808"), "is not in the range 1<=x<=4096"),
        (("--max-wait-ms", "1e308"), "is not in the range 0<=x<=60000"),
        (("--drain-delay-s", "1e308"), "is not in the range 0<=x<=86400"),
        (("--drain-s", "1e10"), "is not in the range 1<=x<=86400"),
        (("--device", "gpu"), "Invalid value for '--device': unknown device 'gpu'"),
        (("--cache-dtype", "fp8"), "Invalid value for '--cache-dtype'"),
        (("--cold-start", "never"), "Invalid value for '--cold-start'"),
        (("--admin-token-file", "/no/such/file"), "Invalid value for '--admin-token-file'"),
    ],
)
def test_wrong_use(words: tuple[str, ...], message: str) -> None:
    result = run("serve", STORED, *words)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--deadline-ms", "50", "--max-deadline-ms", "20"), "at most max_deadline_ms=20.0"),
        (("--state", "mysql://db"), "give a folder, or a URL of redis"),
        (("--state", "/proc/no"), "give another --state"),
        (("--host", "no.such.host.invalid"), "choose another --host or --port"),
    ],
)
def test_what_cannot_be_had_is_told(words: tuple[str, ...], message: str) -> None:
    result = run("serve", STORED, "--device", "cpu", *words)
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", "")


def test_a_folder_that_is_no_bundle_is_told(tmp_path: Path) -> None:
    result = run("serve", tmp_path)
    assert result.exit_code == 1
    assert "is not a bundle" in result.stderr


def test_a_bundle_that_does_not_verify_ends_the_process(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(STORED, tmp_path / "copy"))
    (copy / "ranker.onnx").write_bytes(b"no graph")
    words = [sys.executable, "-m", "unipinrec", "serve", str(copy), "--port", "0", "--device", "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "ranker.onnx is altered" in done.stderr or "ranker.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        before = gc.get_threshold()
        result = run("serve", STORED, "--port", str(taken.getsockname()[1]))
        assert gc.get_threshold() == before  # who only tried to serve goes on as before
    assert result.exit_code == 1
    assert "Address already in use" in result.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'starlette':\n"
        "            raise ModuleNotFoundError('no starlette', name='starlette')\n"
        "sys.meta_path.insert(0, Block())\n"
        "from unipinrec.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, "serve", str(STORED)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "this command needs starlette, which is an extra; run pip install 'unipinrec[cpu,serve]'" in done.stderr


def test_what_ends_it_is_in_the_log_and_names_current_json(tmp_path: Path) -> None:
    shutil.copytree(STORED, tmp_path / "v1")
    (tmp_path / "current.json").write_text('{"bundle": "nothing"}')
    result = run("serve", tmp_path / "v1", "--watch", "--log-format", "json")
    assert result.exit_code == 1
    told, ended = [json.loads(line) for line in result.stderr.splitlines()]
    assert "current.json names nothing, which is used instead of" in told["message"]
    assert (ended["level"], "nothing is not a bundle" in ended["message"]) == ("error", True)


@pytest.mark.parametrize(("before", "code"), [("SIG_DFL", 0), ("SIG_IGN", -signal.SIGKILL)])
def test_a_terminal_that_is_closed_ends_it_as_sigterm_does_but_not_under_nohup(before: str, code: int) -> None:
    start = f"import signal; signal.signal(signal.SIGHUP, signal.{before}); from unipinrec.cli import main; main()"
    command = [sys.executable, "-c", start, "serve", str(STORED), "--port", "0", "--cache-mib", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        next(line for line in server.stderr if "serving " in line)
        server.send_signal(signal.SIGHUP)
        try:
            ended = server.wait(30 if code == 0 else 2)
        except subprocess.TimeoutExpired:
            server.kill()
            ended = server.wait()
    assert ended == code


def test_the_options_of_the_command_are_those_of_python_with_the_same_defaults() -> None:
    context = main.commands["serve"].make_context("serve", [str(STORED)])
    given = {name: value for name, value in context.params.items() if name != "bundle"}
    assert given == asdict(ServeOptions())

"""A server process that ends while one of its threads is in native code."""

from __future__ import annotations

import subprocess
import sys

import pytest
from answers import STORED

AT_WORK = f"""
import logging, sys, threading
import onnxruntime
from unipinrec.runtime.server.process.end import ending_with_its_threads

def work():
    options = onnxruntime.SessionOptions()
    while True:
        onnxruntime.InferenceSession({str(STORED / "encoder.onnx")!r}, options)
        at_work.set()

logging.basicConfig(level=logging.INFO)
at_work = threading.Event()
"""
BEGIN = """
threading.Thread(target=work, name="loader", daemon=True).start()
at_work.wait()
"""


def ended(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("last", "exit_code"), [("pass", 0), ("sys.exit(0)", 0), ("sys.exit(3)", 3)])
def test_a_thread_at_work_does_not_change_the_exit_code(last: str, exit_code: int) -> None:
    within = BEGIN.replace("\n", "\n    ")
    code, said = ended(f"{AT_WORK}\nwith ending_with_its_threads():{within}\n    {last}")
    assert (code, "terminate" in said) == (exit_code, False), said
    assert "ending while loader is at work" in said


def test_a_thread_begun_before_is_no_business_of_it_nor_is_one_that_ends_in_time() -> None:
    threads = "threading.Thread(target=stay.wait, daemon=True).start()"
    within = "threading.Thread(target=lambda: time.sleep(0.05), daemon=True).start()"
    code, said = ended(
        f"{AT_WORK}\nimport atexit, time\nstay = threading.Event()\n{threads}\n"
        f"with ending_with_its_threads():\n    {within}\n"
        "atexit.register(lambda: print('as usual', file=sys.stderr))"
    )
    assert (code, said) == (0, "as usual\n")


def test_what_is_raised_within_comes_out() -> None:
    code, said = ended(f"{AT_WORK}\nwith ending_with_its_threads():\n    raise KeyError('of mine')")
    assert code == 1
    assert "KeyError: 'of mine'" in said

"""The steps of the acceptance, each in a process of its own: prints one JSON document as the last line of stdout.

    machine                                  the machine
    model --size SIZE                        a model with random weights, exported in three precisions
    tests --file FILE                        the tests of a file that are marked `gpu`
    costs, ipc, kv-copies                    memory, copies, launches
    torch --size SIZE                        the PyTorch model on the GPU
    probe --device D [--flavor F --target T] whether a backend runs the stored bundle
    validity                                 what TensorRT-RTX says of its engines on this card
    check --size SIZE --device D [...]       build, golden requests, invariants, times
    joint-attention                          bench/joint_attention.py

`ran` says whether the step ran, `refused` the error if not; `problems` lists the failed checks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from unipinrec.errors import UnipinrecError

# Module and function of each step. A module is imported when its step runs: PyTorch alone takes seconds.
STEPS = {
    "machine": "costs.machine",
    "model": "checks.export",
    "tests": "basics.tests",
    "costs": "costs.costs",
    "ipc": "costs.ipc",
    "kv-copies": "costs.kv_copies",
    "torch": "checks.on_torch",
    "probe": "basics.probe",
    "validity": "basics.validity",
    "check": "checks.check",
    "joint-attention": "basics.joint_attention",
}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=["tiny", "small", "paper"], default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--flavor", default="tensorrt_rtx")
    parser.add_argument("--target", default="")
    parser.add_argument("--file", default="")
    options = parser.parse_args()
    # A separate cache for each backend: else one backend would use another's engines.
    os.environ["UNIPINREC_CACHE"] = str(options.work / "cache" / f"{options.flavor}-{options.target or 'none'}")
    module, function = STEPS[options.step].split(".")
    try:
        found = getattr(importlib.import_module(module), function)(options)
    except (UnipinrecError, ImportError) as error:
        found = {"ran": False, "refused": str(error)}
    sys.stdout.write(json.dumps(found, default=str) + "\n")


if __name__ == "__main__":
    main()

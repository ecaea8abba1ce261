"""Our commands, and the engines that they build."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from unipinrec.runtime.trt.library import import_tensorrt


def command(*arguments: str) -> dict[str, Any]:
    """Run one of our commands; its JSON document, or its error message."""
    done = subprocess.run(
        [sys.executable, "-m", "unipinrec", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"ran": False, "refused": done.stderr.strip()[-2000:]}
    return {"ran": True, "said": json.loads(done.stdout)}


def compile_for(bundle: Path, options: argparse.Namespace, precision: str) -> tuple[Path, dict[str, Any]]:
    """Build engines for this card, or ahead of time for a target: the bundle to serve, and the command's document."""
    asked = ["compile", str(bundle), "--flavor", options.flavor, "--precision", precision]
    if options.target == "current":
        return bundle, command(*asked)
    ahead = options.work / "models" / f"{bundle.name}-{flavor_version(options.flavor)}-{options.target}-{precision}"
    if ahead.exists():
        return ahead, {"ran": True}
    return ahead, command(*asked, "--target", options.target, "--out", str(ahead))


def flavor_version(flavor: str) -> str:
    """The installed TensorRT, in a file name: engines built ahead of time by one version are no use to another."""
    trt = import_tensorrt("tensorrt" if flavor == "tensorrt" else "tensorrt_rtx")
    return f"{trt.flavor}-{trt.version}"


def trusted(target: str) -> list[str]:
    """The option that allows a bundle's own engines."""
    return [] if target == "current" else ["--allow-bundle-engines"]

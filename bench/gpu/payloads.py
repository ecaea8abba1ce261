"""Archives of what a machine with a GPU and no network lacks (x86-64, Python 3.12, CUDA 13), for `bench/gpu/accept`.

    python bench/gpu/payloads.py OUT [NAME ...]      # needs a network, pip, tar and xz

    small       wheels that every step uses: msgspec, cuda-bindings, hnswlib, pytest, click, rich, ...
    models      the model `small` with random weights, exported in fp32, bf16 and fp16 (needs our extra [train])
    ortgpu      onnxruntime-gpu without its TensorRT provider, and with kernels for sm_90 alone
    trtrtx      TensorRT-RTX: the builder and runtime in one library, the parser, the bindings
    trtrtx-1.6  an older version of it, where the newer one is refused
    polars      for the training test alone

Without names, the first four are made. Every archive is cut into pieces NAME.tar.xz.00, .01, ... of at most 56 MiB, so
that each fits a transfer of 60 MiB; NAME.tar.xz.sha256 lists them. Prints each piece and its size. NVIDIA's wheels are
under its licence: carry the archives, do not publish them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from carried import LIST, sha256
from prune import keep_architecture

ROOT = Path(__file__).resolve().parent.parent.parent
PIECE_BYTES = 56 << 20
ARCHITECTURE = 90  # of an H100 and H200
ORT_GPU = ("onnxruntime-gpu==1.31.1",)
RTX = ("tensorrt-rtx-cu13-libs=={0}", "tensorrt-rtx-cu13-bindings=={0}")
POLARS = ("polars==2.1.0", "polars-runtime-32==2.1.0")
# What a plain installation of torch, onnx and onnxruntime lacks, or may lack.
SMALL = (
    *("msgspec>=0.19", "cuda-bindings>=13,<14", "cuda-pathfinder", "ml_dtypes>=0.5", "safetensors>=0.5"),
    *("click>=8.1", "rich>=13.7", "markdown-it-py", "mdurl", "pygments"),
    *("pytest>=8.3", "pytest-timeout>=2.3", "iniconfig", "pluggy>=1.5", "packaging"),
)
HNSWLIB = "hnswlib==0.8.0"
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)  # pip matches a wheel's minor version of glibc exactly


def download(requirements: Sequence[str], into: Path) -> None:
    """Download wheels for Python 3.12 on Linux, without their dependencies."""
    platforms = [*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(into)]
    command += [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run([*command, *requirements], check=True)


def compile_hnswlib(into: Path) -> None:
    """Build hnswlib's wheel, which has none in the package index, for any x86-64 CPU."""
    python = python312()
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(into), HNSWLIB]
    subprocess.run(command, check=True, env={**os.environ, "HNSWLIB_NO_NATIVE": "1"})


def python312() -> str:
    """A Python 3.12 that starts: the present one, on the PATH, or pyenv's."""
    found = [sys.executable if sys.version_info[:2] == (3, 12) else None, shutil.which("python3.12")]
    found += sorted(map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python")))
    for path in filter(None, found):
        if subprocess.run([path, "-V"], capture_output=True, check=False).returncode == 0:
            return path
    sys.exit("no Python 3.12 is here, which hnswlib has to be compiled with; install one, or put it on the PATH")


def unpack(wheels: Path, site: Path) -> None:
    """Install wheels by unpacking them."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)


def small(work: Path, site: Path) -> None:
    """The wheels that every step uses."""
    download(SMALL, work)
    compile_hnswlib(work)
    unpack(work, site)


def models(work: Path, site: Path) -> None:
    """The bundle of `small`; its weights are random, and the same wherever they are made."""
    steps = Path(__file__).with_name("steps.py")
    command = [sys.executable, str(steps), "--work", str(work), "model", "--size", "small"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "bench")])
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths})
    shutil.copytree(work / "models" / "small", site / "small")


def ort_gpu(work: Path, site: Path) -> None:
    """ONNX Runtime with its CUDA provider alone."""
    download(ORT_GPU, work)
    unpack(work, site)
    for library in site.rglob("libonnxruntime_providers_tensorrt.so"):
        library.unlink()
    for library in site.rglob("libonnxruntime_providers_cuda.so"):
        content = bytearray(library.read_bytes())
        kept, cleared = keep_architecture(content, ARCHITECTURE)
        if not kept:
            sys.exit(f"{library.name} of {ORT_GPU[0]} has no kernels for sm_{ARCHITECTURE}")
        library.write_bytes(content)
        say(f"{library.name}: {mib(kept)} of kernels for sm_{ARCHITECTURE} kept, {mib(cleared)} of others cleared")


def wheels(requirements: Sequence[str], work: Path, site: Path) -> None:
    """Wheels as they are."""
    download(requirements, work)
    unpack(work, site)


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "small": small,
    "models": models,
    "ortgpu": ort_gpu,
    "trtrtx": partial(wheels, [name.format("1.7.1.116") for name in RTX]),
    "trtrtx-1.6": partial(wheels, [name.format("1.6.1.120") for name in RTX]),
    "polars": partial(wheels, POLARS),
}
USUAL = ("small", "models", "ortgpu", "trtrtx")


def pack(site: Path, out: Path, name: str) -> Iterator[Path]:
    """Pack a folder into pieces."""
    for stale in out.glob(f"{name}.tar.xz*"):
        stale.unlink()
    files = subprocess.Popen(["tar", "c", "-C", str(site), "--exclude=__pycache__", "."], stdout=subprocess.PIPE)
    compressor = subprocess.Popen(["xz", "-6", "-T2"], stdin=files.stdout, stdout=subprocess.PIPE)
    assert compressor.stdout is not None
    number = 0
    while piece := compressor.stdout.read(PIECE_BYTES):
        path = out / f"{name}.tar.xz.{number:02d}"
        path.write_bytes(piece)
        yield path
        number += 1
    if files.wait() or compressor.wait():
        sys.exit(f"{name}: packing failed")


def mib(count: int) -> str:
    """A size to read."""
    return f"{count / 2**20:.1f} MiB"


def say(line: str) -> None:
    """Report at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Make the archives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MAKERS))
    options = parser.parse_args()
    unknown = set(options.names) - set(MAKERS)
    if unknown:
        parser.error(f"unknown archive {', '.join(sorted(unknown))}; there are {', '.join(MAKERS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or USUAL:
        with tempfile.TemporaryDirectory() as scratch:
            work, site = Path(scratch, "work"), Path(scratch, "site")
            work.mkdir()
            site.mkdir()
            MAKERS[name](work, site)
            pieces = list(pack(site, options.out, name))
        for piece in pieces:
            say(f"{piece}  {mib(piece.stat().st_size)}")
        say(f"{name}: {mib(sum(piece.stat().st_size for piece in pieces))}")
        lines = [f"{sha256(piece)}  {piece.name}\n" for piece in pieces]
        (options.out / f"{name}{LIST}").write_text("".join(lines))


if __name__ == "__main__":
    main()

"""The lines of the Containerfile run in a clean Debian root, and what they make serves; a plain install does too.

No registry and no container engine are needed: a stage is a folder, and each line is executed by chroot in mount and
network namespaces of its own. The root sees this machine at /host, for pip's settings.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import pytest
from answers import STORED

from unipinrec.cli import main

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = (ROOT / "Containerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()
PAGE = (ROOT / "docs/deploy/container.md").read_text()
BASE = re.compile(r"debian:(\w+)-slim")
NEEDED = ("mmdebstrap", "unshare", "nsenter", "chroot", "ip", "curl")
ENTER = """
set -e
root=$1 see_host=$2 writable=$3 user=$4; shift 4
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
if [ "$see_host" ]; then
  touch "$root/etc/resolv.conf"
  mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
  mkdir -p "$root/host"
  mount --rbind / "$root/host"
else
  ip link set lo up
fi
case "$writable" in
  root) ;;
  *) mount -o remount,ro,bind "$root"; [ -z "$writable" ] || mount -t tmpfs -o mode=1777 tmpfs "$root$writable" ;;
esac
exec chroot --userspec="$user" "$root" /usr/bin/env -i "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of the Containerfile, as a folder and what it says about processes in it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    workdir: str = "/"
    user: str = "0:0"
    ports: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()

    def words(self, *words: str, writable: str = "root", settings: Mapping[str, str] | None = None) -> list[str]:
        """A command that runs one in the stage: with settings it sees the host, without it has an empty network."""
        private = ["unshare", "--mount"] if settings is not None else ["unshare", "--mount", "--net"]
        variables = [f"{name}={value}" for name, value in {**self.environment, **(settings or {})}.items()]
        seen = "" if settings is None else "yes"
        enter = ["sh", "-c", ENTER, "sh", str(self.folder), seen, writable, self.user]
        return [*private, *enter, f"--chdir={self.workdir}", *variables, *words]

    def run(self, *words: str, settings: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(self.words(*words, settings=settings), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2_000:]}\n{done.stderr[-2_000:]}"
        return done.stdout


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile, without comments, each in one line."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\s*\\\n\s*", " ", lines).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined if line.strip())]


def built(text: str, base: Path, folder: Path, arguments: Mapping[str, str], settings: Mapping[str, str]) -> Stage:
    """The last stage of a Containerfile.

    Args:
        text: The Containerfile.
        base: The Debian root that its first stage begins with.
        folder: Where stages go.
        arguments: Values for its ARG lines, as `--build-arg`.
        settings: Environment that only builds have.
    """
    files, stages, stage, given = context(folder / "context"), dict[str, Stage](), Stage(folder=base), dict[str, str]()
    for word, rest in instructions(text):
        if word == "FROM":
            source, _, name = rest.partition(" AS ")
            before = stages[source] if source in stages else Stage(folder=base)
            assert source in stages or BASE.fullmatch(source), source
            stage, given = replace(before, folder=folder / f"stage-{len(stages)}"), {}
            subprocess.run(["cp", "-a", "--reflink=auto", before.folder, stage.folder], check=True)
            stages[name or "the last"] = stage
            continue
        if word == "RUN":
            stage.run("/bin/sh", "-c", rest, settings={**settings, **given})
        elif word == "ARG":
            name, default, value = rest.partition("=")
            given |= {name: arguments.get(name, value)} if default or name in arguments else {}
        elif word == "COPY":
            copy(rest, stage, files, stages)
        else:
            stage = described(stage, word, rest)
        stages = {**dict(list(stages.items())[:-1]), list(stages)[-1]: stage}
    return stage


def described(stage: Stage, word: str, rest: str) -> Stage:
    """The stage after an instruction that changes no file."""
    if word == "WORKDIR":
        (stage.folder / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return replace(stage, workdir=rest)
    if word == "ENV":
        return replace(stage, environment={**stage.environment, **dict(one.split("=", 1) for one in shlex.split(rest))})
    if word == "USER":
        return replace(stage, user=rest)
    if word == "EXPOSE":
        return replace(stage, ports=(*stage.ports, rest))
    if word == "CMD":
        return replace(stage, command=tuple(json.loads(rest)))
    if word == "HEALTHCHECK":
        return replace(stage, health=tuple(json.loads(rest.partition(" CMD ")[2])))
    raise AssertionError(f"this test does not know {word} {rest}")


def context(folder: Path) -> Path:
    """The files that .dockerignore lets through."""
    kept = [line[1:] for line in IGNORED if line.startswith("!")]
    inside = shutil.ignore_patterns(*(line[3:] for line in IGNORED if line.startswith("**/")))
    folder.mkdir(parents=True)
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=inside)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def copy(rest: str, stage: Stage, files: Path, stages: Mapping[str, Stage]) -> None:
    """COPY: of a folder its content, of a file the file; root owns it."""
    *sources, target = rest.split()
    if sources[0].startswith("--from="):
        files = stages[sources.pop(0).removeprefix("--from=")].folder
    place = stage.folder / Path(stage.workdir, target).relative_to("/")
    place.mkdir(parents=True, exist_ok=True)
    for source in sources:
        path = files / source.lstrip("/")
        subprocess.run(["cp", "-a", f"{path}/." if path.is_dir() else path, place], check=True)
    subprocess.run(["chown", "-R", "0:0", place], check=True)


def pip_settings() -> dict[str, str]:
    """How pip finds packages on this machine, for a root that sees it at /host."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = [line.split("=", 1) for line in listed.stdout.splitlines()]
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))  # the environment has the last word
    return {
        f"PIP_{key.rpartition('.')[2].upper().replace('-', '_')}": re.sub(
            r"(^|\s|file://)/", r"\1/host/", value.strip("'")
        )
        for key, value in pairs
    }


@contextmanager
def serving(stage: Stage, *command: str, writable: str = "") -> Iterator[subprocess.Popen[str]]:
    """A server in a network of its own, on a read-only root, once it is ready."""
    words = stage.words(*command, writable=writable)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as server:
        try:
            limit = time.monotonic() + 120
            while beside(server, *stage.words(*stage.health, writable=writable)[3:]).returncode:
                assert server.poll() is None, server.communicate()[1]
                assert time.monotonic() < limit
                time.sleep(0.5)
            yield server
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


def beside(server: subprocess.Popen[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the network of a server."""
    enter = ["nsenter", f"--net=/proc/{server.pid}/ns/net", "unshare", "--mount"]
    return subprocess.run([*enter, *words], capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian root of the release that the Containerfile begins with, which has no Python and no compiler."""
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root, and {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root'}")
    found = BASE.search(CONTAINERFILE)
    assert found
    folder = tmp_path_factory.mktemp("image")
    made = ["mmdebstrap", "--quiet", "--variant=minbase", found[1], str(folder / "debian")]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mmdebstrap made no root: {done.stderr[-500:]}")
    acquire = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
    (folder / "debian/etc/apt/apt.conf.d/99host").write_text(acquire)
    yield folder / "debian"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def image(debian: Path) -> Stage:
    return built(CONTAINERFILE, debian, debian.parent / "built", {"EPOCHS": "1"}, pip_settings())


def packages(stage: Stage) -> set[str]:
    return {path.name.partition("-")[0] for path in stage.folder.glob("opt/unipinrec/lib/*/site-packages/*.dist-info")}


@pytest.mark.slow
@pytest.mark.timeout(3_000)
def test_the_image_holds_what_serves_alone(image: Stage) -> None:
    found = packages(image)
    assert {"unipinrec", "onnxruntime", "uvicorn", "redis"} <= found
    assert not found & {"torch", "onnx", "onnxscript", "accelerate", "polars", "pytest"}
    assert not [path for name in ("cc", "gcc", "g++", "c++", "make") for path in image.folder.glob(f"usr/bin/{name}*")]
    assert not (image.folder / "source").exists()
    assert {path.name for path in (image.folder / "bundles").iterdir()} == {"demo"}


@pytest.mark.slow
@pytest.mark.timeout(3_000)
@pytest.mark.parametrize(
    ("options", "writable"), [((), ""), (("--processes", "2", "--state", "/tmp/state"), "/tmp")], ids=["one", "several"]
)
def test_the_image_serves_without_root_and_without_a_writable_root(
    image: Stage, options: tuple[str, ...], writable: str
) -> None:
    calls = re.findall(r"^curl (localhost:8000.*)$", PAGE, re.MULTILINE)
    assert len(calls) >= 2
    with serving(image, *image.command, *options, writable=writable) as server:
        ids = re.search(r"^Uid:\t(\d+)\t(\d+)", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
        assert ids
        assert ids.groups() == tuple(image.user.split(":"))
        for call in calls:
            answer = beside(server, "curl", "--silent", "--show-error", "--fail", *shlex.split(call))
            assert answer.returncode == 0, answer.stderr
            assert json.loads(answer.stdout)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_make_demo_needs_no_compiler(debian: Path) -> None:
    folder = debian.parent / "demo"
    subprocess.run(["cp", "-a", "--reflink=auto", debian, folder], check=True)
    machine, settings = Stage(folder=folder), pip_settings()
    machine.run("apt-get", "update", settings=settings)
    needed = ("python3", "python3-venv", "make")
    machine.run("apt-get", "install", "--yes", "--no-install-recommends", *needed, settings=settings)
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, folder / "clone"], check=True)
    assert not [path for name in ("cc", "gcc", "g++", "c++") for path in folder.glob(f"usr/bin/{name}*")]
    assert not list(folder.glob("usr/include/python3*/Python.h"))
    clone = replace(machine, workdir="/clone")
    shown = clone.run("make", "demo", settings=settings)
    assert "WITHOUT hnswlib, the vector index" in shown
    assert "the same results, more slowly" in shown
    assert re.findall(r"^ +(\d+) +item-\d+ ", shown, re.MULTILINE) == [str(place) for place in range(1, 11)]
    assert "all steps:" in shown
    assert json.loads((folder / "clone/demo/bundle/manifest.json").read_text())["index"] is None
    verified, diagnosis = (
        json.loads(clone.run(".venv/bin/unipinrec", command, "demo/bundle", "--json", settings={}))
        for command in ("verify", "doctor")
    )
    assert verified["ok"]
    for told in (verified["retrieval"], diagnosis["auto"]["retrieval"]):
        assert re.fullmatch(r"each request scans \d+ items in \w+: the bundle has no index", told)
    assert "hnswlib is not installed" in diagnosis["hnswlib"]["problem"]


@pytest.mark.slow
@pytest.mark.timeout(1_500)
def test_a_plain_install_needs_no_compiler(debian: Path) -> None:
    folder = debian.parent / "plain"
    subprocess.run(["cp", "-a", "--reflink=auto", debian, folder], check=True)
    machine, settings = Stage(folder=folder), pip_settings()
    machine.run("apt-get", "update", settings=settings)
    machine.run("apt-get", "install", "--yes", "--no-install-recommends", "python3", "python3-venv", settings=settings)
    context(folder / "source")
    shutil.copytree(STORED, folder / "bundle")
    assert not [path for name in ("cc", "gcc", "g++", "c++") for path in folder.glob(f"usr/bin/{name}*")]
    machine.run("python3", "-m", "venv", "/v", settings={})
    machine.run("/v/bin/pip", "install", "/source[cpu,serve]", settings=settings)
    assert machine.run("/v/bin/unipinrec", "--version").startswith("unipinrec")
    assert json.loads(machine.run("/v/bin/unipinrec", "verify", "/bundle", "--device", "cpu", "--json"))["ok"]
    user = Stage(folder=folder, user="10001:10001", health=last_stage()["HEALTHCHECK"])
    body = json.dumps({"history": [{"item": "item-1", "actions": []}], "k": 3})
    with serving(user, "/v/bin/unipinrec", "serve", "/bundle") as server:
        answer = beside(server, "curl", "--silent", "--fail", "localhost:8000/v1/recommend", "-d", body)
        assert len(json.loads(answer.stdout)["items"]) == 3


def last_stage() -> dict[str, Any]:
    """What the Containerfile says of the processes of its image, by instruction."""
    last = CONTAINERFILE.rpartition("\nFROM ")[2].partition("\n")[2]
    stage = Stage(folder=Path("/nowhere"))
    for word, rest in instructions(last):
        stage = stage if word == "COPY" else described(stage, word, rest)
    return {"HEALTHCHECK": stage.health, "CMD": stage.command, "EXPOSE": stage.ports, "USER": stage.user}


def test_the_images_command_port_and_health_check_are_those_of_the_server() -> None:
    said, serve = last_stage(), main.commands["serve"]
    name, command, *words = said["CMD"]
    assert (name, command) == ("unipinrec", "serve")
    assert serve.make_parser(click.Context(serve)).parse_args(words)[0]["host"] == "0.0.0.0"
    assert {option.name: option.default for option in serve.params}["port"] == int(said["EXPOSE"][0])
    assert f":{said['EXPOSE'][0]}/health/ready" in said["HEALTHCHECK"][-1]
    assert int(said["USER"].partition(":")[0]) > 0


def test_an_instruction_that_is_not_executed_fails() -> None:
    assert instructions("# a\nRUN one && \\\n    two\n\nUSER 7:7\n") == [("RUN", "one && two"), ("USER", "7:7")]
    with pytest.raises(AssertionError, match="does not know ENTRYPOINT"):
        described(Stage(folder=Path("/nowhere")), "ENTRYPOINT", '["sh"]')

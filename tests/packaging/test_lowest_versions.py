"""The lower bounds of pyproject.toml, installed as they stand, serve and train; so does the newest uvicorn."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

UV = str(Path(sys.executable).with_name("uv"))  # beside the interpreter, whatever PATH says
T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import sys
from unipinrec.runtime import Recommender
with Recommender.load(sys.argv[1], sys.argv[2]) as recommender:
    user, events = recommender.bundle.sample_users(1)[0]
    slate = recommender.recommend(recommender.bundle.user_events(user), 5)
print(*(item.item for item in slate.items))
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def installed(folder: Path, *extras: str, others: tuple[str, ...] = ()) -> Path:
    """The programs of an environment with the lowest versions that are declared, or others."""
    uv = [UV, "--no-config", "--quiet"]
    subprocess.run([*uv, "venv", str(folder)], check=True)
    install = [*uv, "pip", "install", "--python", str(folder / "bin/python"), "--no-cache"]
    lowest = [*install, "--resolution", "lowest-direct", f"{ROOT}[{','.join(extras)}]"]
    subprocess.run(lowest, check=True)
    if others:
        subprocess.run([*install, *others], check=True)
    return folder / "bin"


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def versions(programs: Path) -> dict[str, str]:
    listed = json.loads(run(UV, "pip", "list", "--format", "json", "--python", programs / "python"))
    return {package["name"]: package["version"] for package in listed}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("serving"), "cpu", "openvino", "serve", "log")


def test_the_lowest_versions_serve(serving: Path, bundle: Path, tmp_path: Path) -> None:
    found = versions(serving)
    declared = dict(re.findall(r'"([a-z_-]+)>=([\d.]+)[",]', (ROOT / "pyproject.toml").read_text()))
    kept = {name: Version(lowest) for name, lowest in declared.items() if name.replace("_", "-") in found}
    assert {"onnxruntime", "numpy", "uvicorn", "polars", "openvino", "msgspec"} <= set(kept)
    assert kept == {name: Version(found[name.replace("_", "-")]) for name in kept}
    here = run(sys.executable, "-c", CHECK, bundle, "cpu")
    for device in ("cpu", "openvino"):
        assert json.loads(run(serving / "unipinrec", "verify", bundle, "--device", device, "--json"))["ok"]
        assert run(serving / "python", "-c", CHECK, bundle, device) == here
    assert recommended_by_a_server(serving, bundle, tmp_path / "log") == 3


def recommended_by_a_server(programs: Path, bundle: Path, log: Path) -> int:
    command = [str(programs / "unipinrec"), "serve", str(bundle), "--port", "0", "--device", "cpu"]
    with log.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as server:
        try:
            address = eventually(lambda: re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()))
            connection = http.client.HTTPConnection("127.0.0.1", int(address[1]), timeout=60)
            item = json.loads((bundle / "item_ids.json").read_bytes())[0]
            body = json.dumps({"history": [{"item": item, "actions": []}], "k": 3})

            def answered() -> list[object] | None:
                connection.request("POST", "/v1/recommend", body)
                answer = connection.getresponse()
                content = answer.read()
                return json.loads(content)["items"] if answer.status == 200 else None

            count = len(eventually(answered))
        finally:
            server.terminate()
        assert server.wait(60) == 0
        return count


def test_the_newest_uvicorn_serves(bundle: Path, tmp_path: Path) -> None:
    """Whether the cap in pyproject.toml can be raised; parts that uvicorn does not document are overridden here."""
    try:
        programs = installed(tmp_path / "newest", "cpu", "serve", others=("--upgrade", "uvicorn"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"there is no package index: {error}")
    newest, capped = versions(programs)["uvicorn"], Requirement(declared("uvicorn"))
    if newest in capped.specifier:
        pytest.skip(f"uvicorn {newest} is the newest version, and {capped} allows it")
    assert recommended_by_a_server(programs, bundle, tmp_path / "log") == 3


def declared(name: str) -> str:
    """The requirement of an extra."""
    (requirement,) = re.findall(rf'"({name}[><=].*?)"', (ROOT / "pyproject.toml").read_text())
    return str(requirement)


def eventually(what: Callable[[], T | None]) -> T:
    limit = time.monotonic() + 120
    while True:
        found = what()
        if found is not None:
            return found
        assert time.monotonic() < limit
        time.sleep(0.2)


@pytest.mark.parametrize("version", ["1.23.0", "1.24.1", "1.24.4"])
def test_a_version_that_computes_wrongly_is_named(bundle: Path, version: str, tmp_path: Path) -> None:
    programs = installed(tmp_path / "old", "cpu", others=(f"onnxruntime=={version}",))
    done = subprocess.run(
        [programs / "unipinrec", "recommend", bundle, "--user", "u", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"ONNX Runtime {version} computes these graphs wrongly (1.24)" in done.stderr
    assert "install version 1.25 or newer" in done.stderr
    doctor = json.loads(run(programs / "unipinrec", "doctor", "--json"))
    assert f"ONNX Runtime {version} computes these graphs wrongly" in json.dumps(doctor)


def test_the_lowest_versions_train_and_export(dataset: Path, tmp_path: Path) -> None:
    programs = installed(tmp_path / "training", "cpu", "train")
    unipinrec = programs / "unipinrec"
    run(unipinrec, "train", "--data", dataset, "--out", tmp_path / "checkpoint", "--epochs", "1")
    run(unipinrec, "export", tmp_path / "checkpoint", tmp_path / "bundle", "--data", dataset)
    assert json.loads(run(sys.executable, "-m", "unipinrec", "verify", tmp_path / "bundle", "--json"))["ok"]

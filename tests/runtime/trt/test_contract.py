"""The calls of our code against the Python bindings of NVIDIA's own wheels, and against the double of them.

`make install` puts the bindings where they are looked for; they hold nothing of TensorRT itself.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest
from nvidia_bindings import describe, make_stubs, property_type, signatures
from tensorrt_surface import CLASS, MEMBER, MODULE, RTX_ONLY, SINCE_11, SURFACE, overloads
from tensorrt_usage import Usage, Use, members, read, usage

from unipinrec.runtime.trt.library import FLAVORS, MODULES, VERSIONS
from unipinrec.runtime.trt.load import TYPE_NAMES

FOLDER = "UNIPINREC_TENSORRT_BINDINGS"
WHEELS = {
    "tensorrt-cu13-bindings==10.16.1.11": ("tensorrt_bindings", 10),
    "tensorrt-cu13-bindings==11.4.0.106": ("tensorrt_bindings", 11),
    "tensorrt-rtx-cu13-bindings==1.7.1.116": ("tensorrt_rtx_bindings", 1),
}
SESSION = (
    "library.py",
    "runner.py",
    "load.py",
    "backend.py",
)
OURS = {"num_layers"}  # of our own models as well
Classes = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=WHEELS)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a version of the bindings says of itself."""
    module, major = WHEELS[request.param]
    folder = Path(os.environ.get(FOLDER, Path(sys.prefix) / "tensorrt-bindings")) / request.param
    if not folder.is_dir():
        if FOLDER in os.environ:
            pytest.fail(f"{FOLDER} is set, but {folder} does not exist")
        pytest.skip(f"{folder} does not exist; make install fills it")
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C compiler")
    stubs = make_stubs(compiler, tmp_path_factory.mktemp("stubs"), module, major)
    return describe(folder, module, stubs) | {"rtx": "rtx" in module}


def listed(real: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Class and member of everything that a flavour has to have."""
    for owner, contents in SURFACE.items():
        for member in contents:
            missing = set() if real["rtx"] else RTX_ONLY | (SINCE_11 if real["version"] < "11" else set())
            if not {owner, f"{owner}.{member}"} & missing:
                yield owner, member


def parameters(signature: str) -> dict[str, bool]:
    """Names of a signature's parameters, and whether each may be left out."""
    inside = signature[1 : signature.rindex(") -> ")]
    return {part.split(":")[0]: part.endswith("...") for part in re.split(r", (?=\w+:)", inside) if part}


def test_the_list_is_what_our_code_uses() -> None:
    used, known = set(members(usage())), set(SURFACE)
    assert {member for owner, member in used if owner == MODULE} - {"__version__", "ComputeCapability"} <= known
    used = {(owner, member) for owner, member in used if owner != MODULE}
    assert used == {(owner, member) for owner, contents in SURFACE.items() for member in contents}


def test_no_object_of_tensorrt_escapes_the_list(real: dict[str, Any]) -> None:
    theirs = {name for contents in real["classes"].values() for name in contents if "_" in name.strip("_")} - OURS
    loose = [(where, name) for where, name in usage().loose if name in theirs]
    assert loose == [], "give the object a type in SEEDS of tests/doubles/tensorrt_surface.py"


def test_the_bindings_have_what_is_listed(real: dict[str, Any]) -> None:
    classes: Classes = real["classes"]
    for owner, member in listed(real):
        found = classes.get(owner, {}).get(member)
        assert found is not None, f"{owner}.{member}"
        wanted = SURFACE[owner][member]
        if wanted in (CLASS, MEMBER):
            assert found["kind"] == wanted, f"{owner}.{member}"
        elif isinstance(wanted, str) and not overloads(owner, member):
            assert (found["kind"], property_type(found["doc"])) == ("property", wanted), f"{owner}.{member}"
        else:
            theirs = signatures(member, found["doc"])  # of which versions give some parameters a default, some not
            known = {one.replace(" = ...", "") for one in theirs}
            assert {one.replace(" = ...", "") for one in overloads(owner, member)} <= known, f"{owner}.{member}"


def test_what_only_rtx_has(real: dict[str, Any]) -> None:
    classes: Classes = real["classes"]
    for name in RTX_ONLY:
        owner, _, member = name.partition(".")
        there = owner in classes and (not member or member in classes[owner])
        assert there == real["rtx"], name


def fits(use: Use) -> bool:
    """Whether a call's arguments, or a method of ours, fit one of the listed signatures."""
    for signature in overloads(use.owner, use.member):
        names = parameters(signature)
        if use.kind == "override":
            if use.keywords == tuple(names):
                return True
            continue
        given = [*list(names)[: use.arguments], *use.keywords]
        left_out = [name for name, may in names.items() if name not in given and not may]
        too_many = (use.arguments or 0) + len(use.keywords) > len(names)
        if not left_out and not too_many and set(use.keywords) <= set(names):
            return True
    return False


def test_every_call_fits_its_signature() -> None:
    calls = [use for use in usage().uses if use.kind in ("call", "override")]
    assert len(calls) > 60
    assert [use for use in calls if not fits(use)] == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("context.set_tensor_address(name, 5)", True),
        ("context.set_tensor_address(name, memory=5)", True),
        ("context.set_tensor_address(name)", False),
        ("context.set_tensor_address(name, 5, 6)", False),
        ("context.set_tensor_address(name, address=5)", False),
        ("context.set_tensor_adress(name, 5)", False),
        ("engine.create_execution_context(how).execute_async_v3(1, 2)", False),
    ],
)
def test_a_call_that_does_not_fit_is_seen(line: str, found: bool) -> None:
    uses = read(f"def f():\n    {line}\n", "load.py", Usage()).uses
    assert {use.kind for use in uses} == {"call"}
    assert all(fits(use) for use in uses) == found


def test_an_object_of_unknown_type_is_seen() -> None:
    code = "def f(other):\n    other.set_input_shape(name, shape)\n    other.error_recorder = None\n"
    assert read(code, "load.py", Usage()).loose == [
        ("load.py:2", "set_input_shape"),
        ("load.py:3", "error_recorder"),
    ]


def test_what_is_set_can_be_set(real: dict[str, Any]) -> None:
    classes: Classes = real["classes"]
    writes = [use for use in usage().uses if use.kind == "write"]
    assert len(writes) > 5
    for use in writes:
        if (use.owner, use.member) in listed(real):
            assert classes[use.owner][use.member]["settable"], use.where


def test_the_versions_are_those_that_are_supported(real: dict[str, Any]) -> None:
    flavor = FLAVORS[real["rtx"]]
    first, end = VERSIONS[flavor]
    major, minor, *_ = real["version"].split(".")
    assert first <= (int(major), int(minor)) < end
    assert any(module in MODULES[flavor] for module, _ in WHEELS.values())


def test_the_names_of_types_are_theirs(real: dict[str, Any]) -> None:
    assert set(TYPE_NAMES) <= set(real["classes"]["DataType"])


FAKES: dict[str, type] = {
    "Runtime": fake_tensorrt.Runtime,
    "ICudaEngine": fake_tensorrt.ICudaEngine,
    "IExecutionContext": fake_tensorrt.IExecutionContext,
    "IRuntimeConfig": fake_tensorrt.RtxRuntimeConfig,
    "IRuntimeCache": fake_tensorrt.IRuntimeCache,
    "Refitter": fake_tensorrt.Refitter,
    "OnnxParserRefitter": fake_tensorrt.OnnxParserRefitter,
}


@pytest.mark.parametrize("owner", FAKES)
def test_the_double_is_no_wider_than_the_list(owner: str) -> None:
    fake = FAKES[owner]
    for member in [name for name in dir(fake) if not name.startswith("_")]:
        value = getattr(fake, member)
        if isinstance(value, property):
            assert not overloads(owner, member), f"{owner}.{member}"
            assert member in SURFACE[owner], f"{owner}.{member}"
        else:
            names = {name: p.default is not p.empty for name, p in inspect.signature(value).parameters.items()}
            del names["self"]
            assert [*names] in [[*parameters(one)] for one in overloads(owner, member)], f"{owner}.{member}"


def test_the_double_has_all_that_the_session_uses() -> None:
    for owner, member in members(usage(SESSION)):
        if owner in FAKES:
            assert hasattr(FAKES[owner], member), f"{owner}.{member}"


@pytest.mark.parametrize("name", ["DataType", "TensorIOMode", "TensorLocation", "ExecutionContextAllocationStrategy"])
def test_the_doubles_enumerations_are_theirs(real: dict[str, Any], name: str) -> None:
    theirs = {member: told["value"] for member, told in real["classes"][name].items() if told["kind"] == MEMBER}
    for member in getattr(fake_tensorrt, name):
        assert theirs[member.name] == member.value


def test_the_doubles_severities_are_theirs(real: dict[str, Any]) -> None:
    theirs = real["classes"]["ILogger.Severity"]
    assert {s.name: theirs[s.name]["value"] for s in fake_tensorrt.Severity} == {
        s.name: s.value for s in fake_tensorrt.Severity
    }

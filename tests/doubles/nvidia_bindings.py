"""NVIDIA's real Python bindings, imported without NVIDIA's libraries, and what they say of themselves.

The bindings are linked against nine C functions. Libraries that have these and do nothing are enough to import them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = {
    "tensorrt_bindings": ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"),
    "tensorrt_rtx_bindings": ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"),
}
# Runs in a process of its own, without site-packages: two versions of one module cannot be imported side by side.
DESCRIBE = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])

def described(value, name, of):
    if isinstance(value, property):
        return {"kind": "property", "doc": value.fget.__doc__ or "", "settable": value.fset is not None}
    if isinstance(value, of):
        return {"kind": "member", "value": int(value)}
    return {"kind": "class" if isinstance(value, type) else "method", "doc": value.__doc__ or ""}

def members(kind):
    names = [name for name in dir(kind) if not name.startswith("_") or name == "__init__"]
    return {name: described(getattr(kind, name), name, kind) for name in names}

classes = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
classes["ILogger.Severity"] = module.ILogger.Severity
print(json.dumps({"version": module.__version__, "classes": {name: members(kind) for name, kind in classes.items()}}))
"""
PLAIN = [
    (re.compile(r"tensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\."), ""),
    (re.compile(r"nvinfer1::(v_1_0::)?"), ""),
    (re.compile(r"nvonnxparser::|\bI(?=ParserError)"), ""),
    (re.compile(r"typing\.SupportsInt( \| typing\.SupportsIndex)?"), "int"),
    (re.compile(r"typing_extensions\.Buffer|\bbuffer\b"), "Buffer"),
    (re.compile(r"collections\.abc\.|typing\."), ""),
    (re.compile(r" = (<[^<>]*(<[^<>]*>)?[^<>]*>|[^,)]+)"), " = ..."),
]


def make_stubs(compiler: str, folder: Path, module: str, major: int) -> Path:
    """Write and compile the libraries that a module is linked against."""
    source = folder / "stub.c"
    plain = '#ifdef __cplusplus\nextern "C"\n#endif\n'
    source.write_text("".join(f"{plain}void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for library in LIBRARIES[module]:
        name = f"{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True)
    return folder


def describe(bindings: Path, module: str, stubs: Path) -> dict[str, Any]:
    """All classes of a module with their members, and its version."""
    code = f"import sys; sys.path.insert(0, {str(bindings)!r})\n{DESCRIBE}"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs)}
    command = [sys.executable, "-S", "-c", code, module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def signatures(member: str, doc: str) -> list[str]:
    """The overloads in a docstring, as "(name: str, shape: tuple) -> bool", in plain types and without `self`."""
    found = []
    for line in doc.splitlines():
        for pattern, plain in PLAIN:
            line = pattern.sub(plain, line)  # noqa: PLW2901
        overload = re.match(rf"\s*(?:\d+\. )?{member}\(self: [^,)]*(?:, )?(.*)\) -> (.*)$", line)
        if overload:
            found.append(f"({overload[1]}) -> {overload[2]}")
    return found


def property_type(doc: str) -> str:
    """Type of a property, from the docstring of its getter; "" where that says nothing."""
    for pattern, plain in PLAIN:
        doc = pattern.sub(plain, doc)
    found = re.match(r"\s*\w*\(\w+: [^)]*\) -> (.*)", doc)
    return found[1] if found else ""

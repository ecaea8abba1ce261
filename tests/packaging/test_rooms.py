"""The table of rooms in docs/architecture.md is what the code does: it imports nothing else, and needs each entry."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w/]+/)` \| .* \| (.*) \|$", re.MULTILINE)


def rooms() -> dict[str, list[str]]:
    """By room, what it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return {room: re.findall(r"`([^`]+)`", allowed) for room, allowed in ROW.findall(text)}


def target(module: str) -> str | None:
    """The file or package behind a name such as unipinrec.runtime.requests."""
    path = Path(*module.split(".")[1:])
    for base in (ROOT, ROOT / "src" / "unipinrec"):
        if (base / path.with_suffix(".py")).is_file():
            return str((base / path.with_suffix(".py")).relative_to(ROOT))
        if path.parts and (base / path / "__init__.py").is_file():
            return str((base / path).relative_to(ROOT)) + "/__init__.py"
    return None


def imports(path: Path) -> Iterator[str]:
    """Files of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{one.name}" for one in node.names]
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        found = [target(name) for name in names if name.startswith("unipinrec.")]
        yield from (one for one in found[-1:] + found[:1] if one is not None)


def allows(rule: str, file: str) -> bool:
    if rule.endswith("*.py"):
        return Path(file).parent == Path(rule).parent
    return file.startswith(rule) if rule.endswith("/") else file == rule


def test_every_room_is_in_the_table() -> None:
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for top in ("export", "models", "runtime")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(rooms()) == packages | {"src/unipinrec/cli/"}


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_what_its_row_says(room: str) -> None:
    allowed, used = rooms()[room], set[str]()
    for path in sorted((ROOT / room).glob("*.py")):
        for file in imports(path):
            if file.startswith("src/unipinrec/errors") or Path(file).parent == Path(room) or file.count("/") < 1:
                continue
            rules = [rule for rule in allowed if allows(rule, file)]
            assert rules, f"{path.relative_to(ROOT)} imports {file}"
            used |= set(rules)
    assert used == set(allowed) - {"runtime/"} | (used & {"runtime/"})


def test_a_wrong_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "cache.py"
    file.write_text(
        "def late():\n    from unipinrec.runtime.retrieval import index\n"
        "import unipinrec.runtime.popular\nfrom unipinrec.runtime.trt.cuda import Cuda\n"
    )
    found = set(imports(file))
    assert found == {
        "runtime/retrieval/index.py",
        "runtime/retrieval/__init__.py",
        "runtime/popular.py",
        "runtime/trt/cuda.py",
    }
    assert not any(allows(rule, one) for rule in rooms()["runtime/kv/"] for one in found)

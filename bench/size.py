"""The size budget of the house: function and file length, and the package as a whole. Fails when it is exceeded."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("export", "models", "runtime", "src/unipinrec")
MAX_FUNCTION, MAX_FILE, MAX_PACKAGE = 60, 400, 6000


def function_lengths(tree: ast.AST) -> list[tuple[int, str]]:
    """(lines, name) of every function."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [((n.end_lineno or n.lineno) - n.lineno + 1, n.name) for n in functions]


def main() -> None:
    """Measure, print one line, exit 1 with the offenders if any."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    problems, total, lengths = [], 0, []
    for path in files:
        text = path.read_text()
        lines = text.count("\n")
        total += lines
        if lines > MAX_FILE:
            problems.append(f"{path.relative_to(ROOT)}: {lines} lines, limit {MAX_FILE}")
        for length, name in function_lengths(ast.parse(text)):
            lengths.append(length)
            if length > MAX_FUNCTION:
                problems.append(f"{path.relative_to(ROOT)}: {name} has {length} lines, limit {MAX_FUNCTION}")
    if total > MAX_PACKAGE:
        problems.append(f"package: {total} lines, limit {MAX_PACKAGE}")
    lengths.sort()
    sys.stdout.write(
        f"{total} lines in {len(files)} files; {len(lengths)} functions, median {lengths[len(lengths) // 2]}, "
        f"90th percentile {lengths[int(len(lengths) * 0.9)]}\n"
    )
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()

"""The size budget of the house: function and file length, and the package as a whole. Fails when it is exceeded.

A function or file is measured in lines of text; the package in lines of code, without blanks, comments and docstrings
(docs/decisions/0002-size-budget.md; the limit is that of 0016).
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("export", "models", "runtime")
FOLDERS = (*PACKAGE, "src/unipinrec")
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
MAX_FUNCTION, MAX_FILE, MAX_PACKAGE = 60, 400, 16_800


def function_lengths(tree: ast.AST) -> list[tuple[int, str]]:
    """(lines, name) of every function."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [((n.end_lineno or n.lineno) - n.lineno + 1, n.name) for n in functions]


def code_lines(text: str, tree: ast.AST) -> int:
    """Lines that hold code."""
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    docstrings = {line for n in strings for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in BLANK]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstrings)


def main() -> None:
    """Measure, print one line, exit 1 with the offenders if any."""
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    problems, total, lengths = [], 0, []
    for path in files:
        text = path.read_text()
        lines = text.count("\n")
        tree = ast.parse(text)
        if path.parent.name in PACKAGE:
            total += code_lines(text, tree)
        if lines > MAX_FILE:
            problems.append(f"{path.relative_to(ROOT)}: {lines} lines, limit {MAX_FILE}")
        for length, name in function_lengths(tree):
            lengths.append(length)
            if length > MAX_FUNCTION:
                problems.append(f"{path.relative_to(ROOT)}: {name} has {length} lines, limit {MAX_FUNCTION}")
    if total > MAX_PACKAGE:
        problems.append(f"package: {total} lines of code, limit {MAX_PACKAGE}")
    lengths.sort()
    median, high = lengths[len(lengths) // 2], lengths[int(len(lengths) * 0.9)]
    sys.stdout.write(f"{total} lines of code in {', '.join(PACKAGE)} (limit {MAX_PACKAGE})\n")
    sys.stdout.write(f"{len(lengths)} functions, median {median} lines, 90th percentile {high}\n")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()

"""The size budget of the house: functions, files, folders, and the code of each room. Fails when it is exceeded.

A function or file is measured in lines of text; rooms in lines of code, without blanks, comments and docstrings
(docs/decisions/0002-size-budget.md; the limits are those of 0017). A room includes its subfolders.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
MAX_FUNCTION, MAX_FILE, MAX_FILES = 60, 400, 15
ROOMS = {"export": 3_450, "models": 4_410, "runtime": 12_700, "src/unipinrec": 2_720}
TESTS = "tests"
STORED = "tests/fixtures"  # bundles, whose files are those of their format


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


def files_of(room: str) -> list[Path]:
    """The files of a room and its subfolders, without links to other rooms."""
    return [path for path in sorted((ROOT / room).rglob("*.py")) if not any(one.is_symlink() for one in path.parents)]


def crowded(room: str) -> list[str]:
    """Folders with too many files."""
    folders = Counter(
        path.parent
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not any(one.is_symlink() for one in path.parents)
    )
    return [
        f"{folder.relative_to(ROOT)}: {count} files, limit {MAX_FILES}"
        for folder, count in folders.items()
        if count > MAX_FILES and STORED not in str(folder)
    ]


def main() -> None:
    """Measure, print a line per room, exit 1 with the offenders if any."""
    problems, lengths, total = [], [], 0
    for room, limit in ROOMS.items():
        lines_of_code = 0
        for path in files_of(room):
            text = path.read_text()
            tree, lines = ast.parse(text), text.count("\n")
            lines_of_code += code_lines(text, tree)
            if lines > MAX_FILE:
                problems.append(f"{path.relative_to(ROOT)}: {lines} lines, limit {MAX_FILE}")
            for length, name in function_lengths(tree):
                lengths.append(length)
                if length > MAX_FUNCTION:
                    problems.append(f"{path.relative_to(ROOT)}: {name} has {length} lines, limit {MAX_FUNCTION}")
        if lines_of_code > limit:
            problems.append(f"{room}: {lines_of_code} lines of code, limit {limit}")
        total += lines_of_code
        sys.stdout.write(f"{room}: {lines_of_code} lines of code (limit {limit})\n")
    for room in (*ROOMS, TESTS):
        problems += crowded(room)
    lengths.sort()
    median, high = lengths[len(lengths) // 2], lengths[int(len(lengths) * 0.9)]
    sys.stdout.write(f"{total} in all; {len(lengths)} functions, median {median} lines, 90th percentile {high}\n")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()

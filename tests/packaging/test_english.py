"""Texts are plain English: no forbidden phrase anywhere, no long sentence in the documents."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from unipinrec.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("export", "models", "runtime", "src/unipinrec")
MAX_WORDS = 30

# Regular expressions over whole words; upper and lower case count as the same.
FORBIDDEN = (
    "what serves",
    "whoever",
    "nobody",
    "no one",
    "for people",
    "the ones? that",
    "the ones? who",
    "which connections that",
    "what (?:is|are|was|were|has been) (?:asked|found|given|told|wanted)",
    "the (?:asked|wanted)",
)
PHRASES = re.compile(rf"\b(?:{'|'.join(FORBIDDEN)})\b", re.IGNORECASE)

# Places where a phrase is right: (path below the repository, phrase as it stands there, in lower case).
EXCEPTIONS: set[tuple[str, str]] = set()

ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|al|cf)\.(?=\s+[a-z0-9])")
BLOCK_START = re.compile(r"^\s*(?:[-*+] |\d+\. )")


def phrases(text: str) -> list[str]:
    """The forbidden phrases of a text, whose line breaks count as spaces."""
    return [match.group().lower() for match in PHRASES.finditer(" ".join(text.split()))]


def blocks(document: str) -> Iterator[str]:
    """Paragraphs and list items of a Markdown text, without code blocks, tables, headings and comments."""
    text = re.sub(r"^(\s*)(`{3,}|~{3,}).*?^\s*\2\s*$", "\n", document, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        ends = not line.strip() or line.lstrip().startswith(("|", "#"))
        if (ends or BLOCK_START.match(line)) and lines:
            yield " ".join(lines)
            lines = []
        if not ends:
            lines.append(BLOCK_START.sub("", line).strip())


def sentences(document: str) -> Iterator[str]:
    """Sentences of a Markdown text. Inline code and the target of a link are not words of theirs."""
    for block in blocks(document):
        text = re.sub(r"(`+).+?\1", "Code", block)
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = ABBREVIATION.sub(r"\1", re.sub(r"\*+|(?<!\w)_|_(?!\w)", "", text))
        yield from (part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text) if part.strip())


def words(sentence: str) -> int:
    return sum(any(letter.isalnum() for letter in word) for word in sentence.split())


def long_sentences(document: str) -> list[str]:
    return [f"{words(text)} words: {text}" for text in sentences(document) if words(text) > MAX_WORDS]


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string in Python source, docstrings included; {} stands for a value of an f-string."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def modules(folder: str) -> list[Path]:
    """Python files of a folder. Folders below it that are links belong to another one."""
    top = ROOT / folder
    linked = [path for path in top.iterdir() if path.is_symlink()]
    return sorted(path for path in top.rglob("*.py") if not any(link in path.parents for link in linked))


def commands(command: click.Command, name: str) -> Iterator[tuple[str, str]]:
    """Name and help of a command and of all below it."""
    yield name, command.get_help(click.Context(command, info_name=name))
    for child, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {child}")


def report(path: Path, line: int | None, text: str) -> list[str]:
    name = str(path.relative_to(ROOT))
    place = name if line is None else f"{name}:{line}"
    return [f"{place}: {phrase}" for phrase in phrases(text) if (name, phrase) not in EXCEPTIONS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_forbidden_phrase_in_a_document(document: Path) -> None:
    assert report(document, None, document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_long_sentence_in_a_document(document: Path) -> None:
    assert long_sentences(document.read_text()) == []


def test_no_forbidden_phrase_in_the_help_of_a_command() -> None:
    texts = dict(commands(main, "unipinrec"))
    assert len(texts) > 10
    assert {name: phrases(text) for name, text in texts.items() if phrases(text)} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_forbidden_phrase_in_a_string_of_the_code(folder: str) -> None:
    paths = modules(folder)
    assert paths
    assert [
        hit for path in paths for line, text in literals(path.read_text()) for hit in report(path, line, text)
    ] == []


def test_every_exception_is_needed() -> None:
    for name, phrase in EXCEPTIONS:
        assert phrase in phrases((ROOT / name).read_text()), (name, phrase)


def test_bad_samples_are_found() -> None:
    assert phrases("It asks what\n  serves, and Nobody knows.") == ["what serves", "nobody"]
    source = 'def f(x):\n    """No one\n    knows."""\n    return f"the one" f" that {x} said"\n'
    assert [hit for _, text in literals(source) for hit in phrases(text)] == ["no one", "the one that"]
    assert phrases("Everybody else: that is one, and what serving takes is another.") == []


def test_bad_sentences_are_found() -> None:
    bad = " ".join(["word"] * 31) + "."
    good = " ".join(["word"] * 29) + " `some inline code`."
    document = f"# {bad}\n\n{good} {good}\n```\n{bad}\n```\n| {bad} |\n\n- {good}\n- {good}\n"
    assert long_sentences(document) == []
    assert long_sentences(f"{document}- {bad}") == [f"31 words: {bad}"]
    assert list(sentences("See [the page](a.md#b). It says 0.7 (e.g. here). **Bold.** Two")) == [
        "See the page.",
        "It says 0.7 (e.g here).",
        "Bold.",
        "Two",
    ]

"""Bytes that are not UTF-8, and lists in lists without end, are refused like any other JSON that is wrong."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from answers import STORED

from unipinrec.errors import BundleError, RequestError, UnipinrecError
from unipinrec.runtime.bundle.bundle import Bundle
from unipinrec.runtime.requests import parse_events
from unipinrec.runtime.server.admin import read_current
from unipinrec.runtime.server.bodies import Limits, decode_events, decode_recommend, decode_similar
from unipinrec.runtime.server.v2.codec import decode_infer

Reseal = Callable[..., None]
DEEP = b"[" * 20_000 + b"]" * 20_000
LIMITS = Limits()
WAYS: dict[str, Callable[[bytes], object]] = {
    "parse_events": parse_events,
    "decode_recommend": lambda body: decode_recommend(body, LIMITS),
    "decode_events": lambda body: decode_events(body, LIMITS, 0),
    "decode_similar": lambda body: decode_similar(body, LIMITS),
    "decode_infer": lambda body: decode_infer(body, None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "body", [b'["\x82"]', b'{"user": "\xff"}', b'{"\x82": 1}', b"\xff\xfe", DEEP, b'{"a": ' + DEEP + b"}"], ids=range(6)
)
def test_bodies(way: str, body: bytes) -> None:
    with pytest.raises(RequestError, match=r"\w"):
        WAYS[way](body)


@pytest.mark.parametrize("name", ["item_ids.json", "item_titles.json"])
@pytest.mark.parametrize("content", [b'["\x82"]', DEEP], ids=["utf-8", "deep"])
def test_files_of_a_bundle(tmp_path: Path, reseal: Reseal, name: str, content: bytes) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    (folder / name).write_bytes(content)
    reseal(folder)
    with pytest.raises(BundleError, match=name):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "content",
    [b'{"format_version": 1, "\x82": 1}', b'{"format_version": 1, "config": ' + DEEP + b"}"],
    ids=["utf-8", "deep"],
)
def test_manifests(tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(STORED, tmp_path / "copy"))
    (folder / "manifest.json").write_bytes(content)
    (folder / "manifest.sha256").write_text(hashlib.sha256(content).hexdigest())
    with pytest.raises(BundleError, match="export the bundle again"):
        Bundle.open(folder)


@pytest.mark.parametrize("content", [b'{"bundle": "\x82"}', DEEP], ids=["utf-8", "deep"])
def test_the_file_that_names_what_serves(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "current.json").write_bytes(content)
    with pytest.raises(UnipinrecError, match=r"current\.json: .*must be a file such as"):
        read_current(tmp_path)

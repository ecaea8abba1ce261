"""The file of tokens, and what is no such file."""

from __future__ import annotations

import hashlib
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.access.tokens import Scope, Token, name_of, read_admin_token, read_tokens

SECRET = "0123456789abcdef0123456789abcdef"
DIGEST = hashlib.sha256(SECRET.encode()).hexdigest()
NOW = datetime(2026, 12, 1, tzinfo=UTC)
SERVING = Path(__file__).resolve().parents[4] / "docs" / "serving.md"


def file_of(folder: Path, content: str) -> Path:
    file = folder / "tokens.toml"
    file.write_text(content)
    return file


def test_a_file_of_tokens(tmp_path: Path) -> None:
    content = (
        f'[shop]\nsha256 = "{DIGEST}"\nscopes = ["recommend", "events"]\n'
        f'["the ops"]\nsha256 = "{"0" * 64}"\nscopes = ["admin"]\nexpires = 2027-01-31T00:00:00+01:00\n'
    )
    both: frozenset[Scope] = frozenset({"recommend", "events"})
    tokens = read_tokens(file_of(tmp_path, content))
    assert tokens == {
        "shop": Token(sha256=DIGEST, scopes=both),
        "the ops": Token(sha256="0" * 64, scopes=frozenset({"admin"}), expires=datetime(2027, 1, 30, 23, tzinfo=UTC)),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no token; each token is a table"),
        ("[shop", "end of a table declaration"),
        (SECRET, "each token is a table"),
        ("shop = 7", "Expected `object`"),
        (f'[shop]\nsha256 = "{SECRET}"\nscopes = ["events"]', "regex"),
        (f'[shop]\nsha256 = "{DIGEST.upper()}"\nscopes = ["events"]', "regex"),
        (f'[shop]\nsha256 = "{DIGEST}"', "missing required field `scopes`"),
        (f'[shop]\nsha256 = "{DIGEST}"\nscopes = []', "length >= 1"),
        (f'[shop]\nsha256 = "{DIGEST}"\nscopes = ["event"]', "Invalid enum value 'event'"),
        (f'[shop]\nsha256 = "{DIGEST}"\nscopes = ["events"]\nexpire = 2027-01-01', "unknown field `expire`"),
        (f'[shop]\nsha256 = "{DIGEST}"\nscopes = ["events"]\nexpires = 2027-01-01T00:00:00', "timezone"),
        (f'[shop]\nsha256 = "{DIGEST}"\nscopes = ["events"]\n[shop]\n', "twice"),
        (
            f'[a]\nsha256 = "{DIGEST}"\nscopes = ["events"]\n[b]\nsha256 = "{DIGEST}"\nscopes = ["admin"]',
            r"\[a\] and \[b\] have one hash",
        ),
    ],
)
def test_what_is_no_file_of_tokens(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_tokens(file_of(tmp_path, content))
    assert SECRET not in str(raised.value)
    assert DIGEST not in str(raised.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the tokens cannot be read"):
        read_tokens(tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="utf-8"):
        read_tokens(tmp_path / "bytes")


def test_names_of_tokens() -> None:
    every: frozenset[Scope] = frozenset({"events"})
    tokens = {
        "other": Token(sha256="0" * 64, scopes=every),
        "shop": Token(sha256=DIGEST, scopes=every, expires=datetime(2026, 12, 2, tzinfo=UTC)),
    }
    assert name_of(SECRET, tokens, NOW) == "shop"
    assert name_of(SECRET, tokens, datetime(2026, 12, 2, tzinfo=UTC)) is None
    for secret in ("", SECRET[:-1], SECRET.upper(), DIGEST, "0" * 64, "\udcff", "\u00e4"):
        assert name_of(secret, tokens, NOW) is None


def test_the_admin_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    monkeypatch.setenv("ADMIN_TOKEN", SECRET)
    expected = Token(sha256=DIGEST, scopes=frozenset({"admin"}))
    assert read_admin_token(file=tmp_path / "token") == expected
    assert read_admin_token(variable="ADMIN_TOKEN") == expected
    with pytest.raises(ConfigError, match="the admin token cannot be read from"):
        read_admin_token(file=tmp_path / "absent")
    with pytest.raises(ConfigError, match="variable NO_SUCH_TOKEN holds no admin token"):
        read_admin_token(variable="NO_SUCH_TOKEN")
    for weak in ("short", "x" * 15, "\u00e4" * 32, "x" * 8 + "\n" + "x" * 8):
        monkeypatch.setenv("ADMIN_TOKEN", weak)
        with pytest.raises(ConfigError, match="at least 16 printable ASCII characters"):
            read_admin_token(variable="ADMIN_TOKEN")


def test_the_documented_command_makes_a_token(tmp_path: Path) -> None:
    (command,) = re.findall(r"^(umask 077; secret=.*(?:\n .*)*)", SERVING.read_text(), re.MULTILINE)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    tokens = read_tokens(tmp_path / "tokens.toml")
    assert name_of(done.stdout.strip(), tokens, NOW) == "shop"
    assert tokens["shop"].scopes == {"recommend", "events"}

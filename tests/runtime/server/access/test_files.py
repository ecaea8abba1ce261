from __future__ import annotations

from pathlib import Path

import pytest

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.access.files import Reloaded


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "number").write_text("1")
    (tmp_path / "number").chmod(0o600)
    return tmp_path / "number"


def reloaded(file: Path) -> Reloaded[int]:
    def read() -> int:
        try:
            return int(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"no number: {error}") from error

    return Reloaded(read, [file])


def test_a_change_counts_when_it_has_settled(file: Path) -> None:
    content = reloaded(file)
    content.check()
    assert (content.current, content.reloads) == (1, {})
    file.write_text("22")
    content.check()
    assert content.current == 1
    file.write_text("333")
    content.check()
    assert content.current == 1, "it may be written at this moment"
    content.check()
    assert (content.current, content.reloads) == (333, {"loaded": 1})
    content.check()
    assert content.reloads == {"loaded": 1}


def test_what_is_broken_changes_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = reloaded(file)
    file.write_text("seven")
    for _ in range(4):
        content.check()
    assert (content.current, content.stale, content.reloads) == (1, True, {"failed": 1})
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "the former content stays in use until this is corrected: no number: invalid literal" in line
    file.unlink()
    for _ in range(2):
        content.check()
    assert (content.current, content.stale, content.reloads) == (1, True, {"failed": 2})
    file.write_text("7")
    for _ in range(2):
        content.check()
    assert (content.current, content.stale) == (7, False)


def test_an_error_that_nothing_expects_does_not_end_the_watch(file: Path) -> None:
    content = Reloaded(lambda: 7 // int(file.read_text()), [file], every_s=0.01)
    with content:
        for text, failed in (("0", 1), ("7", 1)):
            file.write_text(text)
            for _ in range(1000):
                if content.stale == (text == "0") and content.reloads["failed"] == failed:
                    break
                content._stopped.wait(0.01)
        assert content.current == 1


def test_at_the_start_it_must_be_right(file: Path) -> None:
    file.write_text("")
    with pytest.raises(ConfigError, match="no number"):
        reloaded(file)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True), (0o602, True)])
def test_a_file_for_everyone_is_a_warning(
    file: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file.chmod(mode)
    reloaded(file)
    assert (f"has mode {mode:03o}: every user of this machine can read or change it" in caplog.text) == warned

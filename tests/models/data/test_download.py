"""Downloads from a real HTTP server on the loopback, whole and broken in every way that matters."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from unipinrec.errors import DataError
from unipinrec.models.data.download import KUAIRAND_PURE, ML_1M, ML_100K, Archive, download


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, data in members.items():
            bundle.writestr(name, data)
    return buffer.getvalue()


def tarred(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        if link is not None:
            entry = tarfile.TarInfo("link")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            tar.addfile(entry)
    return buffer.getvalue()


FILES = {"set/README": b"read me", "set/data/log.csv": b"a,b\n1,2\n" * 300_000}
BODIES = {
    "/good.zip": zipped(FILES),
    "/good.tar.gz": tarred(FILES),
    "/up.zip": zipped({"ok.txt": b"1", "../evil.txt": b"2"}),
    "/absolute.zip": zipped({"/tmp/evil.txt": b"2"}),
    "/up.tar.gz": tarred({"ok.txt": b"1", "a/../../evil.txt": b"2"}),
    "/link.tar.gz": tarred({"ok.txt": b"1"}, link="/etc/passwd"),
    "/noise": b"neither a zip nor a tar",
}


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = BODIES.get(self.path.removeprefix("/cut").removeprefix("/unknown"))
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        if not self.path.startswith("/unknown"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path.startswith("/cut") else body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


Get = Callable[..., Path]


@pytest.fixture
def get(address: str, tmp_path: Path) -> Get:
    def get(path: str, body: str | None = None, **digests: str) -> Path:
        body_bytes = BODIES.get(body or path, b"")
        digests = digests or {
            "md5": hashlib.md5(body_bytes).hexdigest(),
            "sha256": hashlib.sha256(body_bytes).hexdigest(),
        }
        archive = Archive(name="x", url=address + path, digests=digests, licence="free")
        return download(archive, tmp_path / "cache" / "x", lambda done, total: None)

    return get


@pytest.mark.parametrize("name", ["/good.zip", "/good.tar.gz"])
def test_an_archive_is_fetched_verified_and_unpacked(get: Get, tmp_path: Path, name: str) -> None:
    folder = get(name)
    assert folder == tmp_path / "cache" / "x"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == FILES
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x"]


def test_progress_tells_received_and_announced_bytes(address: str, tmp_path: Path) -> None:
    body = BODIES["/good.zip"]
    seen: list[tuple[int, int | None]] = []
    for path in ("/good.zip", "/unknown/good.zip"):
        archive = Archive(name="x", url=address + path, digests={"md5": hashlib.md5(body).hexdigest()}, licence="free")
        download(archive, tmp_path / path.replace("/", "_"), lambda done, total: seen.append((done, total)))
    assert (len(body), len(body)) in seen
    assert seen[-1] == (len(body), None)
    assert seen[0] == (1 << 20, len(body))


def test_a_folder_that_is_there_is_not_fetched_again(get: Get, tmp_path: Path) -> None:
    (tmp_path / "cache" / "x").mkdir(parents=True)
    assert list(get("/missing").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "digests", "message"),
    [
        ("/good.zip", {"md5": "0" * 32}, r"md5 is [0-9a-f]{32}, published is 0{32}; .* not unpacked"),
        ("/good.zip", {"sha256": "0" * 64}, r"sha256 is [0-9a-f]{64}, published is 0{64}"),
        ("/cut/good.zip", {}, r"/cut/good.zip: received \d+ of \d+ bytes; try again"),
        ("/missing.zip", {}, r"could not fetch http://.*404: Not Found; fetch and unpack it by hand"),
        ("/up.zip", {}, r"archive member '../evil.txt' is a link, a device or outside the folder"),
        ("/absolute.zip", {}, r"archive member '/tmp/evil.txt' is a link"),
        ("/up.tar.gz", {}, r"archive member 'a/../../evil.txt' is a link"),
        ("/link.tar.gz", {}, r"archive member 'link' is a link"),
        ("/noise", {}, r"/noise could not be unpacked: .*; nothing was left behind"),
    ],
)
def test_a_bad_transfer_leaves_nothing_behind(
    get: Get, tmp_path: Path, path: str, digests: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        get(path, **digests)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_truncated_transfer_of_unknown_length_fails_its_digest(address: str, tmp_path: Path) -> None:
    archive = Archive(name="x", url=address + "/unknown/noise", digests={"md5": "f" * 32}, licence="free")
    with pytest.raises(DataError, match=r"md5 is"):
        download(archive, tmp_path / "x", lambda done, total: None)


def test_no_connection_is_reported(tmp_path: Path) -> None:
    archive = Archive(name="x", url="http://127.0.0.1:9/x.zip", digests={"md5": ""}, licence="free")
    with pytest.raises(DataError, match=r"could not fetch http://127.0.0.1:9/x.zip: .*refused"):
        download(archive, tmp_path / "x", lambda done, total: None)


def test_only_web_addresses_are_fetched(tmp_path: Path) -> None:
    archive = Archive(name="x", url="file:///etc/passwd", digests={"md5": ""}, licence="free")
    with pytest.raises(DataError, match=r"file:///etc/passwd: only http\(s\) addresses are fetched"):
        download(archive, tmp_path / "x", lambda done, total: None)


def test_the_published_archives_are_over_https_with_a_digest_and_a_licence() -> None:
    assert KUAIRAND_PURE.url == "https://zenodo.org/records/10439422/files/KuaiRand-Pure.tar.gz"
    assert KUAIRAND_PURE.digests == {"md5": "0820331067a3784d9691136f772b35a7"}
    assert ML_100K.url == "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
    assert ML_100K.digests["md5"] == "0e33842e24a9c977be4e0107933c0723"
    assert ML_1M.url == "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    assert ML_1M.digests["md5"] == "c4d9eecfca2ab87c1945afe126590906"
    assert "CC BY-SA 4.0" in KUAIRAND_PURE.licence
    assert "no redistribution" in ML_100K.licence
    assert "no redistribution" in ML_1M.licence

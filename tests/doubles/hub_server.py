"""The part of the Hugging Face Hub that its client needs for models: commits, revisions, files, uploads, tokens.

Files of the Hub's large-file patterns are uploaded by LFS and downloaded by a redirect, others are part of the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".onnx", ".bin", ".hnsw", ".plan")
ROUTE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree|preupload|commit)/([^/]+)")
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What the server holds, and what it was asked.

    `repos` maps a name to its commits, and a commit to its files. `refs` maps a name to its branches and tags.
    `token` is needed by all if it is not empty. `cut` and
    `altered` are the sha256 of a large file that is sent in part, or as zeros.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    token: str = ""
    cut: str = ""
    altered: str = ""

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit that holds these files and no others."""
        commits = self.repos.setdefault(repo, {})
        sha = hashlib.sha1(f"{repo} {len(commits)} {sorted(files)}".encode()).hexdigest()
        commits[sha] = files
        self.refs.setdefault(repo, {})[branch] = sha
        return sha

    def resolved(self, repo: str, revision: str) -> str | None:
        """The commit of a revision."""
        name = unquote(revision)
        return name if name in self.repos[repo] else self.refs[repo].get(name)


@contextmanager
def hub_server() -> Iterator[tuple[Hub, str]]:
    """A Hub and its endpoint on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self) -> None:
        path, body = urlsplit(self.path).path, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {path}")
        if path.startswith("/large/"):  # of another host, which must not see the token
            assert self.headers.get("Authorization") is None
            self.large(path.removeprefix("/large/"), body)
            return
        self.hub.tokens.add(self.headers.get("Authorization"))
        if path == "/api/validate-yaml":
            self.send(json.dumps({"errors": [], "warnings": []}))
            return
        route, file = ROUTE.fullmatch(path), RESOLVE.fullmatch(path)
        repo = (route or file or [None, path[1:].partition(".git/")[0]])[1]
        denied = bool(self.hub.token) and self.headers.get("Authorization") != f"Bearer {self.hub.token}"
        if denied or repo not in self.hub.repos:
            self.send("", 401 if denied else 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body)["objects"])
        elif (sha := self.hub.resolved(repo, (route or file)[(2, 3)[file is None]])) is None:  # type: ignore[index]
            self.send("", 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        elif file:
            self.file(self.hub.repos[repo][sha], file[3], sha)
        elif route:
            getattr(self, route[2])(repo, sha, unquote(route[3]), body)

    def send(self, content: str | bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def store(self, oid: str) -> str:
        return f"http://localhost:{self.headers['Host'].rpartition(':')[2]}/large/{oid}"

    def large(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.large[oid] = body
            self.send("")
        else:
            self.body(self.hub.large[oid], {})

    def body(self, content: bytes, headers: dict[str, str]) -> None:
        if self.hub.cut and content == self.hub.large.get(self.hub.cut):
            self.send(content[: len(content) // 2], 200, headers)
        elif self.hub.altered and content == self.hub.large.get(self.hub.altered):
            self.send(bytes(len(content)), 200, headers)
        elif begin := self.headers.get("Range", "").removeprefix("bytes=").rstrip("-"):
            rest = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.send(content[int(begin) :], 206, {**headers, "Content-Range": rest})
        else:
            self.send(content, 200, headers)

    def file(self, files: dict[str, bytes], name: str, sha: str) -> None:
        if (content := files.get(unquote(name))) is None:
            self.send("", 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif name.endswith(LARGE) and content:
            oid = hashlib.sha256(content).hexdigest()
            self.hub.large.setdefault(oid, content)
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            self.send("", 302, {"Location": self.store(oid), "ETag": '"pointer"', **linked, "X-Repo-Commit": sha})
        else:
            self.body(content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha})

    def revision(self, repo: str, sha: str, _: str, __: bytes) -> None:
        siblings = [{"rfilename": name} for name in self.hub.repos[repo][sha]]
        self.send(json.dumps({"id": repo, "sha": sha, "siblings": siblings, "private": bool(self.hub.token)}))

    def tree(self, repo: str, sha: str, _: str, __: bytes) -> None:
        entries: list[dict[str, Any]] = []
        for name, content in self.hub.repos[repo][sha].items():
            entries.append({"type": "file", "path": name, "size": len(content), "oid": _oid(content)})
            if name.endswith(LARGE) and content:
                oid = hashlib.sha256(content).hexdigest()
                entries[-1]["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
        self.send(json.dumps(entries))

    def preupload(self, repo: str, sha: str, _: str, body: bytes) -> None:
        files = [
            {"path": name, "uploadMode": "lfs" if name.endswith(LARGE) else "regular", "shouldIgnore": False}
            for name in (file["path"] for file in json.loads(body)["files"])
        ]
        self.send(json.dumps({"files": files}))

    def batch(self, objects: list[dict[str, Any]]) -> None:
        answers = [{**one, "actions": {"upload": {"href": self.store(one["oid"])}}} for one in objects]
        self.send(json.dumps({"transfer": "basic", "objects": answers}))

    def commit(self, repo: str, sha: str, branch: str, body: bytes) -> None:
        files = dict(self.hub.repos[repo][sha])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
                assert value["parentCommit"] == sha
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del files[value["path"]]
        oid = self.hub.commit(repo, files, branch)
        self.send(
            json.dumps(
                {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
            )
        )


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

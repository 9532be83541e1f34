"""A stand-in for the Hugging Face hub on this machine: repositories in memory, behind the few requests that pushing a
folder and fetching a snapshot make."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    """The name of a commit of these files."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class LocalHub(ThreadingHTTPServer):
    """`files`: of each repository and branch, name -> bytes. `requests`: the path and token of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.created: list[dict] = []
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        length, chunks = self.headers.get("Content-Length"), []
        if length is not None:
            chunks.append(self.rfile.read(int(length)))
        else:  # chunked
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        self._answer(b"".join(chunks))

    def do_GET(self):
        self._answer(b"")

    do_HEAD = do_GET

    def _answer(self, body: bytes):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((path, self.headers.get("Authorization")))
        match path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                wanted = json.loads(body)
                self.server.created.append(wanted)
                owner = wanted.get("organization") or "me"
                self._json({"url": f"{self.server.url}/{owner}/{wanted['name']}", "id": f"{owner}/{wanted['name']}"})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self._json({"files": modes})
            case ["api", "models", owner, name, "commit", revision]:
                files = self.server.files.setdefault((f"{owner}/{name}", revision), {})
                for line in body.splitlines():
                    change = json.loads(line)
                    if change["key"] == "file":
                        files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
                commit = commit_of(files)
                self._json({"commitUrl": f"{self.server.url}/{owner}/{name}/commit/{commit}", "commitOid": commit})
            case ["api", "models", owner, name, "revision", revision]:
                files = self._files(f"{owner}/{name}", revision)
                if not files:
                    return self._missing()
                listed, sha = [{"rfilename": file} for file in files], commit_of(files)
                self._json({"id": f"{owner}/{name}", "sha": sha, "siblings": listed, "private": False, "tags": []})
            case ["api", "models", owner, name, "tree", revision, *_]:
                files = self._files(f"{owner}/{name}", revision)
                digests = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
                self._json([{"type": "file", "path": f, "size": len(files[f]), "oid": digests[f]} for f in files])
            case [owner, name, "resolve", revision, *file]:
                files = self._files(f"{owner}/{name}", revision)
                content = files.get("/".join(file))
                if content is None:
                    return self._missing()
                etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit_of(files)}
                self._send(200, content, etag)
            case _:
                self._missing()

    def _files(self, repo: str, revision: str) -> dict[str, bytes]:
        """Those of a branch or a commit; none of one that does not exist."""
        of_repo = {branch: files for (name, branch), files in self.server.files.items() if name == repo}
        by_commit = {commit_of(files): files for files in of_repo.values()}
        return (of_repo | by_commit).get(revision, {})

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _missing(self):
        self._send(404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()

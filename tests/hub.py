"""A Hub on this machine, for the real clients: repositories in memory, files over HTTP, and the
ways in which it can fail.

    with Hub() as hub:
        commit = hub.add("ours/toy", {"config.json": b"{}", "model.safetensors": weights},
        kind="model") ...  # HF_ENDPOINT=hub.url

It speaks what ``huggingface_hub`` and ``datasets`` ask of the Hub: files of a revision with ETag
and commit, large ones by way of a redirect, ranges; information, trees and paths of a repository.
``requests`` holds (method, path, range) of all that was asked.
"""

import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".npz")


class Hub:
    """Context manager; ``url`` is the endpoint. Change its faults at any time, by path of the file
    or name of the repository.

    gated: repository -> the token that opens it.
    cut: path -> how many of the next answers break off halfway, as when a connection is lost.
    short: paths whose answers end early and say so.
    wrong: path -> bytes that are sent in place of the file's.
    """

    def __init__(self):
        self.repositories, self.blobs, self.requests = {}, {}, []
        self.gated, self.cut, self.short, self.wrong = {}, {}, set(), {}

    def __enter__(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        # another host to the client, as the Hub's store of large files is
        self.store = f"http://localhost:{server.server_port}"
        self._server, self._thread = (
            server,
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True),
        )
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self, repo: str, files: dict[str, bytes], kind: str = "model", revision: str = "main"
    ) -> str:
        """Put a repository's files at a branch, in place of those there; returns the commit, which
        serves them from now on."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        revisions = self.repositories.setdefault((f"{kind}s", repo), {})
        revisions[revision] = revisions[commit] = (commit, dict(files))
        return commit


def entries(files):
    """What the Hub says of files, and of the folders they are in."""
    folders = {path[:at] for path in files for at in range(len(path)) if path[at] == "/"}
    known = [
        {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)
    ]
    return known + [
        {
            "type": "file",
            "path": path,
            "size": len(content),
            "oid": hashlib.sha1(content).hexdigest(),
        }
        for path, content in sorted(files.items())
    ]


class Refusal(Exception):
    """Status and the Hub's own word for an error."""


class Handler(BaseHTTPRequestHandler):
    """Answers of one hub, the class attribute ``hub``."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing on the terminal: ``hub.requests`` has it."""

    def do_GET(self):  # noqa: N802
        """Also HEAD and POST: whatever the method, the path says what is asked."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, query = (
            unquote(part) for part in (urlsplit(self.path).path, urlsplit(self.path).query)
        )
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        try:
            self.answer(path, query, body)
        except Refusal as refusal:
            status, code = refusal.args
            self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def answer(self, path, query, body):
        if match := re.fullmatch("/large/([0-9a-f]{64})/(.*)", path):
            return self.content(match[2], self.hub.blobs[match[1]], {"ETag": f'"{match[1]}"'})
        if match := re.fullmatch(
            "/(datasets/)?([^/]+/[^/]+|[^/]+)/resolve/((?:refs/convert/|refs/pr/)?[^/]+)/(.+)", path
        ):
            return self.resolve((match[1] or "models/")[:-1], *match.group(2, 3, 4))
        if match := re.fullmatch(
            "/api/(models|datasets)/(.+?)"
            "(?:/(revision|tree|paths-info)/((?:refs/convert/|refs/pr/)?[^/]+)(/.*)?)?",
            path,
        ):
            return self.api(*match.groups(), query, body)
        raise Refusal(404, "NotFound")

    def find(self, kind, repo, revision):
        if (kind, repo) not in self.hub.repositories:
            raise Refusal(404, "RepoNotFound")
        if revision not in self.hub.repositories[kind, repo]:
            raise Refusal(404, "RevisionNotFound")
        return self.hub.repositories[kind, repo][revision]

    def resolve(self, kind, repo, revision, path):
        commit, files = self.find(kind, repo, revision)
        token = self.hub.gated.get(repo)
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            raise Refusal(401, "GatedRepo")
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        content, digest = files[path], hashlib.sha256(files[path]).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if not path.endswith(LARGE):
            return self.content(path, content, headers)
        self.hub.blobs[digest] = content
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self.reply(
            302, b"", {**headers, **linked, "Location": f"{self.hub.store}/large/{digest}/{path}"}
        )

    def content(self, path, content, headers):
        content = self.hub.wrong.get(path, content)
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        part, status = content, 206 if span else 200
        if span:
            last = min(int(span[2] or len(content)), len(content) - 1)
            part = content[int(span[1]) : last + 1]
            headers["Content-Range"] = f"bytes {span[1]}-{last}/{len(content)}"
        if path in self.hub.short and self.command == "GET":
            part = part[: len(part) // 2]
        broken = self.command == "GET" and self.hub.cut.get(path, 0) > 0
        if broken:
            self.hub.cut[path] -= 1
        self.reply(
            status,
            part,
            {**headers, "Accept-Ranges": "bytes"},
            sent=len(part) // 2 if broken else None,
        )

    def api(self, kind, repo, verb, revision, below, query, body):
        commit, files = self.find(kind, repo, revision or "main")
        found = entries(files)
        if verb == "tree":
            folder = f"{below.strip('/')}/" if below else ""
            found = [entry for entry in found if entry["path"].startswith(folder)]
            if "recursive=true" not in query.lower():
                found = [entry for entry in found if "/" not in entry["path"].removeprefix(folder)]
        elif verb == "paths-info":
            asked = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else re.findall("paths=([^&]+)", unquote(body.decode()))
            )
            found = [entry for entry in found if entry["path"] in asked]
        else:
            names = [{"rfilename": path} for path in sorted(files)]
            found = {
                "id": repo,
                "sha": commit,
                "private": False,
                "gated": repo in self.hub.gated,
                "disabled": False,
                "tags": [],
                "siblings": names,
            }
        self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def reply(self, status, body, headers, sent=None):
        """``sent``: how much of the body goes out before the connection is lost."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True

"""As much of the Hub's HTTP interface as huggingface_hub needs to make, fill and read a model repository, on one port of this
machine: the client in the tests is the real one."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Repositories = dict[str, dict[str, bytes]]
COMMIT = "c" * 40


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, {"X-Error-Code": code})

    def _file(self, parts: list[str]) -> None:
        """``/org/name/resolve/<revision>/<path>``"""
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        data = self.repositories.get(name, {}).get(path)
        if data is None:
            self._missing("EntryNotFound")
        else:
            self._answer(200, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": COMMIT})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if len(parts) > 4 and parts[2] == "resolve":
            self._file(parts)
            return
        name, rest = "/".join(parts[2:4]), parts[4:]
        files = self.repositories.get(name)
        if files is None:
            self._missing("RepoNotFound")
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._missing("RevisionNotFound")
        elif rest[:1] == ["tree"]:
            self._json([{"type": "file", "path": p, "size": len(d), "oid": _blob(d)} for p, d in files.items()])
        else:
            self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[-1] == "create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            self._json({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif parts[-1] == "validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            asked = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        else:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        files = self.repositories[name]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] in ("deletedFile", "deletedEntry"):
                for path in fnmatch.filter(list(files), value["path"]):
                    del files[path]
        self._json({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})


@contextmanager
def hub(repositories: Repositories) -> Iterator[str]:
    """Serve repositories (name -> path -> bytes), which pushing changes; gives the endpoint."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A server on 127.0.0.1 that speaks as much of the hub's protocol as a download needs, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


@dataclass
class FakeHub:
    """One repository, `org/tiny`. `answers` holds statuses to give first, `cut` how often the weights come short."""

    files: Mapping[str, bytes]
    answers: list[tuple[int, Mapping[str, str]]] = field(default_factory=list)
    gated: bool = False
    cut: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    address: str = ""

    def answer(self, method: str, path: str) -> tuple[int, Mapping[str, str], bytes]:
        self.requests[f"{method} {path.split('?')[0]}"] += 1
        if self.answers:
            status, headers = self.answers.pop(0)
            return status, headers, b"{}"
        if path.startswith("/api/models/org/tiny"):
            return self._api(path)
        if path.startswith("/org/tiny/resolve/"):
            return self._file(method, path.split("?")[0].split("/", 5)[5])
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _api(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        if "/tree/" in path:
            listing: object = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        revision = path.split("?")[0].partition("/revision/")[2] or "main"
        if revision not in {"main", COMMIT}:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
        info = {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "downloads": 0, "tags": []}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _file(self, method: str, name: str) -> tuple[int, Mapping[str, str], bytes]:
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        data = self.files[name]
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
        }
        if method == "GET" and name.endswith(".safetensors") and self.cut:
            self.cut -= 1
            data = data[:-7]
        return 200, headers, data


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            status, headers, body = hub.answer(self.command, self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = _reply

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

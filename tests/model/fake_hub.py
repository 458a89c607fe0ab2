"""A server on 127.0.0.1 that speaks what downloads and commits need of the hub's protocol, with faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34
PIECE = 64 * 1024


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes of which only the first are made; the rest are zeros, and made when they are asked for."""

    start: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        begin, end, _ = part.indices(self.size)
        made = self.start[begin:end]
        return made + bytes(end - begin - len(made))


@dataclass
class FakeHub:
    """One repository. `answers` holds statuses to give first, `cut` how often the weights come short, `down` the one
    file that no request gets whole, `page` what something that is no hub answers to all of them, with `page_status`;
    `served` counts the bytes of bodies by file, those of the API under `api`, and `sent` those that a client took;
    `ranges` False ignores that a part was asked for."""

    files: Mapping[str, bytes | Sparse]
    name: str = "org/tiny"
    answers: list[tuple[int, Mapping[str, str]]] = field(default_factory=list)
    gated: bool = False
    cut: int = 0
    down: str = ""
    page: bytes | Sparse = b""
    page_status: int = 200
    ranges: bool = True
    private: bool = False
    requests: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    address: str = ""

    def answer(self, method: str, path: str, asked: str | None = None) -> tuple[int, Mapping[str, str], bytes | Sparse]:
        """`asked` is the Range header. What a HEAD would have as its body is not made."""
        self.requests[f"{method} {path.split('?')[0]}"] += 1
        if self.page:
            return self.page_status, {"Content-Type": "text/html"}, self.page
        if self.answers:
            status, headers = self.answers.pop(0)
            return status, headers, b"{}"
        if path.startswith(f"/api/models/{self.name}"):
            status, headers, body = self._api(path)
            self.served["api"] += len(body)
            return status, headers, body
        if path.startswith(f"/{self.name}/resolve/"):
            return self._file(method, path.split("?")[0].split("/", 5)[5], asked)
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _api(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        if "/tree/" in path:
            listing: object = [
                {"type": "file", "path": name, "size": len(data), "oid": _hash(name, data)}
                for name, data in self.files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        revision = path.split("?")[0].partition("/revision/")[2] or "main"
        if revision not in {"main", COMMIT}:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
        info = {
            "id": self.name,
            "sha": COMMIT,
            "siblings": siblings,
            "private": self.private,
            "downloads": 0,
            "tags": [],
        }
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _file(self, method: str, name: str, asked: str | None) -> tuple[int, Mapping[str, str], bytes]:
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        data = self.files[name]
        headers = {
            "ETag": f'"{_hash(name, data)}"',
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        if method == "HEAD":
            return 200, {**headers, "Content-Length": str(len(data))}, b""
        begin, end, status = 0, len(data), 200
        if self.ranges and asked and (part := re.fullmatch(r"bytes=(\d+)-(\d*)", asked)):
            begin, end = int(part[1]), min(int(part[2]) + 1 if part[2] else len(data), len(data))
            headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{len(data)}"}
            status = 206
        elif name.endswith(".safetensors") and self.cut:
            self.cut -= 1
            end -= 7
        if name == self.down and status == 200:
            return 503, {}, b"{}"
        body = data[begin:end]
        self.served[name] += len(body)
        return status, headers, body


WRITE_TOKEN = "hf_" + "w" * 30
READ_TOKEN = "hf_" + "r" * 30


@dataclass
class WritableHub(FakeHub):
    """A repository that can be made and committed to, by WRITE_TOKEN alone; `name` starts with the one account's name.
    Small files come within the commit, *.safetensors by the LFS protocol before it. `ignored` are names that its
    .gitignore keeps out."""

    files: dict[str, bytes | Sparse] = field(default_factory=dict)
    exists: bool = False
    private: bool = False
    ignored: frozenset[str] = frozenset()
    full: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    def receive(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Mapping[str, str], bytes]:
        """What is posted or put; `token` is the one of the request."""
        path = path.split("?")[0]
        self.requests[f"{method} {path}"] += 1
        if path.startswith("/stored/"):
            self.stored[path.removeprefix("/stored/")] = body
            return 200, {}, b"{}"
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if token not in (WRITE_TOKEN, READ_TOKEN):
            return 401, {}, b'{"error": "Invalid credentials in Authorization header"}'
        if token == READ_TOKEN:
            return 403, {}, b'{"error": "You don\'t have the rights to write there"}'
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith("/objects/batch"):
            return self._batch(json.loads(body))
        if path == f"/api/models/{self.name}/preupload/main":
            return self._preupload(json.loads(body))
        if path == f"/api/models/{self.name}/commit/main":
            return self._commit(body)
        return 404, {}, b"{}"

    def _create(self, asked: Mapping[str, object]) -> tuple[int, Mapping[str, str], bytes]:
        if asked["organization"] != self.name.split("/")[0]:
            return 403, {}, b'{"error": "You don\'t have the rights to create a model under this namespace"}'
        if self.exists:
            return 409, {}, b'{"error": "You already created this model repo"}'
        self.exists = True
        # Releases before and after 2.0 of huggingface_hub say it in other words.
        self.private = asked.get("private") is True or asked.get("visibility") == "private"
        return _json({"url": f"{self.address}/{self.name}"})

    def _preupload(self, asked: Mapping[str, list[Mapping[str, object]]]) -> tuple[int, Mapping[str, str], bytes]:
        return _json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if str(file["path"]).endswith(".safetensors") else "regular",
                        "shouldIgnore": file["path"] in self.ignored,
                    }
                    for file in asked["files"]
                ]
            }
        )

    def _batch(self, asked: Mapping[str, list[Mapping[str, object]]]) -> tuple[int, Mapping[str, str], bytes]:
        if self.full:
            return 507, {}, b"{}"
        uploads = [
            {**file, "actions": {"upload": {"href": f"{self.address}/stored/{file['oid']}"}}}
            for file in asked["objects"]
        ]
        return _json({"transfer": "basic", "objects": uploads})

    def _commit(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content = self.stored[value["oid"]]
                assert (hashlib.sha256(content).hexdigest(), len(content)) == (value["oid"], value["size"])
                self.files[value["path"]] = content
        self.commits.append([operation["key"] for operation in operations])
        url = f"{self.address}/{self.name}/commit/{COMMIT}"
        return _json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def answer(self, method: str, path: str, asked: str | None = None) -> tuple[int, Mapping[str, str], bytes]:
        if not self.exists:
            self.requests[f"{method} {path.split('?')[0]}"] += 1
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        return super().answer(method, path, asked)


def _json(value: object) -> tuple[int, Mapping[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _hash(name: str, data: bytes | Sparse) -> str:
    return hashlib.sha1(data if isinstance(data, bytes) else f"{name} {data.size}".encode()).hexdigest()


def llama_70b_shape() -> dict[str, bytes | Sparse]:
    """The files of a repository of the shape of Llama 3.1 70B: 141 GB of weights in 30 shards, more copies of them, and
    real headers. Its tokenizer.json is as long as the real one."""
    hidden, feed_forward, key_value, vocabulary, layers = 8192, 28672, 1024, 128256, 80
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (hidden, hidden),
            f"{at}.self_attn.k_proj.weight": (key_value, hidden),
            f"{at}.self_attn.v_proj.weight": (key_value, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, hidden),
            f"{at}.mlp.gate_proj.weight": (feed_forward, hidden),
            f"{at}.mlp.up_proj.weight": (feed_forward, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, feed_forward),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": layers, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": vocabulary, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    names, shards = list(shapes), 30
    files: dict[str, bytes | Sparse] = {}
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        files[file] = _sparse_shard({name: shapes[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    weights = sum(len(shard) for shard in files.values())
    return files | {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2).encode(),
        "tokenizer.json": bytes(9_085_657),
        "consolidated.safetensors": Sparse(b"", weights),
        "original/consolidated.00.pth": Sparse(b"", weights),
        "original/params.json": b"{}",
        "onnx/model.onnx_data": Sparse(b"", weights),
    }


def _sparse_shard(shapes: Mapping[str, tuple[int, ...]]) -> Sparse:
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return Sparse(len(header).to_bytes(8, "little") + header, 8 + len(header) + end)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            if self.command in ("POST", "PUT"):
                assert isinstance(hub, WritableHub)
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                status, headers, body = hub.receive(self.command, self.path, self._body(), token)
            else:
                status, headers, body = hub.answer(self.command, self.path, self.headers.get("Range"))
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self._send(body)

        def _send(self, body: bytes | Sparse) -> None:
            for begin in range(0, len(body), PIECE):
                try:
                    self.wfile.write(body[begin : begin + PIECE])
                except ConnectionError:  # the client has what it wanted
                    self.close_connection = True
                    return
                hub.sent += len(body[begin : begin + PIECE])

        do_GET = do_HEAD = do_POST = do_PUT = _reply

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

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

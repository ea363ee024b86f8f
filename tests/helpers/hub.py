"""A Hugging Face hub on 127.0.0.1: the calls of its commit API, its rules for model cards, and
failures on demand.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_this_test_alone"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
# some of the hub's
LICENSES = {"apache-2.0", "mit", "gemma", "llama2", "cc-by-4.0", "openrail", "unknown", "other"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
FRONT_MATTER = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.branches["main"]


@dataclass
class Hub:
    """`fails`: path pattern → status, or "cut" for a connection that is closed without an answer.

    `seen`: every request's method, path and body.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    fails: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)


def card_problems(content: str) -> list[str]:
    """What breaks the documented rules of the hub's metadata (hub-docs: modelcard.md,
    repositories-licenses.md).
    """
    match = FRONT_MATTER.search(content)
    data = yaml.safe_load(match[2]) if match else None
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    found = []

    def check(key: str, fits: bool) -> None:
        if not fits:
            found.append(f'"{key}" with value {data.get(key)!r} is not valid')

    def names(key: str) -> list[Any]:
        value = data.get(key, [])
        return value if isinstance(value, list) else [value]

    check("license", data.get("license", "mit") in LICENSES)
    check(
        "license_name", data.get("license") != "other" or isinstance(data.get("license_name"), str)
    )
    check(
        "base_model",
        all(isinstance(name, str) and HUB_ID.fullmatch(name) for name in names("base_model")),
    )
    check("base_model_relation", data.get("base_model_relation", "adapter") in RELATIONS)
    check(
        "datasets",
        all(
            isinstance(n, str) and re.fullmatch(r"([\w.-]+/)?[\w.-]+", n) for n in names("datasets")
        ),
    )
    check(
        "language",
        all(isinstance(n, str) and re.fullmatch(r"[a-z]{2,3}", n) for n in names("language")),
    )
    check(
        "tags",
        isinstance(data.get("tags", []), list)
        and all(isinstance(tag, str) for tag in data.get("tags", [])),
    )
    check("pipeline_tag", data.get("pipeline_tag") == "text-generation")
    check("library_name", data.get("library_name") in ("peft", "transformers", "gguf", "mlx"))
    try:
        for entry in data.get("model-index", []):
            assert isinstance(entry["name"], str)
            for result in entry["results"]:
                assert all(
                    isinstance(text, str)
                    for text in (result["task"]["type"], *result["dataset"].values())
                )
                assert {"type", "name"} <= result["dataset"].keys()
                assert result["metrics"]
                assert all(
                    isinstance(m["type"], str) and isinstance(m["value"], float)
                    for m in result["metrics"]
                )
    except (AssertionError, KeyError, TypeError):
        check("model-index", False)
    return found


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer("GET")

        def do_POST(self) -> None:
            self.answer("POST")

        def do_PUT(self) -> None:
            self.answer("PUT")

        def answer(self, method: str) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.seen.append((method, path, body))
            for pattern, failure in hub.fails.items():
                if re.search(pattern, path):
                    if failure == "cut":
                        self.close_connection = True
                        return None
                    return self.send(failure, {"error": "failed on demand"})
            if (
                not path.startswith("/stored/")
                and self.headers.get("Authorization") != f"Bearer {TOKEN}"
            ):
                return self.send(
                    401,
                    {"error": "Invalid credentials"},
                    "Invalid credentials in Authorization header",
                )
            return self.send(*respond(hub, method, path, body))

        def send(self, status: int, value: Any, message: str = "", code: str = "") -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if message:
                self.send_header("X-Error-Message", message)
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def respond(hub: Hub, method: str, path: str, body: bytes) -> tuple[Any, ...]:
    """Status, JSON, and the error's message and code."""
    if path == "/api/whoami-v2":
        return 200, {"type": "user", "name": "me", "orgs": []}
    if method == "PUT" and path.startswith("/stored/"):
        oid = path.removeprefix("/stored/")
        assert hashlib.sha256(body).hexdigest() == oid
        hub.stored[oid] = body
        return 200, {}
    sent = (
        json.loads(body)
        if body and not path.startswith("/stored/") and "/commit/" not in path
        else {}
    )
    if path == "/api/validate-yaml":
        problems = card_problems(sent["content"])
        return (400 if problems else 200), {
            "errors": [{"message": p} for p in problems],
            "warnings": [],
        }
    if path == "/api/repos/create":
        name = f"{sent['organization']}/{sent['name']}"
        if not name.startswith("me/"):
            return (
                403,
                {"error": "no"},
                "You don't have the rights to create a model under this namespace",
            )
        if name in hub.repositories:
            return 409, {"error": "exists", "url": f"{hub.url}/{name}"}
        hub.repositories[name] = Repository(
            sent.get("visibility") == "private", {"main": {".gitattributes": b""}}
        )
        return 200, {"url": f"{hub.url}/{name}", "name": name}
    match = re.fullmatch(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?((?:/.*)?)", path)
    assert match, path
    name, rest = match[1], match[2]
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}, "Repository not found", "RepoNotFound"
    repository = hub.repositories[name]
    if rest == "/info/lfs/objects/batch":
        actions = [
            {**o, "actions": {"upload": {"href": f"{hub.url}/stored/{o['oid']}"}}}
            if o["oid"] not in hub.stored
            else o
            for o in sent["objects"]
        ]
        return 200, {"transfer": "basic", "objects": actions}
    what, _, branch = rest.removeprefix("/").partition("/")
    if what == "branch":
        if branch in repository.branches:
            return 409, {"error": "exists"}
        repository.branches[branch] = dict(repository.files)
        return 200, {}
    if branch and branch not in repository.branches:
        return 404, {"error": "Invalid rev id"}, "Invalid rev id", "RevisionNotFound"
    files = repository.branches[branch or "main"]
    if what == "preupload":
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
            }
            for f in sent["files"]
        ]
        return 200, {"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]}
    if what == "tree":
        return 200, [
            {"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()
        ]
    if what == "commit":
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(branch)
        oid = f"{len(repository.commits):040x}"
        return 200, {
            "commitUrl": f"{hub.url}/{name}/commit/{oid}",
            "commitOid": oid,
            "success": True,
        }
    assert not what, path
    match = FRONT_MATTER.search(files.get("README.md", b"").decode())
    tags = yaml.safe_load(match[2])["tags"] if match else []
    siblings = [{"rfilename": file} for file in files]
    return 200, {
        "id": name,
        "modelId": name,
        "private": repository.private,
        "tags": tags,
        "siblings": siblings,
    }

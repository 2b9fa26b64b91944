"""A Hub on this machine: the routes that `huggingface_hub` and `datasets` call, kept on disk, with faults on demand.

    with HubServer(folder, tokens={"secret": "me"}) as hub:
        subprocess.run(client, env={**os.environ, **hub.environment(home)})

Every object that is uploaded is checked against its SHA-256. `hub.faults.append(Fault("POST /api/.*/commit/", ...))`
breaks the next matching requests; `hub.log` holds every request. Large files are answered by a redirect to a second
port, as the real Hub does. Everything is on 127.0.0.1; nothing outlives the `with` block.

To try things by hand: `python tests/hub/server.py FOLDER` prints the variables to set, and serves until Ctrl-C.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

_LFS_SUFFIXES = (".safetensors", ".png", ".gif", ".parquet", ".bin", ".npz")
_PIECE = 64 * 1024


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path" matches `where`, `times` times.

    Attributes:
        status: Answer with this status.
        drop_after: Cut the connection after so many bytes of the body, of whichever side has one.
        delay: Seconds to wait first.
        lose_answer: Do what was asked, then cut the connection instead of answering.
        text: What the error says.
    """

    where: str
    times: int = 1
    status: int | None = None
    drop_after: int | None = None
    delay: float = 0.0
    lose_answer: bool = False
    text: str = "the test Hub was told to fail"
    happened: int = 0


@dataclass
class Request:
    method: str
    path: str
    token: str | None
    size: int
    headers: dict[str, str]

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Dropped(Exception):
    """The connection was cut on purpose."""


@dataclass
class HubServer:
    """The server, in threads of this process.

    Attributes:
        root: Where repositories and objects are kept.
        before: Pattern of "METHOD /path" to what happens once, just before such a request is answered.
        tokens: Token to user. The first user owns what is created without a namespace.
        orgs: What the users may do in which organizations.
        roles: What tokens may do: `read`; others `write`.
    """

    root: Path
    tokens: dict[str, str] = field(default_factory=lambda: {"hf_test_token": "tester"})
    faults: list[Fault] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    before: dict[str, Callable[[], Any]] = field(default_factory=dict)
    orgs: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.root = Path(self.root)
        (self.root / "objects").mkdir(parents=True, exist_ok=True)
        self.lock, self.connections = threading.RLock(), set[socket.socket]()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, kind)) for kind in ("hub", "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):  # which clients keep open, and their threads would go on answering
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables that send a client here, with a home (cache, stored token) of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
        }

    def requests(self, pattern: str) -> list[Request]:
        """The requests so far whose "METHOD /path" matches."""
        return [request for request in self.log if re.search(pattern, str(request))]

    # ---------------------------------------------------------------- repositories on disk

    def folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def info(self, kind: str, name: str) -> dict[str, Any]:
        return json.loads((self.folder(kind, name) / "repo.json").read_text())

    def change(self, kind: str, name: str, **values: Any) -> None:
        """Change what is known of a repository: `private`, `gated`."""
        info = self.info(kind, name) | values
        (self.folder(kind, name) / "repo.json").write_text(json.dumps(info))

    def commits(self, kind: str, name: str) -> list[dict[str, Any]]:
        """Oldest first; each has `oid`, `summary`, `files` (path to object)."""
        return [json.loads(path.read_text()) for path in sorted(self.folder(kind, name).glob("commit-*.json"))]

    def files(self, kind: str, name: str) -> dict[str, dict[str, Any]]:
        return self.commits(kind, name)[-1]["files"]

    def read(self, kind: str, name: str, path: str) -> bytes:
        return (self.root / "objects" / self.files(kind, name)[path]["sha256"]).read_bytes()

    def create(self, kind: str, name: str, private: bool, gated: bool = False) -> None:
        self.folder(kind, name).mkdir(parents=True)
        (self.folder(kind, name) / "repo.json").write_text(json.dumps({"private": private, "gated": gated}))
        self.commit(kind, name, "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, kind: str, name: str, summary: str, add: dict[str, bytes], delete: tuple[str, ...] = ()) -> str:
        """What a person does in the browser: files changed beside any client."""
        return self._commit(kind, name, summary, {path: self.store(data) for path, data in add.items()}, delete)

    def store(self, data: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.root / "objects" / sha256
        if not target.exists():
            partial = target.with_suffix(f".{threading.get_ident()}")
            partial.write_bytes(data)
            partial.replace(target)
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"sha256": sha256, "size": len(data), "oid": blob, "lfs": False}

    def _commit(self, kind: str, name: str, summary: str, add: dict[str, Any], delete: tuple[str, ...]) -> str:
        with self.lock:
            before = self.commits(kind, name)
            files = dict(before[-1]["files"]) if before else {}
            for path in delete:
                files.pop(path)
            files |= add
            oid = hashlib.sha1(json.dumps([len(before), name, files]).encode()).hexdigest()
            made = {"oid": oid, "summary": summary, "files": files, "changed": sorted([*add, *delete])}
            (self.folder(kind, name) / f"commit-{len(before):04}.json").write_text(json.dumps(made))
            return oid


class _Answer(Exception):
    """An answer other than 200, from anywhere below a route."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


def _handler(hub: HubServer, port: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30

        def setup(self) -> None:
            super().setup()
            hub.connections.add(self.connection)

        def finish(self) -> None:
            hub.connections.discard(self.connection)
            super().finish()

        def log_message(self, *args: Any) -> None:
            pass

        # ------------------------------------------------------------ plumbing

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            self.route, self.query = unquote(parts.path), parse_qs(parts.query)
            size = int(self.headers.get("Content-Length") or 0)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            request = Request(self.command, self.route, token, size, dict(self.headers))
            self.user, self.role = hub.tokens.get(token or ""), hub.roles.get(token or "", "write")
            fault = self.take_fault(str(request))
            self.drop_after = fault.drop_after if fault else None
            try:
                self.answer(*self.result(request, fault, size))
            except (Dropped, ConnectionError, TimeoutError):
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

        def result(self, request: Request, fault: Fault | None, size: int) -> tuple[int, bytes, dict[str, str]]:
            try:
                if fault and fault.delay:
                    time.sleep(fault.delay)
                self.body = self.read_body(size)
                with hub.lock:
                    hub.log.append(request)
                for pattern in [pattern for pattern in hub.before if re.search(pattern, str(request))]:
                    hub.before.pop(pattern)()
                if fault and fault.status is not None:
                    raise _Answer(fault.status, message=fault.text)
                if request.token is not None and self.user is None:
                    raise _Answer(401, message="Invalid credentials in Authorization header")
                response = self.respond()
            except _Answer as answer:
                data = json.dumps({"error": answer.message}).encode()
                response = answer.status, data, {"Content-Type": "application/json", **answer.headers}
            if fault and fault.lose_answer:
                raise Dropped
            return response

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def take_fault(self, request: str) -> Fault | None:
            with hub.lock:
                for fault in hub.faults:
                    if fault.happened < fault.times and re.search(fault.where, request):
                        fault.happened += 1
                        return fault
            return None

        def read_body(self, size: int) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                pieces = []
                while length := int(self.rfile.readline(), 16):
                    pieces.append(self.rfile.read(length))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(pieces)
            if self.drop_after is not None and self.command in ("POST", "PUT"):
                self.rfile.read(min(size, self.drop_after))
                raise Dropped
            return self.rfile.read(size)

        def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            for start in range(0, len(data), _PIECE):
                if self.drop_after is not None and start + _PIECE > self.drop_after:
                    self.wfile.write(data[start : self.drop_after])
                    self.wfile.flush()
                    raise Dropped
                self.wfile.write(data[start : start + _PIECE])

        # ------------------------------------------------------------ routes

        def respond(self) -> tuple[int, bytes, dict[str, str]]:
            table = _STORAGE if port == "storage" else _ROUTES
            for pattern, action in table:
                if found := re.fullmatch(pattern, f"{self.command} {self.route}"):
                    result = action(self, **found.groupdict())
                    if isinstance(result, tuple):
                        return result
                    return 200, json.dumps(result).encode(), {"Content-Type": "application/json"}
            raise _Answer(404, message=f"no route {self.command} {self.route}")

        def seen(self, kind: str | None, name: str, write: bool = False, content: bool = False) -> str:
            """The kind of a repository, after the rights of the caller were checked."""
            kind = (kind or "models").strip("/")
            if not (hub.folder(kind, name) / "repo.json").exists():
                raise _Answer(404 if self.user else 401, "RepoNotFound", "Repository not found")
            info = hub.info(kind, name)
            if info["private"] and self.user is None:
                raise _Answer(401, "RepoNotFound", "Repository not found")
            if write and self.user is None:
                raise _Answer(401, message="Invalid username or password.")
            if write and info.get("read_only"):
                raise _Answer(403, message="Forbidden: you must use a write token to upload to a repository.")
            if content and info.get("gated"):
                message = f"Access to model {name} is restricted and you are not in the authorized list."
                raise _Answer(403, "GatedRepo", message)
            return kind

        def at(self, kind: str, name: str, revision: str) -> dict[str, Any]:
            commits = hub.commits(kind, name)
            for commit in reversed(commits):
                if revision in ("main", commit["oid"]):
                    return commit
            raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")

        def create(self) -> Any:
            asked = json.loads(self.body)
            if self.user is None:
                raise _Answer(401, message="Invalid username or password.")
            kind = (asked.get("type") or "model") + "s"
            name = f"{asked.get('organization') or self.user}/{asked['name']}"
            url = f"{hub.url}/{'' if kind == 'models' else kind + '/'}{name}"
            with hub.lock:
                if (hub.folder(kind, name) / "repo.json").exists():
                    body = json.dumps({"error": "You already created this model repo", "url": url}).encode()
                    return 409, body, {"Content-Type": "application/json"}
                hub.create(kind, name, private=asked.get("visibility") == "private")
            return {"url": url, "name": name}

        def whoami(self) -> Any:
            if self.user is None:
                raise _Answer(401, message="Invalid credentials in Authorization header")
            orgs = [{"name": name, "roleInOrg": role} for name, role in hub.orgs.items()]
            return {"type": "user", "name": self.user, "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}

        def auth_check(self, kind: str, name: str) -> Any:
            self.seen(kind, name, write=True)
            return {}

        def validate_card(self) -> Any:
            text = json.loads(self.body)["content"]
            errors = [] if text.startswith("---\n") else [{"message": "no front matter"}]
            return {"errors": errors, "warnings": []}

        def repository(self, kind: str, name: str, revision: str | None = None) -> Any:
            kind = self.seen(kind, name)
            commit, info = self.at(kind, name, revision or "main"), hub.info(kind, name)
            siblings = [{"rfilename": path} for path in sorted(commit["files"])]
            gated = "manual" if info["gated"] else False
            return {"_id": name, "id": name, "private": info["private"], "gated": gated, "sha": commit["oid"]} | {
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "disabled": False,
            }

        def tree(self, kind: str, name: str, revision: str, under: str | None = None) -> Any:
            kind = self.seen(kind, name)
            files = self.at(kind, name, revision)["files"]
            prefix = f"{under}/" if under else ""
            if prefix and not any(path.startswith(prefix) for path in files):
                raise _Answer(404, "EntryNotFound", f"{under} does not exist")
            recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
            found: dict[str, Any] = {}
            for path, entry in sorted(files.items()):
                rest = path.removeprefix(prefix)
                if not path.startswith(prefix):
                    continue
                parts = rest.split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    folder = prefix + "/".join(parts[:depth])
                    found[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
                if recursive or len(parts) == 1:
                    found[path] = _file(path, entry)
            return list(found.values())

        def paths(self, kind: str, name: str, revision: str) -> Any:
            kind = self.seen(kind, name)
            files = self.at(kind, name, revision)["files"]
            text = self.body.decode()
            asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            found: list[Any] = [_file(path, files[path]) for path in asked if path in files]
            for path in asked:
                if any(name.startswith(f"{path}/") for name in files):
                    found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
            return found

        def preupload(self, kind: str, name: str, revision: str) -> Any:
            kind = self.seen(kind, name, write=True)
            files = self.at(kind, name, revision)["files"]
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LFS_SUFFIXES) else "regular",
                        "shouldIgnore": False,
                        "oid": _identity(files.get(file["path"])),
                    }
                    for file in json.loads(self.body)["files"]
                ]
            }

        def lfs_batch(self, kind: str | None, name: str) -> Any:
            self.seen(kind, name, write=True)
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                oid = wanted["oid"]
                entry: dict[str, Any] = {"oid": oid, "size": wanted["size"]}
                if not (hub.root / "objects" / oid).exists():
                    verify = f"{hub.url}/{kind or ''}{name}.git/info/lfs/verify"
                    entry["actions"] = {
                        "upload": {"href": f"{hub.storage_url}/{oid}", "header": {}},
                        "verify": {"href": verify, "header": {}},
                    }
                objects.append(entry)
            return {"transfer": "basic", "objects": objects}

        def lfs_verify(self, kind: str | None, name: str) -> Any:
            asked = json.loads(self.body)
            path = hub.root / "objects" / asked["oid"]
            if not path.exists() or path.stat().st_size != asked["size"]:
                raise _Answer(422, message="object is missing or has another size")
            return {}

        def put_object(self, oid: str) -> Any:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise _Answer(400, message="the object is not what its SHA-256 says")
            hub.store(self.body)
            return 200, b"", {}

        def get_object(self, oid: str) -> Any:
            return self.ranged((hub.root / "objects" / oid).read_bytes(), {})

        def ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            headers["Accept-Ranges"] = "bytes"
            if not wanted:
                return 200, data, headers
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, data[first : last + 1], headers

        def make_commit(self, kind: str, name: str, revision: str) -> Any:
            kind = self.seen(kind, name, write=True)
            add: dict[str, Any] = {}
            delete: list[str] = []
            header: dict[str, Any] = {}
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "header":
                    header = value
                elif item["key"] == "file":
                    add[value["path"]] = hub.store(base64.b64decode(value["content"]))
                elif item["key"] == "lfsFile":
                    path = hub.root / "objects" / value["oid"]
                    if not path.exists():
                        raise _Answer(422, message=f"the object of {value['path']} was never uploaded")
                    add[value["path"]] = {**hub.store(path.read_bytes()), "lfs": True}
                elif item["key"] == "deletedFile":
                    delete.append(value["path"])
            with hub.lock:
                if header.get("parentCommit") not in (None, hub.commits(kind, name)[-1]["oid"]):
                    raise _Answer(412, message="A commit has happened since. Please refresh and try again.")
                if self.query.get("create_pr"):  # proposed, and not looked at again
                    url = f"{hub.url}/{name}/discussions/1"
                    return {
                        "success": True,
                        "commitOid": "0" * 40,
                        "commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}",
                        "pullRequestUrl": url,
                    }
                oid = hub._commit(kind, name, header["summary"], add, tuple(delete))
            return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}

        def resolve(self, kind: str | None, name: str, revision: str, path: str) -> Any:
            short = self.seen(kind, name, content=True)
            commit = self.at(short, name, revision)
            headers = {"X-Repo-Commit": commit["oid"]}
            if path not in commit["files"]:
                raise _Answer(
                    404, "EntryNotFound", f"{path} does not exist on {revision}", X_Repo_Commit=commit["oid"]
                )
            entry = commit["files"][path]
            if entry["lfs"]:
                headers |= {
                    "Location": f"{hub.storage_url}/{entry['sha256']}",
                    "X-Linked-Size": str(entry["size"]),
                    "X-Linked-ETag": f'"{entry["sha256"]}"',
                    "ETag": f'"{entry["oid"]}"',
                }
                return 302, b"", headers
            data = (hub.root / "objects" / entry["sha256"]).read_bytes()
            return self.ranged(data, headers | {"ETag": f'"{entry["oid"]}"'})

    return Handler


def _identity(entry: dict[str, Any] | None) -> str | None:
    """What tells a client that a file has not changed: Git's hash, or the SHA-256 of a large one."""
    return entry and (entry["sha256"] if entry["lfs"] else entry["oid"])


def _file(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    """A file as the tree lists it."""
    out = {"type": "file", "path": path, "oid": entry["oid"], "size": entry["size"]}
    if entry["lfs"]:
        out["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}
    return out


_KIND, _NAME, _REV = r"(?P<kind>models|datasets|spaces)", r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_PREFIX = r"(?P<kind>datasets/|spaces/)?"


def _call(name: str) -> Callable[..., Any]:
    return lambda handler, **groups: getattr(handler, name)(**groups)


_ROUTES: list[tuple[str, Callable[..., Any]]] = [
    ("POST /api/repos/create", _call("create")),
    ("GET /api/whoami-v2", _call("whoami")),
    ("POST /api/validate-yaml", _call("validate_card")),
    (f"GET /api/{_KIND}/{_NAME}/auth-check/write", _call("auth_check")),
    (f"GET /api/{_KIND}/{_NAME}(/revision/{_REV})?", _call("repository")),
    (f"GET /api/{_KIND}/{_NAME}/tree/{_REV}(/(?P<under>.+))?", _call("tree")),
    (f"POST /api/{_KIND}/{_NAME}/paths-info/{_REV}", _call("paths")),
    (f"POST /api/{_KIND}/{_NAME}/preupload/{_REV}", _call("preupload")),
    (f"POST /api/{_KIND}/{_NAME}/commit/{_REV}", _call("make_commit")),
    (rf"POST /{_PREFIX}{_NAME}\.git/info/lfs/objects/batch", _call("lfs_batch")),
    (rf"POST /{_PREFIX}{_NAME}\.git/info/lfs/verify", _call("lfs_verify")),
    (f"(GET|HEAD) /{_PREFIX}{_NAME}/resolve/{_REV}/(?P<path>.+)", _call("resolve")),
]
_STORAGE: list[tuple[str, Callable[..., Any]]] = [
    ("PUT /(?P<oid>[0-9a-f]{64})", _call("put_object")),
    ("(GET|HEAD) /(?P<oid>[0-9a-f]{64})", _call("get_object")),
]


def main() -> None:
    with HubServer(Path(sys.argv[1])) as hub:
        for name, value in hub.environment(Path(sys.argv[1]) / "home", token="hf_test_token").items():
            print(f"export {name}={value}", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()

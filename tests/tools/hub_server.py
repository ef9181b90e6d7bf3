"""A small model Hub on the loopback interface, complete enough for the unmodified `huggingface_hub` client.

It speaks the HTTP protocol of huggingface.co for model repositories: create and delete a repository, preupload, Git-LFS
batch / upload / verify, commits (ndjson), branches, tags, pull-request refs, tree and info endpoints, resolve with the
redirect of LFS files to a store that knows no accounts, model card validation, and the error headers that the client
turns into its own exceptions. Everything that the real Hub checks and a test relies on is checked here: SHA-256 and
size of each LFS object, the LFS object's presence before a commit may name it, tokens, name spaces, the card's YAML.

    with HubServer({"secret": "alice"}, tmp_path) as hub:
        HfApi(endpoint=hub.url, token="secret").create_repo("alice/adapter")

The Xet protocol is not spoken: clients need `HF_HUB_DISABLE_XET=1` (`HubServer.environment` sets it).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import LFS_SUFFIXES, LFS_THRESHOLD, File, HubError, HubStore, Repo, card_problems

if TYPE_CHECKING:
    from typing import Self  # Python 3.11


class Handler(BaseHTTPRequestHandler):
    """One request. `route` finds the endpoint; every answer has a length, so connections stay open."""

    protocol_version = "HTTP/1.1"
    server: _Http

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_request(self) -> None:
        hub, store = self.server.hub, self.server.hub.store
        body = self.read_body()
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        hub.requests.append(f"{self.command} {unquote(url.path)}")
        try:
            with store.lock:
                status, content, headers = self.route(url.path, body, store.user(token), store)
        except HubError as error:
            payload = {"error": error.message, **{k: v for k, v in error.extra.items() if k != "headers"}}
            headers = {"X-Error-Message": error.message, **error.extra.get("headers", {})}
            if error.code:
                headers["X-Error-Code"] = error.code
            status, content = error.status, json.dumps(payload).encode()
        if isinstance(content, (dict, list)):
            headers = {"Content-Type": "application/json", **headers}
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            cut = hub.truncate_downloads and status in (200, 206) and url.path.startswith("/lfs/")
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = cut or self.close_connection

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def route(self, path: str, body: bytes, user: str | None, store: HubStore) -> tuple[int, Any, dict[str, str]]:
        """Dispatch on the raw path: revisions such as `refs/pr/1` arrive quoted, so split before unquoting."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        match self.command, parts:
            case "GET", ["api", "whoami-v2"]:
                if user is None:
                    raise HubError(401, "Invalid username or password.")
                return 200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}, {}
            case "POST", ["api", "repos", "create"]:
                return self.create_repo(json.loads(body), user, store)
            case "DELETE", ["api", "repos", "delete"]:
                data = json.loads(body)
                repo = store.repo(f"{data.get('organization') or user}/{data['name']}", user, write=True)
                del store.repos[repo.id]
                return 200, {}, {}
            case "POST", ["api", "validate-yaml"]:
                problems = [{"message": problem} for problem in card_problems(json.loads(body)["content"])]
                return 400 if problems else 200, {"errors": problems, "warnings": []}, {}
            case _, ["api", "models", owner, name, *rest]:
                write = self.command in ("POST", "PUT", "DELETE") and rest[0] != "paths-info"
                return self.model_api(store.repo(f"{owner}/{name}", user, write), rest, body, store)
            case "POST", [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                store.repo(f"{owner}/{name.removesuffix('.git')}", user, write=True)
                return 200, self.lfs_batch(json.loads(body), store), {}
            case "POST", ["lfs", "verify"]:
                data = json.loads(body)
                store.check_lfs(data["oid"], data["size"])
                return 200, {}, {}
            case "GET" | "HEAD" | "PUT", ["lfs", oid]:
                return self.lfs_object(oid, body, store)
            case "GET" | "HEAD", [owner, name, "resolve", revision, *file]:
                return self.resolve(store.repo(f"{owner}/{name}", user), revision, "/".join(file), store)
        self.server.hub.unknown.append(f"{self.command} {path}")
        raise HubError(404, f"no such endpoint: {self.command} {path}")

    def create_repo(self, data: dict, user: str | None, store: HubStore) -> tuple[int, Any, dict[str, str]]:
        if data.get("type", "model") != "model":
            raise HubError(400, "only model repositories exist here")
        repo_id = f"{data.get('organization') or user}/{data['name']}"
        store.writer(repo_id, user)
        url = f"{self.server.hub.url}/{repo_id}"
        if repo_id in store.repos:
            raise HubError(409, "You already created this model repo", url=url)
        private = data.get("private") or data.get("visibility") == "private"
        repo = store.repos[repo_id] = Repo(repo_id, bool(private))
        repo.add_commit("main", {}, "initial commit")
        return 200, {"url": url, "name": repo_id, "id": repo_id}, {}

    def model_api(self, repo: Repo, rest: list[str], body: bytes, store: HubStore) -> tuple[int, Any, dict[str, str]]:
        match self.command, rest:
            case "GET", [] | ["revision", _]:
                sha = repo.resolve(rest[1] if rest else "main")
                siblings = [{"rfilename": path} for path in repo.commits[sha]]
                info = {"id": repo.id, "modelId": repo.id, "sha": sha, "private": repo.private, "siblings": siblings}
                return 200, {**info, "tags": [], "downloads": 0, "likes": 0}, {}
            case "GET", ["tree", revision, *folder]:
                entries = list(self.tree(repo, revision, "/".join(folder)))
                if folder and not entries:
                    raise HubError(404, "Entry not found", "EntryNotFound")
                return 200, entries, {}
            case "POST", ["paths-info", revision]:
                text = body.decode()
                paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
                files = repo.commits[repo.resolve(revision)]
                return 200, [entry(path, files[path]) for path in paths if path in files], {}
            case "GET", ["refs"]:
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                    for name, sha in repo.refs.items()
                    if not name.startswith("refs/")
                ]
                tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
                return 200, {"branches": branches, "tags": tags, "converts": []}, {}
            case "GET", ["commits", revision]:
                repo.resolve(revision)
                log = [{"id": sha, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                       for sha, title in reversed(repo.messages.items())]  # fmt: skip
                return 200, log, {}
            case "POST", ["preupload", revision]:
                files = repo.commits[repo.resolve(revision)]
                return 200, {"files": [self.upload_mode(item, files) for item in json.loads(body)["files"]]}, {}
            case "POST", ["commit", revision]:
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                sha, pr = store.commit(repo, revision, lines, self.query.get("create_pr") == "1")
                url = f"{self.server.hub.url}/{repo.id}"
                answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
                if pr:
                    answer["pullRequestUrl"] = f"{url}/discussions/{pr.rsplit('/', 1)[1]}"
                return 200, answer, {}
            case "POST", ["branch", branch]:
                if branch in repo.refs:
                    raise HubError(409, "Reference already exists")
                start = json.loads(body or b"{}").get("startingPoint", "main")
                repo.refs[branch] = repo.resolve(start)
                return 200, {}, {}
            case "POST", ["tag", revision]:
                name = json.loads(body)["tag"]
                if name in repo.tags:
                    raise HubError(409, "Tag reference exists already")
                repo.tags[name] = repo.resolve(revision)
                return 200, {}, {}
        self.server.hub.unknown.append(f"{self.command} {'/'.join(rest)}")
        raise HubError(404, f"no such model endpoint: {self.command} {'/'.join(rest)}")

    def tree(self, repo: Repo, revision: str, folder: str) -> Iterator[dict]:
        prefix = folder + "/" if folder else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        folders = set()
        for path, file in sorted(repo.commits[repo.resolve(revision)].items()):
            if not path.startswith(prefix):
                continue
            head, *deeper = path.removeprefix(prefix).split("/")
            for depth in range(len(deeper) if recursive else min(1, len(deeper))):
                name = prefix + "/".join([head, *deeper][: depth + 1])
                if name not in folders:
                    folders.add(name)
                    yield {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
            if recursive or not deeper:
                yield entry(path, file)

    @staticmethod
    def upload_mode(item: dict, files: dict[str, File]) -> dict:
        binary = b"\0" in base64.b64decode(item["sample"])
        lfs = item["path"].endswith(LFS_SUFFIXES) or item["size"] > LFS_THRESHOLD or binary
        known = files.get(item["path"])
        mode = {"path": item["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        return {**mode, "oid": known.oid} if known else mode

    def lfs_batch(self, data: dict, store: HubStore) -> dict:
        if data["operation"] != "upload" or data.get("hash_algo") != "sha256" or "basic" not in data["transfers"]:
            raise HubError(422, "only basic uploads with sha256")
        objects = []
        for item in data["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not re.fullmatch(r"[0-9a-f]{64}", item["oid"]):
                answer["error"] = {"code": 422, "message": "oid is not a SHA-256"}
            elif not (store.root / "lfs" / item["oid"]).is_file():
                signed = f"{self.server.hub.lfs_url}/lfs/{item['oid']}?signature={store.signature}&size={item['size']}"
                verify = {"href": f"{self.server.hub.url}/lfs/verify", "header": {}}
                answer["actions"] = {"upload": {"href": signed, "header": {}}, "verify": verify}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_object(self, oid: str, body: bytes, store: HubStore) -> tuple[int, Any, dict[str, str]]:
        if "Authorization" in self.headers:
            raise HubError(400, "Only one auth mechanism allowed: this store must not see tokens")
        if self.query.get("signature") != store.signature:
            raise HubError(403, "The link is not signed")
        if self.command == "PUT":
            if len(body) != int(self.query["size"]):
                raise HubError(400, f"announced {self.query['size']} bytes, received {len(body)}")
            store.store_lfs(oid, body)
            return 200, b"", {"ETag": f'"{oid}"'}
        content = (store.root / "lfs" / oid).read_bytes()
        return self.ranged(content, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def resolve(self, repo: Repo, revision: str, path: str, store: HubStore) -> tuple[int, Any, dict[str, str]]:
        sha, file = store.file(repo, revision, path)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            location = f"{self.server.hub.lfs_url}/lfs/{file.oid}?signature={store.signature}"
            linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.oid}"'}
            return 302, b"", {**headers, **linked, "Location": location}
        return self.ranged(store.blob(file).read_bytes(), headers)

    def ranged(self, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """The content, or the tail that a resuming client asks for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return 200, content, headers
        start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start > end:
            return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
        return 206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}


def entry(path: str, file: File) -> dict:
    """A file as tree and paths-info describe it."""
    answer: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid[:40]}
    if file.lfs:
        answer["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 134}
    return answer


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class HubServer:
    """Runs the Hub in a thread while the context is open.

    Args:
        tokens: bearer token -> account name.
        root: empty directory for file contents and, below `client`, for the caches of its clients.
    Attributes:
        url: `http://127.0.0.1:<port>`, the value for `HF_ENDPOINT`; lfs_url: the store of LFS objects, another host.
        requests: "METHOD path" of every request, in order; unknown: those that no endpoint answers.
        truncate_downloads: while True, bodies from the LFS store stop half-way.
    """

    def __init__(self, tokens: dict[str, str], root: Path) -> None:
        self.root = Path(root)
        self.store = HubStore(tokens, self.root / "server")
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.truncate_downloads = False
        # Two hosts, as on the real Hub: a client follows redirects within one host (newer ones: origin) by itself, and
        # drops its token before it turns to another.
        self.servers = [_Http(("127.0.0.1", 0), Handler) for _ in range(2)]
        for http in self.servers:
            http.hub = self
        self.url = f"http://127.0.0.1:{self.servers[0].server_port}"
        self.lfs_url = f"http://localhost:{self.servers[1].server_port}"

    def __enter__(self) -> Self:
        for http in self.servers:
            threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for http in self.servers:
            http.shutdown()
            http.server_close()

    def environment(self, token: str | None = None, home: str = "client") -> dict[str, str]:
        """Environment variables of a client process: this endpoint, an own empty cache, no telemetry, no Xet."""
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.root / home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return {**variables, "HF_TOKEN": token} if token else variables

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a revision, read without any client."""
        repo = self.store.repos[repo_id]
        return {p: self.store.blob(f).read_bytes() for p, f in repo.commits[repo.resolve(revision)].items()}

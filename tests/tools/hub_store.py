"""What the loopback Hub of the tests remembers: repositories, commits, file contents, and what it refuses.

No HTTP here; `hub_server` translates requests into these calls and `HubError` into answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png", ".gguf")
LFS_THRESHOLD = 10 * 1024 * 1024  # bytes: larger regular files are refused by the real Hub
REPO_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


class HubError(Exception):
    """An HTTP error answer; `code` becomes the `X-Error-Code` header that the client dispatches on."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


@dataclass(frozen=True)
class File:
    """One file of one commit. `oid` is the SHA-256 of an LFS object or the git blob SHA-1 of a regular file."""

    oid: str
    size: int
    lfs: bool


@dataclass
class Repo:
    """A repository: `refs` maps a branch, tag or pull-request ref to a commit, `commits` a commit to its files."""

    id: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def add_commit(self, ref: str, files: dict[str, File], message: str) -> str:
        content = json.dumps([self.id, self.refs.get(ref), message, sorted((p, f.oid) for p, f in files.items())])
        sha = hashlib.sha1((content + secrets.token_hex(8)).encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[ref] = files, message, sha
        return sha

    def resolve(self, revision: str) -> str:
        """The commit that a branch, tag, ref or commit hash names."""
        sha = self.refs.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class HubStore:
    """Repositories in memory, file contents under `root`; one lock, because clients upload from several threads."""

    def __init__(self, tokens: dict[str, str], root: Path) -> None:
        self.tokens, self.root = tokens, root
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        # Upload and download links of the LFS store carry a signature instead of an account, as on the real Hub.
        self.signature = secrets.token_hex(16)
        (root / "lfs").mkdir(parents=True, exist_ok=True)
        (root / "git").mkdir(parents=True, exist_ok=True)

    def blob(self, file: File) -> Path:
        return self.root / ("lfs" if file.lfs else "git") / file.oid

    def user(self, token: str | None) -> str | None:
        """The account of a bearer token; None without one. A wrong token is an error even for public files."""
        if token is None:
            return None
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def writer(self, repo_id: str, user: str | None) -> None:
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise HubError(403, f"You don't have the rights to write to {repo_id}")

    def repo(self, repo_id: str, user: str | None, write: bool = False) -> Repo:
        """The repository, if `user` may see it. A private one does not exist for others."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and repo_id.split("/")[0] != user):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self.writer(repo_id, user)
        return repo

    def file(self, repo: Repo, revision: str, path: str) -> tuple[str, File]:
        sha = repo.resolve(revision)
        if path not in repo.commits[sha]:
            # The client remembers missing files per commit, so the commit goes along with the error.
            raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": sha})
        return sha, repo.commits[sha][path]

    def store_lfs(self, oid: str, body: bytes) -> None:
        """Keep an uploaded LFS object; refuse a body whose SHA-256 is not `oid` (truncated or corrupted upload)."""
        found = hashlib.sha256(body).hexdigest()
        if found != oid:
            raise HubError(400, f"SHA-256 mismatch: announced {oid}, received {found} ({len(body)} bytes)")
        (self.root / "lfs" / oid).write_bytes(body)

    def check_lfs(self, oid: str, size: Any) -> None:
        """An LFS object may be named only if it is here and has the announced size."""
        path = self.root / "lfs" / oid
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or not path.is_file():
            raise HubError(400, f"LFS object {oid} was not uploaded")
        if path.stat().st_size != size:
            raise HubError(400, f"LFS object {oid} has {path.stat().st_size} bytes, not {size}")

    def commit(self, repo: Repo, revision: str, lines: list[dict], create_pr: bool) -> tuple[str, str | None]:
        """Apply an ndjson commit as a whole or not at all; returns the commit and, for a pull request, its ref."""
        parent = repo.resolve(revision)
        files = dict(repo.commits[parent])
        header: dict[str, Any] = {}
        new_blobs: list[tuple[File, bytes]] = []
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
            elif key == "file":
                body = base64.b64decode(value["content"], validate=True)
                if len(body) > LFS_THRESHOLD:
                    raise HubError(400, f"{value['path']} is too large for a regular file, use LFS")
                oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
                files[value["path"]] = File(oid, len(body), lfs=False)
                new_blobs.append((files[value["path"]], body))
            elif key == "lfsFile":
                if value.get("algo") != "sha256":
                    raise HubError(400, f"unknown LFS hash {value.get('algo')}")
                self.check_lfs(value["oid"], value.get("size"))
                files[value["path"]] = File(value["oid"], value["size"], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                prefix = value["path"].rstrip("/") + "/"
                files = {path: file for path, file in files.items() if not path.startswith(prefix)}
            else:
                raise HubError(400, f"unknown commit operation {key}")
        if not header.get("summary"):
            raise HubError(400, "a commit needs a summary")
        if header.get("parentCommit", parent) != parent:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for file, body in new_blobs:
            self.blob(file).write_bytes(body)
        ref = f"refs/pr/{sum(name.startswith('refs/pr/') for name in repo.refs) + 1}" if create_pr else revision
        return repo.add_commit(ref, files, header["summary"]), ref if create_pr else None


def card_problems(content: str) -> list[str]:
    """What the real Hub refuses in a model card's metadata, as far as adapters are concerned."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n?---(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return []
    try:
        data = yaml.safe_load(match.group(1)) or {}
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if not isinstance(data, dict):
        return ["YAML Metadata Error: not a mapping"]
    problems = []
    base_models = data.get("base_model") or []
    for name in base_models if isinstance(base_models, list) else [base_models]:
        if not isinstance(name, str) or not REPO_ID.fullmatch(name):
            problems.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    tags = data.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            problems.append(f'"{key}" must be a string')
    return problems

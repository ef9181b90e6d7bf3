"""The Hub, for real: the unmodified `huggingface_hub` client against a Hub on the loopback interface.

First the server itself (a test double that accepts everything would prove nothing), then adapters: pushed by one
process, loaded by a fresh one that only imports `peft_loraswitch`, and compared to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from hub_server import HubServer

TOKENS = {"token-of-alice": "alice", "token-of-bob": "bob"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    # These two are read when huggingface_hub is imported, so an environment variable would come too late here.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HubServer(TOKENS, tmp_path / "hub") as server:
        yield server
        assert server.unknown == []


def api_of(hub: HubServer, user: str = "alice") -> HfApi:
    token = {name: token for token, name in TOKENS.items()}[user]
    return HfApi(endpoint=hub.url, token=token)


def make_folder(folder: Path, weights: bytes = b"\0\1" * 5000) -> Path:
    (folder / "second").mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "second" / "adapter_model.safetensors").write_bytes(weights[::-1])
    (folder / "README.md").write_text("---\ntags:\n- a\nbase_model: alice/base\n---\nText\n")
    return folder


def test_upload_list_and_download(hub, tmp_path):
    api = api_of(hub)
    assert api.whoami()["name"] == "alice"
    assert api.create_repo("adapter").repo_id == "alice/adapter"
    folder = make_folder(tmp_path / "out")
    commit = api.upload_folder(repo_id="alice/adapter", folder_path=folder)
    wanted = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files("alice/adapter") == wanted
    # The two weight files, and only they, went through LFS.
    put = {line.removeprefix("PUT /lfs/") for line in hub.requests if line.startswith("PUT")}
    assert put == {hashlib.sha256(wanted[name]).hexdigest() for name in wanted if name.endswith(".safetensors")}
    assert hub.requests.count("POST /lfs/verify") == 2

    assert api.repo_info("alice/adapter").sha == commit.oid
    assert sorted(api.list_repo_files("alice/adapter")) == sorted(wanted)
    tree = {item.path: item for item in api.list_repo_tree("alice/adapter", recursive=True)}
    assert set(tree) == {*wanted, "second"}
    assert tree["adapter_model.safetensors"].lfs.sha256 in put
    assert api.file_exists("alice/adapter", "second/adapter_model.safetensors")
    assert not api.file_exists("alice/adapter", "missing.json")
    local = Path(snapshot_download("alice/adapter", endpoint=hub.url, cache_dir=tmp_path / "cache"))
    assert {p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()} == wanted

    # Unchanged content makes no commit; the same LFS object is not sent twice.
    before = len(put)
    assert api.upload_folder(repo_id="alice/adapter", folder_path=folder).oid == commit.oid
    assert sum(line.startswith("PUT") for line in hub.requests) == before


def test_revisions_and_pull_requests(hub, tmp_path):
    api = api_of(hub)
    api.create_repo("alice/adapter")
    first = api.upload_folder(repo_id="alice/adapter", folder_path=make_folder(tmp_path / "one"))
    api.create_tag("alice/adapter", tag="v1")
    api.create_branch("alice/adapter", branch="exp/next")
    api.upload_file(repo_id="alice/adapter", path_in_repo="new.txt", path_or_fileobj=b"new", revision="exp/next")
    assert api.file_exists("alice/adapter", "new.txt", revision="exp/next")
    assert not api.file_exists("alice/adapter", "new.txt")
    api.upload_file(repo_id="alice/adapter", path_in_repo="new.txt", path_or_fileobj=b"newer")
    request = api.upload_file(
        repo_id="alice/adapter", path_in_repo="new.txt", path_or_fileobj=b"proposed", create_pr=True
    )
    assert request.pr_num == 1

    def content(revision):
        path = hf_hub_download(
            "alice/adapter", "new.txt", revision=revision, endpoint=hub.url, cache_dir=tmp_path / "c"
        )
        return Path(path).read_bytes()

    assert [content(r) for r in ("exp/next", "main", "refs/pr/1")] == [b"new", b"newer", b"proposed"]
    assert api.repo_info("alice/adapter", revision="v1").sha == first.oid
    with pytest.raises(EntryNotFoundError):
        content("v1")
    with pytest.raises(RevisionNotFoundError):
        content("v2")
    # A commit on top of an outdated parent is refused.
    with pytest.raises(HfHubHTTPError, match="412"):
        operation = CommitOperationAdd("x.txt", b"x")
        api.create_commit("alice/adapter", [operation], commit_message="late", parent_commit=first.oid)
    api.delete_file("new.txt", repo_id="alice/adapter")
    assert not api.file_exists("alice/adapter", "new.txt")
    api.delete_repo("alice/adapter")
    assert not api.repo_exists("alice/adapter")


def test_accounts(hub, tmp_path):
    alice, bob, nobody = api_of(hub), api_of(hub, "bob"), HfApi(endpoint=hub.url, token=False)
    alice.create_repo("alice/secret", private=True)
    alice.upload_file(repo_id="alice/secret", path_in_repo="a.bin", path_or_fileobj=b"\0abc")
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_repo("alice/secret")
    assert alice.create_repo("alice/secret", exist_ok=True).repo_id == "alice/secret"
    assert alice.repo_exists("alice/secret") and alice.file_exists("alice/secret", "a.bin")
    for other in (bob, nobody):
        assert not other.repo_exists("alice/secret")
        assert not other.file_exists("alice/secret", "a.bin")
        with pytest.raises(RepositoryNotFoundError):
            other.hf_hub_download("alice/secret", "a.bin", cache_dir=tmp_path / "cache")
    with pytest.raises(RepositoryNotFoundError):
        nobody.model_info("alice/nothing")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.create_repo("alice/mine-now")
    alice.create_repo("alice/public")
    for other, status in ((bob, "403"), (nobody, "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            other.upload_file(repo_id="alice/public", path_in_repo="a.txt", path_or_fileobj=b"a")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="wrong").model_info("alice/public")
    # LFS objects of a private repository are reachable by signed links only.
    oid = hashlib.sha256(b"\0abc").hexdigest()
    assert get_session().get(f"{hub.lfs_url}/lfs/{oid}").status_code == 403


def test_refuses_a_truncated_or_corrupted_upload(hub, tmp_path):
    api = api_of(hub)
    api.create_repo("alice/adapter")
    folder = make_folder(tmp_path / "out")
    api.upload_folder(repo_id="alice/adapter", folder_path=folder)
    before = hub.files("alice/adapter")
    weights = folder / "adapter_model.safetensors"
    for spoil in (lambda data: data[:-10], lambda data: data[:-1] + b"x"):
        good = b"\2\3" * 7000
        weights.write_bytes(good)
        operation = CommitOperationAdd("adapter_model.safetensors", str(weights))
        assert len(operation.upload_info.sha256) == 32  # hashed now; what is sent afterwards is something else
        weights.write_bytes(spoil(good))
        with pytest.raises(RuntimeError, match="Error while uploading 'adapter_model.safetensors'") as caught:
            api.create_commit("alice/adapter", [operation], commit_message="spoiled")
        assert isinstance(caught.value.__cause__, HfHubHTTPError)
        assert caught.value.__cause__.response.status_code == 400
        assert hub.files("alice/adapter") == before


def test_refuses_a_commit_of_an_object_it_does_not_have(hub):
    api_of(hub).create_repo("alice/adapter")
    missing = {"path": "a.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3}
    body = b"\n".join(
        json.dumps(line).encode()
        for line in ({"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": missing})
    )
    headers = {"Authorization": "Bearer token-of-alice", "Content-Type": "application/x-ndjson"}
    answer = get_session().post(f"{hub.url}/api/models/alice/adapter/commit/main", content=body, headers=headers)
    assert answer.status_code == 400 and "was not uploaded" in answer.json()["error"]
    answer = get_session().post(f"{hub.url}/lfs/verify", json={"oid": "0" * 64, "size": 3})
    assert answer.status_code == 400
    assert hub.files("alice/adapter") == {}


def test_refuses_invalid_card_metadata(hub, tmp_path):
    api = api_of(hub)
    api.create_repo("alice/adapter")
    for metadata in ("base_model: /home/me/model", "tags: 3", "tags: [unclosed"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            api.upload_file(
                repo_id="alice/adapter", path_in_repo="README.md", path_or_fileobj=f"---\n{metadata}\n---\n".encode()
            )


def test_client_refuses_a_truncated_download(hub, tmp_path, monkeypatch):
    api = api_of(hub)
    api.create_repo("alice/adapter")
    api.upload_folder(repo_id="alice/adapter", folder_path=make_folder(tmp_path / "out"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's pauses between attempts
    hub.truncate_downloads = True
    where = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    with pytest.raises(Exception, match="Consistency check failed|closed|peer|incomplete"):
        hf_hub_download("alice/adapter", "adapter_model.safetensors", **where)
    hub.truncate_downloads = False
    path = hf_hub_download("alice/adapter", "adapter_model.safetensors", **where)
    assert os.path.getsize(path) == 10000 and Path(path).read_bytes() == b"\0\1" * 5000

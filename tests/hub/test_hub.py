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
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from safetensors.torch import load as load_weights

from fresh import run_python
from hub_server import HubServer
from paths import ROOT, TOOLS

# One worker of pytest-xdist (with --dist loadgroup) runs them all: the processes of the second half are shared.
pytestmark = [pytest.mark.xdist_group("hub"), pytest.mark.compat]

TOKENS = {"token-of-alice": "alice", "token-of-bob": "bob"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    # These two are read when huggingface_hub is imported, so an environment variable would come too late here.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    huggingface_hub.close_session()  # proxies are read when a session starts
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


# Adapters. The steps are in hub_process.py; each runs once, in a process of its own, and several tests look at it.

OURS = {"loraswitch", "lora-switch", "mixture-of-lora-experts"}


class Steps:
    """Runs the steps of hub_process.py against one Hub, each at most once, and keeps what they returned."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub, self.results = folder, hub, {}

    def __call__(self, step: str, *arguments: str, token: str | None = None) -> dict:
        if step not in self.results:
            environment = {
                name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
            }
            # Each step has its own cache: nothing can be loaded that did not come through the Hub.
            environment |= self.hub.environment(token, home=f"home of {step}")
            code = (TOOLS / "hub_process.py").read_text()
            run_python(
                code, step, str(self.folder / step), *arguments,
                environment=environment, paths=(ROOT,), cwd=self.folder,
            )  # fmt: skip
            self.results[step] = torch.load(self.folder / step)
        return self.results[step]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with HubServer(TOKENS, folder / "hub") as server:
        yield Steps(folder, server)
        assert server.unknown == []


@pytest.fixture(scope="module")
def pushed(steps):
    return steps("push", token="token-of-alice")


@pytest.fixture(scope="module")
def loaded(steps, pushed):
    return steps("load", "token-of-alice")


@pytest.fixture(scope="module")
def read_cards(steps, pushed):
    """The cards of three repositories, one of them a local folder, and what their snippets load."""
    paths = {"local": steps.folder / "local" / "README.md"}
    for name in ("adapter", "classifier", "secret"):
        paths[name] = steps.folder / f"card of {name}" / "README.md"
        paths[name].parent.mkdir()
        revision = "next" if name == "secret" else "main"
        paths[name].write_bytes(steps.hub.files(f"alice/{name}", revision)["README.md"])
    result = steps("snippets", *map(str, paths.values()), token="token-of-alice")
    return {"without import": result["without import"], **{name: result[str(path)] for name, path in paths.items()}}


def card_on(hub: HubServer, repo_id: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


@pytest.mark.slow
def test_what_is_pushed(steps, pushed):
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    files = steps.hub.files("alice/adapter")
    assert set(files) == weights | {f"math/{name}" for name in weights} | {"README.md"}
    repo = steps.hub.store.repos["alice/adapter"]
    stored = repo.commits[repo.refs["main"]]
    assert {path for path, file in stored.items() if file.lfs} == {p for p in files if p.endswith(".safetensors")}
    keys = load_weights(files["adapter_model.safetensors"])
    assert "base_model.model.model.layers.0.self_attn.q_proj.loraswitch_router.weight" in keys
    assert set(steps.hub.files("alice/native")) >= weights | {"README.md"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter default v2", "adapter math v2", "native"])
def test_the_adapter_changes_the_logits(pushed, name):
    assert not torch.equal(pushed[name], pushed["base"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["base", "adapter default v1", "adapter default v2", "adapter math v1", "adapter math v2", "native"],
)
def test_fresh_process_computes_equal_logits(pushed, loaded, name):
    assert torch.equal(loaded[name], pushed[name])


@pytest.mark.slow
def test_second_push_is_what_loads_by_default(pushed, loaded):
    assert not torch.equal(pushed["adapter default v1"], pushed["adapter default v2"])
    for name in ("AutoPeft latest", "transformers latest", "low memory"):
        assert torch.equal(loaded[name], pushed["adapter default v2"]), name


@pytest.mark.slow
def test_native_transformers_adapter_loads_through_peft(pushed, loaded):
    assert torch.equal(loaded["native by PEFT"], pushed["native"])


@pytest.mark.slow
def test_config_of_each_adapter(loaded):
    assert loaded["config"] == {"class": "LoRASwitchConfig", "k": 2, "E": 4, "r": 2}
    assert loaded["config math"] == {"class": "LoRASwitchConfig", "k": 1, "E": 5, "r": 3}


@pytest.mark.slow
def test_private_repository_needs_the_token(pushed, loaded):
    # PEFT turns every failed download of the configuration into this message.
    assert loaded["secret without token"] == "ValueError: Can't find 'adapter_config.json' at 'alice/secret'"
    assert torch.equal(loaded["secret"], pushed["adapter default v2"])


@pytest.mark.slow
def test_missing_revision_and_missing_adapter(loaded):
    for name in ("no such revision", "no such adapter"):
        assert loaded[name] == "ValueError: Can't find 'adapter_config.json' at 'alice/adapter'"


@pytest.mark.slow
def test_without_import_peft_says_key_error_and_the_card_says_why(steps, read_cards):
    assert set(read_cards["without import"]) == {"PeftModel", "PeftConfig", "AutoPeftModel", "transformers"}
    assert set(read_cards["without import"].values()) == {"KeyError: 'LORASWITCH'"}
    text = card_on(steps.hub, "alice/adapter").text
    assert "without `import peft_loraswitch`" in text and "`KeyError: 'LORASWITCH'`" in text


@pytest.mark.slow
@pytest.mark.parametrize("card", ["adapter", "local", "secret"])
def test_snippet_of_the_card_loads_both_adapters(pushed, read_cards, card):
    for name in ("default", "math"):
        assert torch.equal(read_cards[card][name], pushed[f"adapter {name} v2"])


@pytest.mark.slow
def test_snippet_of_a_classifier_knows_the_number_of_labels(pushed, read_cards):
    assert pushed["classifier"].shape == (2, 3)
    assert torch.equal(read_cards["classifier"]["default"], pushed["classifier"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo_id", "pipeline"),
    [("adapter", "text-generation"), ("native", "text-generation"), ("classifier", "text-classification")],
)
def test_card_metadata_on_the_hub(steps, pushed, repo_id, pipeline):
    data = card_on(steps.hub, f"alice/{repo_id}").data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("peft", "alice/base", pipeline)
    assert set(data.tags) >= OURS | {"base_model:adapter:alice/base"}


@pytest.mark.slow
def test_edits_made_on_the_hub_survive_the_next_push(steps, pushed):
    card = card_on(steps.hub, "alice/adapter")
    assert card.data.license == "apache-2.0" and "Written by hand." in card.text
    assert card.text.count("loraswitch:begin") == 1
    assert "Written by hand." not in card_on(steps.hub, "alice/adapter", "v1").text


@pytest.mark.slow
def test_card_names_the_repository_it_is_in(steps, pushed):
    assert 'adapter = "alice/adapter"' in card_on(steps.hub, "alice/adapter").text
    secret = card_on(steps.hub, "alice/secret", "next").text
    assert 'from_pretrained(base, adapter, revision="next")' in secret


@pytest.mark.slow
@pytest.mark.parametrize(("run", "tags", "own_text"), [
    ("plain", set(), "### Training hyperparameters"),
    ("sft", {"trl", "sft"}, "It has been trained using [TRL]"),
])  # fmt: skip
def test_trainers_own_card_keeps_our_section(steps, run, tags, own_text):
    trained = steps("trainers", token="token-of-alice")
    on_hub = card_on(steps.hub, f"alice/trained-{run}")
    assert f'adapter = "alice/trained-{run}"' in on_hub.text
    for card in (on_hub, ModelCard(trained[f"{run}/README.md"])):
        assert own_text in card.text and card.text.count("loraswitch:begin") == 1
        assert card.data.library_name == "peft" and card.data.base_model == "alice/trainbase"
        assert set(card.data.tags) >= OURS | tags | {"base_model:adapter:alice/trainbase"}
    checkpoint = ModelCard(trained[f"{run}/checkpoint-1/README.md"])
    assert set(checkpoint.data.tags) >= OURS and checkpoint.text.count("loraswitch:begin") == 1
    assert not any(path.startswith("checkpoint-") for path in steps.hub.files(f"alice/trained-{run}"))

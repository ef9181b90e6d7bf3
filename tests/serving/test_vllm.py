"""LoRA-Switch adapters in a vLLM server: a real process, a real client, PEFT's own answers to compare with.

`.ci/vllm` makes vLLM's environment and runs these; `pytest -m vllm` where it is there. Most tests share a server; those of
other models are in `test_vllm_*.py`, so that a second worker has servers of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import served_files
import vllm_server
from peft_loraswitch import LoRASwitchConfig
from served_answers import TOLERANCE, compare, differing, jobs_for, long_jobs
from served_files import BASE, CHAT, CONTEXT, PROMPTS, TOKENS, ServedFiles
from vllm_server import Server

pytestmark = pytest.mark.vllm
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama_files(tmp_path_factory) -> ServedFiles:
    return served_files.make(tmp_path_factory.mktemp("served") / "llama", "llama")


@pytest.fixture(scope="module")
def llama(llama_files) -> Iterator[Server]:
    arguments = served_files.arguments(llama_files, "llama")
    with vllm_server.serving(llama_files.folder / BASE, llama_files.folder / "log", *arguments) as server:
        yield server


# ------------------------------------------------------------------------------------------------- the same as PEFT


def test_all_adapters_in_one_batch(llama, llama_files):
    differing(llama_files)
    jobs = jobs_for(llama_files)
    compare(llama_files, jobs, llama.ask(jobs, clients=len(jobs)))


def test_stream_and_chat_and_several_answers(llama, llama_files):
    jobs = jobs_for(llama_files, kind="stream")
    chat = len(PROMPTS) - 1
    jobs += [
        {"model": name, "kind": "chat", "messages": CHAT, "max_tokens": TOKENS, "answer": chat}
        for name in llama_files.answers
    ]
    compare(llama_files, jobs, llama.ask(jobs))
    one_choice = {"temperature": 1, "extra": {"top_k": 1}}  # n > 1 does not go with temperature 0
    several = jobs_for(llama_files, n=2, **one_choice)[: len(llama_files.answers)]
    for job, answer in zip(several, llama.ask(several), strict=True):
        assert answer["tokens"] == [llama_files.answers[job["model"]][job["answer"]].tokens] * 2, job["model"]


def test_prefix_cache_is_used_and_not_shared_by_adapters(llama, llama_files):
    longest = max(range(len(PROMPTS)), key=lambda index: len(llama_files.prompts[index]))
    assert len(llama_files.prompts[longest]) > served_files.BLOCK
    jobs = [job for job in jobs_for(llama_files) if job["answer"] == longest]
    for _ in range(2):
        before = llama.metric("vllm:prefix_cache_hits_total")
        compare(llama_files, jobs, llama.ask(jobs))
    assert llama.metric("vllm:prefix_cache_hits_total") - before >= served_files.BLOCK * len(jobs)


def test_context_goes_on_from_the_prefix_cache(llama, llama_files):
    """Cached beginnings that end with a block, within one, and with the prompt: one request after the other."""
    jobs = long_jobs(llama_files)
    before = llama.metric("vllm:prefix_cache_hits_total")
    compare(llama_files, jobs, llama.ask(jobs, clients=1))
    shared = llama.metric("vllm:prefix_cache_hits_total") - before
    assert shared >= (1 + 1 + 2) * served_files.BLOCK * len(CONTEXT)
    compare(llama_files, jobs, llama.ask(jobs, clients=1))
    again = llama.metric("vllm:prefix_cache_hits_total") - before - shared
    assert again >= (2 + 1 + 2 + 2) * served_files.BLOCK * len(CONTEXT)


def test_a_router_that_forgets_gives_other_tokens(llama, llama_files, tmp_path):
    """The negative control: without its sums, an adapter's answers are others."""
    for name in CONTEXT:
        folder = tmp_path / name
        shutil.copytree(llama_files.folder / name, folder)
        edited({"router_decay": 0.0})(folder)
        assert llama.load(f"forgets_{name}", folder)[0] == 200
    jobs = [{**job, "model": f"forgets_{job['model']}"} for job in long_jobs(llama_files)]
    wanted = [llama_files.answers[job["model"]][job["answer"]].tokens for job in long_jobs(llama_files)]
    assert not any(answer["tokens"][0] == tokens for answer, tokens in zip(llama.ask(jobs), wanted, strict=True))
    for name in CONTEXT:
        assert llama.unload(f"forgets_{name}")[0] == 200


def test_a_router_that_is_rolled_gives_other_tokens(llama, llama_files, tmp_path):
    """The negative control: the comparison notices wrong routing."""
    folder = tmp_path / "rolled"
    shutil.copytree(llama_files.folder / "paper", folder)
    tensors = load_file(folder / WEIGHTS)
    (router,) = [name for name in tensors if "router" in name]
    save_file({**tensors, router: tensors[router].roll(1, 0).contiguous()}, folder / WEIGHTS)
    assert llama.load("rolled", folder)[0] == 200
    jobs = [{**job, "model": "rolled"} for job in jobs_for(llama_files) if job["model"] == "paper"]
    wanted = [answer.tokens for answer in llama_files.answers["paper"]]
    assert not any(answer["tokens"][0] == tokens for answer, tokens in zip(llama.ask(jobs), wanted, strict=True))
    assert llama.unload("rolled")[0] == 200


def streamed(text: str) -> list[dict[str, Any]]:
    """What a stream of server-sent events says, up to its end."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]", text
    return [json.loads(event) for event in events[:-1]]


def test_chat_is_streamed(llama, llama_files):
    chat = len(PROMPTS) - 1
    for name, answers in llama_files.answers.items():
        body = {
            "model": name,
            "messages": CHAT,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": True,
            "stream": True,
        }
        status, text = llama.post("/v1/chat/completions", {**body, "ignore_eos": True, "return_token_ids": True})
        assert status == 200, text
        choices = [part["choices"][0] for part in streamed(text) if part["choices"]]
        tokens = [token for choice in choices for token in choice.get("token_ids") or []]
        logprobs = [
            each["logprob"] for choice in choices for each in (choice.get("logprobs") or {}).get("content") or []
        ]
        assert tokens == answers[chat].tokens, name
        assert logprobs == pytest.approx(answers[chat].logprobs, abs=TOLERANCE), name


def test_logprobs_of_a_prompt(llama, llama_files):
    """Those of PEFT's tokens, when they are a part of the prompt."""
    for name, answers in llama_files.answers.items():
        for index, answer in list(enumerate(answers))[-2:]:
            body = {
                "model": name,
                "prompt": llama_files.prompts[index] + answer.tokens,
                "max_tokens": 1,
                "prompt_logprobs": 0,
            }
            status, text = llama.post("/v1/completions", body)
            assert status == 200, text
            rows = json.loads(text)["choices"][0]["prompt_logprobs"][-len(answer.tokens) :]
            found = [row[str(token)]["logprob"] for row, token in zip(rows, answer.tokens, strict=True)]
            assert found == pytest.approx(answer.logprobs, abs=TOLERANCE), (name, index)


def test_clients_that_leave(llama, llama_files):
    """Requests that end early, between others whose blocks they share."""
    jobs = long_jobs(llama_files)
    asked = [each for job in jobs for each in ({**job, "kind": "cancel"}, job)]
    compare(llama_files, jobs, llama.ask(asked, clients=8)[1::2])


def test_names_of_adapters(llama, llama_files):
    """A name that is taken or not there is an error; what is loaded in its place serves the new adapter, of whatever kind."""
    short = [index for index in range(len(PROMPTS)) if len(llama_files.prompts[index]) + TOKENS < served_files.BLOCK]
    assert short  # no block is full, so none is in the prefix cache, which goes by the name
    assert llama.unload("changing")[0] == 404
    assert llama.load("changing", llama_files.folder / "paper")[0] == 200
    status, text = llama.load("changing", llama_files.folder / "deep")
    assert status == 400 and "already been loaded" in text
    for name in ("paper", "lora", "context_0.9", "all", "lora", "context_row"):
        body = {"lora_name": "changing", "lora_path": str(llama_files.folder / name), "load_inplace": True}
        assert llama.post("/v1/load_lora_adapter", body)[0] == 200
        jobs = [job for job in jobs_for(llama_files) if job["model"] == name and job["answer"] in short]
        compare(llama_files, jobs, llama.ask([{**job, "model": "changing"} for job in jobs]))
    assert llama.unload("changing")[0] == 200
    assert llama.post("/v1/completions", {"model": "changing", "prompt": "x"})[0] == 404
    assert llama.unload("changing")[0] == 404


# ---------------------------------------------------------------------------------------------------------- refused


def edited(settings: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def with_tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return apply


def made_new(layers: int = 3, hidden: int = 64, **settings: Any) -> Callable[[Path], None]:
    """Another adapter in its place, perhaps on another backbone."""

    def make(folder: Path) -> None:
        config = served_files.backbone_config("llama", 258)
        config.num_hidden_layers, config.hidden_size = layers, hidden
        model = AutoModelForCausalLM.from_config(config)
        common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_weights": False}
        get_peft_model(model, LoRASwitchConfig(**{**common, **settings})).save_pretrained(folder)

    return make


DEFECTS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "biases": (edited({"bias": "all"}), ["bias='all'"]),
    "modules in full": (edited({"modules_to_save": ["lm_head"]}), ["modules_to_save"]),
    "token embeddings": (edited({"trainable_token_indices": [1, 2]}), ["trainable_token_indices"]),
    "more than all context": (edited({"router_decay": 1.5}), ["router_decay=1.5", "from 0 to 1"]),
    "a field of a newer version": (edited({"router_depth": 2}), ["router_depth", "newer version"]),
    "other settings": (edited({"num_experts": 7}), ["num_experts=7", "do not belong"]),
    "other ranks": (edited({"r": 2}), ["rank 4", "do not belong"]),
    "a pattern that never ends": (edited({"alpha_pattern": {"(a|aa)+$": 0}}), ["alpha_pattern"]),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), ["Expecting property name"]),
    "truncated": (truncated, ["truncated"]),
    "no weights": (without_weights, [WEIGHTS]),
    "a foreign tensor": (
        with_tensors(lambda t: {**t, "base_model.model.lm_head.weight": t.popitem()[1].clone()}),
        ["lm_head"],
    ),
    "half of the experts": (
        with_tensors(lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up_proj.loraswitch_B" not in k}),
        ["layers.1.mlp.up_proj"],
    ),
    "NaN": (with_tensors(lambda t: {k: v * float("nan") for k, v in t.items()}), ["NaN"]),
    "too wide": (made_new(r=16, num_experts=8), ["LoRA of rank 128", "--max-lora-rank 128"]),
    "wider than vLLM takes": (made_new(r=128, num_experts=8), ["1024", "at most 512"]),
    "too many experts": (made_new(r=1, num_experts=40), ["--additional-config", '"max_experts": 40']),
    "an undeclared router": (
        made_new(router_module="layers.2.self_attn.v_proj", num_shared_experts=1),
        ["--additional-config", "router_modules", "model.layers.2.self_attn.qkv_proj"],
    ),
    "a wider backbone": (made_new(hidden=128), ["another backbone"]),
    "a shallower backbone": (
        made_new(layers=2, target_modules=["q_proj", "up_proj"]),
        ["layers.2", "another backbone"],
    ),
    "a deeper backbone": (made_new(layers=4), ["layers.3", "another backbone"]),
}


def test_what_cannot_be_served_is_refused_by_name(llama, llama_files, tmp_path):
    for name, (damage, wanted) in DEFECTS.items():
        folder = tmp_path / name.replace(" ", "_")
        shutil.copytree(llama_files.folder / "paper", folder)
        damage(folder)
        status, text = llama.load("bad", folder)
        assert status >= 400, name
        assert [part for part in wanted if part not in json.loads(text)["error"]["message"]] == [], (name, text)
        assert llama.post("/v1/completions", {"model": "bad", "prompt": "x"})[0] == 404
    assert llama.alive()
    jobs = jobs_for(llama_files)[: len(llama_files.answers)]
    compare(llama_files, jobs, llama.ask(jobs))


def test_a_server_that_starts_with_one_that_is_refused(llama_files, tmp_path):
    """It says why, and ends."""
    folder = tmp_path / "wide"
    made_new(r=16, num_experts=8)(folder)
    arguments = ["--enable-lora", "--max-lora-rank", "64", "--lora-modules", f"wide={folder}"]
    with (
        pytest.raises(RuntimeError, match="ended:"),
        vllm_server.serving(llama_files.folder / BASE, tmp_path / "log", *arguments),
    ):
        pass
    assert "start the server with --max-lora-rank 128" in (tmp_path / "log").read_text()


def test_an_unload_lets_running_requests_end(llama, llama_files):
    assert llama.load("again", llama_files.folder / "deep")[0] == 200
    jobs = [{**job, "model": "again", "max_tokens": TOKENS} for job in jobs_for(llama_files) if job["model"] == "deep"]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(llama.ask, jobs * 4, clients=8)
        while llama.metric("vllm:num_requests_running") == 0 and not asked.done():
            time.sleep(0.01)
        assert llama.unload("again")[0] == 200
        answers = asked.result()
    for job, answer in zip(jobs * 4, answers, strict=True):  # those that came after the unload are told so
        wanted = llama_files.answers["deep"][job["answer"]].tokens
        assert answer.get("status") == 404 or answer["tokens"][0] == wanted, answer
    assert any("tokens" in answer for answer in answers)
    assert llama.alive()


# ------------------------------------------------------------------------------------------------ GPUs' model runner


def test_the_runner_of_gpus(llama_files):
    """vLLM has two model runners, which keep tables of blocks in their own ways. The second, which GPUs get, in Triton's
    interpreter: all adapters in one batch, prompts in chunks that share beginnings, and again from the prefix cache."""
    arguments = [*served_files.arguments(llama_files, "llama"), "--max-num-batched-tokens", "64"]
    ours = {"module": "interpreted_vllm", "PYTHONPATH": str(vllm_server.TOOLS)}
    with vllm_server.serving(llama_files.folder / BASE, llama_files.folder / "log_2", *arguments, **ours) as server:
        assert " [model_runner.py:" in server.log.read_text()  # the other says [cpu_model_runner.py:
        jobs = [job for job in jobs_for(llama_files) if job["answer"] in (0, *range(len(PROMPTS), 99))]
        jobs = [{**job, "max_tokens": 4} for job in jobs]
        compare(llama_files, jobs, server.ask(jobs, clients=len(jobs)))
        before = server.metric("vllm:prefix_cache_hits_total")
        jobs = [{**job, "max_tokens": 2} for job in long_jobs(llama_files)]
        compare(llama_files, jobs, server.ask(jobs, clients=len(jobs)))
        assert server.metric("vllm:prefix_cache_hits_total") - before >= 7 * served_files.BLOCK * len(CONTEXT)


# ------------------------------------------------------------------------------------------------ never silently wrong


STATES = """
import vllm
import vllm.plugins
from peft_loraswitch.__main__ import report
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager as Manager
from vllm.lora.peft_helper import PEFTHelper

def start():
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()

def tell(what, function):
    try:
        print(what, "->", function())
    except Exception as error:
        print(what, "->", type(error).__name__, error)

tell("supported", start)

from types import SimpleNamespace as Some
from vllm.config import AttentionConfig, CacheConfig, KVTransferConfig, ParallelConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from peft_loraswitch.vllm_plugin import internals
import torch

def config(transfer=None, cache={{}}, **parallel):
    changed = ParallelConfig()
    for name, value in parallel.items():
        setattr(changed, name, value)
    cached = CacheConfig()
    for name, value in cache.items():
        setattr(cached, name, value)
    return Some(parallel_config=changed, cache_config=cached, kv_transfer_config=transfer, attention_config=AttentionConfig(),
                speculative_config=None)

tell("context", lambda: internals.why_no_context(config()))
tell("context, connector", lambda: internals.why_no_context(config(KVTransferConfig())))
tell("context, dcp", lambda: internals.why_no_context(config(decode_context_parallel_size=2)))
tell("context, pcp", lambda: internals.why_no_context(config(prefill_context_parallel_size=2)))
tell("context, dbo", lambda: internals.why_no_context(config(enable_dbo=True)))
tell("context, fast prefill", lambda: internals.why_no_context(config(cache={{"kv_sharing_fast_prefill": True}})))
size = dict(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
full, window = FullAttentionSpec(**size), SlidingWindowSpec(**size, sliding_window=4)

def group(*specs):
    groups = [KVCacheGroupSpec([str(index)], spec) for index, spec in enumerate(specs)]
    return internals.full_attention_group(Some(kv_cache_config=Some(num_blocks=10, kv_cache_groups=groups)))

tell("groups", lambda: [group(full), group(window, full), group(window), group(), internals.full_attention_group(Some())])
tell("report", lambda: report().replace(chr(10), " "))
tell("without the plugin", lambda: LoRAModel.from_local_checkpoint(
    {folder!r}, {{"q_proj"}}, PEFTHelper.from_local_dir({folder!r}, 512), device="cpu"))
own = Manager.activate_adapter
Manager.activate_adapter = lambda self, other: None
tell("a changed name", start)
Manager.activate_adapter = own
vllm.__version__ = "99.0.0"
tell("another version", start)
tell("report of it", lambda: report().replace(chr(10), " "))
"""


def test_another_version_or_a_changed_name_stops_vllm(llama_files):
    command = [str(vllm_server.PYTHON), "-c", STATES.format(folder=str(llama_files.folder / "paper"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=vllm_server.environment())
    said = dict(line.split(" -> ", 1) for line in done.stdout.splitlines() if " -> " in line)
    assert said["supported"] == "None", done.stderr
    assert "LoRA-Switch adapters are served" in said["report"]
    assert said["context"] == ""
    parts = {
        "connector": "KV connector",
        "dcp": "context parallelism",
        "pcp": "context parallelism",
        "dbo": "--enable-dbo",
    }
    for name, part in {**parts, "fast prefill": "--kv-sharing-fast-prefill"}.items():
        assert part in said[f"context, {name}"], said
    assert said["groups"] == "[(0, 160), (1, 160), None, None, None]"
    assert "is unsupported LoRA weight" in said["without the plugin"]  # not served as something else
    assert (
        said["a changed name"].startswith("UnsupportedVLLM")
        and "activate_adapter does not take lora_id" in said["a changed name"]
    )
    assert said["another version"].startswith("UnsupportedVLLM vLLM 99.0.0 cannot serve LoRA-Switch adapters")
    assert "LoRA-Switch adapters are NOT served: vLLM 99.0.0" in said["report of it"]

"""recipes/benchmarks/decode without a GPU: the order of events with workers that only talk, and once with tiny models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_decode_worker as fake
from decode_rehearsal import rehearse
from recipes.benchmarks import quiet_processor
from recipes.benchmarks.decode import __main__ as command
from recipes.benchmarks.decode import devices, loops, models, report, scheduler, worker
from recipes.benchmarks.decode import plan as decode_plan
from recipes.benchmarks.decode.device_lock import DeviceLock
from recipes.benchmarks.decode.plan import (
    METHODS,
    MODES,
    NUM_EXPERTS,
    SHAPES,
    TINY_SHAPES,
    TOP_K,
    Job,
    kind_of,
    plan,
)
from recipes.benchmarks.token_times import token_times

SHAPE = TINY_SHAPES["mistral-7b"]


def job(method: str, rank: int = 0, modes: tuple[str, ...] = ("compiled:1",), model: str = "mistral-7b") -> Job:
    return Job(model, method, rank, modes, SHAPE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs jobs with talking workers; gives the run when it is over."""
    monkeypatch.setattr(worker, "serve", fake.serve)
    monkeypatch.setattr(worker, "hold_weights", fake.hold_weights)
    monkeypatch.setattr(scheduler, "process_context", lambda device: multiprocessing.get_context("spawn"))
    monkeypatch.setattr(scheduler, "LAST_WORDS", 4.0)

    def go(jobs: list[Job], limit: float = 60.0, **options: Any) -> scheduler.Scheduler:
        settings = {"device": "cpu", "memory": None, "reserve": 0.0, "slots": 3, "no_sharing": False, "profile": False}
        args = argparse.Namespace(limit=limit, output=tmp_path / "out.json", **{**settings, **options})
        result: dict[str, Any] = {"header": {"gpu": ""}, "linears": {}, "copy_tb_per_s": None, "rows": []}
        it = scheduler.Scheduler(jobs, args, result, tmp_path)
        it.run()
        return it

    return go


def rows(run: Any) -> dict[tuple[str, int, str], tuple[float, float | None]]:
    return {(r["method"], r["rank"], f"{r['mode']}:{r['batch']}"): (r["ms"], r["ratio"]) for r in run.result["rows"]}


def test_samples_take_turns_with_the_backbones_and_everybody_else_stands_still(run, tmp_path):
    heard = fake.HEARS_TICKS
    jobs = [job("backbone", modes=("compiled:1", "graph")), job("fused", heard), job("lora", fake.TICKS)]
    jobs += [job("merge", 8, ("graph",)), job("ceilings", modes=("copy", "linears:mistral-7b"))]
    done = run(jobs)
    assert rows(done) == {
        ("backbone", 0, "compiled:1"): (2.0, 1.0), ("backbone", 0, "graph:1"): (2.0, 1.0),
        ("fused", heard, "compiled:1"): (3.0, 1.5), ("lora", fake.TICKS, "compiled:1"): (4.0, 2.0),
        ("merge", 8, "graph:1"): (8.0, 4.0),
    }  # fmt: skip
    order = (tmp_path / "samples").read_text().split()
    assert len(order) == 3 * 2 * 7
    assert all(order[i : i + 2].count("backbone") == 1 for i in range(0, len(order), 2)), "one of each in every round"
    assert (tmp_path / "ticks").stat().st_size > 0 and (tmp_path / "heard").read_text().split() == 7 * ["0"]
    merged = next(r for r in done.result["rows"] if r["method"] == "merge")
    assert merged["floor_ms"] == 2.5 and merged["over_floor"] == 3.2  # 2 ms, and 2 GB at 4 TB/s
    assert done.result["copy_tb_per_s"] == 4.0 and done.result["linears"] == {"mistral-7b": {"rows": []}}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == done.result and written["header"]["gpu"] == "fake" and written["header"]["missing"] == []


def test_what_fails_is_named_and_the_rest_goes_on(run):
    jobs = [
        job("backbone", modes=("compiled:1", "prefill")),
        job("fused", fake.FAILS),
        job("lora", fake.DIES_WHILE_MEASURED),
    ]
    done = run([*jobs, job("fused", fake.SKIPS, ("compiled:1", "prefill")), job("fused", 8)])
    assert set(rows(done)) == {
        ("backbone", 0, "compiled:1"), ("backbone", 0, "prefill:1"), ("fused", fake.SKIPS, "prefill:1"),
        ("fused", 8, "compiled:1"),
    }  # fmt: skip
    missing = "\n".join(done.result["header"]["missing"])
    assert f"fused r={fake.FAILS} compiled:1: OutOfMemoryError: too much" in missing
    assert f"lora r={fake.DIES_WHILE_MEASURED} compiled:1: died in sample compiled:1" in missing
    assert f"fused r={fake.SKIPS} compiled:1: Unsupported: a graph break" in missing
    assert len(done.result["header"]["missing"]) == 3


def test_a_reference_that_dies_takes_nobody_with_it(run):
    """What it had measured until then is what the others are compared with."""
    jobs = [job("backbone", fake.DIES_LATER, ("compiled:1", "prefill")), job("fused", 8), job("fused", 16)]
    done = run([*jobs, job("fused", 64, ("compiled:1", "prefill"))], slots=1)
    found = rows(done)
    assert found[("fused", 8, "compiled:1")] == found[("fused", 16, "compiled:1")] == (3.0, 1.5)
    assert found[("fused", 64, "compiled:1")] == (3.0, 1.5) and found[("fused", 64, "prefill:1")] == (3.0, None)
    assert done.result["header"]["missing"] == [
        f"mistral-7b backbone r={fake.DIES_LATER} prefill: died in sample compiled:1"
    ]


@pytest.mark.slow
def test_the_limit_ends_the_run_and_what_is_ready_is_measured(run):
    start = time.monotonic()
    done = run([job("backbone"), job("fused", fake.NEVER_READY), job("fused", 8)], limit=10)
    assert time.monotonic() - start < 12
    assert set(rows(done)) == {("backbone", 0, "compiled:1"), ("fused", 8, "compiled:1")}
    assert not [p for p in done.live if p.process.is_alive() and p.process.join(5)]


def test_little_memory_means_one_after_the_other_not_nothing(run, tmp_path):
    big = dataclasses.replace(SHAPE, vocabulary=2**29 // 32)  # 2 GiB of weights
    jobs = [dataclasses.replace(j, shape=big) for j in (job("backbone"), job("fused", 8), job("merge", 8, ("graph",)))]
    assert 2.0 < jobs[0].weights_gib() < 2.01
    room = jobs[0].gib(shared_weights=False) + 0.5
    done = run([*jobs, dataclasses.replace(job("fused", 16), shape=big)], no_sharing=True, memory=room)
    assert rows(done)[("fused", 8, "compiled:1")] == (3.0, 1.5), "compared with the backbone that had to go"
    assert ("fused", 16, "compiled:1") in rows(done) and not done.result["header"]["missing"]
    done = run([*jobs], memory=2.5)
    assert not done.result["rows"] and "GiB of device memory, 2.5 can be used" in done.result["header"]["missing"][0]


def test_weights_that_cannot_be_shared_are_built_by_everyone(run, tmp_path):
    done = run([job("backbone"), job("fused", fake.CANNOT_SHARE), job("fused", 8), job("lora", 16)], slots=1)
    assert len(rows(done)) == 4 and not done.share and not done.result["header"]["missing"]
    built = (tmp_path / "built").read_text()
    assert "backbone 0 shared" in built and "lora 16 own" in built


def test_the_lock_is_shared_or_alone(tmp_path):
    first, second, alone = (DeviceLock(tmp_path, "x") for _ in range(3))
    first.shared()
    second.shared()  # at once
    assert not alone.exclusive(time.monotonic() + 0.1)
    first.release()
    second.release()
    assert alone.exclusive(time.monotonic() + 1)
    late = []

    def wait() -> None:
        first.shared()
        late.append(time.monotonic())

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    assert not late
    alone.release()
    thread.join(5)
    assert late


def test_the_plan_holds_what_is_asked_for_most_important_first():
    jobs = plan(list(SHAPES), list(METHODS), list(MODES), "cuda")
    keys = [(j.model, j.method, j.rank, mode) for j in jobs for mode in j.modes]
    assert len(keys) == len(set(keys))
    for model in ("llama-2-7b", "mistral-7b", "llama-3.1-8b"):
        for mode in ("compiled:1", "compiled:8", "compiled:32", "static", "eager", "prefill"):
            assert (model, "backbone", 0, mode) in keys and (model, "fused", 8, mode) in keys
        for wanted in (
            ("fused", 16, "compiled:1"),
            ("fused", 64, "compiled:1"),
            ("fused", 64, "prefill"),
            ("merge", 8, "graph"),
        ):
            assert (model, *wanted) in keys
        assert {
            (model, method, rank, "compiled:1") for method, rank in (("kernels", 0), ("lora", 16), ("torch", 8))
        } <= set(keys)
        assert next(j.shape for j in jobs if j.model == model).layers == 32
    assert ("qwen3-0.6b", "fused", 8, "compiled:1") in keys
    assert [j.model for j in jobs[:12]] == 12 * ["llama-2-7b"] and jobs[-1].method in ("torch", "lora", "kernels")
    for j in jobs:  # whatever is compared comes after what it is compared with
        for mode in j.modes:
            if j.method not in ("backbone", "ceilings"):
                assert keys.index((j.model, "backbone", 0, mode)) < keys.index((j.model, j.method, j.rank, mode))
    assert 12.5 < jobs[0].weights_gib() < 12.6 and 12 < SHAPES["llama-2-7b"].linear_elements() * 2 / 2**30 < 12.1
    assert {kind_of(mode) for *_, mode in keys} == {*MODES, "copy", "linears"}


def test_models_are_spread_by_what_they_take():
    jobs = plan(list(SHAPES), list(METHODS), list(MODES), "cuda")
    assert sorted(map(len, devices.spread(list(SHAPES), ["0", "1", "2", "3"], jobs).values())) == [1, 1, 1, 1]
    two = devices.spread(list(SHAPES), ["0", "1"], jobs)
    assert sorted(map(len, two.values())) == [2, 2] and sorted(m for models in two.values() for m in models) == sorted(
        SHAPES
    )
    assert devices.spread(["llama-2-7b"], ["0", "1"], jobs) == {"0": ["llama-2-7b"]}


def test_results_of_devices_are_merged_only_if_they_can_be_compared():
    def part(model: str, **header: str) -> dict[str, Any]:
        head = {"gpu": "G", "torch": "2", "commit": "c", "missing": [f"{model} x"], **header}
        return {"header": head, "linears": {model: 1}, "copy_tb_per_s": 4.0, "rows": [{"model": model}]}

    merged = report.merge([part("mistral-7b"), part("llama-2-7b")], ["qwen3-0.6b: gone"])
    assert [r["model"] for r in merged["rows"]] == ["llama-2-7b", "mistral-7b"] and merged["header"]["devices"] == 2
    assert merged["header"]["missing"] == ["mistral-7b x", "llama-2-7b x", "qwen3-0.6b: gone"]
    with pytest.raises(SystemExit, match="differ in torch"):
        report.merge([part("mistral-7b"), part("llama-2-7b", torch="3")], [])
    with pytest.raises(SystemExit, match="No device wrote"):
        report.merge([], ["a: its process wrote nothing"])


def test_a_model_filled_with_shared_tensors_is_the_same_model():
    tied = Job("qwen3-0.6b", "backbone", 0, ("graph",), TINY_SHAPES["qwen3-0.6b"])
    for it in (job("backbone"), tied):
        whole = models.empty_backbone(it, "cpu")
        filled = models.empty_backbone(it, "meta")
        models.fill(filled, models.tensors_of(whole))
        ids = torch.randint(5, 90, (2, 7))
        assert torch.equal(filled(input_ids=ids).logits, whole(input_ids=ids).logits)
        assert (filled.lm_head.weight is filled.model.embed_tokens.weight) == it.shape.tied
        assert filled.lm_head.weight.data_ptr() == whole.lm_head.weight.data_ptr()
        assert sum(p.numel() for p in filled.parameters()) == sum(p.numel() for p in whole.parameters())
        norms = (2 * it.shape.layers + 1) * it.shape.hidden + (
            2 * it.shape.layers * it.shape.head_dim if it.shape.tied else 0
        )
        assert sum(p.numel() for p in whole.parameters()) == it.shape.elements() + norms
    with pytest.raises(RuntimeError, match="without a value"):
        models.fill(models.empty_backbone(tied, "meta"), {})


@pytest.mark.slow
def test_samples_can_be_taken_for_ever(tmp_path, monkeypatch):
    """A reference is sampled with each of its partners: more steps in all than its cache has room for."""
    monkeypatch.setattr(decode_plan, "CACHE", 64)
    modes = ("graph", "prefill", "compiled:8", "compiled:32")
    it = dataclasses.replace(job("fused", 4, modes), shape=dataclasses.replace(SHAPE, layers=1))
    measuring = worker.Worker(it, "cpu", DeviceLock(tmp_path, "cpu"))
    with torch.no_grad():
        measuring.build(models.tensors_of(models.empty_backbone(it, "cpu")))
        for mode in it.modes:
            measuring.prepare(mode)
        samples = decode_plan.CACHE // sum(loops.LOOP_STEPS["graph"]) + 2
        assert all(measuring.sample("graph") > 0 for _ in range(samples)) and measuring.sample("prefill") > 0
        measuring.begin("graph")
        facts = measuring.finish("graph")
        assert facts["adapted_bytes"] == 2 * it.shape.linear_elements() and facts["tokens"] == 1
        weights = it.shape.elements() - it.shape.vocabulary * it.shape.hidden  # an embedding is looked up, not read
        experts = it.shape.expert_elements(it.rank) * TOP_K // NUM_EXPERTS
        rest = 3 * it.shape.hidden + NUM_EXPERTS * it.shape.hidden  # norms, router
        assert facts["read_bytes"] == pytest.approx(2 * (weights + experts + rest), rel=0.01)
        assert measuring.profile("graph")["host_ms"]
        for mode in ("compiled:8", "compiled:32"):  # batches of one process, each with a graph of its own
            measuring.begin(mode)
            assert measuring.sample(mode) > 0 and measuring.finish(mode)["batch"] == int(mode.partition(":")[2])
            assert measuring.compilations == 0


def rehearsed(
    output: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[dict[str, Any], dict[tuple, dict[str, Any]], str]:
    """What the command writes with tiny models of one layer, its rows by what they are of, and what it says."""
    written, said = rehearse(output, monkeypatch, "--layers", "1", "--limit", "300", *options)
    assert written["header"]["missing"] == [], said
    found = {(r["model"], r["method"], r["rank"], r["mode"], r["batch"]): r for r in written["rows"]}
    assert len(found) == len(written["rows"])
    for row in written["rows"]:
        assert {"model", "method", "mode", "batch", "tokens", "rank", "ms", "ratio", "gb_per_s", "peak_gib"} <= set(row)
        assert row["ms"] > 0 and row["samples"] >= 5
        assert row["ratio"] == 1.0 if row["method"] == "backbone" else row["ratio"] > 0
        assert row["ratio"] == pytest.approx(row["ms"] / row["backbone_ms"], abs=1e-3)
    return written, found, said


@pytest.mark.slow
def test_everything_but_the_numbers_on_two_devices(tmp_path, monkeypatch):
    """Tiny models: real workers, shared weights, `generate`, fusing, one file and a picture."""
    output, models = tmp_path / "results" / "out.json", ("qwen3-0.6b", "mistral-7b")
    options = ("--devices", "0", "1", "--models", *models, "--methods", "backbone", "fused", "merge")
    written, found, said = rehearsed(output, monkeypatch, *options, "--modes", "graph", "static", "eager", "--profile")
    assert written["header"]["devices"] == 2 and written["header"]["torch"] == torch.__version__
    assert len(found) == 8, said
    assert found[("mistral-7b", "merge", 8, "graph", 1)]["over_floor"] > 0
    assert found[("mistral-7b", "fused", 8, "eager", 1)]["fuse_seconds"] > 0
    assert any("fused r=8 static" in name for name in written["profile"]), list(written["profile"])
    assert {bar["model"] for bar in written["bars"]} == set(models)


@pytest.mark.slow
def test_everything_but_the_numbers_compiled(tmp_path, monkeypatch):
    output = tmp_path / "results" / "out.json"
    options = ("--models", "qwen3-0.6b", "--methods", "backbone", "fused", "--modes", "compiled", "--profile")
    written, found, said = rehearsed(output, monkeypatch, *options)
    assert set(found) == {
        ("qwen3-0.6b", method, rank, "compiled", 1) for method, rank in (("backbone", 0), ("fused", 8))
    }
    assert all(row["compilations"] == 0 for row in written["rows"]) and len(written["profile"]) == 2
    assert {bar["what"].partition(",")[0] for bar in written["bars"]} >= {"compiled"}, said
    assert output.with_suffix(".png").stat().st_size > 1000


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA GPU.*--device cpu"):
        command.main([])


def test_token_times_are_those_of_steps_without_prefill_and_set_up():
    class Model:
        def generate(self, logits_processor: Any, max_new_tokens: int, **options: Any) -> None:
            time.sleep(0.2)
            for n in range(max_new_tokens):
                time.sleep(0.1 if n < 2 else 0.01)  # a prefill, and a step that waits for it
                assert logits_processor(None, 7) == 7

    times = token_times(Model(), torch.zeros(1, 4), 5)
    assert len(times) == 3 and all(0.01 <= seconds < 0.1 for seconds in times)


def test_a_quiet_processor_is_sought_and_stayed_on(monkeypatch):
    slow, here = {1: 1.0, 2: 1.5, 3: 1.1}, [1]
    monkeypatch.setattr(quiet_processor.os, "sched_getaffinity", lambda _: set(slow), raising=False)
    monkeypatch.setattr(quiet_processor.os, "sched_setaffinity", None, raising=False)
    monkeypatch.setattr(quiet_processor, "set_processors", lambda allowed: here.__setitem__(0, min(allowed)))
    monkeypatch.setattr(quiet_processor.QuietProcessor, "loop", lambda self: slow[here[0]] * 1e-5)
    monkeypatch.setattr(quiet_processor, "PATIENCE", 0.05)
    processor = quiet_processor.QuietProcessor()
    assert processor.best == 1e-5 and here == [1] and processor.is_quiet()
    slow[1] = 1.4
    assert not processor.is_quiet() and processor.seek() and here == [3]
    assert processor.seek() and here == [3], "quiet enough: not moved"
    slow[3] = 1.3
    assert not processor.seek()


def test_a_disturbed_sample_is_taken_again_and_counted_if_it_stays_so(monkeypatch):
    measuring = worker.Worker(job("fused", 8), "cuda", None)  # type: ignore[arg-type]
    answers = iter([True, False, False, True, True] + 8 * [False])  # before and after each try

    class Processor:
        def seek(self) -> bool:
            return next(answers)

        is_quiet = seek

    monkeypatch.setattr(worker, "QuietProcessor", Processor)
    taken = iter(range(1, 9))
    monkeypatch.setattr(measuring, "milliseconds", lambda mode: float(next(taken)))
    assert measuring.sample("eager") == 3.0 and measuring.disturbed["eager"] == 0
    assert measuring.sample("eager") == 3.0 + worker.TRIES and measuring.disturbed["eager"] == 1

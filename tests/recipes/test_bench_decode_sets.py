"""The parts of the decode benchmark that `--only` chooses: other numbers of experts, batches, prompts, quantised backbones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from decode_rehearsal import rehearse
from peft_loraswitch import record_routing
from recipes.benchmarks.decode import backbones, bars, models, report, sure_router
from recipes.benchmarks.decode.plan import (
    BACKBONES,
    FEWER,
    FIRST,
    MANY,
    METHODS,
    MODES,
    MORE,
    PREFILL,
    RECOMMENDED,
    SETS,
    SHAPES,
    TINY_SHAPES,
    Adapter,
    Job,
    batch_of,
    kind_of,
    plan,
    tokens_of,
)

TINY = TINY_SHAPES[FIRST]


def chosen(*only: str, device: str = "cuda") -> list[Job]:
    return plan([FIRST], list(METHODS), list(MODES), device, only=list(only))


def test_without_only_the_table_is_what_it_was():
    jobs = plan(list(SHAPES), list(METHODS), list(MODES), "cuda")
    assert all(job.backbone == "bf16" and job.given_adapter is None and job.method != "tuned" for job in jobs)
    assert not {"prefill:128", "compiled:64"} & {mode for job in jobs for mode in job.modes}


@pytest.mark.parametrize("name", [name for name in SETS if name != "ceilings"])
def test_every_part_has_what_it_is_compared_with(name):
    jobs = chosen(name)
    keys = [(job.name, mode) for job in jobs for mode in job.modes]
    assert jobs and len(keys) == len(set(keys))
    if name in ("baselines", "composed"):  # the core has it
        jobs = chosen("core", name)
    compared = {
        (job.backbone, mode) for job in jobs for mode in job.modes if job.method not in ("backbone", "ceilings")
    }
    assert compared <= {(job.backbone, mode) for job in jobs if job.method == "backbone" for mode in job.modes}
    assert all(job.backbone in BACKBONES for job in jobs)


def test_parts_that_share_a_backbone_measure_it_once():
    jobs = chosen("high-rank", "top-p", "many-experts")
    modes = [mode for job in jobs if job.method == "backbone" for mode in job.modes]
    assert sorted(modes) == ["compiled:1", "compiled:32", "compiled:8"]
    assert [job.method for job in chosen("ceilings")] == ["ceilings"]


def test_what_is_asked_for_is_planned():
    found = {(j.method, j.rank, mode, j.adapter, j.backbone) for name in SETS for j in chosen(name) for mode in j.modes}
    for bar in (*bars.BARS, bars.BYTES_SAVED):
        for mode in bar.modes:
            suffix = f":{bar.tokens}" if mode == "prefill" and bar.tokens != PREFILL else ""
            names = {f"{mode}:{bar.batch}", f"{mode}{suffix}" if bar.batch == 1 else ""}
            adapter = bar.adapter or Job(FIRST, bar.method, 0, (), TINY).adapter
            assert any((bar.method, bar.rank, each, adapter, bar.backbone) in found for each in names), bar
    for batch in (1, 8, 32):
        assert ("fused", 8, f"compiled:{batch}", RECOMMENDED, "bf16") in found
        assert ("tuned", 0, f"compiled:{batch}", Adapter(0, 0), "bf16") in found


def test_modes_and_numbers_of_experts():
    assert [(kind_of(m), batch_of(m), tokens_of(m)) for m in ("prefill", "prefill:128", "compiled:64", "graph")] == [
        ("prefill", 1, PREFILL), ("prefill", 1, 128), ("compiled", 64, 64), ("graph", 1, 1)
    ]  # fmt: skip
    assert MANY.distinct(8) == pytest.approx(21.0, abs=0.1) and MORE.distinct(32) == pytest.approx(40.8, abs=0.1)
    assert Adapter().distinct(1) == 2 and FEWER.distinct(1) == pytest.approx(1.3) and RECOMMENDED.distinct(3) == 8


def row(
    method: str, rank: int, mode: str = "compiled", batch: int = 1, ms: float = 4.0, **fields: Any
) -> dict[str, Any]:
    whole = {"model": FIRST, "method": method, "rank": rank, "mode": mode, "batch": batch, "tokens": batch, "ms": ms}
    return {**whole, "ratio": ms / 4, "peak_gib": 12.0, "gb_per_s": 3000.0, **fields}


def result_of(*rows: dict[str, Any]) -> dict[str, Any]:
    result = {"header": {}, "linears": {}, "copy_tb_per_s": None, "rows": list(rows)}
    report.complete(result)
    return result


def test_rows_are_told_apart_by_what_is_new_in_them():
    many = row("fused", 8, batch=8, ms=4.2, experts=32, top_k=4, shared_experts=0, backbone="bf16", mean_experts=None)
    usual = row("fused", 8, batch=8, ms=4.1)  # as in files of before
    nf4 = row("fused", 8, batch=8, ms=4.3, experts=8, top_k=2, backbone="nf4")
    short, long = (row("fused", 8, "prefill", ms=4.0, tokens=n) | {"tokens": n} for n in (128, PREFILL))
    result = result_of(row("backbone", 0, batch=8), many, usual, nf4, short, long)
    at = (FIRST, "fused", 8, "compiled", 8)
    assert report.find(result, *at) is usual and report.find(result, *at, adapter=MANY) is many
    assert report.find(result, *at, backbone="nf4") is nf4 and report.find(result, *at, adapter=MORE) is None
    assert report.find(result, FIRST, "fused", 8, "prefill") is long
    assert report.find(result, FIRST, "fused", 8, "prefill", tokens=128) is short
    lines = [report.line(each) for each in result["rows"]]
    assert "E=32 k=4" in lines[1] and "E=" not in lines[2] and "on nf4" in lines[3] and "128 tokens" in lines[4]
    values = {bar["what"]: (bar["value"], bar["met"]) for bar in report.bars(result)}
    assert values["compiled, batch 8, E = 32, k = 4, r = 8"] == (1.05, True)
    assert values["prefill of 128 tokens, r = 8"] == (1.0, True)


def test_the_ratio_is_over_the_faster_backbone():
    tuned, fused = row("tuned", 0, ms=3.6), row("fused", 8, ms=3.9)
    result = result_of(row("backbone", 0), tuned, fused, row("fused", 8, batch=8))
    assert fused["over_faster"] == pytest.approx(3.9 / 3.6, abs=1e-4) and "over_faster" not in tuned
    assert "over_faster" not in result["rows"][3] and "faster backbone 1.083" in report.line(fused)
    assert next(bar for bar in report.bars(result) if bar["what"] == "compiled, batch 1, r = 8")["met"] is False
    slower = result_of(row("backbone", 0), row("tuned", 0, ms=4.4), row("fused", 8, ms=3.9))
    assert slower["rows"][2]["over_faster"] == 0.975


def test_quantised_backbones_are_compared_in_the_best_mode_of_each():
    rows = [row("backbone", 0, "graph", ms=5.0, backbone="nf4"), row("backbone", 0, ms=4.0, backbone="nf4")]
    rows += [row("fused", 8, "graph", ms=4.1, backbone="nf4"), row("fused", 8, ms=4.9, backbone="nf4")]
    (bar,) = [bar for bar in report.bars(result_of(*rows)) if bar["what"].startswith("NF4")]
    assert bar["value"] == 1.025 and bar["met"]
    assert not [bar for bar in report.bars(result_of(*rows[2:])) if bar["what"].startswith("NF4")], "no backbone"


def test_what_fewer_experts_save_is_measured_by_their_bytes():
    both = {"experts": 8, "top_k": 2, "shared_experts": 0}
    whole = row("fused", 64, ms=4.4, read_bytes=1000, **both)
    fewer = row("fused", 64, ms=4.3, read_bytes=960, mean_experts=1.3, **both)
    result = result_of(row("backbone", 0), whole, fewer)
    (bar,) = [bar for bar in report.bars(result) if "top_p" in bar["what"]]
    assert bar["value"] == pytest.approx((0.1 / 4.4) / 0.04, abs=1e-3) and bar["met"] is (bar["value"] >= 0.6)
    fewer["ratio"] = whole["ratio"]
    (bar,) = [bar for bar in report.bars(result) if "top_p" in bar["what"]]
    assert bar["value"] == 0 and bar["met"] is False


@pytest.mark.parametrize("backbone", ["nf4", "int8", "float8"])
@torch.no_grad()
def test_a_quantised_backbone_is_near_the_plain_one_and_holds_fewer_bytes(backbone):
    shape = dataclasses.replace(TINY, hidden=64, intermediate=128, head_dim=16)
    job = Job(FIRST, "fused", 8, ("graph",), shape, backbone=backbone)
    model, plain = (models.empty_backbone(job, "cpu") for _ in range(2))
    for each in (model, plain):  # random weights of a useful size
        for name, parameter in each.named_parameters():
            if "proj" in name:
                parameter.mul_(8)
    backbones.quantize(model, backbone, "cpu")
    ids = torch.randint(5, 90, (2, 7))
    expected, found = plain(input_ids=ids).logits.float(), model(input_ids=ids).logits.float()
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()
    sizes = [sum(map(backbones.bytes_of, each.model.layers.parameters())) for each in (model, plain)]
    share = {"nf4": 0.25 + 1 / 32, "int8": 0.5, "float8": 0.5}[backbone]
    assert share < sizes[0] / sizes[1] < share + 0.1
    adapted, _ = models.adapt(model, job, "cpu")
    assert (adapted(input_ids=ids).logits.float() - found).norm() > 0.01 * found.norm()


def test_int4_says_that_it_needs_a_gpu():
    with pytest.raises(RuntimeError, match="int4 needs a CUDA GPU"):
        backbones.quantize(torch.nn.Linear(2, 2), "int4", "cpu")


@torch.no_grad()
def test_a_router_that_takes_1_3_experts_on_average():
    job = Job(FIRST, "fused", 8, ("compiled:1",), dataclasses.replace(TINY, vocabulary=4000), FEWER)
    model, _ = models.adapt(models.empty_backbone(job, "cpu"), job, "cpu")
    tokens, mean = sure_router.make_sure(model, FEWER, 10, "cpu")
    assert tokens.shape == (10, 1, 1) and mean == pytest.approx(1.3)
    with record_routing(model) as recorded:
        for token in tokens:
            model(input_ids=token)
    assert recorded.summary("default")["mean_experts"] == pytest.approx(1.3)
    with pytest.raises(ValueError, match="need top_k=2"):
        sure_router.make_sure(model, MANY, 10, "cpu")


@torch.no_grad()
def test_the_recommended_adapter_has_an_eighth_of_the_blocks_before_its_router():
    job = Job(FIRST, "fused", 8, ("compiled:1",), dataclasses.replace(TINY, layers=8), RECOMMENDED)
    model, _ = models.adapt(models.empty_backbone(job, "cpu"), job, "cpu")
    shapes = {name: tuple(p.shape[:2]) for name, p in model.named_parameters() if "q_proj.loraswitch_A" in name}
    assert [shape for name, shape in sorted(shapes.items())] == [(1, 56)] + 7 * [(8, 8)]


def thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part with one batch where it has several, and a model of one block: tracing takes the time."""
    keep = {
        "many-experts": {"compiled:8"}, "prompts": {"prefill:128", "prefill:512"}, "nf4": {"graph:8", "compiled:8"},
        "int4": {"graph"}, "top-p": {"compiled:1"}, "recommended": {"compiled:1"}, "max-autotune": {"compiled:1"},
    }  # fmt: skip
    for name, modes in keep.items():
        entries = [entry._replace(modes=tuple(m for m in entry.modes if m in modes)) for entry in SETS[name]]
        monkeypatch.setitem(SETS, name, tuple(entry for entry in entries if entry.modes))
    monkeypatch.setitem(TINY_SHAPES, FIRST, dataclasses.replace(TINY, layers=1))


@pytest.mark.slow
def test_parts_on_a_cpu(tmp_path, monkeypatch):
    """Tiny models: real workers, all parts but int4, which names itself among what is missing."""
    thinned(monkeypatch)
    parts = ("many-experts", "prompts", "nf4", "int4", "top-p", "recommended", "max-autotune")
    written, said = rehearse(tmp_path / "out.json", monkeypatch, "--limit", "500", "--only", *parts)
    assert len(written["header"]["missing"]) == 2, said
    assert all(" on int4 " in text and "int4 needs a CUDA GPU" in text for text in written["header"]["missing"])
    fields = {"experts", "top_k", "backbone", "shared_experts", "read_bytes"}
    assert all(fields <= set(each) and each["ratio"] > 0 for each in written["rows"])
    assert report.find(written, FIRST, "fused", 8, "compiled", 8, MANY)["experts"] == 32
    assert report.find(written, FIRST, "fused", 8, "compiled", adapter=RECOMMENDED)["shared_experts"] == 1
    assert report.find(written, FIRST, "fused", 64, "compiled", 1, FEWER)["mean_experts"] == pytest.approx(1.3)
    assert report.find(written, FIRST, "fused", 8, "graph", 8, backbone="nf4")["backbone"] == "nf4"
    assert report.find(written, FIRST, "fused", 8, "prefill", tokens=512)["tokens"] == 512
    assert "over_faster" in report.find(written, FIRST, "fused", 8, "compiled")
    bars_met = {bar["what"] for bar in written["bars"]}
    assert {"NF4, batch 8, r = 8, best mode of each", "prefill of 128 tokens, r = 8", bars.BYTES_SAVED.what} <= bars_met
    assert "MISSED" in said or "met" in said

"""Figures that stand in documents by hand are those of the committed result files (the decode table and the quality tables,
which a command writes, have tests of their own)."""

from __future__ import annotations

import csv
import json
from typing import Any

from recipes.checkout import ROOT

NEWEST_SERVING = "decode_h200_parts_57c5685.json"


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "recipes" / "results" / name).read_text())


def document(path: str) -> str:
    """With one space for each white space, since sentences go on in the next line."""
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def test_training_on_a_cpu() -> None:
    found = result("train_cpu.json")
    step, forward = (found["results"][name]["contestants"] for name in ("training_step", "forward"))
    assert (
        f"a training step takes {step['LoRA-Switch']['ratio']:.2f} of a step with PEFT's LoRA of rank 64 on the same linears, "
        f"a forward of 512 tokens {forward['LoRA-Switch']['ratio']:.2f} of the backbone's "
        f"(PEFT's LoRA of rank 64: {forward['LoRA r=64']['ratio']:.2f})"
    ) in document("recipes/benchmarks/README.md")
    settings = found["header"]["settings"]
    assert settings["batch"] * settings["length"] == 512 and settings["experts"] * settings["rank"] == 64


def test_training_on_a_gpu() -> None:
    """The table's rows, and the README's sentence."""
    page, readme = document("recipes/benchmarks/README.md"), document("README.md")
    for name, shown in (
        (
            "train_h200_e01d55b.json",
            ("fused 8 8", "fused 8 16", "router_only 8 8", "plain fused 8 8", "plain lora 0 16"),
        ),
        ("train_h200_4bit_867f627.json", ("4bit fused 8 8", "4bit lora 0 16")),
        ("train_h200_compiled_867f627.json", ("compiled fused 8 8", "compiled lora 0 16")),
        ("train_h200_0197e7b.json", ("4bit fused 8 8",)),
        ("train_h200_compiled_0197e7b.json", ("compiled fused 8 8",)),
        ("train_h200_plain_0197e7b.json", ("plain fused 8 8", "plain lora 0 16")),
        ("train_h200_plain_8ad06cf.json", ("plain fused 8 8", "plain lora 0 16")),
        ("train_h200_plain_1224cbd.json", ("plain fused 8 8", "plain lora 0 16")),
        ("train_h200_pairs.json", ("pairs 32 16",)),
        ("train_h200_a322179.json", ("fused 8 64", "fused 32 16", "fused 8 8")),
    ):
        rows = {}
        for row in result(name)["rows"]:
            mode = "" if row["mode"] == "checkpointing" else f"{row['mode']} "
            rows[f"{mode}{row['method']} {row['experts']} {row['rank']}"] = row
        for row in shown:
            assert f"{rows[row]['ratio']:.3f}" in page, row
        if "e01d55b" in name:
            assert f"takes {rows['fused 8 8']['ratio']:.2f} of the step with nothing adapted" in readme
    floor, lora, fused, *_ = result("train_h200_f37d06f.json")["rows"]
    fastest = " and ".join(f"{row['ms_fastest'] / floor['ms_fastest']:.2f}" for row in (fused, lora))
    said = f"PEFT's LoRA of rank 16 takes {lora['ratio']:.2f} in another run, in which ours took {fused['ratio']:.2f} "
    assert f"{said}(fastest steps, which the host slows down least: {fastest};" in readme
    floor, lora, fused = (row["step"] for row in result("train_phases_h200_63c9e2a.json")["rows"])
    assert f"| **{fused / floor:.3f}** |" in page and f"quiet processor | {lora / floor:.3f} |" in page
    said = f"took {fused:.0f} ms, {fused / floor:.2f} of the step with nothing adapted"
    assert said in document("docs/training.md") and f"(PEFT's LoRA of rank 16: {lora:.0f};" in document(
        "docs/training.md"
    )


def test_losses_of_the_fused_path() -> None:
    page = document("recipes/benchmarks/README.md")
    for file, said in (
        ("train_losses_h200.csv", "fused path are {} nats away on average, those of the plain form in float32 {}"),
        ("train_losses_cpu.csv", "--device cpu`) {} and {}"),
    ):
        with (ROOT / "recipes" / "results" / file).open(newline="") as lines:
            rows = [{run: float(loss) for run, loss in row.items()} for row in csv.DictReader(lines)]
        assert len(rows) == 300
        apart = (sum(abs(row[run] - row["plain"]) for row in rows) / 300 for run in ("fused", "float32"))
        assert said.format(*(f"{mean:.4f}" for mean in apart)) in page, file


def test_serving_batches() -> None:
    rows = [row for row in result("decode_h200_parts_63c9e2a.json")["rows"] if row["method"] == "fused"]
    many, most = (
        f"{next(row['ratio'] for row in rows if row['batch'] == batch and row['experts'] == experts):.3f}"
        for batch, experts in ((8, 32), (32, 64))
    )
    rows = result(NEWEST_SERVING)["rows"]
    ratios = {(row["method"], row["batch"]): f"{row['ratio']:.2f}" for row in rows}
    one, two, three = (ratios["fused", batch] for batch in (64, 128, 256))
    joined = f"{ratios['joined', 128]} and {ratios['joined', 256]}"
    readme = document("README.md")
    assert (
        f"compiled batches of 64, 128 and 256 take {one}, {two} and {three} (r = 8), the last two {joined} with [`fuse"
        in readme
    )
    assert (
        f"32 experts, four for each token, take {many} at batch 8; 64 of rank 16, two for each token, {most} at batch 32"
        in readme
    )
    page = document("docs/inference.md")
    assert (
        f"takes {joined} of the unadapted backbone's at batch 128 and 256, where it takes {two} and {three} without"
        in page
    )


def test_weights_of_4_bits() -> None:
    rows = [row for row in result("decode_h200_parts_452f508.json")["rows"] if row["method"] == "fused"]
    one, eight = (
        next(r["ratio"] for r in rows if r["backbone"] == "nf4" and r["mode"] == "compiled" and r["batch"] == batch)
        for batch in (1, 8)
    )
    said = f"takes {one:.2f} of the unadapted NF4 backbone's at batch 1 and {eight:.2f} at batch 8"
    assert said in document("docs/inference.md")
    rows = result("decode_h200_parts_2db9912.json")["rows"]
    (int4,) = (row["ratio"] for row in rows if row["method"] == "fused" and row["mode"] == "compiled")
    assert f"torchao's int4 takes {int4:.2f} at batch 1" in document("README.md")
    assert f"at batch 1 takes {int4:.2f} of the unadapted int4 backbone's" in document("docs/inference.md")
    assert f"{one:.2f} of the unadapted backbone at batch 1 and **{eight:.2f} at batch 8**" in document("README.md")


def test_host_time_of_a_step() -> None:
    rows = {row["method"]: row for row in result("host_cpu.json")["rows"] if row["mode"] == "step"}
    ms = {method: (row["us"] / 1000, row["unguarded_us"] / 1000) for method, row in rows.items()}
    assert (
        f"{ms['fused'][0]:.2f} → {ms['fused'][1]:.2f} ms fused, {ms['backbone'][0]:.2f} → {ms['backbone'][1]:.2f} for the "
        f"backbone, {ms['lora'][0]:.2f} → {ms['lora'][1]:.2f} with PEFT's LoRA"
    ) in document("docs/inference.md")


def test_eager_rows_alone() -> None:
    ratios = [row["ratio"] for row in result("eager_h200.json")["rows"] if row["method"] == "fused"]
    assert len(ratios) == 4
    assert f"all four models are at {min(ratios):.2f} to {max(ratios):.2f}" in document("recipes/benchmarks/README.md")


def test_quickstart() -> None:
    found = result("quickstart_cpu.json")
    assert found["size"] == "full" and all(found["checks"].values())
    mean = found["mean_loss"]
    text = f"mean held-out loss {mean['base']:.2f} → {mean['lora_switch']:.2f} nats (plain LoRA: {mean['lora']:.2f})"
    assert text in document("recipes/README.md") and text in document("recipes/train/README.md")


def test_gpu_time_of_the_comparison_of_routers() -> None:
    found = json.loads((ROOT / "recipes" / "quality" / "results.json").read_text())
    seconds = sum(run["seconds"] for run in found["runs"]) + found["header"]["base"]["seconds"]
    assert f"{seconds / 60:.0f} minutes" in document("recipes/README.md")


def test_time_of_the_decode_benchmark() -> None:
    assert f"{result('decode_h200.json')['header']['seconds'] / 60:.0f} minutes" in document("recipes/README.md")

"""recipes/quality/report.py: what README and pictures show is what results.csv holds; the verdict follows from the figures."""

from __future__ import annotations

import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

for _package in ("matplotlib", "PIL"):
    pytest.importorskip(_package, reason="the recipes need the extra `recipes`")

from fresh import Finished, run_module  # noqa: E402
from recipes.checkout import ROOT, module_environment  # noqa: E402
from recipes.quality import cost, files, methods, pictures, report, results, tables, verdict  # noqa: E402
from recipes.quality.merge import Incompatible, merge  # noqa: E402
from recipes.quality.settings import FULL  # noqa: E402
from recipes.quality.summary import LAYER_WISE, LORA, PAPER, Quantity, Spread, Summary  # noqa: E402

QUALITY = ROOT / "recipes" / "quality"

DOMAINS = ("go", "lisp", "scripture", "german", "russian", "japanese", "tex", "legal", "tables")
OTHER, COSTLY = [method.name for method in methods.METHODS if method.family == "routers"][:2]
TASKS = ("sort-up", "sort-down", "echo-copy", "echo-reverse", "sum-ten", "sum-eight", "lookup-first", "lookup-last")


def header(**settings: Any) -> dict[str, Any]:
    source = {
        "name": "a", "split": "go", "package": "golang", "version": "1.19", "licence": "BSD-3-Clause", "files": 1234,
        "characters": 5_600_000, "train_tokens": 1_200_000, "validation_tokens": 45_000, "test_tokens": 80_000,
    }  # fmt: skip
    return {
        "date": "2026-01-02", "gpu": "NVIDIA H200", "gpus": 1, "python": "3.11.7", "torch": "2.11.0", "transformers": "5.17.0",
        "peft": "0.21.0", "commit": "abc1234", "settings": {**FULL.fingerprint(), **settings},
        "base": {"fingerprint": "f", "sha256": "5" * 64, "parameters": 31_500_000, "tokens": 78_600_000, "held_out_loss": 3.21},
        "sources": [source],
        "data": {
            "domains": {"go": {"train_tokens": 1_200_000, "validation_tokens": 24_576, "test_tokens": 65_536}},
            "tasks": {"sort-up": {"train_items": 13_000, "validation_items": 384, "test_items": 1024}},
        },
    }  # fmt: skip


def one_run(method: methods.Method, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(entry, rows) of one run, with made-up figures that differ from run to run."""
    place = methods.METHODS.index(method)
    generator = np.random.default_rng([place, seed])
    quality = np.random.default_rng(place).uniform(-0.04, 0.04) + (1.2 if method.name == "base" else 0)
    figures: list[tuple[str, str, float]] = []
    for index, name in enumerate(DOMAINS):
        figures.append((name, "loss", 2 + 0.1 * index + quality + generator.normal(0, 0.004)))
    for index, name in enumerate(TASKS):
        figures.append((name, "loss", 0.5 + quality + generator.normal(0, 0.01)))
        figures.append(
            (name, "exact_match", float(np.clip(0.6 - 5 * quality + 0.04 * index + generator.normal(0, 0.01), 0, 1)))
        )
    rank = {"base": 0, "lora-r16": 16, LORA: 64, COSTLY: 40}.get(method.name, 16)
    figures.append(("all", "active_rank", rank))
    if method.family != "baselines" or method.name == LAYER_WISE:
        values = {"effective_experts": 7.5, "mi_domain": 0.3, "context_information": 0.0 if method.name == PAPER else 0.8,
                  "context_variance": 0.4, "mi_domain_given_token": 0.1}  # fmt: skip
        figures += [("domains", name, value + generator.normal(0, 0.01)) for name, value in values.items()]
        figures += [
            (f"{a}+{b}", "mi_instruction_given_token", 0.2) for a, b in zip(TASKS[::2], TASKS[1::2], strict=True)
        ]
        if method.name != LAYER_WISE:
            for name in DOMAINS:
                load = generator.dirichlet(np.full(8, 1.5))
                figures += [(name, f"load_{expert}", float(share)) for expert, share in enumerate(load)]
    trained = method.name != "base"
    shared = {"method": method.name, "seed": seed, "trainable_params": 4_000_000 if trained else 0,
              "learning_rate": 1e-3 if trained else 0.0, "steps": 600 if trained else 0}  # fmt: skip
    rows = [
        {**shared, "domain_or_task": where, "metric": metric, "value": float(value)} for where, metric, value in figures
    ]
    rows = [{name: row[name] for name in results.COLUMNS} for row in rows]
    tuning = {repr(x): 2.2 + quality + abs(np.log2(x / 1e-3)) / 50 for x in (5e-4, 1e-3, 2e-3)} if trained else {}
    return {**shared, "training_loss": 2.0, "ms_per_step": 50.0,
            "seconds": 40.0, "family": method.family, "tuning": tuning}, rows  # fmt: skip


def made_up(*families: str, seeds: tuple[int, ...] = (0, 1, 2), **settings: Any) -> dict[str, Any]:
    """Results as run.py writes them, of these families or of all."""
    runs, rows = [], []
    for method in methods.METHODS:
        if method.family in (families or methods.FAMILIES):
            for seed in seeds if method.name != "base" else seeds[:1]:
                run, found = one_run(method, seed)
                runs.append(run)
                rows += found
    return {"header": header(**settings), "runs": runs, "rows": rows}


def written(path: Path, found: dict[str, Any]) -> Path:
    results.write(path, found["header"], found["rows"], found["runs"])
    return path


def change(found: dict[str, Any], method: str, where: str, metric: str, values: list[float]) -> None:
    """Put these values, one per seed, in the place of a method's."""
    rows = [r for r in found["rows"] if (r["method"], r["domain_or_task"], r["metric"]) == (method, where, metric)]
    for row, value in zip(rows, values, strict=True):
        row["value"] = value


def empty_readme(folder: Path) -> Path:
    text = "# Title\n\n" + "\n\nby hand\n\n".join(f"{report.begin(name)}\n{report.end(name)}" for name in report.BLOCKS)
    (folder / "README.md").write_text(text + "\n")
    return folder


@functools.cache
def costs(names: tuple[str, ...]) -> dict[str, Any]:
    return DECODE_COSTS(list(names))


DECODE_COSTS = cost.decode_costs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with empty blocks; the cost of decoding, which builds every method on 7B, is computed once and for two methods."""

    def of_two(names: Any) -> dict[str, Any]:
        return copy.deepcopy(costs(tuple(n for n in names if n in (PAPER, LAYER_WISE))))

    monkeypatch.setattr(cost, "decode_costs", of_two)
    (tmp_path / "out").mkdir()
    return empty_readme(tmp_path / "out")


# ----------------------------------------------------------------------------------------------------- what is committed


def test_readme_and_pictures_show_the_committed_results() -> None:
    assert report.differences(QUALITY) == []
    text = (QUALITY / "README.md").read_text()
    for name in pictures.PICTURES:
        assert (f"]({name})" in text) == (QUALITY / name).exists()
    if not (QUALITY / "results.csv").exists():
        assert all(f"{report.begin(name)}\n{report.end(name)}" in text for name in report.BLOCKS)


def test_the_committed_figures_are_those_that_were_measured() -> None:
    """Checksums of header and rows as they were first written, but for the costs, which follow the decode benchmark."""
    found = results.read(QUALITY / "results.csv")
    assert found["header"]["commit"] == "7c4198e", "measured anew: write the new checksums below"
    assert len(found["rows"]) == 3953 and list(found["rows"][0]) == list(results.COLUMNS)
    del found["header"]["decode_cost"]
    assert files.digest(found["header"]) == "d7215b4107f79fd7" and files.digest(found["rows"]) == "dcc5e6c2a6e3e728"
    for run in found["runs"]:  # these two stood in the rows alone
        del run["trainable_params"], run["steps"]
    assert files.digest(found["runs"]) == "50865c81c442bab4"


# ------------------------------------------------------------------------------------------------------ files of results


def test_written_results_are_read_as_they_were(tmp_path: Path) -> None:
    found = made_up("baselines")
    found["rows"][0]["value"], found["rows"][1]["value"] = None, 0.1 + 0.2
    path = written(tmp_path / "new" / "results.csv", found)
    assert results.read(path) == found
    assert [type(value) for value in results.read(path)["rows"][1].values()] == [
        str, int, str, str, float, int, float, int,
    ]  # fmt: skip
    lines = path.read_text().splitlines()
    assert lines[:3] == [
        "method,seed,domain_or_task,metric,value",
        "base,0,go,loss,",
        f"base,0,lisp,loss,{0.1 + 0.2!r}",
    ]
    assert len(lines) == 1 + len(found["rows"])
    before = path.read_bytes()
    written(path, results.read(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text(path.read_text().replace("loss", "gain", 1)), "has changed since .*results.json"),
        (lambda path: results.about(path).unlink(), "results.csv holds no results"),
        (lambda path: path.unlink(), "results.csv holds no results"),
        (lambda path: results.about(path).write_text("{"), "results.csv holds no results"),
        (lambda path: results.about(path).write_text('{"rows": []}'), "results.csv holds no results"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "results.csv", made_up("paper"))
    damage(path)
    with pytest.raises(ValueError, match=message):
        results.read(path)
    with pytest.raises(ValueError, match="results.json holds no results .it must be a .csv"):
        results.read(results.about(path))


# ------------------------------------------------------------------------------------------------------------- merging


@pytest.mark.slow
def test_two_families_become_one_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = written(tmp_path / "one.csv", made_up("routers", "combined"))
    two = made_up("baselines", "paper", seeds=(0, 1))
    two["header"] |= {"gpu": "NVIDIA B200", "commit": "def5678"}
    two["header"]["settings"]["seeds"] = [0, 1]
    report.main([str(one), str(written(tmp_path / "two.csv", two)), "--folder", str(folder)])
    assert "The best variant" in capsys.readouterr().out
    assert report.differences(folder) == []
    found = results.read(folder / "results.csv")
    head = found["header"]
    assert (head["gpu"], head["commit"]) == ("NVIDIA H200, NVIDIA B200", "abc1234, def5678")
    assert head["settings"]["seeds"] == [0, 1, 2] and [part["gpu"] for part in head["parts"]] == [
        "NVIDIA H200",
        "NVIDIA B200",
    ]
    assert set(head["parts"][0]["methods"]) | set(head["parts"][1]["methods"]) == set(methods.BY_NAME)
    assert list(dict.fromkeys(row["method"] for row in found["rows"])) == list(methods.BY_NAME)
    text = (folder / "README.md").read_text()
    assert text.count("by hand") == 2 and "`switch` lacks 2" in text and f"`{OTHER}` lacks" not in text
    # what stands in the table is the mean over the rows, and their spread
    values = [
        np.mean([r["value"] for r in two["rows"] if (r["method"], r["seed"], r["metric"]) == (PAPER, seed, "loss")
                 and r["domain_or_task"] in DOMAINS])
        for seed in (0, 1)
    ]  # fmt: skip
    assert f"| {np.mean(values):.4f} ± {np.std(values, ddof=1):.4f} |" in next(
        line for line in text.splitlines() if line.startswith("| `switch` (paper's router)")
    )
    for name in pictures.PICTURES:
        assert f"]({name})" in text and (folder / name).read_bytes().startswith(b"\x89PNG")
    # the same again from what was written, and from that and a file it holds already
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}
    report.main(["--folder", str(folder)])
    report.main([str(folder / "results.csv"), str(one), "--folder", str(folder)])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".png"}


@pytest.mark.parametrize(
    ("change_of", "message"),
    [
        (lambda head: head["settings"].update(steps=7), r"one.csv and .*two.csv were made with .* \(steps: \d+ and 7\)"),
        (lambda head: head["settings"].update(size="smoke"), "size: full and smoke"),
        (lambda head: head["sources"][0].update(version="1.20"), "from different texts or tasks"),
        (lambda head: head["data"]["tasks"].clear(), "from different texts or tasks"),
        (lambda head: head["base"].update(sha256="6" * 64), "start from different bases .55555555 and 66666666"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(change_of: Any, message: str, folder: Path, tmp_path: Path) -> None:
    other = made_up("paper")
    change_of(other["header"])
    paths = [written(tmp_path / "one.csv", made_up("baselines")), written(tmp_path / "two.csv", other)]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(Incompatible, match=message):
        report.main([*map(str, paths), "--folder", str(folder)])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_run_with_other_figures_is_refused(tmp_path: Path) -> None:
    one, two = made_up("paper"), made_up("paper")
    two["rows"][0]["value"] += 1e-6
    paths = [written(tmp_path / name, found) for name, found in (("one.csv", one), ("two.csv", two))]
    with pytest.raises(
        Incompatible, match=r"one.csv and .*two.csv both hold switch with seed 0, and their figures differ"
    ):
        merge(paths)
    two["rows"][0]["value"] -= 1e-6
    two["runs"] = two["runs"][1:]
    with pytest.raises(ValueError, match="no entry for it in 'runs'"):
        merge([written(paths[1], two)])
    with pytest.raises(ValueError, match="absent.csv holds no results"):
        merge([tmp_path / "absent.csv"])


def test_a_figure_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    found = made_up("paper", "baselines")
    change(found, PAPER, "domains", "context_information", [float("nan")] * 3)
    for run in found["runs"]:
        run["tuning"] = {"0.001": 2.0, "0.002": float("inf")} if run["tuning"] else {}
    merged = merge([written(tmp_path / "one.csv", found)])
    assert "NaN" not in json.dumps(merged, allow_nan=False)
    summary = Summary(merged)
    assert summary.spread(PAPER, Quantity("context_information", ("domains",))) is None
    assert all(line.endswith("| **2.0000** | diverged |") for line in tables.tuning(summary)[2:-1])


# ------------------------------------------------------------------------------------------------------------- verdict


def test_spread_and_paired_difference() -> None:
    assert Spread.of([]) is None
    assert Spread.of([2.0]) == Spread(2.0, None, 1)
    assert Spread.of([1.0, 3.0]) == Spread(2.0, 2**0.5, 2)
    found = made_up("baselines", "paper")
    change(found, LORA, "go", "loss", [2.0, 2.5, 3.0])
    change(found, PAPER, "go", "loss", [1.9, 2.3, 2.9])
    summary = Summary(found)
    difference = summary.difference(PAPER, LORA, Quantity("loss", ("go",)))
    assert difference is not None
    assert (difference.mean, difference.sd) == pytest.approx((-0.4 / 3, 0.1 / 3**0.5))
    assert Summary(made_up("paper")).difference(PAPER, LORA, Quantity("loss", ("go",))) is None


def level_with(found: dict[str, Any], method: str, domain_loss: float, match: float) -> None:
    """The method gets these figures everywhere, the same in each seed but for +-0.01 in the first two."""
    for name in DOMAINS:
        change(found, method, name, "loss", [domain_loss - 0.01, domain_loss + 0.01, domain_loss])
    for name in TASKS:
        change(found, method, name, "exact_match", [match - 0.01, match + 0.01, match])


def test_bars_are_met_or_not_by_the_figures() -> None:
    found = made_up("baselines", "paper")
    for method in (LORA, LAYER_WISE, PAPER):
        level_with(found, method, 2.0, 0.5)
    on_lora, match_on_lora, on_mean, match_on_mean = verdict.bars(Summary(found), PAPER)
    assert all(bar.met for bar in (on_lora, match_on_lora, on_mean, match_on_mean))  # a tie is as good
    # one domain a little worse than LoRA's: not met, and which one is said; better by as much: met
    change(found, PAPER, "tex", "loss", [2.02, 2.04, 2.03])
    on_lora = verdict.bars(Summary(found), PAPER)[0]
    assert on_lora.met is False and on_lora.short == "8 of 9" and "worse on tex +0.0300" in on_lora.text
    change(found, PAPER, "tex", "loss", [1.96, 1.98, 1.97])
    assert verdict.bars(Summary(found), PAPER)[0].met is True
    change(found, PAPER, "sum-ten", "exact_match", [0.41, 0.39, 0.40])
    match_on_lora = verdict.bars(Summary(found), PAPER)[1]
    assert match_on_lora.met is False and "worse on sum-ten -10.0" in match_on_lora.text
    # the mean against layer-wise: its own spread (0.01) is allowed, no more
    for worse, met in ((-0.5, True), (0.009, True), (0.011, False)):
        level_with(found, PAPER, 2.0 + worse, 0.5 - worse)
        _, _, on_mean, match_on_mean = verdict.bars(Summary(found), PAPER)
        assert (on_mean.met, match_on_mean.met) == (met, met), worse
    # with one seed there is no spread: worse is undecided, better is better
    single = made_up("baselines", "paper", seeds=(0,))
    for method, loss in ((LORA, 2.0), (LAYER_WISE, 2.0), (PAPER, 2.001)):
        for name in DOMAINS:
            change(single, method, name, "loss", [loss])
    assert verdict.bars(Summary(single), PAPER)[2].met is None
    assert "undecided" in "\n".join(verdict.section(Summary(single)))


def test_the_best_variant_is_chosen_without_the_reported_figures() -> None:
    found = made_up()
    for run in found["runs"]:
        if run["method"] in (OTHER, COSTLY):
            run["tuning"] = {"0.001": 0.5 if run["method"] == OTHER else 0.4}
    summary = Summary(found)
    assert summary.best() == COSTLY and summary.best_at_paper_rank() == OTHER
    assert summary.highlights() == [LORA, LAYER_WISE, PAPER, OTHER, COSTLY]
    text = "\n".join(verdict.section(summary))
    assert "the lowest validation loss" in text and f"no more rank than with the paper's router: `{OTHER}`" in text
    # without a search for learning rates the test figures are all there is
    for run in found["runs"]:
        run["tuning"] = {}
    for name in DOMAINS:
        change(found, OTHER, name, "loss", [0.1, 0.1, 0.1])
    summary = Summary(found)
    assert summary.best() == OTHER and "the lowest test loss" in "\n".join(verdict.section(summary))


# ------------------------------------------------------------------------------------------------ parts that are missing


def test_parts_without_figures_are_left_out(folder: Path, tmp_path: Path) -> None:
    """Only two variants, no baselines: no verdict, no picture against LoRA, and no heading without a body."""
    for name in pictures.PICTURES:
        (folder / name).write_bytes(b"of an earlier run")
    found = made_up("paper")
    found["rows"] = [row for row in found["rows"] if row["method"] != PAPER]
    found["runs"] = [run for run in found["runs"] if run["method"] != PAPER]
    report.main([str(written(tmp_path / "one.csv", found)), "--folder", str(folder)])
    text = (folder / "README.md").read_text()
    assert "## The answer" not in text and "loss_by_domain.png" not in text and "### All methods" in text
    assert not (folder / "loss_by_domain.png").exists()
    lines = [line for line in text.splitlines() if line]
    for line, following in zip(lines, lines[1:], strict=False):
        assert not (line.startswith("### ") and following.startswith(("#", "<!-- end"))), line
    assert report.differences(folder) == []


@pytest.mark.slow
def test_check_tells_what_differs(folder: Path, tmp_path: Path) -> None:
    report.main([str(written(tmp_path / "one.csv", made_up())), "--folder", str(folder)])
    report.main(["--check", "--folder", str(folder)])
    found = results.read(folder / "results.csv")
    change(found, PAPER, "go", "loss", [9.0, 9.0, 9.0])
    written(folder / "results.csv", found)
    with pytest.raises(ValueError, match=r"README.md, loss_by_domain.png.* do not show results.csv"):
        report.main(["--check", "--folder", str(folder)])
    report.main(["--folder", str(folder)])
    found["header"]["decode_cost"] = results.read(folder / "results.csv")["header"]["decode_cost"]
    found["header"]["decode_cost"]["methods"][PAPER]["measured"] = 0.5  # not what decode_h200.json says
    written(folder / "results.csv", found)
    with pytest.raises(ValueError, match=r"README.md, quality_by_cost.png, results.json \(its costs of decoding\)"):
        report.main(["--check", "--folder", str(folder)])
    (folder / "README.md").write_text("# no markers\n")
    with pytest.raises(ValueError, match="README.md needs the lines"):
        report.main(["--folder", str(folder)])


@pytest.mark.slow
def test_reasons_stand_beside_their_variant(folder: Path, tmp_path: Path) -> None:
    (folder / "reasons.json").write_text(json.dumps({OTHER: "Because."}))
    report.main([str(written(tmp_path / "one.csv", made_up())), "--folder", str(folder)])
    lines = (folder / "README.md").read_text().splitlines()
    assert [line.count("|") for line in lines if line.startswith(f"| `{OTHER}`") and line.endswith("| Because. |")] == [
        6
    ]
    for text, message in (('{"swich": "x"}', "names swich, which is no method"), ("{", "is no JSON")):
        (folder / "reasons.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            report.main(["--folder", str(folder)])


# ---------------------------------------------------------------------------------------------------- cost of decoding


def test_decode_cost_is_computed_from_the_shapes(tmp_path: Path) -> None:
    """Against a count by hand for Llama-2-7B, and measured rows only where shape and method fit."""
    sides = 4 * (4096 + 4096) + 2 * (4096 + 11_008) + (11_008 + 4096)
    backbone = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096) + 4096 + 32_000 * 4096)
    rows = [{"model": "llama-2-7b", "method": m, "mode": mode, "batch": 1, "rank": r, "ms": ms, "ratio": ms / 5}
            for m, mode, r, ms in (("backbone", "compiled", 0, 5.0), ("fused", "eager", 8, 20.0), ("fused", "compiled", 8, 5.1),
                                   ("fused", "compiled", 16, 5.2), ("lora", "compiled", 16, 7.0))]  # fmt: skip
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"header": {"gpu": "G", "commit": "c", "num_experts": 8, "top_k": 2}, "rows": rows}))
    found = cost.decode_costs(["base", "lora-r16", LORA, LAYER_WISE, PAPER, "gone"], path)
    assert found["backbone_gb"] == pytest.approx(backbone / 1e9, abs=1e-3) and set(found["methods"]) == {
        "base", "lora-r16", LORA, LAYER_WISE, PAPER
    }  # fmt: skip
    of = found["methods"]
    assert of["base"]["computed"] == 1 and of["base"]["launches"] == 0
    assert of[LORA]["mb_per_token"] == pytest.approx(2 * 64 * 32 * sides / 1e6)
    assert of[LORA]["computed"] == pytest.approx(1 + 2 * 64 * 32 * sides / backbone, abs=1e-4)
    assert of[PAPER]["launches"] == 1 and of[LAYER_WISE]["launches"] == 4 * 32
    routers = 4 * 8 * 32 * (6 * 4096 + 11_008) / 1e6
    experts = of[LAYER_WISE]["active_rank"] * 2 * 32 * sides / 1e6
    assert of[LAYER_WISE]["mb_per_token"] == pytest.approx(experts + routers, rel=1e-4)
    assert of[LAYER_WISE]["computed"] == pytest.approx(
        1 + of[LAYER_WISE]["mb_per_token"] * 1e6 / backbone + 128 * cost.LAUNCH_US / 5000, abs=1e-4
    )
    assert of[PAPER]["measured"] == 1.02 and of["lora-r16"]["measured"] == 1.4 and "measured" not in of[LAYER_WISE]
    # measured with other experts, or not at all
    path.write_text(json.dumps({"header": {"num_experts": 4, "top_k": 2}, "rows": rows}))
    assert "measured" not in cost.decode_costs([PAPER], path)["methods"][PAPER]
    alone = cost.decode_costs([LAYER_WISE], tmp_path / "absent.json")
    assert alone["backbone_ms"] is None and "measured" not in alone["methods"][LAYER_WISE]


# ----------------------------------------------------------------------------------------------- sizes, and ScienceQA


def test_sizes_are_of_what_is_measured() -> None:
    def split(*items: list[int]) -> SimpleNamespace:
        return SimpleNamespace(item_ids=np.array(items))

    task = SimpleNamespace(
        train=split([0, 0, 1, 2], [-1, 0, 0, 1]),
        validation=split([0, 2, -1, -1]),
        test=split([1, 1, -1, 3], [0, 1, 2, 3]),
    )
    prepared = SimpleNamespace(
        train={"go": np.zeros(5000)},
        validation={"go": np.zeros(700)},
        test={"go": np.zeros(9000)},
        tasks={"sort-up": task},
    )
    found = results.data_sizes(prepared, FULL.with_changes(test_rows=4, test_task_rows=1))
    assert found["domains"]["go"] == {"train_tokens": 5000, "validation_tokens": 512, "test_tokens": 1024}
    assert found["tasks"]["sort-up"] == {"train_items": 5, "validation_items": 2, "test_items": 2}


def test_science_qa_without_pictures() -> None:
    datasets = pytest.importorskip("datasets", reason="the recipes need the extra `recipes`")
    from recipes.quality.lm_eval_tasks.science_qa import without_pictures

    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string")})
    rows = [
        {"image": image, "question": text}
        for image, text in ((None, "a"), ({"bytes": b"no picture"}, "b"), (None, "c"))
    ]
    kept = without_pictures(datasets.Dataset.from_list(rows, features=features))
    assert kept.to_list() == [{"question": "a"}, {"question": "c"}]


def test_the_readmes_adapter_block_is_one() -> None:
    """The command for a real model passes fields that LoRASwitchConfig knows, and budgets that are equal."""
    from peft_loraswitch import LoRASwitchConfig

    text = (QUALITY / "README.md").read_text()
    block = text.split("--adapter '")[1].split("'")[0]
    config = LoRASwitchConfig(**json.loads(block))
    (pattern, rank), (same, alpha) = *config.rank_pattern.items(), *config.alpha_pattern.items()
    assert config.router_module == "layers.4.self_attn.q_proj" and same == pattern
    assert [re.fullmatch(rf"(.*\.)?({pattern})", f"model.layers.{n}.mlp.up_proj") is not None for n in (0, 3, 4, 13)] == [
        True, True, False, False,
    ]  # fmt: skip
    total = config.r * (config.num_experts + config.num_shared_experts)
    assert total == rank * config.num_shared_experts and f"--lora_r {total} " in text
    assert alpha / rank == config.lora_alpha / config.r
    assert f"--lora_alpha {total * config.lora_alpha // config.r // config.top_k} " in text


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Started from elsewhere, into a folder without a README; its errors are one line."""
    folder = tmp_path / "new"
    path = written(tmp_path / "one.csv", made_up("baselines"))

    def start(results: Path) -> Finished:
        environment = module_environment(CUDA_VISIBLE_DEVICES="")
        words = ("recipes.quality.report", results, "--folder", folder)
        return run_module(*words, cwd=tmp_path, environment=environment)

    done = start(path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "results.csv" in done.stdout and "decode step, computed" in (folder / "README.md").read_text()
    done = start(tmp_path / "absent.csv")
    assert done.returncode == 1 and "absent.csv holds no results" in done.stderr and "Traceback" not in done.stderr

"""The compose recipe: pieces that could be wrong without showing it, and all of it once, as `--smoke`."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from recipes.compose import __main__ as compose
from recipes.compose import domains, smoke, work
from recipes.compose.base_model import check_tokenizer
from recipes.compose.decisions import GivenRoutes, one_hot, table_of
from recipes.compose.lab import COLUMNS, Lab, balanced_batches, open_model, open_tokenizer, read_items, resume
from recipes.compose.mixed_training import train_stacked
from recipes.compose.routed_lora import RoutedLora
from recipes.compose.routers import Ours
from recipes.compose.scoring import answers, by_answer_length, losses
from recipes.compose.settings import SIZES, SMOKE
from recipes.compose.stacked_lora import StackedAdamW
from recipes.compose.tasks import Task, all_tasks
from recipes.compose.text_batches import Example, answer_losses, batch_of, right


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A tiny base, made-up items, and random LoRAs of the eight domains."""
    folder = tmp_path_factory.mktemp("compose")
    base, data = smoke.make(folder)
    made = Lab(SMOKE, base, folder, read_items(base, data, SMOKE), open_tokenizer(base), open_model(base), "test")
    stack = made.stack()
    torch.manual_seed(0)
    for name in (*domains.EIGHT, domains.NINTH):
        stack.save(0.1 * torch.randn(stack.size), made.lora(name, 0), base)
    return made


def test_exact_match() -> None:
    assert right(" paris\n", "paris")
    assert not right("Paris", "paris")
    assert right("2+2=4; 4", "4*1=4; 4")  # of a solution the result counts
    assert not right("2+2=5; 5", "2+2=4; 4")
    assert not right("", "4")


def test_a_broken_tokenizer_is_refused(lab: Lab) -> None:
    class Letters:
        def tokenize(self, text: str) -> list[str]:
            return list(text)

    check_tokenizer(lab.tokenizer)
    with pytest.raises(ValueError, match="--tokenizer"):
        check_tokenizer(Letters())


def test_batches_hold_every_domain_alike(lab: Lab) -> None:
    sets = lab.sets("train", 100)
    steps = balanced_batches(sets, 16, 3, seed=1)
    owner = {tuple(e.prompt): name for name, items in sets.items() for e in items}
    for step in steps:
        names = [owner[tuple(e.prompt)] for e in step]
        assert sorted(names) == sorted(2 * list(domains.EIGHT))
    assert steps == balanced_batches(sets, 16, 3, seed=1) != balanced_batches(sets, 16, 3, seed=2)


def test_a_stack_computes_what_peft_computes(lab: Lab) -> None:
    names = domains.EIGHT[:2]
    stack = lab.stack()
    stack.use(lab.flat(stack, 0, names))
    items = lab.data["arc"]["test"][:3]
    together = answer_losses(stack.model, batch_of(items * 2, 0))
    for part, name in zip(together.chunk(2), names, strict=True):
        alone = PeftModel.from_pretrained(lab.model(), lab.lora(name, 0)).get_base_model()
        torch.testing.assert_close(part, answer_losses(alone, batch_of(items, 0)), rtol=1e-4, atol=1e-4)


def test_candidates_trained_together_are_as_trained_alone(lab: Lab) -> None:
    steps = lab.mixed_batches(0)
    rates = [1e-3, 1e-2]
    stack = lab.stack()
    together = train_stacked(lab, stack, stack.fresh([1, 1]), rates, steps)
    for row, rate in zip(together, rates, strict=True):
        alone = train_stacked(lab, stack, stack.fresh([1]), [rate], steps)
        torch.testing.assert_close(row, alone[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_stacked_training_is_that_of_peft_and_adamw(lab: Lab) -> None:
    """Two steps of one LoRA, against PEFT's with torch's AdamW and clipping."""
    steps = lab.mixed_batches(0)
    stack = lab.stack()
    begin = stack.fresh([3])
    stack.save(begin[0], lab.out / "begin", lab.base)
    ours = begin.clone()
    gradients = stack.use(ours)
    assert gradients is not None
    optimizer = StackedAdamW(ours)
    peft = PeftModel.from_pretrained(lab.model(), lab.out / "begin", is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    for chosen in steps:
        answer_losses(stack.model, batch_of(chosen, 0)).mean().backward()
        optimizer.step(gradients, torch.tensor([1e-2]))
        stack.refresh(ours, gradients)
        theirs.zero_grad()
        answer_losses(peft.get_base_model(), batch_of(chosen, 0)).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        theirs.step()
    peft.save_pretrained(lab.out / "end")
    torch.testing.assert_close(ours, stack.load([lab.out / "end"]), rtol=1e-2, atol=2e-4)


def test_given_routes_are_what_the_adapter_computes(lab: Lab) -> None:
    """Losses and answers with the adapter's own decisions given are the adapter's, also for tokens behind the prompt (here the
    decision does not change there: all rows of the router but one are zero and that one wins or loses by the prompt's mean)."""
    ours = Ours(lab, 0, decay=1.0)
    stack = lab.stack()
    routed = RoutedLora(lab.model(), stack, lab.flat(stack, 0))
    sets = lab.sets("test", 2)
    for expert in (0, 5):
        rows = torch.zeros_like(ours.router.weight)
        x = torch.cat(ours.inputs([e for items in sets.values() for e in items]))
        direction = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[
            :, 0
        ]  # x @ direction is about 1 for all tokens
        rows[expert] = direction
        ours.set_rows(rows)
        table = table_of(sets, lambda index, e, expert=expert: one_hot(torch.full((len(e.prompt),), expert)))
        routes = GivenRoutes(routed, table)
        if float((x @ direction).min()) > 0:  # the adapter has chosen so everywhere
            assert losses(ours.backbone, lab.tokenizer, sets) == pytest.approx(
                losses(routed.model, lab.tokenizer, sets, routes), rel=1e-4
            )
            prompts = [e.prompt for items in sets.values() for e in items]
            theirs = answers(ours.backbone, lab.tokenizer, prompts, 3, SMOKE)
            assert theirs == answers(routed.model, lab.tokenizer, prompts, 3, SMOKE, routes)
        else:
            pytest.fail("the made-up router does not choose one expert everywhere: the test tests nothing")


def test_routes_change_within_a_prompt(lab: Lab) -> None:
    """Gates stand where their tokens stand, on left- and right-padded rows alike: a switch in the middle gives the same logits in
    both, and other ones than no switch."""
    stack = lab.stack()
    routed = RoutedLora(lab.model(), stack, lab.flat(stack, 0))
    items = lab.data["arc"]["test"][:2]
    short = Example(items[0].prompt[:9], items[0].answer, items[0].text)
    chosen = [short, items[1]]

    def gates(index: int, e: Example, switch: int = 4) -> torch.Tensor:
        choices = torch.full((len(e.prompt),), 1)
        choices[:switch] = 0
        return one_hot(choices)

    routes = GivenRoutes(routed, table_of({"arc": chosen}, gates))
    first = {}
    for e in chosen:  # alone and without padding
        routes.begin_answers([e.prompt], len(e.prompt))
        first[tuple(e.prompt)] = routed.model(input_ids=torch.tensor([e.prompt])).logits[0, -1]
    batch = batch_of(chosen, 0)
    routes.begin_losses(chosen, batch.ids.shape[1])
    logits = routed.model(input_ids=batch.ids).logits
    for row, e in enumerate(chosen):
        torch.testing.assert_close(logits[row, len(e.prompt) - 1], first[tuple(e.prompt)], rtol=1e-4, atol=1e-4)
    plain = GivenRoutes(routed, table_of({"arc": chosen}, lambda i, e: gates(i, e, 0)))
    plain.begin_losses(chosen, batch.ids.shape[1])
    assert not torch.allclose(routed.model(input_ids=batch.ids).logits[0, 8], logits[0, 8], atol=1e-3)


def test_coefficients_of_one_half_are_half_a_sum(lab: Lab) -> None:
    stack = lab.stack()
    flat = lab.flat(stack, 0)
    routed = RoutedLora(lab.model(), stack, flat)
    values = torch.full((1, len(routed.linears), routed.experts), 0.5)
    routed.use_coefficients(values)
    batch = batch_of(lab.data["arc"]["test"][:2], 0)
    found = answer_losses(routed.model, batch)
    model = lab.model()
    for name, (a, b) in stack.views(flat).items():
        weight = model.get_submodule(name).weight
        with torch.no_grad():
            weight += 0.5 * stack.alpha / stack.rank * torch.einsum("eor,eri->oi", b, a)
    torch.testing.assert_close(found, answer_losses(model, batch), rtol=1e-4, atol=1e-4)


def test_accuracy_is_counted_at_the_right_place(lab: Lab) -> None:
    """A router that is right for one domain everywhere and for none else."""
    ours = Ours(lab, 0)
    x = torch.cat(ours.inputs([e for name in domains.EIGHT for e in lab.data[name]["test"]]))
    rows = torch.zeros_like(ours.router.weight)
    rows[2] = torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[:, 0]
    ours.set_rows(rows)
    found = ours.accuracy()
    for index, name in enumerate(domains.EIGHT):
        assert set(found[name].values()) == {1.0 if index == 2 else 0.0}


def test_domains_with_long_answers_are_generated_apart() -> None:
    def items(length: int) -> list[Example]:
        return [Example([1], [2] * length, "")]

    groups = by_answer_length({"a": items(2), "b": items(20), "c": items(5), "d": items(70)}, SMOKE)
    assert [names for _, names in groups] == [["a", "c"], ["b"], ["d"]]
    assert groups[-1][0] == SMOKE.new_tokens


def test_what_a_task_needs_stands_before_it() -> None:
    for settings in SIZES.values():
        seen: set[str] = set()
        for task in all_tasks(settings):
            assert set(task.needs) <= seen and task.name not in seen
            seen.add(task.name)


def test_a_failed_task_takes_only_what_needs_it(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def fails(lab: Lab) -> None:
        raise RuntimeError("broken")

    tasks = [
        Task("a", fails),
        Task("b", lambda lab: done.append("b"), ("a",)),
        Task("c", lambda lab: done.append("c")),
        Task("d", lambda lab: done.append("d"), ("c",)),
    ]
    monkeypatch.setattr(work, "all_tasks", lambda settings: tasks)
    work.work(replace(lab, out=tmp_path), limit=1e9)
    assert done == ["c", "d"]
    assert sorted(path.name for path in tmp_path.glob("failed/*")) == ["a", "b"]
    assert "broken" in (tmp_path / "failed" / "a").read_text()


def test_a_run_goes_on_where_it_ended(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is not done again; rows of a task that was ended in the middle do not stand twice."""
    done: list[str] = []
    broken = True

    def row(lab: Lab) -> None:
        done.append(lab.task)
        lab.rows(lab.task, "a", 0, {"arc": {"loss": 1.0}})

    def ends(lab: Lab) -> None:
        row(lab)
        if broken:
            raise KeyboardInterrupt

    tasks = [Task("a", row), Task("b", ends, ("a",)), Task("c", row, ("b",))]
    monkeypatch.setattr(work, "all_tasks", lambda settings: tasks)
    ours = replace(lab, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work.work(ours, limit=1e9)
    assert done == ["a", "b"]
    broken = False
    resume(tmp_path)
    work.work(ours, limit=1e9)
    assert done == ["a", "b", "b", "c"]
    rows = [line for path in sorted(tmp_path.glob("rows/*.csv")) for line in path.read_text().splitlines()]
    assert [line.split(",")[0] for line in rows] == ["a", "b", "c"]


def test_rows_are_added_to_those_of_an_earlier_run(tmp_path: Path) -> None:
    head = {
        "date": "today", "commit": "b", "hardware": "two", "command": "c", "seconds": 2.0, "base": "y",
        "settings": asdict(SIZES["full"]),  # with tuples, as a run has them
        "left_out": ["late", "early"], "tuned": {"new": 1}, "tasks": {},
    }  # fmt: skip
    earlier = {**head, "commit": "a", "left_out": ["late", "now"], "tuned": {"old": 1}}
    (tmp_path / "compose.json").write_text(json.dumps(earlier))
    with (tmp_path / "compose.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *[[m, "a", "0", d, "loss", "1", "0"] for m in "uv" for d in "xy"]])
    now = [["v", "a", "0", "x", "loss", "2", "0"], ["v", "a", "1", "x", "loss", "3", "0"]]
    rows, found = compose.added(tmp_path, now, head)
    assert sorted((row[0], row[2], row[3], row[5]) for row in rows) == [
        ("u", "0", "x", "1"), ("u", "0", "y", "1"), ("v", "0", "x", "2"), ("v", "0", "y", "1"), ("v", "1", "x", "3"),
    ]  # fmt: skip
    assert found["left_out"] == ["late"] and found["tuned"] == {"old": 1, "new": 1}
    assert [run["commit"] for run in found["runs"]] == ["a", "b"]
    with pytest.raises(SystemExit, match="other settings"):
        compose.added(tmp_path, now, {**head, "settings": asdict(SIZES["smoke"])})
    with pytest.raises(SystemExit, match="other settings"):  # before anything is made
        compose.main(["--smoke", "--out", str(tmp_path / "out"), "--add", str(tmp_path)])


def test_a_part_of_the_measurement(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tasks that are named, and what they need; times only if they are named."""
    with pytest.raises(SystemExit, match="no task oracl-seed0; similar: oracle-seed0"):
        compose.main(["--smoke", "--out", str(tmp_path / "out"), "--only", "oracl-seed0"])
    assert not (tmp_path / "out").exists()
    for only, expected in ((["base"], 100.0), (["base", "cost"], 25.0)):
        args = compose._arguments(["--base", "y", "--limit", "100", "--only", *only])
        assert compose._tasks_limit(args) == expected
    run: list[str] = []
    monkeypatch.setattr(work, "_run", lambda _, task: (run.append(task.name), (tmp_path / "done" / task.name).touch()))
    work.work(replace(lab, out=tmp_path), 1e9, ["oracle-seed0", "cost"])
    assert sorted(run) == ["experts-0-seed0", "experts-1-seed0", "oracle-seed0"]


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    compose.main(["--smoke", "--out", str(tmp_path)])
    header = json.loads((tmp_path / "compose.json").read_text())
    assert header["failed"] == {} and header["left_out"] == [] and "times_failed" not in header
    with (tmp_path / "compose.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    kinds = {row["kind"] for row in rows}
    assert kinds == {"base", *"abcdefgh", "diagnostic", "growth", "cost"}
    methods = {row["method"] for row in rows if row["domain"] == domains.NINTH}
    assert {"texts_before", "texts_after", "trained_after", "one_lora_before", "one_lora_after"} <= methods

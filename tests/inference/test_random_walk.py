"""Whatever is done to a fused model, it stays equal to one that was never fused.

Two models that start alike take the same random operations; one of them is fused and unfused on the way. After each, logits,
weights, flags and everything else that a walk over the modules finds are compared. A failure names the seed and the fewest
operations that still fail. LORASWITCH_WALK_STEPS and LORASWITCH_WALK_SEEDS make the walk longer.
"""

from __future__ import annotations

import copy
import io
import os
import random
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as tf_logging

from fusing import join_anywhere
from helpers import padded, randomize_adapter, switch_config, tiny_llama, tokens
from peft_loraswitch.inference.fuse import fuse, is_fused, refresh_fused, unfuse
from peft_loraswitch.model import record_routing, router_stats

STEPS = int(os.environ.get("LORASWITCH_WALK_STEPS", "40"))
SEEDS = range(int(os.environ.get("LORASWITCH_WALK_SEEDS", "3")))
NAMES = ("default", "b", "c")
TARGETS: list[Any] = [
    "all-linear", ["q_proj", "v_proj"], ["k_proj", "o_proj"], ["q_proj", "k_proj", "v_proj", "up_proj"],
    ["gate_proj", "down_proj"],
]  # fmt: skip


class Walker:
    """One of the two models, and what its operations have to know of each other.

    Attributes:
        fuses: this is the model that is fused; for the other one, to fuse is to do nothing.
        double: experts are kept in float64 on a float32 backbone, so that fused layers work with casts of them.
        in_place: the fused model holds, or the other one would hold, experts in the backbone's weights.
    """

    def __init__(self, fuses: bool, api: str, double: bool, folder: Path) -> None:
        self.fuses, self.api, self.double, self.folder = fuses, api, double, folder
        self.in_place = False
        self.model: Any = self.wrapped(tiny_llama(), random.Random(0))

    def wrapped(self, base: nn.Module, rng: random.Random) -> nn.Module:
        config = self.config(rng)
        torch.manual_seed(rng.randrange(1000))
        if self.api == "peft":
            model: Any = get_peft_model(base, config)
        else:
            model = base
            model.add_adapter(config, adapter_name="default")
        self.model = model
        self.fill("default", rng)
        return model.eval()

    def config(self, rng: random.Random) -> Any:
        options = {
            "target_modules": rng.choice(TARGETS), "num_experts": rng.choice([3, 4]), "top_k": rng.choice([1, 2]),
            "num_shared_experts": rng.choice([0, 0, 1]), "r": rng.choice([2, 3]), "lora_alpha": 6,
        }  # fmt: skip
        if rng.random() < 0.3:
            options["modules_to_save"] = ["lm_head"]
        return switch_config(**copy.deepcopy(options))

    def fill(self, adapter: str, rng: random.Random) -> None:
        randomize_adapter(self.model, adapter, seed=rng.randrange(1000))
        with torch.inference_mode(False):  # what is put into `.data` within it can never ask for gradients again
            for name, parameter in self.model.named_parameters() if self.double else ():
                if ("loraswitch_A" in name or "loraswitch_B" in name) and adapter in name.split("."):
                    parameter.data = parameter.data.double()

    @property
    def backbone(self) -> nn.Module:
        return self.model.base_model.model if self.api == "peft" else self.model

    def loaded(self) -> list[str]:
        return sorted(getattr(self.model, "peft_config", {}))

    def experts(self) -> list[nn.Parameter]:
        return [p for n, p in self.model.named_parameters() if "loraswitch_A" in n or "loraswitch_B" in n]


# -------------------------------------------------------------------------------------------------------- operations
# Each takes a walker and a generator that is in the same state for both; what it returns or raises is compared.

OPERATIONS: dict[str, tuple[Callable[[Walker, random.Random], Any], int]] = {}


SERVED: set[str] = set()  # those that a server may do within `torch.inference_mode()`


def operation(weight: int = 1, served: bool = False) -> Callable[[Any], Any]:
    def register(function: Callable[[Walker, random.Random], Any]) -> Any:
        OPERATIONS[function.__name__] = (function, weight)
        if served:
            SERVED.add(function.__name__)
        return function

    return register


@operation(5, served=True)
def to_fuse(walker: Walker, rng: random.Random) -> None:
    strategy, in_place = rng.choice([("fused", False), ("fused", False), ("merge", False), ("merge", True)])
    join_weights = strategy == "fused" and rng.random() < 0.5
    if not walker.fuses:
        walker.in_place = in_place
        return
    if is_fused(walker.model):
        unfuse(walker.model)
    walker.in_place = in_place
    try:
        fuse(walker.model, strategy, in_place, join_weights)
    except ValueError as error:  # what "merge" cannot serve stays unfused
        assert strategy == "merge" and not is_fused(walker.model), error


@operation(served=True)
def to_unfuse(walker: Walker, rng: random.Random) -> None:
    walker.in_place = False
    if walker.fuses:
        unfuse(walker.model)


@operation(4, served=True)
def add_adapter(walker: Walker, rng: random.Random) -> None:
    free = [name for name in NAMES if name not in walker.loaded()]
    name, config = rng.choice(free if free and rng.random() < 0.9 else NAMES), walker.config(rng)
    if walker.api == "peft":
        walker.model.add_adapter(name, config)
    else:
        walker.model.add_adapter(config, adapter_name=name)
    walker.fill(name, rng)


@operation(4, served=True)
def delete_adapter(walker: Walker, rng: random.Random) -> None:
    if len(walker.loaded()) > 1:
        walker.model.delete_adapter(rng.choice(walker.loaded()))


@operation(5, served=True)
def set_adapter(walker: Walker, rng: random.Random) -> None:
    walker.model.set_adapter(rng.choice(NAMES))


@operation(served=True)
def set_adapters(walker: Walker, rng: random.Random) -> None:
    names = rng.sample(walker.loaded(), min(2, len(walker.loaded())))
    if walker.api == "peft":
        walker.model.base_model.set_adapter(names)
    else:
        walker.model.set_adapter(names)


@operation(served=True)
def disable(walker: Walker, rng: random.Random) -> Any:
    inputs = tokens(1, rng.choice([1, 4]), seed=rng.randrange(100))
    if walker.api == "peft":
        with walker.model.disable_adapter(), torch.no_grad():
            return walker.model(input_ids=inputs).logits
    walker.model.disable_adapters()
    with torch.no_grad():
        logits = walker.model(input_ids=inputs).logits
    walker.model.enable_adapters()
    return logits


@operation(served=True)
def disable_for_good(walker: Walker, rng: random.Random) -> None:
    on = rng.random() < 0.6
    if walker.api == "peft":
        (walker.model.base_model.enable_adapter_layers if on else walker.model.base_model.disable_adapter_layers)()
    else:
        (walker.model.enable_adapters if on else walker.model.disable_adapters)()


def saved(walker: Walker, rng: random.Random) -> Path:
    folder = Path(tempfile.mkdtemp(dir=walker.folder))
    walker.model.save_pretrained(folder)
    return folder


@operation(2, served=True)
def save_and_load(walker: Walker, rng: random.Random) -> Any:
    folder = saved(walker, rng)
    files = sorted(folder.rglob("adapter_model.safetensors"))
    name = rng.choice(NAMES)
    for file in files[:1]:
        values = load_file(file)
        other = {key: value * 1.5 if "loraswitch_" in key else value for key, value in values.items()}
        save_file(other, file, {"format": "pt"})
        walker.model.load_adapter(str(file.parent), adapter_name=name)
        walker.model.eval()
        if name not in walker.loaded():
            walker.fill(name, rng)
    return [load_file(file) for file in files]


@operation(2, served=True)
def load_what_is_broken(walker: Walker, rng: random.Random) -> Any:
    folder = saved(walker, rng)
    for file in sorted(folder.rglob("adapter_model.safetensors"))[:1]:
        values = load_file(file)
        keys = sorted(key for key in values if "loraswitch_" in key)
        if rng.random() < 0.5:
            values.pop(rng.choice(keys))
        else:
            values[rng.choice(keys)] = torch.zeros(1, 1, 1)
        save_file(values, file, {"format": "pt"})
        with pytest.raises(ValueError):
            walker.model.load_adapter(str(file.parent), adapter_name=rng.choice(NAMES))


@operation()
def load_state_dict(walker: Walker, rng: random.Random) -> Any:
    if walker.in_place:
        to_unfuse(walker, rng)
    only = rng.choice(["loraswitch_", ""])
    state = {name: value.clone() * 1.01 for name, value in walker.model.state_dict().items() if only in name}
    walker.model.load_state_dict(state, strict=False, assign=rng.random() < 0.5)


@operation(4)
def write_to_experts(walker: Walker, rng: random.Random) -> None:
    ways = ["in place", "data", "alias", "new data", "there and back", "init", "swap", "set", "parameter"]
    how, factor = rng.choice(ways), -1.1
    for parameter in rng.sample(walker.experts(), min(3, len(walker.experts()))):
        with torch.no_grad():
            if how == "in place":
                parameter.mul_(factor)
            elif how == "data":
                parameter.data.mul_(factor)
            elif how == "alias":
                parameter.data[:1].view(-1)[:5].add_(0.3)
            elif how == "new data":
                parameter.data = parameter.data * factor
            elif how == "there and back":  # memory that is freed is given out again
                values = (parameter * factor).tolist()
                address = parameter.data_ptr()
                parameter.data = torch.zeros(1, dtype=parameter.dtype)
                kept = []
                for _ in range(20):
                    kept.append(torch.tensor(values, dtype=parameter.dtype))
                    if kept[-1].data_ptr() == address:
                        break
                parameter.data = kept[-1]
            elif how == "init":
                torch.manual_seed(rng.randrange(1000))
                nn.init.normal_(parameter, std=0.1)
            elif how == "swap":
                torch.utils.swap_tensors(parameter, nn.Parameter(parameter * factor, parameter.requires_grad))
            elif how == "set":
                parameter.set_((parameter * factor).detach())
    if how == "parameter":
        for name, module in walker.model.named_modules():
            if name.endswith("v_proj.loraswitch_B.default"):
                module.weight = nn.Parameter(module.weight.detach() * factor, module.weight.requires_grad)


@operation()
def write_within_inference_mode(walker: Walker, rng: random.Random) -> None:
    with torch.inference_mode():
        for parameter in rng.sample(walker.experts(), min(3, len(walker.experts()))):
            (parameter.data if rng.random() < 0.5 else parameter).mul_(-1.1)


@operation()
def write_to_the_backbone(walker: Walker, rng: random.Random) -> None:
    if walker.in_place:
        to_unfuse(walker, rng)
    named = [p for n, p in walker.model.named_parameters() if n.endswith("base_layer.weight")]
    with torch.no_grad():
        for parameter in rng.sample(named, min(2, len(named))):
            (parameter.data if rng.random() < 0.5 else parameter).mul_(0.97)


@operation()
def write_uncounted(walker: Walker, rng: random.Random) -> None:
    """What PyTorch knows nothing of, and `refresh_fused()` is for."""
    for parameter in walker.experts()[:3]:
        parameter.detach().numpy()[:] *= -1
    refresh_fused(walker.model)


@operation()
def optimizer_in_evaluation(walker: Walker, rng: random.Random) -> None:
    make = rng.choice([torch.optim.AdamW, torch.optim.SGD])
    options = {"fused": True} if rng.random() < 0.5 else {"foreach": True}
    experts = [p for p in walker.experts() if p.requires_grad]
    for parameter in experts:
        parameter.grad = torch.full_like(parameter, 0.1)
    if experts:
        make(experts, lr=0.02, **options).step()
        walker.model.zero_grad()


@operation(2)
def training_step(walker: Walker, rng: random.Random) -> Any:
    if walker.in_place and any(p.requires_grad for n, p in walker.model.named_parameters() if "base_layer" in n):
        to_unfuse(walker, rng)
    walker.model.train()
    trained = [(n, p) for n, p in walker.model.named_parameters() if p.requires_grad]
    if not trained:
        walker.model.eval()
        return None
    loss = walker.model(**padded([5, 3], seed=rng.randrange(100))).loss
    if loss.requires_grad:
        loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in trained}
    torch.optim.SGD([p for _, p in trained], lr=0.01).step()
    walker.model.zero_grad()
    walker.model.eval()
    return loss.detach(), gradients


@operation()
def set_requires_grad(walker: Walker, rng: random.Random) -> None:
    part, on = rng.choice(["", "loraswitch_A", "loraswitch_router", "base_layer"]), rng.random() < 0.5
    for name, parameter in walker.model.named_parameters():
        if part in name:
            parameter.requires_grad_(on)


@operation()
def gradients_in_evaluation(walker: Walker, rng: random.Random) -> Any:
    if not any(p.requires_grad for p in walker.model.parameters()):
        return None
    logits = walker.model(input_ids=tokens(1, rng.choice([1, 3]))).logits
    if logits.requires_grad:
        logits.square().mean().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in walker.model.named_parameters()}
    walker.model.zero_grad()
    return gradients


@operation(2, served=True)
def statistics(walker: Walker, rng: random.Random) -> Any:
    with record_routing(walker.model) as recorded, torch.no_grad():
        walker.model(input_ids=tokens(2, rng.choice([1, 3]), seed=rng.randrange(100)))
        if rng.random() < 0.3:
            to_fuse(walker, rng)
    found = [recorded.summary(name) for name in sorted(recorded.records)]
    return found, [router_stats(walker.model, name, reset=rng.random() < 0.3) for name in sorted(recorded.records)]


@operation(served=True)
def status(walker: Walker, rng: random.Random) -> Any:
    if walker.api == "peft":
        return [asdict(walker.model.get_model_status()), *map(asdict, walker.model.get_layer_status())]
    return walker.model.active_adapters()


@operation(served=True)
def mixed_batch(walker: Walker, rng: random.Random) -> Any:
    names = [rng.choice([*walker.loaded(), "__base__"]) for _ in range(3)]
    if walker.api != "peft":
        return None
    with torch.no_grad():
        return walker.model(input_ids=tokens(3, rng.choice([1, 2])), adapter_names=names).logits


@operation(served=True)
def generate(walker: Walker, rng: random.Random) -> Any:
    prompt = tokens(rng.choice([1, 2]), rng.choice([1, 4]), seed=rng.randrange(100))
    return walker.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
    )


@operation()
def autocast(walker: Walker, rng: random.Random) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        walker.model(input_ids=tokens(1, 2))  # bf16 logits are not compared, but weights are


@operation()
def copied(walker: Walker, rng: random.Random) -> None:
    walker.model = copy.deepcopy(walker.model)


@operation()
def pickled(walker: Walker, rng: random.Random) -> None:
    buffer = io.BytesIO()
    torch.save(walker.model, buffer)
    buffer.seek(0)
    walker.model = torch.load(buffer, weights_only=False)


@operation()
def to_dtype(walker: Walker, rng: random.Random) -> Any:
    """Through float64 and back; float64 is nothing that the fused ops take."""
    walker.model.to(torch.float64)
    with torch.no_grad():
        logits = walker.model(input_ids=tokens(1, 2)).logits
    walker.model.to(torch.float32)
    for parameter in walker.experts() if walker.double else ():
        parameter.data = parameter.data.double()
    return logits


@operation()
def merge(walker: Walker, rng: random.Random) -> None:
    if walker.api == "peft":
        (walker.model.merge_adapter if rng.random() < 0.5 else walker.model.merge_and_unload)()


@operation()
def unload(walker: Walker, rng: random.Random) -> Any:
    if walker.api != "peft" or rng.random() < 0.5:
        return None
    base = walker.model.unload()
    with torch.no_grad():
        logits = base(input_ids=tokens(1, 3)).logits
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    walker.in_place = False
    walker.model = walker.wrapped(base, rng)
    return logits


@operation()
def hook_for_a_moment(walker: Walker, rng: random.Random) -> None:
    layers = [m for m in walker.model.modules() if hasattr(m, "loraswitch_A")]
    layer = rng.choice(layers)
    handle = layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.5)
    with torch.no_grad():
        walker.model(input_ids=tokens(1, 1))
    handle.remove()


# --------------------------------------------------------------------------------------------------------- comparing


def same(one: Any, other: Any, tolerance: float, where: str) -> None:
    if type(one) is not type(other):
        raise AssertionError(f"{where}: {one} is not {other}")
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        if one.is_floating_point():
            difference = (one - other).norm() / other.norm().clamp(min=1e-3)
            if not difference <= tolerance:
                raise AssertionError(f"{where}: off by {float(difference):.1e}")
        else:
            assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), f"{where}: {set(one) ^ set(other)}"
        for key in one:
            same(one[key], other[key], tolerance, f"{where}, {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, tolerance, f"{where}[{i}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=tolerance, abs=1e-5), where
    else:
        assert one == other, f"{where}: {one} is not {other}"


@torch.no_grad()
def seen(walker: Walker, rng: random.Random) -> dict[str, Any]:
    """Everything that is compared after a step; logits first, which are what a stale copy would change."""
    model = walker.model
    inputs = [tokens(1, 1, seed=rng.randrange(100)), tokens(*rng.choice([(1, 5), (2, 1), (6, 8)]))]
    with torch.inference_mode() if rng.random() < 0.3 else nullcontext():
        logits = [model(input_ids=each).logits.clone() for each in inputs]
    return {
        "logits": logits,
        "state_dict": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": {name: (type(module).__name__, module.training) for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "buffers": sorted(name for name, _ in model.named_buffers()),
        "adapters": walker.loaded(),
        "active": {
            n: (m.active_adapters, m.disable_adapters) for n, m in model.named_modules() if hasattr(m, "loraswitch_A")
        },
        "printed": repr(model),
    }


Step = tuple[str, int]


def take(steps: list[Step], api: str, double: bool) -> str | None:
    """What goes wrong on the way, and at which step; None if nothing does."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        walkers = [Walker(fuses, api, double, Path(folder)) for fuses in (True, False)]
        for number, (name, seed) in enumerate(steps):
            results = [_outcome(walker, name, seed) for walker in walkers]
            try:
                same(*results, 1e-3, "result")
                same(*[seen(walker, random.Random(seed)) for walker in walkers], 1e-3, "model")
            except Exception as error:
                return f"step {number}, {name}: {type(error).__name__}: {error}"
    return None


def _outcome(walker: Walker, name: str, seed: int) -> Any:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    within = torch.inference_mode() if rng.random() < 0.3 and name in SERVED else nullcontext()
    try:
        with within:
            return OPERATIONS[name][0](walker, rng)
    except Exception as error:
        walker.model.eval()
        return type(error).__name__, str(error).partition(str(walker.folder))[0].partition("{")[0]  # sets have no order


def shortest(steps: list[Step], api: str, double: bool) -> list[Step]:
    """A tail of `steps` that still fails, and of it only what is needed."""
    length = 1
    while length < len(steps) and take(steps[-length:], api, double) is None:
        length *= 2
    tail = steps[-length:]
    for i in reversed(range(len(tail) - 1)):
        without = tail[:i] + tail[i + 1 :]
        if take(without, api, double) is not None:
            tail = without
    return tail


def walk(seed: int, api: str, double: bool) -> list[Step]:
    rng = random.Random(f"{seed} {api} {double}")
    names, weights = zip(*((name, weight) for name, (_, weight) in OPERATIONS.items()), strict=True)
    return [(name, rng.randrange(10**6)) for name in rng.choices(names, weights, k=STEPS)]


@pytest.fixture(autouse=True)
def silence() -> Any:
    before = tf_logging.get_verbosity()
    tf_logging.set_verbosity_error()
    yield
    tf_logging.set_verbosity(before)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("double", [False, True], ids=["", "casts"])
@pytest.mark.parametrize("api", ["peft", "transformers"])
@pytest.mark.slow
def test_a_fused_model_equals_one_that_never_was(api, double, seed, monkeypatch):
    join_anywhere(monkeypatch)
    steps = walk(seed, api, double)
    problem = take(steps, api, double)
    if problem is not None:
        failed = int(problem.removeprefix("step ").partition(",")[0])
        tail = shortest(steps[: failed + 1], api, double)
        pytest.fail(
            f"seed {seed}, {api}, casts {double}: {problem}\nfails as well with {take(tail, api, double)}:\n{tail}"
        )

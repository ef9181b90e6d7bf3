"""`LoRASwitchConfig`: `LoraConfig`'s words, and the few that routing needs."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass, field, fields
from typing import Any

import peft
from packaging.version import Version
from peft import LoraConfig
from peft.config import PeftConfig

from .patterns import BLOCK, ENDING, TimeLimit, check_target_pattern, compile_pattern, first_match, shown
from .peft_names import extend_peft_type
from .routing.options import RoutingOptions
from .saving.model_card import update_model_card
from .saving.safe_save import BROKEN_OFF, UNFINISHED, save_config

TRAINABLE_CHOICES = ("all", "router")
BIAS_CHOICES = ("none", "all", "loraswitch_only")
# Whether PEFT saves the biases of methods other than its own.
SAVES_BIASES = Version(peft.__version__) >= Version("0.21.0.dev0")
# Sanity bounds: beyond them a number is a typing mistake (or an attack on the memory), not a choice.
MAX_EXPERTS = 4096
MAX_RANK = 65536  # also of all experts of one linear together
MAX_SCALE, MIN_SCALE = 65504.0, 2.0**-126  # the largest float16, the smallest normal float32
MAX_COEFFICIENT = 1e6
MAX_BLOCKS = 65536
MAX_NAME = 4096
MAX_NAMES = 16384  # of modules_to_save: a module each
MAX_EMBEDDINGS = 64  # of trainable_token_indices
MAX_EXPERT_NAME = 200
BASE = "base"  # what the base expert is called


@dataclass
class LoRASwitchConfig(PeftConfig):
    """Configuration of a LoRA-Switch adapter: `num_experts` LoRA experts on every adapted linear, one router that decides
    once per token, all layers follow (arXiv 2405.17741).

    For token t an adapted linear computes `y = W x + b + s * sum_j g_tj B[e_tj] A[e_tj] x` with `s = lora_alpha / r` (or
    `lora_alpha / sqrt(r)` with `use_rslora`), the `top_k` experts `e_tj` and gates `g_tj` that the router picked for t, and
    the `num_shared_experts` shared ones with gate 1 / top_k (arXiv 2401.06066).
    Fields that `LoraConfig` has too mean the same here. Every field is validated when the config is made.

    Raises:
        ValueError: a field is out of range, or unknown (a file written by a newer version). The message names the field.

    Example:
        ```py
        from peft import get_peft_model
        from peft_loraswitch import LoRASwitchConfig

        model = get_peft_model(model, LoRASwitchConfig(r=8, num_experts=8, top_k=2, target_modules="all-linear"))
        ```
    """

    r: int = field(
        default=8, metadata={"help": "Rank of each expert, >= 1. Trainable parameters grow with num_experts * r."}
    )
    num_experts: int = field(
        default=8,
        metadata={"help": "Number of LoRA experts E on every adapted linear, >= 1. 1 with top_k=1 is plain LoRA."},
    )
    expert_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the num_experts experts, in their order, for statistics, the model card and export_expert. None "
            "(default): they have none. With base_expert=True none of them is called base, which is that one's name."
        },
    )
    top_k: int = field(
        default=2,
        metadata={
            "help": "Experts used per token, 1 <= top_k <= num_experts. Cost at decode time grows with top_k * r."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={
            "help": "Experts are taken, the likeliest first, until their probabilities (the softmax over all of the router's "
            "choices) sum to at least top_p: at least one, at most top_k. In (0, 1]; 1.0 (default) always takes top_k. An expert "
            "that is not taken costs nothing at decode time. normalize_gates counts those that are taken; where that is one, "
            "its gate is the hard gate."
        },
    )
    num_shared_experts: int = field(
        default=0,
        metadata={
            "help": "Experts that every token uses with gate 1 / top_k, besides the routed ones, >= 0. Each adds r to the rank "
            "at work on every token. With router_module they also adapt the linears before it."
        },
    )
    normalize_gates: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the gates of the chosen (not of the shared) experts are rescaled to sum to 1. None (default) means "
            "True for top_k > 1 and False for top_k = 1. True with top_k = 1 is the hard gate: exactly 1, and in backward the "
            "softmax that it stands for (a straight-through gradient), so that the router trains."
        },
    )
    base_expert: bool = field(
        default=False,
        metadata={
            "help": "One more choice for the router, without weights: the backbone as it is. Where a token chooses it, nothing "
            "is added; with the hard gate (top_k = 1, normalize_gates = True) that token gets exactly the backbone. In the "
            "router's losses it counts as one more expert."
        },
    )
    router_module: str | None = field(
        default=None,
        metadata={
            "help": "Full name, or unique ending of the name, of the adapted linear whose input is routed, for instance "
            "'layers.8.self_attn.q_proj'. None (default): the adapted linear that runs first. With a deeper one the "
            "router sees context; linears before it (in the order of model.named_modules()) get the num_shared_experts "
            "shared experts alone, or with none are not adapted."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Linears to adapt: list of names or name endings, a regex (str), or 'all-linear'. None (default): "
            "PEFT's choice for this architecture's LoRA, or 'all-linear' where PEFT has none. All must see the same tokens."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears not to adapt: list of names or name endings, or a regex (str)."}
    )
    lora_alpha: float = field(default=8, metadata={"help": "Scale of the adapter, > 0: s = lora_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Rank-stabilised scale: s = lora_alpha / sqrt(r)."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the input of the experts (not of the router), in [0, 1)."}
    )
    bias: str = field(
        default="none",
        metadata={"help": "Which biases of the backbone train: 'none', 'all' or 'loraswitch_only' (adapted linears)."},
    )
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: A Kaiming-uniform, B zero (a fresh adapter changes nothing). 'gaussian': A normal with std 1/r, "
            "B zero. False: A and B random, for tests and benchmarks."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks that differ from r: {name ending or regex: rank}. Example: {'mlp.down_proj': 16}."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "lora_alpha values that differ: {name ending or regex: alpha}."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt (target_modules must be a list). None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the block list, if layers_to_transform is set and the name is unusual."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter, e.g. ['score']."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids whose embeddings train as well, as in LoraConfig."}
    )
    router_aux_loss_coef: float = field(
        default=0.01,
        metadata={
            "help": "Weight of the load-balance loss (Switch/Mixtral form, smallest value top_k) in the training loss, >= 0."
        },
    )
    router_z_loss_coef: float = field(
        default=0.001, metadata={"help": "Weight of the router z-loss, mean of logsumexp(logits)^2 (ST-MoE), >= 0."}
    )
    router_jitter: float = field(
        default=0.0,
        metadata={"help": "In training the router's input is multiplied by noise from [1 - j, 1 + j]; j in [0, 1)."},
    )
    router_decay: float = field(
        default=0.0,
        metadata={
            "help": "How much context the router sees, d in [0, 1]: the logits of token t are the mean of the router's logits of "
            "the real tokens i <= t of its sequence, weighted by d^n for n real tokens behind i, up to t. 0 (default): the "
            "token alone; 1: all tokens so far alike. About 1 / (1 - d) tokens count."
        },
    )
    trainable: str | list[str] | list[int] = field(
        default="all",
        metadata={
            "help": "Which weights of the adapter train: 'all'; 'router' alone, for experts that are good already; or a list of "
            "experts, by name or index: those alone, all else stays the same to the bit. What bias, "
            "modules_to_save and trainable_token_indices name trains either way. May be changed on a loaded adapter: "
            "model.peft_config[name].trainable = 'all', then model.set_adapter(name) and a new optimizer."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "On a model whose input and output embeddings are tied: what modules_to_save trains of the one is the "
            "other's too, as in LoraConfig."
        },
    )

    def __new__(cls, /, *args: Any, **kwargs: Any) -> LoRASwitchConfig:  # a file may have a field "cls"
        # PEFT drops config fields it does not know with a warning. A field of ours that is dropped changes the maths.
        if UNFINISHED in kwargs:
            raise ValueError(BROKEN_OFF)
        unknown = sorted(set(kwargs) - {f.name for f in fields(cls)})
        foreign = [name for name in unknown if name in {f.name for f in fields(LoraConfig)}]
        if foreign:
            raise ValueError(
                f"LoRASwitchConfig has no {', '.join(foreign)}: this part of LoraConfig has no counterpart in LoRA-Switch. "
                "Leave it out."
            )
        if unknown:
            raise ValueError(
                f"LoRASwitchConfig does not know the field(s) {', '.join(unknown)}. Check the spelling; if they come from "
                "adapter_config.json, the adapter was written by a newer version: pip install -U peft_loraswitch peft"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = extend_peft_type()
        self.check()

    def check(self) -> None:
        """Check every field; lists of names become sets. Runs at construction, and again before an adapter is injected,
        because fields may be set on a configuration that was loaded.

        Raises:
            ValueError: names the field, its value and what it may be.
        """
        self._check_routing()
        self._check_experts()
        self._check_targets()
        self._check_origin()

    def _check_routing(self) -> None:
        for name in ("num_experts", "top_k"):
            _require_int(name, getattr(self, name), MAX_EXPERTS)
        _require_int("num_shared_experts", self.num_shared_experts, MAX_EXPERTS, lower=0)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is larger than num_experts={self.num_experts}: lower top_k.")
        _require_float("top_p", self.top_p, low=0, high=1, low_open=True, high_open=False)
        if self.top_p < 1 and self.top_k == 1:
            raise ValueError(
                f"top_p={self.top_p} would change nothing with top_k=1, which takes one expert anyway: raise top_k, the most "
                "that a token takes, or leave top_p at 1.0."
            )
        _require_bool("base_expert", self.base_expert)
        if self.expert_names is not None:
            check_expert_names("expert_names", self.expert_names, self.num_experts, self.base_expert)
            self.expert_names = list(self.expert_names)
        if self.normalize_gates is None:
            self.normalize_gates = self.top_k > 1
        _require_bool("normalize_gates", self.normalize_gates)
        if self.router_module is not None and (not isinstance(self.router_module, str) or not self.router_module):
            raise ValueError(
                f"router_module={shown(self.router_module)} must be the name of an adapted linear, or None."
            )
        _require_float("router_jitter", self.router_jitter, low=0, high=1)
        _require_float("router_decay", self.router_decay, low=0, high=1, high_open=False)
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            _require_float(name, getattr(self, name), low=0, high=MAX_COEFFICIENT)
        _ = self.trained_experts

    def _check_experts(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if pattern is None:
                setattr(self, name, {})
            elif not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name}={shown(pattern)} must be a dict of name (ending or regex) to number.")
        _require_bool("use_rslora", self.use_rslora)
        _require_bool("ensure_weight_tying", self.ensure_weight_tying)
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        for name, rank in ranks.items():
            self._check_rank(name, rank)
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            self._check_scale(name, alpha, ranks)
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                compile_pattern(f"{name}[{shown(key)}]", key, ENDING)
        _require_float("lora_dropout", self.lora_dropout, low=0, high=1)
        if not (isinstance(self.init_weights, bool) or self.init_weights == "gaussian"):
            raise ValueError(f"init_weights={shown(self.init_weights)} is not one of True, False, 'gaussian'.")
        if self.bias not in BIAS_CHOICES:
            raise ValueError(f"bias={shown(self.bias)} is not one of {', '.join(BIAS_CHOICES)}.")
        if self.bias != "none" and not SAVES_BIASES:
            raise ValueError(
                f"bias={self.bias!r} needs PEFT 0.21 or newer: PEFT {peft.__version__} would train the biases and not save "
                "them. Use bias='none', or pip install -U peft."
            )

    def _check_rank(self, name: str, rank: Any) -> None:
        _require_int(name, rank, MAX_RANK)
        stacked = self.routing_options().num_stacked * rank
        if stacked > MAX_RANK:
            raise ValueError(
                f"{name}={rank} with num_experts={self.num_experts}, num_shared_experts={self.num_shared_experts} makes "
                f"{stacked:,} rows on every adapted linear; at most {MAX_RANK:,} are accepted. Lower one of them."
            )

    def _check_scale(self, name: str, alpha: Any, ranks: dict[str, int]) -> None:
        """What experts are multiplied with must be a number in the dtypes they come in."""
        _require_float(name, alpha, low=0, low_open=True, high=MAX_SCALE * MAX_RANK)
        for rank in {min(ranks.values()), max(ranks.values())}:
            scale = self.scale(alpha, rank)
            if not MIN_SCALE <= scale <= MAX_SCALE:
                raise ValueError(
                    f"{name}={alpha} makes a scale of {scale:.3g} at rank {rank}; it must be from {MIN_SCALE:.2g} to "
                    f"{MAX_SCALE:.0f}, beyond which float16 is infinite."
                )

    def rank_of(self, name: str, limit: TimeLimit | None = None) -> int:
        """The rank of each expert on the linear `name`: `r`, or what `rank_pattern` says. Give one `limit` for many names.

        Raises:
            ValueError: a pattern takes too long. Names the field.
        """
        key = self.matching_key("rank_pattern", name, limit)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str, limit: TimeLimit | None = None) -> float:
        """The same for `lora_alpha` and `alpha_pattern`."""
        key = self.matching_key("alpha_pattern", name, limit)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scale_of(self, name: str, limit: TimeLimit | None = None) -> float:
        """What the experts on the linear `name` are multiplied with."""
        return self.scale(self.alpha_of(name, limit), self.rank_of(name, limit))

    def matching_key(self, field: str, name: str, limit: TimeLimit | None = None) -> str | None:
        """The first key of `rank_pattern` or `alpha_pattern` (`field`) that matches the linear `name`, or None."""
        keys = getattr(self, field)
        return first_match(field, keys, name, limit or TimeLimit()) if keys else None

    def scale(self, alpha: float, rank: int) -> float:
        """What the experts of a linear with this `lora_alpha` and rank are multiplied with."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                check_target_pattern(name, value)
            elif value is not None:
                _require_names(name, value)
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not (name == "layers_pattern" and isinstance(value, str)):
                _require_names(name, value)
        if len(self.modules_to_save or ()) > MAX_NAMES:
            raise ValueError(f"modules_to_save has {len(self.modules_to_save or ()):,} names; at most {MAX_NAMES:,}.")
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            compile_pattern("layers_pattern", pattern, BLOCK)
        _require_indices("layers_to_transform", self.layers_to_transform)
        if isinstance(self.layers_to_transform, (list, tuple)) and len(self.layers_to_transform) > MAX_BLOCKS:
            raise ValueError(
                f"layers_to_transform has {len(self.layers_to_transform):,} indices; at most {MAX_BLOCKS:,}."
            )
        tokens = self.trainable_token_indices
        if isinstance(tokens, dict) and len(tokens) > MAX_EMBEDDINGS:
            raise ValueError(f"trainable_token_indices has {len(tokens):,} names; at most {MAX_EMBEDDINGS}.")
        for name, indices in tokens.items() if isinstance(tokens, dict) else [("", tokens)]:
            field = f"trainable_token_indices{[name] if name else ''}"
            _require_indices(field, indices, lists_only=True)
            if indices is not None and len(set(indices)) < len(indices):
                raise ValueError(f"{field}={shown(indices)} names a token twice.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} needs target_modules as a list of names, not as the str {shown(self.target_modules)}."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform.")

    def _check_origin(self) -> None:
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, os.PathLike)) or len(str(value)) > MAX_NAME):
                raise ValueError(f"{name}={shown(value)} must be a name of at most {MAX_NAME} characters, or None.")
        if not isinstance(self.auto_mapping, (dict, type(None))):
            raise ValueError(f"auto_mapping={shown(self.auto_mapping)} must be a dict, or None.")
        _require_bool("inference_mode", self.inference_mode)

    def routing_options(self) -> RoutingOptions:
        """The part of the configuration that routing itself needs."""
        return RoutingOptions(
            num_experts=self.num_experts,
            top_k=self.top_k,
            normalize_gates=bool(self.normalize_gates),
            num_shared_experts=self.num_shared_experts,
            base_expert=self.base_expert,
            top_p=float(self.top_p),
            jitter=self.router_jitter,
            decay=self.router_decay,
            aux_loss_coef=self.router_aux_loss_coef,
            z_loss_coef=self.router_z_loss_coef,
        )

    @property
    def trained_experts(self) -> list[int] | None:
        """The experts that train, by `trainable` as it is now: None for all and the router, [] for the router alone, else the
        indices of those that train without it.

        Raises:
            ValueError: `trainable` is none of its choices.
        """
        if isinstance(self.trainable, str) and self.trainable in TRAINABLE_CHOICES:
            return None if self.trainable == "all" else []
        names = self.expert_names or []
        experts: list[Any] = self.trainable if isinstance(self.trainable, list) else []
        indices = [names.index(expert) if isinstance(expert, str) and expert in names else expert for expert in experts]
        known = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.num_experts for i in indices)
        if not indices or not known or len(set(indices)) < len(indices):
            by_name = f"the names {', '.join(names)} and " if names else ""
            raise ValueError(
                f"trainable={shown(self.trainable)} is not one of {', '.join(TRAINABLE_CHOICES)}, nor a list of experts, each "
                f"once: {by_name}indices 0 to {self.num_experts - 1}."
            )
        return sorted(indices)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as they are saved: names in order, so that the same adapter is always the same file."""
        settings = {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}
        defaults = {"num_shared_experts": 0, "base_expert": False, "ensure_weight_tying": False, "trainable": "all"}
        for name, default in (*defaults.items(), ("expert_names", None), ("router_decay", 0.0), ("top_p", 1.0)):
            if settings[name] == default:  # so that versions before it still read adapters that do not use it
                del settings[name]
        return settings

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and bring the model card beside it up to date.

        Raises:
            OSError: it cannot be written (disk full); the adapter_config.json of before is then still complete.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is a file, not a folder.")
        os.makedirs(save_directory, exist_ok=True)
        write = functools.partial(super().save_pretrained, **kwargs)
        save_config(
            os.fspath(save_directory), write, functools.partial(update_model_card, save_directory, self.to_dict())
        )


def check_expert_names(field: str, names: Any, number: int, base_expert: bool = False) -> None:
    """Raise a ValueError unless `names` are distinct printable texts, `number` of them; with `base_expert` none is that one's."""
    _require_names(field, names)
    for name in names:
        if not name.isprintable() or not name.strip() or len(name) > MAX_EXPERT_NAME:
            raise ValueError(
                f"{field} holds {shown(name)}; a name has 1 to {MAX_EXPERT_NAME} printable characters, not only spaces."
            )
    if base_expert and BASE in names:
        raise ValueError(
            f"{field} holds '{BASE}', which with base_expert=True is the name of the choice to add nothing: give that expert "
            "another name."
        )
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice or isinstance(names, set):
        raise ValueError(
            f"{field}: {shown(twice or names)} must be a list that holds every name once, in the experts' order."
        )
    if len(names) != number:
        raise ValueError(f"{field} holds {len(names)} names for num_experts={number} experts: give one for each.")


def _require_int(name: str, value: Any, upper: int, lower: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not lower <= value <= upper:
        raise ValueError(f"{name}={shown(value)} must be a whole number from {lower} to {upper}.")


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be True or False.")


def _require_float(
    name: str, value: Any, low: float, high: float, low_open: bool = False, high_open: bool = True
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not (low <= value <= high) or (low_open and value == low) or (high_open and value == high):
        brackets = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{name}={shown(value)} must be a number in {brackets[0]}{low}, {high:.10g}{brackets[1]}.")


def _require_names(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name}={shown(value)} must be a list of names.")


def _require_indices(name: str, value: Any, lists_only: bool = False) -> None:
    indices = [value] if isinstance(value, int) and not lists_only else value
    ok = indices is None or isinstance(indices, (list, tuple))
    if not ok or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices or ()):
        raise ValueError(f"{name}={shown(value)} must be a list of whole numbers from 0 on.")

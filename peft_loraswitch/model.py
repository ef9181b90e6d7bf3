"""The tuner: which linears become `LoRASwitchLinear`, which of them routes, and PEFT's calls around that."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import (
    BaseTuner,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from . import hooks, integrations
from .adapted_layers import adapted_layers
from .config import LoRASwitchConfig
from .inference.fuse import fuse, fuse_new_layers, refresh_fused, unfuse
from .layer import CANNOT_MERGE, LoRASwitchLayer, LoRASwitchLinear
from .loading.load import check_experts_being_loaded, check_file_being_loaded, injecting, select_tensors
from .mixed import check_batch_size, check_given, mixed_batch
from .reporting.report import RoutingReport, routing_report
from .router_inputs import AT_A_TIME
from .routing.frame import RoutingState
from .routing.statistics import RoutingRecorder, summary_of
from .switching import (
    NoConfigs,
    check_can_be_active,
    inherit_switched_off,
    remove_adapter,
    tell_wrappers,
)
from .targets.linears import is_time_first
from .targets.plan import InjectionPlan, plan_injection
from .targets.selection import selects
from .targets.tied_embeddings import tied_names
from .targets.trained_in_full import train_in_full


class LoRASwitchModel(BaseTuner):
    """PEFT's tuner of LoRA-Switch (arXiv 2405.17741): replaces linears of a backbone by `LoRASwitchLinear`. It is made by
    `get_peft_model(model, LoRASwitchConfig(...))`; users call it through the `PeftModel` that this returns.

    Args:
        model: the backbone, any `nn.Module`; adapted linears must all see the same tokens.
        peft_config: a `LoRASwitchConfig`.
        adapter_name: name of the adapter.
        low_cpu_mem_usage (keyword): make the adapter's weights on the meta device (to be loaded afterwards).

    Raises:
        ValueError: the adapter exists already, or the configuration selects modules that cannot be adapted or do not see the
            same tokens. The message names them. The model is then unchanged.
    """

    prefix = "loraswitch_"
    tuner_layer_cls = LoRASwitchLayer
    _plan: InjectionPlan
    _injected: LoRASwitchConfig | None = None  # the configuration of the adapter that is being injected
    # deberta-v2's query_proj and pooler see something else than tokens (see targets/linears.py)
    target_module_mapping: dict[str, Any] = {
        **TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
        "deberta-v2": ["value_proj", "attention.output.dense", "intermediate.dense", "output.dense"],
    }

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # here, because PEFT's constructor overwrites the configuration of the adapter that is there
        if any(adapter_name in layer.loraswitch_A for layer in adapted_layers(model)):
            raise ValueError(
                f"The adapter '{adapter_name}' exists already: delete it first, or give another adapter_name."
            )
        if isinstance(model, PeftModel) and adapted_layers(model):
            raise ValueError(
                "The model has a LoRA-Switch adapter already, and get_peft_model would wrap it once more: add the next one by "
                f"model.add_adapter('{adapter_name}', config)."
            )
        # A PeftModel passes a dictionary, and calls the backbone through this module from then on. inject_adapter_in_model (also
        # behind Transformers' add_adapter) passes one configuration and lets go of this module: the backbone is all there is.
        object.__setattr__(self, "_is_kept", isinstance(peft_config, dict))
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    @property
    def _mode(self) -> bool:
        """Whether new layers are in training mode: as the module is that the user holds."""
        return self.training if self._is_kept else self.model.training

    # ------------------------------------------------------------------------------------------ injection

    def _prepare_adapter_config(self, peft_config: LoRASwitchConfig, model_config: dict[str, Any]) -> LoRASwitchConfig:
        if peft_config.target_modules is None:
            targets = self.target_module_mapping.get(str(model_config.get("model_type")), "all-linear")
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[assignment]
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT has entered the configuration already: taken out, so that what a failure goes back to is the state without it
        config: Any = self.peft_config.pop(adapter_name)
        integrations.install_card_patches()
        with injecting(self, config):
            prepared = self._prepare_adapter_config(config, self.get_model_config(model))
            prepared.check()
            self._plan = plan_injection(model, prepared, adapter_name, kwargs.get("state_dict"))
            check_experts_being_loaded(model, prepared, self._plan.adapted, self._plan.router, self._plan.before)
            self._injected = config
            try:
                self.peft_config[adapter_name] = seen_by_peft = _for_peft(config)
                # inference mode off: what a server loads within it can still be trained, moved and changed outside
                with torch.inference_mode(False), train_in_full(self, model, config, adapter_name):
                    super().inject_adapter(model, adapter_name, *args, **kwargs)
            finally:
                self._injected = None
            self.peft_config[adapter_name] = config
            config.target_modules = seen_by_peft.target_modules  # many names have become few endings
            check_file_being_loaded(model, config, adapter_name)
            state = routing_state(model)
            assert state is not None
            hooks.connect(state, model, adapted_layers(model))
            fuse_new_layers(model)
            tell_wrappers(model, self.active_adapters, config.inference_mode)
            inherit_switched_off(model)

    def _cast_adapter_dtype(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):  # as above
            super()._cast_adapter_dtype(*args, **kwargs)
        for layer in adapted_layers(self.model):
            layer.tie_to_stack()

    def _check_target_module_exists(self, config: LoRASwitchConfig, key: str) -> Any:
        return selects(self._injected or config, key)

    def _check_tied_modules(self, model: nn.Module, peft_config: LoRASwitchConfig) -> None:
        super()._check_tied_modules(model, self._injected or peft_config)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # PEFT finds none where an adapter trains the input embeddings in full, and would not tie those of the next one
        return super()._get_module_names_tied_with_embedding() or tied_names(self.model)[1:]

    def _add_modules_to_save_to_tie(self, peft_config: LoRASwitchConfig, tied_weight_keys: list[str]) -> None:
        """What `ensure_weight_tying` asks for: PEFT's LoRA knows how."""
        LoraModel._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)  # type: ignore[arg-type]

    def _create_and_replace(
        self,
        config: LoRASwitchConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key not in self._plan.adapted:  # runs before the router: see LoRASwitchConfig.router_module
            return
        settings: dict[str, Any] = {
            "config": self._injected or config,  # not PEFT's copy: what is changed in it later counts
            "r": self._plan.ranks.get(current_key, config.r),
            "lora_alpha": self._plan.alphas.get(current_key, config.lora_alpha),
            "is_router": current_key == self._plan.router,
            "is_routed": current_key not in self._plan.before,
        }
        if isinstance(target, LoRASwitchLinear):
            target.update_layer(adapter_name, **settings)
            return
        # the first layer brings it, the others find it there
        state = routing_state(self.model) or RoutingState(is_time_first(self.model))
        settings |= {"training": self._mode, **_quantization_kwargs(self)}
        layer = LoRASwitchLinear(target, adapter_name, current_key, state, **settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # an additional adapter is not trainable by itself
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, LoRASwitchLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: PEFT would also assign weight and bias, which not every quantised linear has
            setattr(parent, child_name, new_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT 0.20 calls self.model.forward here, which would pass over the hooks that open and close the frame.
        state = routing_state(self.model)
        if state is not None and state.adapter_names is not None:
            check_batch_size(state.adapter_names, args, kwargs)
        return self.model(*args, **kwargs)

    # -------------------------------------------------------------------------------------- active adapters

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        check_can_be_active(self.model, adapter_name)
        if adapter_name:
            super().set_adapter(adapter_name, *args, **kwargs)
        else:  # PEFT's call after an injection, if every adapter that was there has been deleted
            self.active_adapter = []
            for layer in adapted_layers(self.model):
                layer.set_adapter([])
            tell_wrappers(self.model, [])

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the active one, another adapter becomes active, if there is one.

        Raises:
            ValueError: there is no adapter of this name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"Adapter {adapter_name} does not exist: choose from {', '.join(self.peft_config) or 'none'}."
            )
        self.active_adapter = remove_adapter(self.model, adapter_name)
        config = self.peft_config.pop(adapter_name)
        if not self.peft_config:
            self.peft_config = NoConfigs(config)
            self.model.peft_config = self.peft_config

    # ---------------------------------------------------------------------------------------- statistics

    def router_stats(self, adapter_name: str | None = None, reset: bool = False) -> dict[str, Any]:
        """Routing statistics of the training forwards since the last reset, over real tokens (padding is not counted).

        Args:
            adapter_name: which adapter; may be left out if only one has been trained.
            reset: start counting anew afterwards.

        Returns:
            dict: `tokens`, `load`, `entropy` and more, as the function `router_stats` of the package says.

        Raises:
            ValueError: the name is unknown or ambiguous.
        """
        return router_stats(self.model, adapter_name, reset)

    def record_routing(self) -> Any:
        """Context manager: counts the routing of every forward within it, also in eval mode and under `no_grad`.

        Yields:
            RoutingRecorder: its `summary(adapter_name=None)` returns the dict of `router_stats()`, for these forwards alone.
        """
        return record_routing(self.model)

    def routing_report(
        self,
        texts: str | Sequence[str],
        tokenizer: Any = None,
        adapter_name: str | None = None,
        max_length: int | None = None,
        batch_size: int = AT_A_TIME,
    ) -> RoutingReport:
        """Have the model read texts, and tell which experts each token gets: see the function `routing_report`.

        Args:
            texts: a text or several.
            tokenizer: of the backbone. None: the one that stands where the backbone was loaded from.
            adapter_name: which adapter; may be left out if there is only one.
            max_length: tokens of a text that are read. None: all.
            batch_size: texts that are read at a time.

        Returns:
            RoutingReport: `print(report)`, `report.save("routes.html")`, and the numbers as attributes.

        Raises:
            ValueError: a text is empty, the adapter is unknown, ambiguous or not active, or there is no tokenizer.
        """
        return routing_report(self.model, texts, tokenizer, adapter_name, max_length, batch_size)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a sum of adapters that pick experts for every token is no such adapter.

        Raises:
            ValueError: always, and says what to do.
        """
        raise ValueError(
            "A LoRA-Switch adapter picks experts for every token, so a weighted sum of such adapters is none. export_expert() "
            "makes plain LoRAs of the experts: from_loras() puts those side by side, and PEFT's add_weighted_adapter() sums them."
        )

    # ------------------------------------------------------------------------------------- mixed batches

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around forward and generate: takes `adapter_names`, one adapter per sample of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        state = routing_state(self.model)
        if state is not None:
            for given in state.given.values():
                check_given(given, args, kwargs)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names cannot be used in training mode: call model.eval() first.")
        state = _require_state(self.model)
        with mixed_batch(self.model, state, self.peft_config, adapter_names, args, kwargs):
            yield

    # ----------------------------------------------------------------------------------- faster inference

    def fuse_for_inference(
        self, strategy: Literal["auto", "fused", "merge"] = "auto", in_place: bool = False, join_weights: bool = False
    ) -> Any:
        """Compute the adapted linears and their experts by fused ops: the same outputs to the rounding of the dtype, faster.

        Adapters and weights may change while a model is fused; see `refresh_fused` for what has to be announced.

        Args:
            strategy: "fused": base weights and experts in one pass, nothing is merged, and the backbone is not copied. "merge":
                the method of arXiv 2405.17741, which merges the experts of each single token into all weights before it runs;
                needs a second copy of the adapted weights. "auto": "fused" on a CUDA GPU and on a CPU, where it
                makes the decoding of one sequence faster; elsewhere it gains nothing, and the model stays as it is.
            in_place: with "merge": merge into the backbone's own weights (a copy on the host is kept for `unfuse()`). Each
                token adds a rounding error: docs/kernel_log.md has the measured drift.
            join_weights: with "fused" on a CUDA GPU, for compiled decoding of large batches (65 to 256 tokens; from 33 on GPUs
                other than an H100 or H200): move the weights of linears that receive the same tensor (q, k, v; gate, up) into
                one matrix, so that a library multiplies once for all of them. Parameters keep their values and names, and have
                memory of their own again after `unfuse()`. CUDA graphs captured before, and tensors taken by `.data` or
                `state_dict()` before, do not follow.

        Returns:
            Fusion: has `strategy`, `reason` (why kernels are not used, or None), `groups` (names of linears that share a
            launch) and `joined` (those of them whose weights lie in one matrix). As a context manager it unfuses at the end
            of the block.

        Raises:
            ValueError: an unknown strategy, `in_place` without "merge", `join_weights` with it, or layers that "merge" cannot
                serve.
            RuntimeError: the model is fused already.
        """
        return fuse(self.model, strategy, in_place, join_weights)

    def unfuse(self) -> None:
        """Undo `fuse_for_inference()`; weights are then what they were, bit for bit. Does nothing if the model is not fused."""
        unfuse(self.model)

    def refresh_fused(self) -> None:
        """Make a fused model use what was written to its weights. Does nothing if the model is not fused.

        Needed only after writes that PyTorch does not count (NumPy, DLPack, own kernels, a flat buffer that parameters are parts
        of), and after any write if nothing but compiled code runs afterwards. Everything else, the next forward sees by itself.
        """
        refresh_fused(self.model)

    # -------------------------------------------------------------------------------- merging, unloading

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def unload(self) -> nn.Module:
        """Remove every adapter and return the backbone (`nn.Module`), unfused and without hooks of this package."""
        self.unfuse()
        state = routing_state(self.model)
        if state is not None:
            hooks.disconnect(state)
        return super().unload()

    # ------------------------------------------------------------------------------------------- loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: LoRASwitchConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return select_tensors(model, config, adapter_name, remapped)


def _for_peft(config: LoRASwitchConfig) -> LoRASwitchConfig:
    """The configuration as PEFT gets to see it while it injects the adapter: without what is done here in its place."""
    seen = copy.copy(config)
    seen.rank_pattern, seen.alpha_pattern = {}, {}
    seen.modules_to_save = seen.trainable_token_indices = None
    return seen


def _quantization_kwargs(tuner: BaseTuner) -> dict[str, Any]:
    try:
        from peft.utils import get_quantization_kwargs
    except ImportError:
        return {}
    # torchao's handle insists on knowing how to quantise merged weights again; there are none
    return {"get_apply_tensor_subclass": _never_quantised_again, **get_quantization_kwargs(tuner)}


def _never_quantised_again() -> None:
    raise ValueError(CANNOT_MERGE)


def routing_state(model: nn.Module) -> RoutingState | None:
    """The state that the adapted layers of `model` share, or None if it has none. At each forward: it looks no further than the
    first of them."""
    return next((module.routing_state for module in model.modules() if isinstance(module, LoRASwitchLinear)), None)


def _require_state(model: nn.Module) -> RoutingState:
    state = routing_state(model)
    if state is None:
        raise ValueError(f"{type(model).__name__} carries no LoRA-Switch adapter.")
    return state


def _only_state(model: nn.Module) -> RoutingState:
    """As `_require_state`; refuses a module that holds several adapted models, each with a routing of its own."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRASwitchLinear):
            found.setdefault(id(module.routing_state), name)
    if len(found) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} models with LoRA-Switch adapters, of which each routes for itself (their "
            f"first linears are {', '.join(found.values())}): give one of them."
        )
    return _require_state(model)


def router_stats(model: nn.Module, adapter_name: str | None = None, reset: bool = False) -> dict[str, Any]:
    """Routing statistics of the training forwards since the last reset, over real tokens.

    Args:
        model: a `PeftModel`, or any model with LoRA-Switch layers (`model.add_adapter` of transformers).
        adapter_name: which adapter; may be left out if only one has been trained.
        reset: start counting anew afterwards.

    Returns:
        dict: `tokens` (int); `load` (list of num_experts floats, share of the picks that went to each expert, sum 1);
        `entropy` (nats, of the router's softmax, mean over tokens; at most log(num_experts)); `dropped_experts` (indices
        of experts that no token picked); `mean_experts` (experts that a token used, mean over tokens: `top_k`, or fewer with
        `top_p` or a base expert, which does not count); `balance_loss` and `z_loss` (unweighted); `expert_names` if the adapter
        has them, in the order of `load`. Shared experts are not counted. A base expert counts as one more in entropy and losses,
        and has its share of the picks in `base_share`, so that this and `load` have the sum 1.

    Raises:
        ValueError: the model has no LoRA-Switch adapter, or holds several adapted models; the name is unknown or ambiguous.
    """
    state = _only_state(model)
    records: dict[str, Any] = {name: layer.loraswitch_record[name] for name, layer in state.router_layers.items()}
    stats = summary_of(records, adapter_name)
    if reset:
        for record in records.values():
            record.reset()
    return stats


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Count the routing of every forward of `model` within the block, also in eval mode and under `no_grad`.

    Args:
        model: a `PeftModel`, or any model with LoRA-Switch layers (`model.add_adapter` of transformers).

    Yields:
        RoutingRecorder: its `summary(adapter_name=None)` returns the dict of `router_stats()`, for these forwards alone; the
        name may be left out if only one adapter was used.

    Raises:
        ValueError: the model has no LoRA-Switch adapter, or holds several adapted models.

    Example:
        ```py
        with record_routing(model) as recorded:
            model.generate(**batch)
        print(recorded.summary()["load"])
        ```
    """
    state = _only_state(model)
    recorder = RoutingRecorder(
        {adapter: layer.loraswitch_record[adapter].emptied() for adapter, layer in state.router_layers.items()}
    )
    state.recorders.append(recorder)
    try:
        yield recorder
    finally:
        state.recorders.remove(recorder)

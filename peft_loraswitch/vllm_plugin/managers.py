"""vLLM's two managers of LoRAs, extended: the worker's reads an adapter's folder, the model's puts it into a slot.

`Placement` is what a LoRA-Switch adapter has beyond a LoRA. It stays with the LoRA that vLLM keeps in host memory, and is
written to the tables whenever that gets a slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import __version__
from ..routing.options import RoutingOptions
from . import internals
from .adapter_folder import Adapter, read_adapter, read_settings
from .masked_lora import RoutingWrapper, mask_wrapper
from .options import KEY, ServingOptions
from .routing_site import RoutingSite
from .routing_tables import RoutingTables
from .versions import unsupported
from .wide_lora import wide_a, wide_b, with_unrouted

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Placement:
    """Routing of one adapter: its settings, the linear that it routes at, and the router's weight there."""

    options: RoutingOptions
    site: str
    router: torch.Tensor


class LoRASwitchModelManager(internals.ModelManager):  # type: ignore[misc]
    """Also holds the routing tables, and the linears of this server at which adapters may route.

    Raises:
        ValueError: an option of `--additional-config` is wrong.
    """

    loraswitch_tables: RoutingTables | None = None  # None: nothing is routed here, for `loraswitch_reason`
    loraswitch_reason = ""
    loraswitch_runner: Any = None  # vLLM's model runner, once it has told

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        self.loraswitch_options = ServingOptions.read(vllm_config.additional_config)
        self.loraswitch_sites: dict[str, RoutingSite] = {}
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            self.loraswitch_reason = (
                "pipeline parallelism splits the model, and the decision made in one part does not reach the next: start the "
                "server with --pipeline-parallel-size 1, and --tensor-parallel-size for several GPUs"
            )
        self.loraswitch_no_context = internals.why_no_context(vllm_config)
        super().__init__(*args, vllm_config=vllm_config, **kwargs)
        internals.require(self, internals.MANAGER_ATTRIBUTES)
        if isinstance(vllm_config.additional_config, dict):
            # Part of the key under which vLLM keeps compiled models: one compiled without the plugin has no mask.
            vllm_config.additional_config = {**vllm_config.additional_config, f"{KEY}_version": __version__}

    # ------------------------------------------------------------------------------------------------ at start

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        if self.loraswitch_reason:
            return
        wrapper = internals.language_wrapper(self)
        internals.require(wrapper, internals.WRAPPER_ATTRIBUTES)
        if type(wrapper).__name__ not in internals.PUNICA_WRAPPERS:
            self.loraswitch_reason = f"the plugin does not know this device ({type(wrapper).__name__})"
            return
        self.loraswitch_tables = RoutingTables(
            slots=self.lora_slots,
            max_rank=self.lora_config.max_lora_rank,
            max_choices=self.loraswitch_options.max_experts,
            max_tokens=max_num_batched_tokens,
            device=self.device,
        )
        mask_wrapper(wrapper, self.loraswitch_tables)

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        if self.loraswitch_tables is None:
            return
        wrapper = internals.language_wrapper(self)
        linears = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, internals.BaseLinear) and module.punica_wrapper is wrapper
        }
        self.loraswitch_order = in_order_of_execution(linears)
        if not self.loraswitch_order:
            self.loraswitch_tables, self.loraswitch_reason = None, "the model has no linear that vLLM adapts"
            return
        first = self.loraswitch_order[0]
        declared = [self.loraswitch_find(name) for name in self.loraswitch_options.router_modules]
        for name in dict.fromkeys([first, *declared]):
            linear = linears[name]
            internals.require(linear, internals.LINEAR_ATTRIBUTES)
            in_features = linear.lora_a_stacked[0].shape[-1]
            site = RoutingSite(
                self.loraswitch_tables,
                in_features,
                first=name == first,
                begins=linear.tp_rank * in_features if is_sharded(linear) else 0,
                sum_shards=internals.sum_over_ranks if is_sharded(linear) else None,
            )
            linear.set_mapping(RoutingWrapper(wrapper, site))
            self.loraswitch_sites[name] = site

    def loraswitch_find(self, wanted: str) -> str:
        """The linear, packed as vLLM has it, that a name or an ending of one in `--additional-config` means.

        Raises:
            ValueError: none or several. Names it.
        """
        names = {name: name for name in self.loraswitch_order}
        names |= {part: name for name in self.loraswitch_order for part in self.packed_modules.get(name, ())}
        found = {packed for name, packed in names.items() if name == wanted or name.endswith(f".{wanted}")}
        if len(found) != 1:
            what = (
                f"means {sorted(found)}"
                if found
                else f"is no linear of this model, such as {self.loraswitch_order[0]!r}"
            )
            raise ValueError(
                f"--additional-config: {KEY}.router_modules: {wanted!r} {what}: give one full name for each."
            )
        return found.pop()

    # ------------------------------------------------------------------------------------------------- loading

    def loraswitch_convert(self, adapter: Adapter) -> tuple[dict[str, torch.Tensor], int, Placement]:
        """The adapter as tensors of a wide LoRA, that LoRA's rank, and the rest.

        Raises:
            ValueError: this server cannot serve it. Says why, and what to change.
        """
        options, folder = adapter.options, adapter.folder
        if self.loraswitch_tables is None:
            raise ValueError(f"{folder}: this server cannot serve LoRA-Switch adapters: {self.loraswitch_reason}.")
        if options.num_choices > self.loraswitch_tables.max_choices:
            raise ValueError(
                f"{folder}: the router chooses among {options.num_choices}; this server was started for at most "
                f"{self.loraswitch_tables.max_choices}: start it with "
                + self.loraswitch_options.advice(max_experts=options.num_choices)
            )
        packed = {linear: self.loraswitch_packed(folder, linear) for linear in adapter.experts}
        site = self._site_of(adapter, {name: parent for name, (parent, _) in packed.items()})
        router = adapter.router.float()
        in_features = internals.full_input(self.modules[site])
        if router.shape[1] != in_features:
            raise ValueError(_another_backbone(folder, adapter.router_linear, "router", router.shape[1], in_features))
        starts = self.loraswitch_order.index(site)
        self._check_all_blocks(adapter, self.loraswitch_order[starts + 1 :])
        tensors: dict[str, torch.Tensor] = {}
        widest = 1
        for linear, experts in adapter.experts.items():
            parent, part = packed[linear]
            self._check_sizes(folder, linear, experts.a, experts.b, parent, part)
            a, b, scale = experts.a, experts.b, experts.scale
            before = self.loraswitch_order.index(parent) < starts
            if before and experts.stacked == options.num_stacked and options.num_experts:
                raise ValueError(f"{folder}: '{linear}' runs before '{site}', which routes, and has routed experts.")
            if before:  # their mask is not made yet
                scale /= options.top_k
            elif experts.stacked < options.num_stacked:
                a, b = with_unrouted(a, options.num_experts), with_unrouted(b, options.num_experts)
            widest = max(widest, a.shape[0] * experts.rank)
            self._check_rank(folder, linear, a.shape[0], experts.rank)
            dtype = self.lora_config.lora_dtype
            tensors[f"base_model.model.{linear}.lora_A.weight"] = wide_a(a).to(dtype).contiguous()
            tensors[f"base_model.model.{linear}.lora_B.weight"] = wide_b(b, scale).to(dtype).contiguous()
        if options.decay:
            self._keep_sums(folder, options.decay)
        return tensors, widest, Placement(options, site, router)

    def _keep_sums(self, folder: str, decay: float) -> None:
        """Make room for the sums of routers that see context, if this is the first."""
        assert self.loraswitch_tables is not None
        kept, reason = self.loraswitch_tables.kept, self.loraswitch_no_context
        group = None if self.loraswitch_runner is None else internals.full_attention_group(self.loraswitch_runner)
        if not reason and group is None:
            reason = "no layer of this model keeps the keys of all tokens of a request, and the router's sums lie beside them"
        if reason:
            raise ValueError(f"{folder}: router_decay={decay} cannot be served by this server: {reason}.")
        assert group is not None
        internals.require_places(self.loraswitch_runner, group[0])
        try:
            size = kept.allocate(group[1])
        except RuntimeError as error:
            raise ValueError(
                f"{folder}: router_decay={decay} needs {4 * group[1] * (kept.max_choices + 1) / 2**20:.0f} MiB for the router's "
                "sums, which are not free: start the server with a lower --gpu-memory-utilization, or a smaller max_experts, "
                + self.loraswitch_options.advice(max_experts=8)
            ) from error
        if size:
            internals.logger.info(
                "LoRA-Switch: the sums of routers with router_decay take %.1f MiB beside the KV cache.", size / 2**20
            )

    def loraswitch_packed(self, folder: str, linear: str) -> tuple[str, int | None]:
        """vLLM's linear for one of the checkpoint, and which part of it that is, if it packs several.

        Raises:
            ValueError: vLLM does not adapt it.
        """
        name = internals.name_in_model(self, linear)
        for parent in self.loraswitch_order:
            parts = self.packed_modules.get(parent, [])
            if name in parts:
                return parent, parts.index(name)
        if name not in self.loraswitch_order:
            raise ValueError(
                f"{folder}: '{linear}' is no linear that this server adapts: the adapter was made for another backbone, or the "
                "server was started with --lora-target-modules that leave it out."
            )
        return name, None

    def _site_of(self, adapter: Adapter, packed: dict[str, str]) -> str:
        """The linear at which the adapter routes; a name of vLLM."""
        wanted = packed[adapter.router_linear]
        if not adapter.router_is_named:  # the file keeps the router with the first by name; the first to run decides
            routed = {packed[name] for name, experts in adapter.experts.items()}
            wanted = next(name for name in self.loraswitch_order if name in routed)
        if wanted not in self.loraswitch_sites:
            raise ValueError(
                f"{adapter.folder}: routes at '{wanted}', where this server does not: start it with "
                + self.loraswitch_options.advice(router_module=wanted)
            )
        return wanted

    def _check_all_blocks(self, adapter: Adapter, behind: list[str]) -> None:
        """An adapter of all blocks must be one of all of this model's: `behind`, those behind the router."""
        if not adapter.covers_all_blocks:
            return
        there = {internals.name_in_model(self, linear) for linear in adapter.experts}
        kinds = {without_block(name) for name in there}
        here = [part for name in behind for part in self.packed_modules.get(name, [name])]
        for name in here:
            if without_block(name) in kinds and name not in there:
                raise ValueError(
                    f"{adapter.folder}: has nothing for '{name}', but for others like it: the adapter was made for another "
                    "backbone."
                )

    def _check_sizes(
        self, folder: str, linear: str, a: torch.Tensor, b: torch.Tensor, parent: str, part: int | None
    ) -> None:
        expected = internals.full_input(self.modules[parent]), internals.full_output(self.modules[parent], part)
        for what, found, wanted in (("input", a.shape[2], expected[0]), ("output", b.shape[1], expected[1])):
            if wanted is not None and found != wanted:
                raise ValueError(_another_backbone(folder, linear, what, found, wanted))

    def _check_rank(self, folder: str, linear: str, experts: int, rank: int) -> None:
        wide = experts * rank
        if wide > self.lora_config.max_lora_rank:
            enough = next((value for value in RANKS if value >= wide), None)
            remedy = f"start the server with --max-lora-rank {enough}" if enough else f"vLLM takes at most {RANKS[-1]}"
            raise ValueError(
                f"{folder}: {experts} experts of rank {rank} on '{linear}' are a LoRA of rank {wide}, and this server has "
                f"max_lora_rank={self.lora_config.max_lora_rank}: {remedy}."
            )

    # ------------------------------------------------------------------------------------------------ activating

    def activate_adapter(self, lora_id: int) -> bool:
        placed = bool(super().activate_adapter(lora_id))
        if placed and self.loraswitch_tables is not None:
            slot = self.lora_index_to_id.index(lora_id)
            placement = getattr(self._registered_adapters[lora_id], "loraswitch_placement", None)
            for name, site in self.loraswitch_sites.items():
                site.place(slot, placement.router if placement is not None and placement.site == name else None)
            if placement is not None:
                self.loraswitch_tables.place(slot, placement.options)
        return placed


class LoRASwitchWorkerManager(internals.WorkerManager):  # type: ignore[misc]
    """Loads folders of both kinds."""

    _manager_cls = LoRASwitchModelManager

    def create_lora_manager(self, *args: Any, **kwargs: Any) -> Any:
        model = super().create_lora_manager(*args, **kwargs)
        internals.require(self, internals.WORKER_ATTRIBUTES)
        if not isinstance(self._adapter_manager, LoRASwitchModelManager):
            raise unsupported(f"it made a {type(self._adapter_manager).__name__}")
        return model

    def loraswitch_belongs_to(self, runner: Any) -> None:
        """What vLLM's model runner is asked where the tokens of a batch lie."""
        manager = self._adapter_manager
        manager.loraswitch_runner = runner
        if manager.loraswitch_tables is not None:
            manager.loraswitch_tables.kept.places = partial(internals.places, runner)

    def _load_adapter(self, lora_request: Any) -> Any:
        folder = internals.adapter_folder_of(lora_request.lora_path)
        settings = read_settings(folder)
        if settings is None:  # of another method, or not there: vLLM says so
            return super()._load_adapter(lora_request)
        tensors, rank, placement = self._adapter_manager.loraswitch_convert(read_adapter(folder, settings))
        lora = internals.make_lora(self, lora_request.lora_int_id, tensors, rank)
        lora.loraswitch_placement = placement
        return lora


def in_order_of_execution(linears: dict[str, Any]) -> list[str]:
    """The names of vLLM's linears in the order in which they run.

    Modules stand in this order in vLLM's models, but for some that list a block's output projection before its input
    projection. Only the latter are column-parallel, and within a block they run first.
    """
    names = list(linears)
    first_of_block: dict[str, int] = {}
    for place, name in enumerate(names):
        first_of_block.setdefault(name.rpartition(".")[0], place)

    def key(name: str) -> tuple[int, bool, int]:
        row_parallel = isinstance(linears[name], internals.RowParallelLinear)
        return first_of_block[name.rpartition(".")[0]], row_parallel, names.index(name)

    return sorted(names, key=key)


def without_block(name: str) -> str:
    """The name of a linear, the same for all blocks."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def is_sharded(linear: Any) -> bool:
    """Whether this process sees a part of the linear's input only."""
    return isinstance(linear, internals.RowParallelLinear) and linear.tp_size > 1


def _another_backbone(folder: str, linear: str, what: str, found: int, wanted: int) -> str:
    return (
        f"{folder}: the {what} size of '{linear}' is {found}, this model's is {wanted}: the adapter was made for another "
        "backbone."
    )

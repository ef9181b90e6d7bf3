"""Everything of vLLM that the plugin touches, in this one file, and whether it is as it must be.

vLLM has no interface for adapters of other kinds. All names here are private and may change with any release; so the supported
versions are a closed range, each end of which is tested, and within it every name is looked up, with the arguments that it
must take, before anything is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple

import torch
from vllm import forward_context
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.logger import init_logger
from vllm.lora import model_manager, utils, worker_manager
from vllm.lora.layers import base_linear, row_parallel_linear
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper import punica_base
from vllm.v1.worker import lora_model_runner_mixin

from .kept_sums import Places
from .versions import unsupported

# What is called or replaced, and the arguments that it must take.
FUNCTIONS: list[tuple[Any, str, tuple[str, ...]]] = [
    (lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", ("vllm_config", "device", "embedding_modules")),
    (lora_model_runner_mixin.LoRAModelRunnerMixin, "load_lora_model", ("self", "model", "vllm_config", "device")),
    (forward_context, "get_forward_context", ()),
    (forward_context, "is_forward_context_available", ()),
    (forward_context, "ForwardContext", ("slot_mapping",)),
    (worker_manager.LRUCacheWorkerLoRAManager, "_load_adapter", ("self", "lora_request")),
    (worker_manager.LRUCacheWorkerLoRAManager, "create_lora_manager", ("self", "model", "vllm_config")),
    (model_manager.LRUCacheLoRAModelManager, "__init__", ("self", "model", "max_num_batched_tokens", "vllm_config")),
    (model_manager.LRUCacheLoRAModelManager, "_init_punica_wrapper", ("self", "max_num_batched_tokens", "vllm_config")),
    (model_manager.LRUCacheLoRAModelManager, "_create_lora_modules", ("self",)),
    (model_manager.LRUCacheLoRAModelManager, "activate_adapter", ("self", "lora_id")),
    (punica_base.PunicaWrapperBase, "add_shrink", ("self", "y", "x", "lora_a_stacked", "scale")),
    (punica_base.PunicaWrapperBase, "add_expand", ("self", "y", "x", "lora_b_stacked", "output_slices")),
    (punica_base.PunicaWrapperBase, "add_lora_linear", ("self", "y", "x", "lora_a_stacked", "lora_b_stacked")),
    (base_linear.BaseLinearLayerWithLoRA, "set_mapping", ("self", "punica_wrapper")),
    (utils, "parse_fine_tuned_lora_name", ("name", "weights_mapper")),
    (utils, "get_adapter_absolute_path", ("lora_path",)),
    (PEFTHelper, "from_dict", ("config_dict",)),
    (
        LoRAModel,
        "from_lora_tensors",
        ("lora_model_id", "tensors", "peft_helper", "device", "dtype", "model_vocab_size", "weights_mapper"),
    ),
]
# Of CPUs, and of CUDA and ROCm; those of other devices compute elsewhere than in the functions above.
PUNICA_WRAPPERS = ("PunicaWrapperCPU", "PunicaWrapperGPU")
# What objects have once they are made.
MANAGER_ATTRIBUTES = (
    "model", "modules", "packed_modules", "punica_wrapper_mapping", "lora_index_to_id", "lora_config", "device", "supports_mm",
    "_registered_adapters", "lora_slots",
)  # fmt: skip
WORKER_ATTRIBUTES = ("_adapter_manager", "_lora_model_cls", "_manager_cls", "lora_config", "vocab_size")
WRAPPER_ATTRIBUTES = ("_token_lora_indices",)
GPU_WRAPPER_ATTRIBUTES = ("token_mapping_meta", "lora_config")
RENAMING = ("get_rename_mapper", "get_unstacked_mapper")  # of a model's WeightsMapper, newest name first
# Of the two model runners, where they tell attention where tokens lie.
RUNNER_ATTRIBUTES = ("positions", "query_start_loc", "input_batch")
RUNNER_2_ATTRIBUTES = ("input_buffers", "block_tables")
# KV caches whose blocks stay as long as their request, one place for each token.
FULL_ATTENTION = ("FullAttentionSpec", "MLAAttentionSpec", "TQFullAttentionSpec")
LINEAR_ATTRIBUTES = ("base_layer", "lora_a_stacked", "lora_b_stacked", "punica_wrapper", "tp_rank", "tp_size")

BaseLinear = base_linear.BaseLinearLayerWithLoRA
RowParallelLinear = row_parallel_linear.RowParallelLinearWithLoRA
ModelManager = model_manager.LRUCacheLoRAModelManager
WorkerManager = worker_manager.LRUCacheWorkerLoRAManager
logger = init_logger("vllm.loraswitch")
parse_name = utils.parse_fine_tuned_lora_name
adapter_folder_of = utils.get_adapter_absolute_path


def check() -> None:
    """Raise an UnsupportedVLLM unless all functions are there and take what they must."""
    problems = [problem for owner, name, wanted in FUNCTIONS if (problem := _problem(owner, name, wanted))]
    if problems:
        raise unsupported("; ".join(problems))


def _problem(owner: Any, name: str, wanted: Iterable[str]) -> str | None:
    where = f"{getattr(owner, '__module__', '')}.{getattr(owner, '__qualname__', owner.__name__)}.{name}".lstrip(".")
    function: Callable[..., Any] | None = getattr(owner, name, None)
    if function is None:
        return f"{where} is not there"
    missing = [argument for argument in wanted if argument not in inspect.signature(function).parameters]
    return f"{where} does not take {', '.join(missing)}" if missing else None


def require(thing: Any, attributes: Iterable[str]) -> None:
    """Raise an UnsupportedVLLM unless `thing`, an object of vLLM, has `attributes`."""
    missing = [name for name in attributes if not hasattr(thing, name)]
    if missing:
        raise unsupported(f"{type(thing).__name__} has no {', '.join(missing)}")


def replace_worker_manager(manager: type) -> None:
    """Have vLLM's workers make `manager` in place of their own, and call its `loraswitch_belongs_to(model runner)`."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
    mixin = lora_model_runner_mixin.LoRAModelRunnerMixin
    load = mixin.load_lora_model
    if getattr(load, "tells_runner", False):
        return

    @wraps(load)
    def load_lora_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(self, *args, **kwargs)
        if isinstance(self.lora_manager, manager):
            self.lora_manager.loraswitch_belongs_to(self)  # type: ignore[attr-defined]
        return model

    load_lora_model.tells_runner = True  # type: ignore[attr-defined]
    mixin.load_lora_model = load_lora_model


def full_input(linear: Any) -> int:
    """in_features of a linear, whatever part of it this process has."""
    return int(linear.base_layer.input_size)


def full_output(linear: Any, part: int | None) -> int | None:
    """out_features of a linear, or of one of the checkpoint's linears that it packs; None if that cannot be told."""
    base = linear.base_layer
    if hasattr(
        base, "total_num_kv_heads"
    ):  # one size for each of q, k, v; those that the base lists count copies of k and v
        value_size = getattr(base, "v_head_size", base.head_size)
        sizes = [
            base.total_num_heads * base.head_size,
            base.total_num_kv_heads * base.head_size,
            base.total_num_kv_heads * value_size,
        ]
    elif hasattr(base, "output_sizes"):
        sizes = list(base.output_sizes)
    else:
        sizes = [base.output_size]
    if part is None:
        return int(sum(sizes))
    return int(sizes[part]) if part < len(sizes) else None


def language_wrapper(manager: Any) -> Any:
    """The object through which the linears of the language model (not of an image encoder) compute their LoRAs."""
    key = manager.mm_mapping.language_model[0] if manager.supports_mm else model_manager.DEFAULT_LANGUAGE_WRAPPER_KEY
    return manager.punica_wrapper_mapping[key]


class LoRAGroups(NamedTuple):
    """How vLLM on a GPU tells the kernels of LoRAs which token has which one.

    order: int32 [tokens], those of one LoRA side by side.
    counts, starts, ids: int32, for each such group its tokens, where they begin in `order`, and its slot (-1: no LoRA).
    no_lora: bool [1], in host memory: no token has a LoRA.
    number: int32 [1], in host memory: how many groups to look at.
    """

    order: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    ids: torch.Tensor
    no_lora: torch.Tensor
    number: torch.Tensor


def has_lora_groups(wrapper: Any) -> bool:
    """Whether this wrapper is that of GPUs.

    Raises:
        UnsupportedVLLM: it is, but what it tells its kernels is not what it was.
    """
    if type(wrapper).__name__ != "PunicaWrapperGPU":
        return False
    require(wrapper, GPU_WRAPPER_ATTRIBUTES)
    require(wrapper.lora_config, ("specialize_active_lora",))
    meta = wrapper.token_mapping_meta
    require(meta, ("meta_args", "no_lora_flag_cpu"))
    if problem := _problem(type(meta), "meta_args", ("token_nums", "specialize_active_lora")):
        raise unsupported(problem)
    told = meta.meta_args(1, wrapper.lora_config.specialize_active_lora)
    if len(told) != 7 or told[5] is not meta.no_lora_flag_cpu or told[6].device.type != "cpu":
        raise unsupported(f"{type(meta).__name__}.meta_args does not give what it gave")
    return True


def no_lora_flag(wrapper: Any) -> torch.Tensor:
    """`LoRAGroups.no_lora` of the wrapper of GPUs."""
    flag: torch.Tensor = wrapper.token_mapping_meta.no_lora_flag_cpu
    return flag


def lora_groups(wrapper: Any, tokens: int) -> LoRAGroups:
    """What the wrapper of GPUs tells its kernels about the first `tokens` tokens."""
    _, order, counts, starts, ids, no_lora, number = wrapper.token_mapping_meta.meta_args(
        tokens, wrapper.lora_config.specialize_active_lora
    )
    return LoRAGroups(order, counts, starts, ids, no_lora, number)


def _renaming(model: Any) -> Any:
    """What renames linears of the checkpoint, without what packs them; None if nothing does."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for without_packing in RENAMING:
        if hasattr(mapper, without_packing):
            return getattr(mapper, without_packing)()
    if getattr(mapper, "orig_to_new_stacked", None):
        raise unsupported(f"{type(mapper).__name__} has none of {', '.join(RENAMING)}")
    return mapper


def name_in_model(manager: Any, linear: str) -> str:
    """What vLLM calls a linear of the checkpoint (without what it may be packed in)."""
    name, _ = parse_name(f"base_model.model.{linear}.lora_A.weight", _renaming(manager.model))
    return str(name)


def make_lora(worker: Any, lora_id: int, tensors: dict[str, Any], rank: int) -> Any:
    """The LoRA with these tensors, named as PEFT names them, of scale 1; on the CPU."""
    manager = worker._adapter_manager
    helper = PEFTHelper.from_dict({"r": rank, "lora_alpha": rank, "target_modules": []})
    return worker._lora_model_cls.from_lora_tensors(
        lora_model_id=lora_id,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=worker.lora_config.lora_dtype,
        model_vocab_size=worker.vocab_size,
        weights_mapper=_renaming(manager.model),
    )


def why_no_context(vllm_config: Any) -> str:
    """Why sums beside the KV cache would be wrong with this configuration; empty if they are right."""
    parallel = vllm_config.parallel_config
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector moves or offloads blocks of the KV cache, and the router's sums are not moved with them"
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism spreads a request's KV cache over processes: start the server without it"
    if parallel.use_ubatching:
        return "a batch is split in two (--enable-dbo): start the server without it"
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "--kv-sharing-fast-prefill leaves tokens out of a part of the model: start the server without it"
    if getattr(vllm_config.attention_config, "hisparse_config", None) is not None:
        return "HiSparse keeps blocks of the KV cache in host memory: start the server without it"
    if getattr(vllm_config.speculative_config, "enable_adaptive_verification", False):
        return "adaptive verification of drafts changes where tokens lie: start the server without it"
    return ""


def full_attention_group(runner: Any) -> tuple[int, int] | None:
    """Of a model runner: which group of layers of the KV cache keeps its blocks as long as a request lasts, and how many
    slots it has. None if there is none, or no KV cache."""
    config: Any = getattr(runner, "kv_cache_config", None)
    for index, group in enumerate([] if config is None else config.kv_cache_groups):
        spec = group.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", None)  # of each layer, where they differ in size alone
        kinds = [spec] if specs is None else list(specs.values())
        if all(_keeps_each_token(kind) for kind in kinds):
            return index, int(config.num_blocks) * int(spec.block_size)
    return None


def _keeps_each_token(spec: Any) -> bool:
    per_token = getattr(spec, "tokens_per_state", 1) == 1 and getattr(spec, "compress_ratio", 1) == 1
    return type(spec).__name__ in FULL_ATTENTION and per_token


def require_places(runner: Any, group: int) -> None:
    """Raise an UnsupportedVLLM unless `places` works."""
    is_second = hasattr(runner, "input_buffers")
    require(runner, RUNNER_2_ATTRIBUTES if is_second else RUNNER_ATTRIBUTES)
    if is_second:
        require(runner.input_buffers, ("query_start_loc", "positions"))
        require(runner.block_tables, ("input_block_tables", "slot_mappings", "block_sizes"))
    else:
        require(runner.query_start_loc, ("gpu",))
        require(runner.input_batch, ("block_table",))
        table = runner.input_batch.block_table[group]
        require(table, ("block_size", "block_table", "slot_mapping"))
        require(table.block_table, ("gpu",))
        require(table.slot_mapping, ("gpu",))


def places(runner: Any) -> Places | None:
    """Where the tokens of the present forward are, by what the runner tells attention. The tensors are those that it writes
    before each forward. None if this is a run without a KV cache."""
    if not forward_context.is_forward_context_available() or not forward_context.get_forward_context().slot_mapping:
        return None
    group = full_attention_group(runner)
    if group is None:
        return None
    index = group[0]
    if hasattr(runner, "input_buffers"):
        buffers, tables = runner.input_buffers, runner.block_tables
        sizes = getattr(tables, "kernel_block_sizes", tables.block_sizes)
        return Places(
            buffers.query_start_loc,
            buffers.positions,
            tables.slot_mappings[index],
            tables.input_block_tables[index],
            sizes[index],
        )
    table = runner.input_batch.block_table[index]
    return Places(
        runner.query_start_loc.gpu, runner.positions, table.slot_mapping.gpu, table.block_table.gpu, table.block_size
    )


def sum_over_ranks(logits: torch.Tensor) -> torch.Tensor:
    """The sum over all tensor-parallel processes, in the same order and so with the same bits in each."""
    gathered = tensor_model_parallel_all_gather(logits, dim=-1)
    return gathered.view(*logits.shape[:-1], -1, logits.shape[-1]).sum(dim=-2)

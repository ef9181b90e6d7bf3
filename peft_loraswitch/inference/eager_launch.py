"""A group of linears called without a compiler: one C call for few tokens, one for many on the GPUs that have a kernel for them,
else library products and one C call; and as little Python before them as can be.

What `kernels.PackedGroup` looks up and fills in field by field is here one template of bytes for each shape of input, into
which a call packs its pointers. Before each call the group's fingerprint is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int, c_void_p, sizeof
from dataclasses import dataclass
from struct import Struct

import torch
from torch import Tensor

from .. import kernels, ops
from ..fingerprint import Fingerprint
from ..kernels import MAX_GROUP, Expansion, PackedGroup, check, empty_strided_cuda, library
from ..kernels.abi import Group, Item
from ..routing.decision import Routing
from ..routing.frame import RoutingFrame
from .live_linear import LiveLinear

_pack_pointer = Struct("P").pack_into
_pack_inputs = Struct("PPPP").pack_into  # x, experts, gates, hidden: neighbours in `Group`
assert Group.experts.offset == Group.x.offset + 8 and Group.hidden.offset == Group.x.offset + 24
_ITEMS = [Group.items.offset + i * sizeof(Item) for i in range(MAX_GROUP)]
_OUTPUTS, _BASES = [at + Item.out.offset for at in _ITEMS], [at + Item.base.offset for at in _ITEMS]
_MOST_SHAPES = 64  # of inputs, kept for each group

# For fewer tokens, but more than the kernel for up to 128 takes, library products take the GPU less time than the kernel for many
# (docs/kernel_log.md), and the host more: a dozen calls in place of one. So the kernel serves them where everybody waits for the
# host: nothing is being captured, and the weights are no more than a GPU reads in the time of such calls.
_FEWER_TOKENS, _FEW_BYTES = 192, 1 << 28


@dataclass
class _Shape:
    """What a call needs that depends on the shapes of x and of the decision only."""

    template: bytes
    outputs: list[tuple[tuple[int, ...], tuple[int, ...]]]  # size and stride of each linear's result
    hidden: int  # elements of scratch
    aligned: bool = False  # one C call, by a kernel that takes only an x whose address is divisible by 16
    many: Expansion | None = (
        None  # library products and a C call: no such kernel, it takes the GPU longer, or x is elsewhere
    )
    slower: bool = False  # the GPU takes longer for the one C call


def launchable(x: Tensor) -> bool:
    """Whether the kernels can read x as it is."""
    return type(x) is Tensor and x.is_cuda and x.is_contiguous()


class _Direct:
    """`ls_linear` for a group that is packed, with pointers put into bytes.

    Args:
        packed: the group's tensors as the kernels take them.
    """

    def __init__(self, packed: PackedGroup) -> None:
        self.packed = packed
        self.device, self.device_type, self.dtype = packed.tensors[0].get_device(), packed.device.type, packed.dtype
        self.shapes: dict[tuple[torch.Size, torch.Size], _Shape] = {}
        function = library()["ls_linear"]  # of its own, so that it can take the group as bytes
        function.restype, function.argtypes = c_int, [c_char_p, c_void_p]
        self.function: Callable[[bytes, int], int] = function

    def _reads(self, x: Tensor, routing: Routing) -> bool:
        """Whether the kernels can read both as they are."""
        experts, device = routing.experts, self.device
        if x.dtype is not self.dtype or x.get_device() != device or not launchable(x):
            return False
        return experts.get_device() == device and experts.is_contiguous() and routing.gates.is_contiguous()

    def _launch(self, x: Tensor, routing: Routing, shape: _Shape, bases: Sequence[Tensor] = ()) -> list[Tensor]:
        device = self.device
        if empty_strided_cuda is not None and torch._C._cuda_getDevice() == device:
            outputs = [empty_strided_cuda(size, stride, self.dtype) for size, stride in shape.outputs]
            hidden = empty_strided_cuda((shape.hidden,), (1,), self.dtype)
        else:
            outputs = [x.new_empty(size) for size, _ in shape.outputs]
            hidden = x.new_empty(shape.hidden)
        buffer = bytearray(shape.template)
        experts, gates = routing.experts.data_ptr(), routing.gates.data_ptr()
        _pack_inputs(buffer, Group.x.offset, x.data_ptr(), experts, gates, hidden.data_ptr())
        for output, offset in zip(outputs, _OUTPUTS, strict=False):
            _pack_pointer(buffer, offset, output.data_ptr())
        for base, offset in zip(bases, _BASES, strict=False):
            _pack_pointer(buffer, offset, base.data_ptr())
        code = self.function(bytes(buffer), torch._C._cuda_getCurrentRawStream(device))
        if code:
            check(code, "ls_linear")
        return outputs

    def _sized(self, x: Tensor, experts: Tensor) -> Group | None:
        """The group for inputs of these shapes; None if they do not belong together."""
        group = Group.from_buffer_copy(self.packed.group)
        group.top_k = experts.shape[-1]
        group.tokens = experts.numel() // group.top_k
        return group if x.numel() == group.tokens * group.in_features else None

    def _keep(
        self, x: Tensor, experts: Tensor, group: Group, aligned: bool = False, many: Expansion | None = None,
        slower: bool = False,
    ) -> _Shape:  # fmt: skip
        outputs = []
        for out in self.packed.out_features:
            size = (*x.shape[:-1], out)
            outputs.append((size, torch.empty(size, device="meta").stride()))
        hidden = library().ls_hidden_elements(byref(group))
        if len(self.shapes) >= _MOST_SHAPES:
            self.shapes.clear()
        shape = self.shapes[x.shape, experts.shape] = _Shape(bytes(group), outputs, hidden, aligned, many, slower)
        return shape


class DirectDeltas(_Direct):
    """What the experts of a group add to the results of base layers that have run, called without a compiler. For few tokens.

    Args:
        packed: as the kernels take it: experts, and no weights.
    """

    def __call__(self, bases: Sequence[Tensor], x: Tensor, routing: Routing) -> list[Tensor] | None:
        """bases [..., out], x [..., in], all on the group's device -> [..., out] each; None if something does not fit."""
        experts = routing.experts
        shape = self.shapes.get((x.shape, experts.shape))
        if shape is None:
            group = self._sized(x, experts)
            if group is None:
                return None
            shape = self._keep(x, experts, group)
        if not self._reads(x, routing):
            return None
        for base, (size, _) in zip(bases, shape.outputs, strict=True):
            if base.shape != size or base.dtype is not self.dtype or base.get_device() != self.device:
                return None
            if not launchable(base):
                return None
        return self._launch(x, routing, shape, bases)


class DirectFewTokens(_Direct):
    """The linears of a group with one adapter, called without a compiler, for few tokens: weights of 4 bits.

    Args:
        packed: the group's tensors as the kernels take them; fingerprint: of them, at latest of when they were packed.
        few_tokens: up to how many one C call is made; routed: they follow the decision, not only shared experts.
    """

    def __init__(
        self, packed: PackedGroup, fingerprint: Fingerprint, adapter: str, few_tokens: int, routed: bool
    ) -> None:
        super().__init__(packed)
        self.adapter, self.fingerprint = adapter, fingerprint
        self.few_tokens, self.routed = few_tokens, routed

    def again(self, x: Tensor, frame: RoutingFrame) -> list[Tensor] | None:
        """As `__call__`, with what this forward has decided; None wherever `FusedGroup.routing` has to be asked first."""
        routing = (frame.routings if self.routed else frame.shared).get(self.adapter)
        if routing is None or frame.adapter_names is not None:
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self.device_type):
            return None
        shape = self.shapes.get((x.shape, routing.experts.shape))
        return None if shape is None else self._call(x, routing, shape)

    def __call__(self, x: Tensor, routing: Routing) -> list[Tensor] | None:
        """x [..., in] on the group's device -> [..., out] for each linear; None if something changed or does not fit."""
        experts = routing.experts
        shape = self.shapes.get((x.shape, experts.shape)) or self._shape(x, experts)
        return None if shape is None else self._call(x, routing, shape)

    def _call(self, x: Tensor, routing: Routing, shape: _Shape) -> list[Tensor] | None:
        if not self._reads(x, routing) or not self.fingerprint.is_current():
            return None
        fits = not shape.aligned or x.data_ptr() % 16 == 0
        return self._launch(x, routing, shape) if fits else None

    def _shape(self, x: Tensor, experts: Tensor) -> _Shape | None:
        """Worked out once for each shape of x; None if the kernels are no good for it."""
        group = self._sized(x, experts)
        if group is None or group.tokens > self.few_tokens or self.packed.path(x, experts) != kernels.FAST_PATH:
            return None
        return self._keep(x, experts, group, aligned=True)  # no slower kernel takes another x


class DirectGroup(DirectFewTokens):
    """The same for any number of tokens.

    Args:
        linears: whose tensors they are.
    """

    def __init__(
        self, packed: PackedGroup, fingerprint: Fingerprint, adapter: str, few_tokens: int, routed: bool,
        linears: list[LiveLinear],
    ) -> None:  # fmt: skip
        super().__init__(packed, fingerprint, adapter, few_tokens, routed)
        weights = [one.base["weight"].detach() for one in linears]
        self.matrices = weights if packed.group.transposed else [weight.T for weight in weights]  # [in, out] each
        self.biases = [None if one.base["bias"] is None else one.base["bias"].detach() for one in linears]
        self.lora_a = [one.a["weight"].detach().flatten(0, 1) for one in linears]
        self.lora_b = [one.b["weight"].detach() for one in linears]
        self.scalings = [one.scaling[adapter] for one in linears]

    def _call(self, x: Tensor, routing: Routing, shape: _Shape) -> list[Tensor] | None:
        if not self._reads(x, routing) or not self.fingerprint.is_current():
            return None
        fits = not shape.aligned or x.data_ptr() % 16 == 0
        one_call = shape.aligned and fits and not (shape.slower and torch._C._cuda_isCurrentStreamCapturing())
        if shape.many is not None and not one_call:
            return self._many(x, routing, shape, shape.many)
        return self._launch(x, routing, shape) if fits else None

    def _many(self, x: Tensor, routing: Routing, shape: _Shape, group: Expansion) -> list[Tensor]:
        """One shrink for the whole group; what the experts add, for all of its linears; and their own products on top."""
        rows = x.view(-1, x.shape[-1])
        hidden = ops.all_hidden(rows, self.lora_a)
        if group.expands:
            results = kernels.expand(group, hidden, routing.experts, routing.gates)
            for result, matrix in zip(results, self.matrices, strict=True):
                result.addmm_(rows, matrix)  # the larger product adds to the smaller one's result while it computes
        else:
            gates = [routing.scaled(scaling, x.dtype) for scaling in self.scalings]
            parts = ops.group_hidden(hidden, [b.shape[::2] for b in self.lora_b], gates, routing.chosen_rows())
            linears = zip(parts, self.matrices, self.biases, kernels.widen(group, hidden), strict=True)
            results = [ops.dense_linear(rows, h, matrix, bias, wide, True) for h, matrix, bias, wide in linears]
        return [result.view(size) for result, (size, _) in zip(results, shape.outputs, strict=True)]

    def _shape(self, x: Tensor, experts: Tensor) -> _Shape | None:
        group = self._sized(x, experts)
        if group is None:
            return None
        aligned, slower, many = False, False, None
        if group.tokens > self.few_tokens:
            slower = kernels.SPLIT_K_TOKENS < group.tokens < _FEWER_TOKENS
            size = sum(matrix.numel() * matrix.element_size() for matrix in self.matrices)
            aligned = self.packed.path(x, experts) == kernels.SM90_PATH and not (slower and size > _FEW_BYTES)
            if group.tokens < _FEWER_TOKENS or not aligned:
                many = kernels.expansion(self.lora_b, self.biases, self.scalings, group.top_k)
                if not (many.expands or many.widens):
                    many = None
            if many is None and not aligned:
                return None
        return self._keep(x, experts, group, aligned, many, slower)

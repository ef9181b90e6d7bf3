"""A stub of the CUDA library, with which fused layers on a CPU take the way that they take on a GPU up to the launch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock


class NoKernels:
    """In place of the library: takes what it is given and does nothing but count."""

    calls = 0

    def __getitem__(self, name: str) -> Any:
        @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        def nothing(group: bytes, stream: int) -> int:
            self.calls += 1
            return 0

        return nothing

    def ls_hidden_elements(self, group: Any) -> int:
        return 64

    def ls_linear_path(self, group: Any) -> int:
        from peft_loraswitch import kernels

        return kernels.FAST_PATH


@contextmanager
def in_place_of_the_library(library: Any) -> Iterator[None]:
    """Within it, fused layers on a CPU call `library` as they do on a GPU, if `use_kernels` was called for them."""
    import torch

    from peft_loraswitch import kernels
    from peft_loraswitch.inference import capabilities, eager_launch, group_outputs

    with ExitStack() as stack:
        empty = torch._C._dynamo.guards._empty_strided_cpu
        for module in (eager_launch, kernels.calls):
            stack.enter_context(mock.patch.object(module, "library", lambda: library))
            stack.enter_context(mock.patch.object(module, "empty_strided_cuda", empty))
        for module in (eager_launch, group_outputs):
            stack.enter_context(
                mock.patch.object(module, "launchable", lambda x: type(x) is torch.Tensor and x.is_contiguous())
            )
        stack.enter_context(mock.patch.object(capabilities, "kernels_serve", lambda device: True))
        answers = {"_cuda_getCurrentRawStream": 0, "_cuda_getDevice": -1, "_cuda_isCurrentStreamCapturing": False}
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch._C, name, lambda *_, answer=answer: answer, create=True))
        yield


def use_kernels(model: Any) -> None:
    """Have the fused layers of `model`, if it has any, believe that there are kernels for their device."""
    from peft_loraswitch.inference.fuse import adapted_layers

    for layer in adapted_layers(model):
        for group in getattr(layer, "fused_groups", {}).values():
            group.kernels = True

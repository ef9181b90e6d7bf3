"""Adapted linears whose weight is read without calling them: refused where the class is known, found in the first forward that
trains where it is not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import get_peft_model
from torch import nn

from helpers import adapted, randomize_adapter, switch_config, switch_layers, tiny_llama, tokens

WIDTH = 32


class Encoder(nn.Module):
    """Two of PyTorch's own encoder layers, and a linear before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(self.first(x), src_key_padding_mask=mask)


class ReadsTheWeight(nn.Module):
    """What no list knows: a module that multiplies with a child's weight itself."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.up(x))
        return self.down(hidden) if self.calls else F.linear(hidden, self.down.weight, self.down.bias)


class Blocks(nn.Module):
    def __init__(self, calls: list[bool], skipped: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReadsTheWeight(each) for each in calls)
        self.skipped = skipped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if i != self.skipped:
                x = x + block(x)
        return x


def warned_by(model: nn.Module, *inputs: torch.Tensor) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model(*inputs)
        (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
    return [str(w.message) for w in caught if "did not call them" in str(w.message).replace("\n", " ")]


# ------------------------------------------------------------------------------------------------------- known classes


def test_multihead_attention_is_refused_by_name():
    with pytest.raises(ValueError, match=r"MultiheadAttention reads its weight.*exclude_modules="):
        get_peft_model(Encoder(), switch_config(target_modules=["out_proj", "linear1"]))
    model = get_peft_model(
        Encoder(), switch_config(target_modules=["out_proj", "linear1"], exclude_modules=["out_proj"])
    )
    assert len(switch_layers(model)) == 2


def test_all_linear_leaves_multihead_attention_out():
    with pytest.warns(UserWarning, match="MultiheadAttention reads its weight"):
        model = get_peft_model(Encoder(), switch_config(target_modules="all-linear"))
    names = {name.rpartition(".")[2] for name in switch_layers(model)}
    assert names == {"first", "linear1", "linear2"}


def test_wavlm_is_refused_with_what_works():
    config = tf.WavLMConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=(32,), conv_stride=(4,),
        conv_kernel=(4,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=1,
    )  # fmt: skip
    base = tf.WavLMModel(config)
    with pytest.raises(ValueError, match="WavLMAttention reads its weight"):
        get_peft_model(base, switch_config(target_modules=["q_proj", "v_proj"]))
    with pytest.warns(UserWarning, match="WavLMAttention reads its weight"):
        model = get_peft_model(tf.WavLMModel(config), switch_config(target_modules="all-linear"))
    assert not any("proj" in name and "attention" in name for name in switch_layers(model))


# ----------------------------------------------------------------------------------------- PyTorch's encoder, fast path


@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_an_encoder_layer_does_not_pass_the_experts_by(masked):
    model = get_peft_model(Encoder(), switch_config(target_modules=["first", "linear1", "linear2"]))
    randomize_adapter(model)
    x = torch.randn(2, 5, WIDTH)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    given = (x, mask) if masked else (x,)
    model.eval()
    slow = model(*given).detach()  # with gradients on, PyTorch does not take it
    with torch.no_grad():
        fast = model(*given)
        with model.disable_adapter():
            base = model(*given)
    real = ~mask if masked else torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(fast[real], slow[real])
    assert not torch.allclose(fast[real], base[real], atol=1e-3)


# ------------------------------------------------------------------------------------------------------ unknown classes


def test_a_linear_that_never_runs_is_named_once():
    model = get_peft_model(Blocks([True, False, False]), switch_config(target_modules=["up", "down"]))
    found = warned_by(model, torch.randn(2, 5, WIDTH))
    assert len(found) == 1 and "'blocks.1.down', 'blocks.2.down'" in found[0] and "'blocks.0.down'" not in found[0]
    assert "exclude_modules=['down']" in found[0]
    assert not warned_by(model, torch.randn(2, 5, WIDTH))


def test_blocks_that_are_skipped_are_no_false_alarm():
    model = get_peft_model(Blocks([True, True, True], skipped=1), switch_config(target_modules=["up", "down"]))
    assert not warned_by(model, torch.randn(2, 5, WIDTH))


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_models_whose_linears_run_are_no_false_alarm(checkpointing):
    model = adapted(tiny_llama(), num_shared_experts=1, router_module="layers.1.self_attn.q_proj").train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    assert not warned_by(model, tokens())


def test_eval_forwards_do_not_count_and_a_failed_one_is_looked_at_again():
    model = get_peft_model(Blocks([True, False]), switch_config(target_modules=["up", "down"]))
    with torch.no_grad():
        model(torch.randn(2, 5, WIDTH))
    handle = model.get_base_model().blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(2, 5, WIDTH))
    handle.remove()
    assert len(warned_by(model, torch.randn(2, 5, WIDTH))) == 1
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == sum(len(m._forward_pre_hooks) for m in get_fresh().modules())


def get_fresh() -> nn.Module:
    return get_peft_model(Blocks([True, False]), switch_config(target_modules=["up", "down"]))


def test_another_adapter_is_looked_at_too():
    model = get_peft_model(Blocks([True, False]), switch_config(target_modules=["up"]))
    assert not warned_by(model, torch.randn(2, 5, WIDTH))
    model.add_adapter("wider", switch_config(target_modules=["up", "down"]))
    model.set_adapter("wider")
    assert len(warned_by(model, torch.randn(2, 5, WIDTH))) == 1

"""A router without training, for experts that exist: from example texts of each (`router_from_texts`), or from what the weights
of the experts tell (`router_from_weights`).

Both write the rows of the one linear that is the router, and nothing else. They are a start: training (`trainable="router"`)
may follow, and so may a look at what comes out (`routing_report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoRASwitchConfig
from ..layer import LoRASwitchLinear
from ..loading.layout import backbone_of
from ..patterns import shown
from ..router_inputs import (
    AT_A_TIME,
    MAX_TOKENS,
    averaged,
    check_active,
    linears_of_one_input,
    read,
    tokenized,
    tokenizer_of,
)
from .experts import adapted_linears, check_in_memory, choice_name, config_of, index_of, means_base, router_layer
from .linear_classifiers import Moments, discriminant_rows, logistic_rows, regression_rows

METHODS = ("discriminant", "centroid", "logistic")
RIDGE = 0.1  # share of a covariance that becomes a multiple of the identity
LOGISTIC_RIDGE = 1e-3  # weight of the logits' variance within the experts' texts


def router_from_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str | int, Sequence[str]],
    adapter_name: str | None = None,
    method: str = "discriminant",
    temperature: float = 1.0,
    batch_size: int = AT_A_TIME,
    max_length: int = MAX_TOKENS,
) -> dict[str, int]:
    """Set the router of an adapter from a few example texts of each expert, without training.

    The model reads the texts up to the router (with the default router that is an embedding and a norm, so that it costs
    little), and the router becomes the linear classifier of what it sees there:

    - "discriminant": Fisher's linear discriminant. Experts are told apart by features in which their texts differ by more than
      tokens of one expert differ among themselves.
    - "centroid": the expert with the nearest mean wins, all features counting alike. LORAUTER (arXiv 2601.21795) does
      something like it for whole prompts, in a text encoder; PHATGOOSE (arXiv 2402.05859) trains a gate for each expert instead.
    - "logistic": logistic regression on every token's input (with `router_decay`, averaged as logits are): the router trained
      on labels, which are the keys of `texts`. For many texts, some hundred of each expert; keeps all inputs in memory, 4 bytes
      a token and feature.

    The rows are relative to the mean of all experts' means, whose logit is 0. A router has no offset, which both methods want;
    the best linear approximation of a constant takes its place. Logits are log-odds, were the inputs normally distributed, and
    experts count as equally frequent, however many texts each has. With `router_decay`, which averages logits over the tokens
    before, the rows are the same but larger: averages vary less.

    A single token often does not tell where it belongs: with the default router, which sees the embedding alone, expect most of
    them to be spread. What makes the difference is a router that sees more than one token, by `router_decay` or a deeper
    `router_module`.

    Args:
        model: a model with LoRA-Switch adapters; the adapter must be active.
        tokenizer: of the backbone, with its special tokens; it needs no padding token. None: the one that stands where the
            backbone was loaded from.
        texts: for each expert, by name or index, its texts: about ten or more. With `base_expert=True` also, under "base",
            texts that are no expert's; without those, the base expert's logit is 0, so that it is chosen where no expert's
            mean is nearer than the mean of all.
        adapter_name: which adapter; may be left out if there is only one.
        method: "discriminant", "centroid" or "logistic".
        temperature: logits are divided by it. Above 1, the gates of the `top_k` chosen are more even.
        batch_size: texts that are read at a time.
        max_length: tokens of a text that are read; the rest is left out.

    Returns:
        dict: the number of tokens that each expert's row was made of.

    Raises:
        ValueError: an expert is unknown or has no texts, a text is empty, the adapter is not active, there is no tokenizer, or
            all inputs, or those of all experts, are equal. The router is then as it was.
        RuntimeError: the model is fused, offloaded or in a forward.

    Example:
        ```py
        model = from_loras(model, ["you/maths-lora", "you/code-lora"])
        router_from_texts(model, tokenizer, {"maths-lora": maths_texts, "code-lora": code_texts})
        ```
    """
    adapter, config, backbone, router = _target(model, adapter_name)
    _check_choice("method", method, METHODS)
    _check_positive("temperature", temperature)
    _check_length(max_length)
    sequences = _sequences(config, texts, tokenizer_of(backbone, tokenizer), max_length)
    decay = config.router_decay
    moments: dict[int, Moments] = {}
    averaged_within = []
    for index, found in sequences.items():
        moments[index], of_averages = _moments(backbone, adapter, found, batch_size, decay, choice_name(config, index))
        averaged_within.append(of_averages.covariance)
    means = torch.stack([moment.mean for moment in moments.values()])
    within = torch.stack([moment.covariance for moment in moments.values()]).mean(0)
    if not torch.isfinite(within).all():
        raise ValueError(
            f"NaN or Inf in what the router of adapter '{adapter}' sees: the backbone's hidden states are broken."
        )
    if float(within.trace()) <= 1e-12 * float(means.square().sum()):
        raise ValueError(
            "texts: all tokens of an expert look alike to the router, so that they tell nothing: give other texts."
        )
    if float((means - means.mean(0)).square().sum()) <= 1e-12 * float(means.square().sum()):
        raise ValueError(
            "texts: those of one expert look to the router like those of every other, so that they tell nothing: give others."
        )
    rows = discriminant_rows(means, within, RIDGE if method == "discriminant" else 1.0)
    if decay:  # averages vary less than tokens, so that the same logit says more
        averages = torch.stack(averaged_within).mean(0)
        rows = rows * (((rows @ within) * rows).sum() / ((rows @ averages) * rows).sum())
    if method == "logistic":
        rows = _logistic(backbone, adapter, sequences, batch_size, decay, rows, averages if decay else within)
    _write(router, dict(zip(moments, rows / temperature, strict=True)))
    return {choice_name(config, index): moment.count for index, moment in moments.items()}


def router_from_weights(
    model: nn.Module,
    adapter_name: str | None = None,
    directions: int = 1,
    temperature: float = 1.0,
    texts: Sequence[str] | None = None,
    tokenizer: Any = None,
    references: int = 16384,
    batch_size: int = 512,
) -> dict[str, float]:
    """Set the router of an adapter from the weights of its experts, without data and without training.

    Arrow (arXiv 2405.11157) takes the top right singular vector v of an expert's `B A` for its prototype: the input that the
    expert changes most. It routes each layer to the largest `|v x|`; SpectR (arXiv 2504.03454) and LAG (arXiv 2507.05346) refine
    that. Here one decision serves all layers, so v is taken where that falls: of the experts' changes to all linears that read
    what the router reads (q, k and v of a block), one below the other, each with its scale.

    The router is linear, `|v x|` is not, and the sign of a singular vector means nothing. So the rows are those whose logits
    follow `|v x|` best over reference inputs, by ridge regression: that decides the sign by what the inputs are. By default
    these are the tokens of the vocabulary, each by itself. Norms of experts do not count: each one's `|v x|` is measured in
    its own spread, what all experts have in common is left out, and each row's logits have mean 0 and standard deviation 1
    over the references. (A base expert's row is 0: chosen where every expert's logit is negative.)

    What it can do is limited, and said by the returned numbers. For inputs that are as likely as their negatives, no linear
    function follows `|v x|` at all (0). Tokens of a vocabulary are not, and may be followed in part. That an expert changes an
    input much does not mean either that it is good there. If you have ten texts of each expert, `router_from_texts` is better.

    Args:
        model: a model with LoRA-Switch adapters; the adapter must be active.
        adapter_name: which adapter; may be left out if there is only one.
        directions: singular vectors of each expert; with more than one, the norm of the projection on them, each weighted by
            its singular value (SpectR).
        temperature: logits are divided by it. At 1 they have standard deviation 1 over the references, token by token.
        texts: read these, with `tokenizer`, for references, all of their tokens. A deeper `router_module` needs some: there, a
            token by itself is not what a text is made of.
        references: tokens of the vocabulary that are read, evenly spaced. Several for each feature of the input.
        batch_size: tokens (with `texts`: texts) that are read at a time.

    Returns:
        dict: for each expert, how much (0 to 1) of the variance of its `|v x|`, relative to the others', the row follows.

    Raises:
        ValueError: an expert changes none of the linears that read what the router reads, two experts are the same there,
            or an argument does not fit. The router is then as it was.
        RuntimeError: the model is fused, offloaded or in a forward.
    """
    adapter, config, backbone, router = _target(model, adapter_name)
    _check_positive("temperature", temperature)
    for name, value in (("directions", directions), ("references", references)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={shown(value)} must be a positive whole number.")
    layers = linears_of_one_input(backbone, adapter)
    prototypes = [_prototype(layers, adapter, config, index, directions) for index in range(config.num_experts)]
    sequences = _references(backbone, texts, tokenizer, references)
    moments = None
    for batch in read(backbone, adapter, sequences, batch_size, progress="router_from_weights"):
        x = _double(batch.x)[batch.real.to(batch.x.device)]
        heights = torch.stack([(x @ v.to(x.device)).square().sum(1).sqrt() for v in prototypes], 1)
        found = Moments.of(x, heights)
        moments = found if moments is None else moments + found
    assert moments is not None
    if not float(moments.covariance.trace()) > 1e-12 * float(moments.mean.square().sum()):
        raise ValueError(
            f"{len(sequences)} reference inputs are all alike to the router, or NaN or Inf: give more or others."
        )
    rows, shares = regression_rows(moments, RIDGE)
    if not bool((shares > 1e-12).all()):
        raise ValueError(
            f"The experts of adapter '{adapter}' cannot be told apart by their weights in {', '.join(layers)}: use "
            "router_from_texts, or train the router."
        )
    _write(router, dict(enumerate(rows / temperature)))
    return {choice_name(config, index): float(share) for index, share in enumerate(shares)}


# ------------------------------------------------------------------------------------------------------------- checks


def _target(model: nn.Module, adapter_name: str | None) -> tuple[str, LoRASwitchConfig, nn.Module, Any]:
    adapter, config = config_of(model, adapter_name)
    backbone = backbone_of(model)
    layer = router_layer(adapted_linears(backbone, adapter), adapter)
    check_in_memory([layer])
    state = layer.routing_state
    if state.fused:
        raise RuntimeError("This model is fused: call unfuse() before its router is set, and fuse it again.")
    if state.running_frame() is not None:
        raise RuntimeError("The model is in a forward: its router cannot be set meanwhile.")
    check_active(backbone, adapter)
    return adapter, config, backbone, layer.loraswitch_router[adapter]


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(choices)}.")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={shown(value)} must be a positive number.")


def _check_length(max_length: Any) -> None:
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise ValueError(f"max_length={shown(max_length)} must be a positive whole number.")


# -------------------------------------------------------------------------------------------------------------- texts


def _sequences(config: LoRASwitchConfig, texts: Any, tokenizer: Any, max_length: int) -> dict[int, list[list[int]]]:
    """Token ids of the texts, by the index of the expert in the router, in its order."""
    if not isinstance(texts, Mapping):
        raise ValueError(f"texts={shown(texts)} must be a dict: a list of texts for each expert.")
    found: dict[int, list[list[int]]] = {}
    for key, value in texts.items():
        index = config.num_experts if means_base(config, key) else index_of(config, key)
        whose = f"texts[{key!r}]"
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ValueError(f"{whose} is {shown(value)}; it must be a list of one or more texts.")
        if index in found:
            raise ValueError(f"{whose} is expert {index}, which has texts under another key already.")
        found[index] = tokenized(value, tokenizer, max_length, whose)
    missing = [choice_name(config, index) for index in range(config.num_experts) if index not in found]
    if missing:
        raise ValueError(f"texts has none for {', '.join(missing)}: every expert needs some.")
    if len(found) < 2:
        raise ValueError("texts: with one expert there is nothing to tell apart.")
    return dict(sorted(found.items()))


def _moments(
    backbone: nn.Module, adapter: str, sequences: list[list[int]], batch_size: int, decay: float, name: str
) -> tuple[Moments, Moments]:
    """Of all that the router sees in these texts: token by token, and with inputs averaged as the logits are."""
    totals: list[Moments] = []
    by_length = sorted(sequences, key=len)  # little padding
    for batch in read(backbone, adapter, by_length, batch_size, progress=f"texts of {name}"):
        x, real = _double(batch.x), batch.real.to(batch.x.device)
        found = [Moments.of(each[real]) for each in ([x, averaged(x, decay)] if decay else [x])]
        totals = [old + new for old, new in zip(totals, found, strict=True)] if totals else found
    return totals[0], totals[-1]


def _logistic(
    backbone: nn.Module, adapter: str, sequences: dict[int, list[list[int]]], batch_size: int, decay: float,
    start: Tensor, within: Tensor,
) -> Tensor:  # fmt: skip
    inputs, classes = [], []
    for place, found in enumerate(sequences.values()):
        for batch in read(backbone, adapter, sorted(found, key=len), batch_size, progress="router on labels"):
            x = averaged(batch.x.detach().float(), decay)[batch.real.to(batch.x.device)]
            inputs.append(x)
            classes.append(torch.full((len(x),), place, device=x.device))
    x = torch.cat(inputs)
    return logistic_rows(start.to(x.device), x, torch.cat(classes), within, LOGISTIC_RIDGE)


# ------------------------------------------------------------------------------------------------------------ weights


def _prototype(
    layers: dict[str, LoRASwitchLinear], adapter: str, config: LoRASwitchConfig, index: int, directions: int
) -> Tensor:
    """[d, directions]: the top right singular vectors of what the expert adds to all of `layers`, one below the other. Of more
    than one, each times its singular value over the first.

    Never the full matrices: with B = Q R and A^T = P L, the singular values of B A are those of R L^T, and the right singular
    vectors are P times those.
    """
    parts_a, parts_r = [], []
    for layer in layers.values():
        a = _double(layer.loraswitch_A[adapter].weight[index])
        b = _double(layer.loraswitch_B[adapter].weight[index]) * layer.scaling[adapter]
        parts_a.append(a)
        parts_r.append(torch.linalg.qr(b, mode="r").R.to(a.device))
    device = parts_a[0].device
    p, lower = torch.linalg.qr(torch.cat([a.to(device) for a in parts_a]).T)
    small = torch.block_diag(*[r.to(device) for r in parts_r]) @ lower.T
    _, values, right = torch.linalg.svd(small, full_matrices=False)
    if not float(values[0]) > 0:
        raise ValueError(
            f"Expert '{choice_name(config, index)}' adds nothing in {', '.join(layers)}, which read what the router reads: its "
            "weights do not tell where it belongs. Use router_from_texts, or another router_module."
        )
    return p @ (right[:directions].T * (values[:directions] / values[0]))


def _references(backbone: Any, texts: Any, tokenizer: Any, references: int) -> list[list[int]]:
    if texts is not None:
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise ValueError(f"texts={shown(texts)} must be a list of one or more texts.")
        return tokenized(texts, tokenizer_of(backbone, tokenizer), MAX_TOKENS)
    embeddings = backbone.get_input_embeddings() if hasattr(backbone, "get_input_embeddings") else None
    size = getattr(embeddings, "num_embeddings", None)
    if size is None:
        raise ValueError(f"texts is missing: {type(backbone).__name__} has no table of token embeddings to go by.")
    number = min(size, references)
    return [[index * size // number] for index in range(number)]


# ------------------------------------------------------------------------------------------------------------ the router


def _double(tensor: Tensor) -> Tensor:
    """float64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def _write(router: Any, rows: dict[int, Tensor]) -> None:
    """Rows by index; those that are not given become 0."""
    weight = router.weight
    new = torch.zeros_like(weight)
    for index, row in rows.items():
        new[index] = row.to(weight.device, weight.dtype)
    if not torch.isfinite(new).all():
        raise ValueError(f"A row of the router would be beyond {weight.dtype}: raise the temperature.")
    with torch.inference_mode(False), torch.no_grad():  # a write that is counted, in whatever mode
        weight.copy_(new)

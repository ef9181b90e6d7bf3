"""The float64 oracle of every op, used by tests and benchmarks alike, and random inputs that hide nothing."""

from __future__ import annotations

import os

import torch

# Set by sanitize_kernels.sh: no product of cuBLAS in 16 bits, for compute-sanitizer's racecheck breaks down in some of those,
# which are not ours; and few rounds, because a kernel takes up to a thousand times longer.
SANITIZING = os.environ.get("PEFT_LORASWITCH_SANITIZING") == "1"

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALVES = DTYPES[:2]


def rounds(n: int) -> range:
    """As often as a test repeats something: `n` times, or a few under compute-sanitizer."""
    return range(max(4, n // 50) if SANITIZING else n)


def route(
    x: torch.Tensor, router: torch.Tensor, top_k: int, normalize: bool, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, in], router [E, in] -> experts [T, k], gates [T, k] in float64: the highest logits (NaN is as high as +Inf), of
    equal ones those that come first. With top_p < 1 id E and gate 0 for those that come after the sum has reached it."""
    logits = x.double() @ router.double().T
    heights = logits.where(~logits.isnan(), float("inf"))
    experts = heights.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    gates = torch.softmax(logits, dim=-1).gather(-1, experts)
    if top_p < 1:
        left_out = gates.cumsum(-1) - gates >= top_p
        experts, gates = experts.masked_fill(left_out, router.shape[0]), gates.masked_fill(left_out, 0.0)
    return experts, gates / gates.sum(-1, keepdim=True) if normalize else gates


def route_context(
    x, router, previous, decay, top_k, normalize, real=None, top_p=1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, in], router [E, in], previous [T, E + 1], real bool [T] or None -> experts [T, k], gates [T, k] and sums
    [T, E + 1] in float64. The mean is routed as the input of a router that is the identity."""
    logits = x.double() @ router.double().T
    one = torch.ones_like(logits[:, :1])
    own = torch.cat([logits, one], 1)
    sums = decay * previous.double() + own
    if real is not None:  # padding leaves them as they are
        sums = sums.where(real.unsqueeze(1), previous.double())
    some = sums[:, -1:] != 0
    mean = (sums[:, :-1] / sums[:, -1:].where(some, 1.0)).where(some, logits)
    return *route(mean, torch.eye(router.shape[0], device=x.device), top_k, normalize, top_p), sums


def gate_of(expert: int, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """[T, 1] in float64: of an expert that is there twice both, of one that is not 0, whatever other gates are."""
    return gates.double().where(experts == expert, 0.0).sum(-1, keepdim=True)


def delta(x, experts, gates, lora_a, lora_b, scaling) -> torch.Tensor:
    """What the experts add, [T, out] in float64; ids outside [0, E) add nothing."""
    x = x.double()
    result = torch.zeros(x.shape[0], lora_b.shape[1], dtype=torch.float64, device=x.device)
    for e in experts[(experts >= 0) & (experts < lora_a.shape[0])].unique().tolist():
        gate = gate_of(e, experts, gates) * scaling
        tokens = (experts == e).any(-1)
        result[tokens] += gate[tokens] * (x[tokens] @ lora_a[e].double().T @ lora_b[e].double().T)
    return result


def expand(hidden, experts, gates, bias, lora_b, scaling) -> torch.Tensor:
    """bias + what the chosen experts make of one linear's hidden [T, E * r], [T, out] in float64, an expert at a time."""
    hidden = hidden.double().view(hidden.shape[0], lora_b.shape[0], lora_b.shape[2])
    result = hidden.new_zeros(hidden.shape[0], lora_b.shape[1])
    for e in range(lora_b.shape[0]):
        gate = gate_of(e, experts, gates) * scaling
        result += gate * (hidden[:, e] @ lora_b[e].double().T)
    return result if bias is None else result + bias.double()


# What the 4 bits of a weight stand for: NF4 (QLoRA, arXiv 2305.14314, appendix E), and FP4, a sign, two bits of exponent and
# one of mantissa, whose largest value is 1.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
CODES = {"nf4": NF4, "fp4": FP4}


def random_4bit(out: int, in_features: int, block: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with scales whose products with a normal x are about 1: uint8 [out, in / 2], float32 [out, in / block]."""
    weight = torch.randint(0, 256, (out, in_features // 2), dtype=torch.uint8, device=device)
    scales = (torch.rand(out, in_features // block, device=device) + 0.5) * 2 * in_features**-0.5
    return weight, scales


def from_4bit(weight: torch.Tensor, scales: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in / 2], [out, in / block], [16] -> [out, in] in float64."""
    values = torch.empty(weight.shape[0], 2 * weight.shape[1], dtype=torch.float64, device=weight.device)
    values[:, 0::2] = code.double()[weight.long() // 16]
    values[:, 1::2] = code.double()[weight.long() % 16]
    return values * scales.double().repeat_interleave(values.shape[1] // scales.shape[1], 1)


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """[out, in] in 0..15 -> int32 [out / 8, in / 128, 32, 4], written from the layout, since what torchao packs with
    (`aten._convert_weight_to_int4pack`) runs on GPUs alone; there a test compares them. Sizes: multiples of 8 and 128."""
    out, width = q.shape
    q = q.long().view(out // 8, 8, width // 128, 4, 32)  # tile, row, chunk, word, features of a word
    words = torch.zeros(out // 8, width // 128, 32, 4, dtype=torch.int64, device=q.device)
    for lane in range(32):
        row, pair = lane // 4, lane % 4 * 2
        for place, first in enumerate((0, 8, 16, 24)):
            for odd in range(2):
                words[:, :, lane] |= q[:, row, :, :, first + pair + odd] << (4 * place + 16 * odd)
    return (words - (words >> 31 << 32)).int()


def unpack_int4(tiles: torch.Tensor) -> torch.Tensor:
    """The reverse: int64 [out, in]."""
    rows, chunks = tiles.shape[:2]
    words = tiles.long() & 0xFFFFFFFF
    q = torch.empty(rows, 8, chunks, 4, 32, dtype=torch.int64, device=tiles.device)
    for feature in range(32):
        place, rest = divmod(feature, 8)
        lanes = torch.arange(8, device=tiles.device) * 4 + rest // 2
        of_lanes = words[:, :, lanes] >> (4 * place + 16 * (rest % 2)) & 15  # tile, chunk, row, word
        q[:, :, :, :, feature] = of_lanes.transpose(1, 2)
    return q.reshape(8 * rows, -1)


def from_int4(tiles: torch.Tensor, scales: torch.Tensor, out: int, in_features: int) -> torch.Tensor:
    """int32 [out / 8, in / 128, 32, 4], bfloat16 [in / group, out, 2], both padded -> [out, in] in float64."""
    q = unpack_int4(tiles).double() - 8
    scale, zero = (scales[:, :, i].T.double().repeat_interleave(q.shape[1] // scales.shape[0], 1) for i in range(2))
    return (q * scale + zero)[:out, :in_features].contiguous()


def pack_int4_scales(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """[out, in / group] each -> bfloat16 [in / group, out, 2]."""
    return torch.stack((scale.T, zero.T), -1).bfloat16().contiguous()


def random_int4(out: int, in_features: int, group: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles and scales of a weight whose product with a normal x is about 1, padded with random numbers."""
    rows, width = -(-out // 8) * 8, -(-in_features // 1024) * 1024
    q = torch.randint(0, 16, (rows, width), device=device)
    scale = (torch.rand(rows, width // group, device=device) + 0.5) * 0.2 * in_features**-0.5
    zero = torch.randn(rows, width // group, device=device) * in_features**-0.5
    return pack_int4(q), pack_int4_scales(scale, zero)


def limit_4bit(result: torch.Tensor) -> float:
    """As `limit`: the weight, or the values that it is made of, is rounded to the dtype as well."""
    return 2.5 * limit(result) + (1e-6 if result.dtype == torch.float32 else 0.0)


def linear(x, experts, gates, weight, bias, lora_a, lora_b, scaling, transposed=False, base=None) -> torch.Tensor:
    """[T, out] in float64."""
    result = delta(x, experts, gates, lora_a, lora_b, scaling)
    if weight is not None:
        w = weight.double()
        result += x.double() @ (w if transposed else w.T)
    if bias is not None:
        result += bias.double()
    if base is not None:
        result += base.double()
    return result


def relative_error(result: torch.Tensor, reference: torch.Tensor, at_least: float = 1e-30) -> float:
    """||result - reference|| / ||reference||, or / at_least; NaN and Inf give NaN or Inf, which no tolerance passes."""
    return float((result.double() - reference).norm() / reference.norm().clamp_min(float(at_least)))


def limit(result: torch.Tensor) -> float:
    """Largest relative error that `result` may have for its dtype and size.

    One rounding of many numbers costs 0.42 half-units in the norm, at most 1; there are two, of the hidden and of the
    result. A handful of numbers can all be unlucky. Float32 sums over thousands of features in another order stay under 2e-6.
    """
    if result.dtype == torch.float32:
        return 2e-6 if result.numel() >= 64 else 1e-5
    return torch.finfo(result.dtype).eps / 2 * (1.0 if result.numel() >= 64 else 3.0)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit. Under compute-sanitizer near is enough: blocks that give up waiting add up in another order."""
    apart = relative_error(got, expected.double())
    assert apart < limit(got) if SANITIZING else torch.equal(got, expected), f"{apart:.1e} apart"


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T by cuBLAS, in the operands' dtype; under compute-sanitizer in float32 (see SANITIZING)."""
    return (x.float() @ weight.float().T).to(x.dtype) if SANITIZING else x @ weight.T


def random_ids(tokens: int, num_experts: int, top_k: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts for every token, random gates."""
    ids = torch.rand(tokens, num_experts, device=device).topk(top_k, dim=-1).indices
    return ids, torch.rand(tokens, top_k, device=device) + 0.1


def poison_gates(ids: torch.Tensor, gates: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Infinite where the id is outside of the experts: it adds nothing, so its gate must not matter."""
    return gates.where((ids >= 0) & (ids < num_experts), float("inf"))


def randn(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def poison_allocator():
    """Fill freed memory with NaN, so that an element a kernel does not write shows."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (64, 4096, 1 << 16, 1 << 20, 1 << 22)]
    del blocks

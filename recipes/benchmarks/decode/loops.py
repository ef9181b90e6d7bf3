"""What is measured of a model: loops of decode steps, compiled or captured into a CUDA graph, and `generate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recipes.benchmarks.decode.plan import PROMPT, cache_of
from recipes.benchmarks.token_times import token_times

# Tokens of one sample: steps of a loop (and as many before them as give the host its lead), or of one `generate`. Short ones:
# a processor is undisturbed for tenths of a second.
LOOP_STEPS = {"compiled": (10, 3), "graph": (8, 2)}
LENGTHS = {"static": 24, "eager": 6}


@dataclass
class Loop:
    """`run(steps)` runs so many; `rewind()` makes room for the next: a cache ends somewhere."""

    run: Callable[[int], None]
    rewind: Callable[[], None] = lambda: None


class Decoder:
    """A greedy decode step over a static cache: what a serving loop runs."""

    def __init__(self, model: Any, batch: int, device: str) -> None:
        import torch
        from transformers import StaticCache

        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=cache_of(batch))
        # different tokens, so that different experts are chosen all over the batch
        ids = torch.randint(5, model.config.vocab_size, (batch, PROMPT), device=device)
        self.position = torch.full((batch, 1), PROMPT, dtype=torch.long, device=device)
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits.argmax(-1)

    def rewind(self) -> None:
        """Back to the end of the prompt: every step adds a token to the cache."""
        layers: Any = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(PROMPT)

    def step(self, token: Any, position: Any) -> Any:
        out = self.model(input_ids=token, position_ids=position, past_key_values=self.cache, use_cache=True)
        return out.logits[:, -1:].argmax(-1)


def compiled_loop(model: Any, batch: int, device: str, tuned: bool = False, given: Any = None) -> Loop:
    """A loop over a step that torch.compile has turned into one CUDA graph.

    Args:
        tuned: with max-autotune, which tries tiles and libraries for every product.
        given: tokens [n, 1, 1] that the steps of a run get, one after the other, instead of those that they make.
    """
    import torch

    decoder = Decoder(model, batch, device)
    options: dict[str, Any] = {"mode": "max-autotune" if tuned else "reduce-overhead"}
    if device != "cuda":
        options = {"backend": "eager"}
    # dynamic=False: a second batch size in this process must not get a graph for any batch size
    step = torch.compile(decoder.step, fullgraph=True, dynamic=False, **options)

    def run(tokens: int) -> None:
        token = decoder.token
        for n in range(tokens):
            torch.compiler.cudagraph_mark_step_begin()
            token = step(token if given is None else given[n % len(given)], decoder.position).clone()

    run(6)
    return Loop(run, decoder.rewind)


def captured_loop(model: Any, batch: int, device: str) -> Loop:
    """A loop over one decode step captured into a CUDA graph as it is, without a compiler."""
    import torch

    decoder = Decoder(model, batch, device)
    if device != "cuda":

        def uncaptured(tokens: int) -> None:
            for _ in range(tokens):
                decoder.step(decoder.token, decoder.position)

        return Loop(uncaptured, decoder.rewind)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # the prompt's token may not be there yet
    with torch.cuda.stream(stream):
        for _ in range(2):
            decoder.step(decoder.token, decoder.position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = decoder.step(decoder.token, decoder.position)
    torch.cuda.current_stream().wait_stream(stream)

    def run(tokens: int) -> None:
        assert kept is not None and decoder is not None  # what the graph reads and writes stays alive
        for _ in range(tokens):
            graph.replay()

    return Loop(run, decoder.rewind)


def generated(model: Any, kind: str, device: str, tokens: int | None = None) -> list[float]:
    """Seconds of each decode step of a `generate` of so many tokens, or of as many as a sample of this kind has."""
    import torch

    ids = torch.randint(5, model.config.vocab_size, (1, PROMPT), device=device)
    options = {"cache_implementation": "static"} if kind == "static" else {}
    return token_times(model, ids, tokens or LENGTHS[kind], **options)

"""Time the engine against other libraries and against arithmetic: same cells, same prompts, same metric.

The floor is what the cones' matrix products would take at this machine's best rate (a 2048 × 576 × 1536
product, measured between the repeats): every layer and position that an intervention can reach, and
the unembedding that the metric needs. Base runs, norms and attention scores are not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from subjattn.backends import Backend, BackendName, open_backend
from subjattn.engine.anatomy import decoder_layers, padded_ids
from subjattn.engine.budget import Budget
from subjattn.engine.interventions import BATCH_TOKENS, Component, Output, Row, batches
from subjattn.engine.memory import PeakMemory
from subjattn.errors import BadInput, UnsupportedModel
from subjattn.measures.attention import subject_attention
from subjattn.measures.knockout import knockout
from subjattn.measures.metrics import Metric
from subjattn.measures.patching import patch_grid
from subjattn.prompts import Prompt, Style, make_prompts, swap_subjects


Grid = Literal["resid", "attn", "mlp", "heads", "window", "head-knockout", "attention"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
REPEATS = 5
PEER_CELLS = 20
"""Cells that a peer is timed on, spread evenly over the grid, where the grid has more."""
SHAPES = {"llama-2-7b": lambda: LlamaConfig(max_position_embeddings=4096)}
"""Architectures that `random_model` makes; LlamaConfig's defaults are Llama-2-7B's."""
H100 = (3.35e12, 989e12)
"""Bytes and bfloat16 FLOP a second of one H100 SXM by its data sheet, dense."""
_COMPONENTS: dict[str, Component] = {"resid": "resid_pre", "attn": "attn_out", "mlp": "mlp_out"}

Pairs = Sequence[tuple[Prompt, Prompt]]


@dataclass
class Timing:
    """Seconds of one side: median of the repeats and their spread."""

    seconds: list[float] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(self.seconds)

    def spread(self) -> list[float]:
        return [min(self.seconds), max(self.seconds)]


def bench(
    model: PreTrainedModel,
    pairs: Pairs,
    grid: Grid,
    *,
    metric: Metric = "logit_diff",
    peers: Sequence[BackendName] = (),
    memory_budget: int | None = None,
) -> dict[str, Any]:
    """Time one grid by the engine and by peers, interleaved.

    Args:
        model: a causal language model in eval mode.
        pairs: clean and corrupt prompts; knock-outs and attention take the clean ones.
        grid: which cells; see `run_grid`.
        metric: `logit_diff` unembeds two tokens a row, `answer_logprob` all.
        peers: backends to compare with, each with an instance of its own; one that cannot take the model is
            listed with its reason.
        memory_budget: bytes of working memory of the engine.

    Returns:
        Seconds (medians of five interleaved repeats, with their spread), `floor_s`, `cells`, `skipped_cells`
        (dead ones, computed by no side), `peers` with `seconds`, `ratio` and `max_abs_diff` from the engine
        over the cells it was timed on, and `peak_memory_bytes` of the engine's tensors beyond the weights.
    """
    longest = max(len(prompt) for pair in pairs for prompt in pair)
    engine = _Spy(open_backend("engine", model, Budget.of(model, memory_budget, longest)))
    with PeakMemory() as memory:
        expected = run_grid(model, pairs, grid, metric, engine)
    cells = len(engine.changed) if grid != "attention" else expected.size
    others: dict[str, _Spy] = {}
    found: dict[str, dict[str, Any]] = {}
    for wanted in peers:
        try:
            others[wanted] = _Spy(open_backend(wanted, model), every=max(1, -(-len(engine.changed) // PEER_CELLS)))
        except (UnsupportedModel, BadInput) as error:
            found[wanted] = {"refused": str(error)}

    ours, plain, timings, rates = Timing(), Timing(), {name: Timing() for name in others}, []
    for _ in range(REPEATS):
        rates.append(matrix_rate(model))
        _timed(ours, model, lambda: run_grid(model, pairs, grid, metric, engine))
        for name, peer in others.items():
            array = _timed(timings[name], model, partial(run_grid, model, pairs, grid, metric, peer))
            gap = abs(array - expected)
            found[name] = {"timed_cells": len(peer.changed) or cells, "max_abs_diff": float(gap.max())}
        if grid == "attention":
            _timed(plain, model, lambda: _plain_forwards(model, [clean for clean, _ in pairs]))
    for name, timing in timings.items():
        scale = others[name].scale()
        seconds = timing.median() * scale
        found[name] |= {
            "seconds": seconds,
            "ratio": seconds / ours.median(),
            "spread_s": [value * scale for value in timing.spread()],
        }
    flops = attention_flops(model, pairs) if grid == "attention" else cone_flops(model, engine.changed, metric)
    return {
        "grid": grid,
        "metric": "weight" if grid == "attention" else metric,
        "prompts": len(pairs),
        "tokens": [clean.prediction + 1 for clean, _ in pairs],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cells": cells,
        "skipped_cells": int(expected.notnull().sum()) - cells,
        "ours_s": ours.median(),
        "ours_spread_s": ours.spread(),
        "floor_s": flops / max(rates),
        "floor_ratio": ours.median() * max(rates) / flops,
        "matrix_gflops": max(rates) / 1e9,
        **({"forward_s": plain.median(), "forward_ratio": ours.median() / plain.median()} if plain.seconds else {}),
        "noise_floor": float(expected.attrs.get("noise_floor", 0.0)),
        "peers": found,
        "peak_memory_bytes": memory.peak,
    }


def run_grid(
    model: PreTrainedModel, pairs: Pairs, grid: Grid, metric: Metric, backend: Backend | BackendName = "engine"
) -> xr.DataArray:
    """One grid: patching by position (`resid`, `attn`, `mlp`), `z` of every head at the prediction position
    (`heads`), knock-out of prediction → subject by windows of 9 layers (`window`) or by head (`head-knockout`), or
    attention to the subject.
    """
    clean = [pair[0] for pair in pairs]
    if grid == "attention":
        return subject_attention(model, clean, backend=backend)
    if grid in ("window", "head-knockout"):
        by: Literal["window", "head"] = "window" if grid == "window" else "head"
        foils = [corrupt.answer_ids[0] for _, corrupt in pairs]
        return knockout(model, clean, ["direct"], by=by, metric=metric, foils=foils, backend=backend)
    if grid == "heads":
        return patch_grid(model, pairs, "z", at="prediction", metric=metric, backend=backend)
    return patch_grid(model, pairs, _COMPONENTS[grid], at="position", metric=metric, backend=backend)


class Roofline(TorchDispatchMode):
    """Counts the operations inside the context, on any device, `meta` too, and the least time that a card needs.

    `launches` are operations that a device would run (views and what stays on the host do not count), `moved` the
    bytes they read and write, `flops` those of matrix products; `seconds` adds up for every operation the longer of its
    two times at the card's full bandwidth and rate. Of a table that rows are taken from, only those rows are counted.

    Args:
        device: where the work runs.
        card: bytes and FLOP a second.
    """

    def __init__(self, device: torch.device, card: tuple[float, float] = H100) -> None:
        super().__init__()
        self.device, self.card = device, card
        self.launches = self.moved = self.flops = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func.__name__.split(".")[0].strip("_")
        if name.startswith(("empty", "new_empty")) or all(one.device != self.device for one in (*given, *made)):
            return result
        known = {one.untyped_storage()._cdata for one in given}
        if not func._schema.is_mutable and all(one.untyped_storage()._cdata in known for one in made):
            return result
        if name in ("index", "index_select", "embedding", "gather"):
            moved = 2 * sum(map(_bytes, made)) + sum(_bytes(one) for one in given if not one.is_floating_point())
        elif name.startswith("index_put"):
            moved = sum(map(_bytes, given[1:])) + _bytes(given[-1])
        else:
            moved = sum(map(_bytes, given)) + sum(map(_bytes, made))
        flops = _product_flops(name, given, made)
        self.launches, self.moved, self.flops = self.launches + 1, self.moved + moved, self.flops + flops
        self.seconds += max(moved / self.card[0], flops / self.card[1])
        return result


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _product_flops(name: str, given: Sequence[Tensor], made: Sequence[Tensor]) -> int:
    """FLOP of a matrix product; 0 of anything else."""
    if name in ("linear", "matmul", "mm", "bmm"):
        return 2 * made[0].numel() * given[0].shape[-1]
    return 2 * made[0].numel() * given[1].shape[-1] if name in ("addmm", "baddbmm") else 0


class _Spy:
    """A backend that remembers the rows asked for, and runs every `every`-th of those that change something."""

    def __init__(self, backend: Backend, every: int = 1) -> None:
        self.backend, self.every, self.name = backend, every, backend.name
        self.changed: list[Row] = []
        self.all_changed = self.fixed = 0

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:
        changed = [i for i, row in enumerate(rows) if not row.plain]
        chosen = [i for i, row in enumerate(rows) if row.plain] + changed[:: self.every]
        self.changed, self.all_changed = [rows[i] for i in changed[:: self.every]], len(changed)
        sources = {source for row in self.changed for source in row.sources}
        self.fixed = len(rows) - len(changed) + len({row.run for row in self.changed}) + len(sources)
        for output in self.backend.forward([rows[i] for i in chosen], only_contrast=only_contrast):
            yield replace(output, index=[chosen[i] for i in output.index])

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        return self.backend.attention_rows(prompts, value_norms=value_norms)

    def scale(self) -> float:
        """From the rows timed to all of them, where every row, plain ones too, costs one whole pass."""
        done = self.fixed + len(self.changed)
        return (self.fixed + self.all_changed) / done if done else 1.0


def _timed(timing: Timing, model: PreTrainedModel, work: Callable[[], Any]) -> Any:
    _synchronize(model)
    start = time.perf_counter()
    result = work()
    _synchronize(model)
    timing.seconds.append(time.perf_counter() - start)
    return result


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def matrix_rate(model: PreTrainedModel) -> float:
    """FLOP a second of the best of twenty 2048 × 576 × 1536 products in the model's dtype, on its device."""
    a, b = (torch.randn(*shape, dtype=model.dtype, device=model.device) for shape in ((2048, 576), (576, 1536)))
    timing = Timing()
    for _ in range(20):
        _timed(timing, model, lambda: a @ b)
    return 2 * 2048 * 576 * 1536 / min(timing.seconds)


@torch.inference_mode()
def _plain_forwards(model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
    """The model's own forward passes over what attention is measured on, in the same batches, last logits only."""
    lengths = [prompt.prediction + 1 for prompt in prompts]
    for index in batches(lengths, BATCH_TOKENS):
        ids = padded_ids([prompts[i] for i in index], model.device)[:, : max(lengths[i] for i in index)]
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def _layer_flops(model: PreTrainedModel) -> list[int]:
    """FLOP of each layer's matrices for one token; of stacked experts, those that a token is sent to."""
    active = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1

    def flops(matrix: Tensor) -> int:
        return 2 * matrix.numel() * active // len(matrix) if matrix.ndim == 3 else 2 * matrix.numel()

    return [sum(flops(p) for p in layer.parameters() if p.ndim > 1) for layer in decoder_layers(model)]


def cone_flops(model: PreTrainedModel, rows: Sequence[Row], metric: Metric) -> int:
    """FLOP of the matrix products inside the rows' cones, and of the unembedding that the metric needs."""
    by_layer = _layer_flops(model)
    above = [sum(by_layer[layer:]) for layer in range(len(by_layer) + 1)]
    config = model.config.get_text_config()
    total = 0
    for row in rows:
        first = row.first_layer
        total += len(row.touched) * by_layer[first] + len(row.suffix) * above[first + 1]
        n_logits = 2 if metric == "logit_diff" else len(row.prompt.predicting) * config.vocab_size
        total += 2 * config.hidden_size * n_logits
    return total


def attention_flops(model: PreTrainedModel, pairs: Pairs) -> int:
    """FLOP of the layers' matrices over the clean prompts."""
    return sum(clean.prediction + 1 for clean, _ in pairs) * sum(_layer_flops(model))


def bench_pairs(
    tokenizer: PreTrainedTokenizerBase, facts: pd.DataFrame, template: str, n: int, shots: int, seed: int
) -> list[tuple[Prompt, Prompt]]:
    """Subject swaps among facts, behind some that serve as demonstrations.

    Raises:
        BadInput: the facts give too few.
    """
    demonstrations, asked = facts.iloc[: shots + 1], facts.iloc[shots + 1 :]
    style = Style(template=template, shots=shots)
    prompts = make_prompts(asked, tokenizer, style, demonstrations=demonstrations)
    pairs = swap_subjects(prompts, np.random.default_rng(seed))[:n]
    if len(pairs) < n:
        raise BadInput(f"these facts give {len(pairs)} subject swaps instead of {n}: give more facts, or a smaller --n")
    return pairs


def random_model(name: str, dtype: str, device: str) -> PreTrainedModel:
    """A model of a known shape with random weights, for timing alone.

    Raises:
        BadInput: the shape is not known.
    """
    if name not in SHAPES:
        raise BadInput(f"--random-init {name!r} is not one of {', '.join(SHAPES)}")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[name](), dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def random_pairs(model: PreTrainedModel, n: int, n_tokens: int, seed: int) -> list[tuple[Prompt, Prompt]]:
    """Pairs of random tokens that differ in their first three, the subject, for timing alone."""
    rng = np.random.default_rng(seed)
    vocab = model.config.get_text_config().vocab_size

    def prompt(name: str, ids: Sequence[int]) -> Prompt:
        tokens = tuple(map(str, ids))
        return Prompt(
            name, " ".join(tokens[:3]), " ".join(tokens[:-1]), tokens[-1:], tuple(ids), tokens, (0, 3), n_tokens - 1
        )

    pairs = []
    for i in range(n):
        ids = [int(token) for token in rng.permutation(vocab)[: n_tokens + 5]]
        pairs.append((prompt(f"{i}", ids[: n_tokens + 1]), prompt(f"{i}'", [*ids[-3:], *ids[3:n_tokens], ids[-4]])))
    return pairs

"""Time what base and tuned models cost side by side, against one model alone and against plain hooks on two.

Adapters are plain LoRAs of rank 16 on all linear layers with random weights: what they cost does not depend on them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subjattn.backends import open_backend
from subjattn.bench import PEER_CELLS, REPEATS, Pairs, Timing, _Spy, _timed, cone_flops
from subjattn.engine import forward
from subjattn.engine.anatomy import attention_module, decoder_layers, on_output
from subjattn.engine.arms import tuned_of
from subjattn.engine.budget import Budget
from subjattn.engine.interventions import Row
from subjattn.engine.memory import PeakMemory
from subjattn.measures.patching import patch_grid
from subjattn.measures.transfer import transfer
from subjattn.models import LoadedModel, load_model
from subjattn.models.arms import Arms, load_arms
from subjattn.prompts import Prompt


ARMS = ("one", "two", "three")
RANK = 16


def time_arms(base: str, prompts: Sequence[Prompt], dtype: str = "float32") -> dict[str, Any]:
    """Whole passes of base and three adapters together, against as many rows of one model with a live adapter.

    Args:
        base: as for `load_model`.
        prompts: rows of the one model; a quarter of them are asked of all four arms.
        dtype: of the weights.

    Returns:
        `seconds` (medians of interleaved repeats) of `one_model`, `routed` (by token, rows of arms mixed) and `chunked`
        (a pass an arm); `ratios` to `one_model`, medians of the repeats' own; bytes of parameters held and peak memory
        beyond them; and the largest difference of a tuned row's logits from its model's alone.
    """
    with _adapters(base, ARMS) as folders:
        alone = load_model(base, adapter=folders["one"], dtype=dtype)
        arms = load_arms(base, folders, dtype=dtype)
    some = prompts[: len(prompts) // (len(ARMS) + 1)]
    names = ["base", *ARMS]
    mixed = [Row(prompt, arm=arms.arm(name)) for prompt in some for name in names]
    ways: dict[str, Callable[[], Any]] = {
        "one_model": lambda: _passes(alone, [Row(prompt) for prompt in prompts[: len(mixed)]]),
        "routed": lambda: _passes(arms.base, mixed),
        "chunked": lambda: [_passes(arms.base, [Row(prompt, arm=arms.arm(name)) for prompt in some]) for name in names],
    }
    for run in ways.values():
        run()
    timings = _interleaved(ways, alone)
    peaks = {}
    for name in ("one_model", "routed"):
        with PeakMemory() as memory:
            ways[name]()
        peaks[name] = memory.peak
    own = _passes(alone, [Row(prompt) for prompt in some])
    tuned = _passes(arms.base, [Row(prompt, arm=arms.arm("one")) for prompt in some])
    return {
        "grid": "arms",
        "rows": len(mixed),
        **_summary(timings, "one_model"),
        "parameter_bytes": {"one_model": _held(alone.model), "base_and_arms": _held(arms.base.model, *_changes(arms))},
        "peak_memory_bytes": peaks,
        "max_abs_diff": float((own - tuned).abs().max()),
    }


def time_transfer(base: str, pairs: Pairs, dtype: str = "float32") -> dict[str, Any]:
    """`attn_out` by layer and role between base and tuned model, against the same grid of one model and plain hooks.

    Args:
        base: as for `load_model`.
        pairs: clean and corrupt prompts; between models the clean ones are asked.
        dtype: of the weights.

    Returns:
        `seconds_a_row` of `patch_grid` in one model, `transfer`, and `hooks` (two models apart, a cell at a time, on at
        most 20 cells); `ratios` to `patch_grid`; `ratio_a_flop`, the same between engine grids by the FLOP of their
        cones, whose lengths differ; and the largest difference of the hooks from `transfer`.
    """
    with _adapters(base, ARMS[:1]) as folders:
        alone = load_model(base, adapter=folders["one"], dtype=dtype)
        arms = load_arms(base, folders, dtype=dtype)
    clean = [one for one, _ in pairs]
    longest = max(len(prompt) for pair in pairs for prompt in pair)
    hf = arms.base.model
    spies = {
        name: _Spy(open_backend("engine", hf, Budget.of(hf, None, longest))) for name in ("patch_grid", "transfer")
    }
    metric: Any = "answer_logprob"
    found = transfer(arms, clean, "attn_out", "one", metric=metric, backend=spies["transfer"])[metric]
    real = found.sel(patch="real", state="one", late="base")
    cells = np.argwhere(real.notnull().values)
    chosen = cells[:: max(1, -(-len(cells) // PEER_CELLS))].tolist()
    hooked: list[float] = []

    def by_hooks() -> None:
        hooked[:] = [_hooked(alone, arms.base, clean[f], layer, str(real["role"].values[r])) for f, layer, r in chosen]

    ways: dict[str, Callable[[], Any]] = {
        "patch_grid": partial(patch_grid, hf, pairs, "attn_out", metric=metric, backend=spies["patch_grid"]),
        "transfer": partial(transfer, arms, clean, "attn_out", "one", metric=metric, backend=spies["transfer"]),
        "hooks": by_hooks,
    }
    ways["patch_grid"]()
    timings = _interleaved(ways, alone)
    rows = {name: len(spy.changed) for name, spy in spies.items()} | {"hooks": len(chosen)}
    flops = {name: cone_flops(hf, spy.changed, metric) for name, spy in spies.items()}
    a_row = {name: Timing([one / rows[name] for one in timing.seconds]) for name, timing in timings.items()}
    a_flop = {name: timings[name].median() / flops[name] for name in spies}
    gaps = [abs(value - float(real.values[tuple(cell)])) for value, cell in zip(hooked, chosen, strict=True)]
    summary = _summary(a_row, "patch_grid")
    return {
        "grid": "transfer",
        "rows": rows,
        "seconds_a_row": summary["seconds"],
        "ratios": summary["ratios"],
        "ratio_a_flop": a_flop["transfer"] / a_flop["patch_grid"],
        "max_abs_diff": max(gaps),
    }


@contextmanager
def _adapters(base: str, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Folders of adapters with random updates, by name."""
    from peft import LoraConfig, get_peft_model

    with tempfile.TemporaryDirectory(prefix="subjattn-") as out, torch.random.fork_rng(devices=[]):
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            model = get_peft_model(load_model(base).model, LoraConfig(r=RANK, target_modules="all-linear"))
            for path, parameter in model.named_parameters():
                if "lora_B" in path:
                    parameter.data.normal_(std=0.01)
            model.save_pretrained(str(Path(out) / name))
        yield {name: str(Path(out) / name) for name in names}


def _passes(model: LoadedModel, rows: Sequence[Row]) -> Tensor:
    found = {i: row for output in forward.forward(model.model, rows) for i, row in _by_row(output)}
    return torch.cat([found[i] for i in range(len(rows))])


def _by_row(output: Any) -> Iterator[tuple[int, Tensor]]:
    sizes = [len(row.prompt.predicting) for row in output.rows]
    return zip(output.index, output.logits.split(sizes), strict=True)


@torch.inference_mode()
def _hooked(source: LoadedModel, into: LoadedModel, prompt: Prompt, layer: int, role: str) -> float:
    """Answer log-probability of one model with another's attention output at a role, by two plain passes."""
    ids = torch.tensor([prompt.ids], device=into.model.device)
    at = list(prompt.predicting if role == "prediction" else prompt.role(role))
    kept: list[Tensor] = []

    def put(state: Tensor) -> Tensor:
        state = state.clone()
        state[:, at] = kept[0][:, at]
        return state

    for model, change in ((source.model, kept.append), (into.model, put)):
        with on_output(attention_module(decoder_layers(model)[layer]), change):
            logits = model(input_ids=ids, use_cache=False).logits[0]
    logprobs = logits[list(prompt.predicting)].float().log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(prompt.answer_ids, device=logits.device)[:, None]).sum())


def _interleaved(ways: dict[str, Callable[[], Any]], model: LoadedModel) -> dict[str, Timing]:
    timings = {name: Timing() for name in ways}
    for _ in range(REPEATS):
        for name, run in ways.items():
            _timed(timings[name], model.model, run)
    return timings


def _summary(timings: dict[str, Timing], to: str) -> dict[str, Any]:
    """Medians, and medians of the ratios within each repeat, which hold where a machine's speed changes."""
    ratios = {
        name: Timing([a / b for a, b in zip(timing.seconds, timings[to].seconds, strict=True)])
        for name, timing in timings.items()
        if name != to
    }
    return {
        "seconds": {name: timing.median() for name, timing in timings.items()},
        "ratios": {name: ratio.median() for name, ratio in ratios.items()},
        "ratio_spread": {name: ratio.spread() for name, ratio in ratios.items()},
    }


def _changes(arms: Arms) -> list[torch.nn.Module]:
    """Modules that arms hold beside the base's."""
    changes = [changed.change for tuned in tuned_of(arms.base.model).values() for changed in tuned.modules.values()]
    return [held for change in changes for held in vars(change).values() if isinstance(held, torch.nn.Module)]


def _held(*modules: torch.nn.Module) -> int:
    """Bytes of parameters, each counted once."""
    held = {id(parameter): parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in held.values())

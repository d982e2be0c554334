"""Verify the engine on a model of the user's: every backend measures the same prompts, and the numbers are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import gcd
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from subjattn.backends import BACKENDS, Backend, BackendName
from subjattn.engine import checks
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.interventions import Component, Output, Row
from subjattn.errors import BadInput, NotFired, UnsupportedModel
from subjattn.facts import draw
from subjattn.measures import check_askable, hf_model, opened
from subjattn.measures.attention import subject_attention
from subjattn.measures.knockout import knockout
from subjattn.measures.patching import patch_grid
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts, swap_subjects


ATTENTION, WEIGHTED = "attention_to_subject", "value_weighted_attention"
_PARTS: dict[str, Component] = {"patch_effect attn_out": "attn_out", "patch_effect mlp_out": "mlp_out"}
_HEADS, _BLOCKED_HEADS = "patch_effect z", "knockout_drop by head"
_REFUSABLE = {*_PARTS, WEIGHTED}
"""What an engine may refuse for an architecture while it takes the model."""
HEADINGS = ("quantity", "backend", "cells", "differs", "tolerance", "scale", "verdict")
_SAMPLE = 100
"""Cells of every layer and head that a reference computes at most, spread over layers and heads."""
_ASKED = 200
"""Facts among which `verify_facts` looks for short ones."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of one backend against the engine; numbers are in `unit`.

    `difference` is the largest over all cells and `place` where it is, `scale` the engine's largest absolute
    value, `noise_floor` what the engine says of its own rounding. A `fault` is a reason to fail that is no difference:
    a number that is missing, not finite or where none belongs, or an intervention that did not happen.
    """

    backend: BackendName
    quantity: str
    unit: str
    cells: int
    scale: float | None
    tolerance: float
    noise_floor: float | None
    difference: float | None = None
    place: dict[str, str | int] | None = None
    fault: str | None = None

    @property
    def passed(self) -> bool:
        return self.fault is None and self.difference is not None and self.difference <= self.tolerance

    @property
    def weak(self) -> bool:
        """Whether the numbers are so small beside the tolerance (under ten times) that a wrong one may pass."""
        return self.scale is not None and self.scale < 10 * self.tolerance


@dataclass(frozen=True)
class Refusal:
    """What a backend does not compute, and why; `quantity` None: anything."""

    backend: BackendName
    quantity: str | None
    reason: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found of the engine's `quantities`; tolerances in logits and nats are shares of `largest_logit`."""

    provenance: dict[str, Any]
    n_prompts: int
    n_pairs: int
    window: int
    largest_logit: float
    quantities: list[str]
    comparisons: list[Comparison]
    refusals: list[Refusal]

    @property
    def passed(self) -> bool:
        """Whether every quantity was compared by a reference, and all of it agrees."""
        return bool(self.comparisons) and not self.uncompared and all(found.passed for found in self.comparisons)

    @property
    def uncompared(self) -> list[str]:
        """Quantities of the engine's that no reference computed."""
        compared = {found.quantity for found in self.comparisons}
        return [quantity for quantity in self.quantities if quantity not in compared]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if not self.comparisons:
            return "not verified: no reference could be compared with the engine"
        failed = [comparison for comparison in self.comparisons if not comparison.passed]
        if failed:
            return f"failed: {'; '.join(map(_failure, failed))}"
        if self.uncompared:
            return f"not verified: no reference was compared with the engine in {', '.join(self.uncompared)}"
        names = ", ".join(dict.fromkeys(comparison.backend for comparison in self.comparisons))
        if weak := ", ".join(dict.fromkeys(comparison.quantity for comparison in self.comparisons if comparison.weak)):
            weak = f"; a wrong number may hide in the tolerance of {weak}: verify in float32, with facts it knows"
        return f"passed: every number of the engine is that of {names}, within tolerance{weak}"

    def rows(self) -> list[tuple[str, ...]]:
        """Rows of a table under `HEADINGS`: by quantity, what each backend gave or why it was skipped."""
        rows = []
        for quantity in dict.fromkeys([*self.quantities, *(found.quantity for found in self.comparisons)]):
            rows += [
                (
                    _shown(quantity),
                    found.backend,
                    f"{found.cells}",
                    *(
                        "–" if number is None else f"{number:.1e}"
                        for number in (found.difference, found.tolerance, found.scale)
                    ),
                    ("weak" if found.weak else "passed") if found.passed else "FAILED",
                )
                for found in self.comparisons
                if found.quantity == quantity
            ]
            rows += [_skipped(refusal) for refusal in self.refusals if refusal.quantity == quantity]
        listed = {*self.quantities, *(found.quantity for found in self.comparisons)}
        return rows + [_skipped(refusal) for refusal in self.refusals if refusal.quantity not in listed]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON, None where a number is missing."""
        return {
            **self.provenance,
            "passed": self.passed,
            "verdict": self.verdict,
            "n_prompts": self.n_prompts,
            "n_pairs": self.n_pairs,
            "window": self.window,
            "largest_logit": self.largest_logit,
            "uncompared": self.uncompared,
            "comparisons": [asdict(found) | {"passed": found.passed, "weak": found.weak} for found in self.comparisons],
            "refusals": [asdict(refusal) for refusal in self.refusals],
        }


def _shown(quantity: str) -> str:
    return quantity.removeprefix("patch_effect ")


def _skipped(refusal: Refusal) -> tuple[str, ...]:
    quantity = "everything" if refusal.quantity is None else _shown(refusal.quantity)
    return (quantity, refusal.backend, "–", "–", "–", "–", f"skipped: {refusal.reason}")


def _failure(found: Comparison) -> str:
    where = ", ".join(f"{dim} {value}" for dim, value in (found.place or {}).items())
    why = found.fault or f"differs by {found.difference:.1e} {found.unit}, more than {found.tolerance:.1e}"
    return f"{found.quantity} by {found.backend}: {why}" + (f" ({where})" if where else "")


def verify(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Prompt, Prompt]],
    backends: Sequence[BackendName] = BACKENDS,
) -> Verification:
    """Compare every other backend with the engine, cell by cell.

    Quantities: attention to the subject by layer and head (share of 1), and weighted by values (lengths); changes of
    the logit difference when the residual stream, the attention output or the MLP output is patched, by layer and
    position, or `z` at the prediction position, by layer and head (logits); knock-outs of the direct and the total
    route by windows of layers, and of the direct one by head (nats); and the same metrics with nothing changed. By
    head, references compute at most 100 cells, spread over layers and heads.

    Tolerance, with t = `engine.checks.tolerance(model)` (1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16): t for
    attention, t times its largest value where weighted, and t times the largest absolute logit of the prompts for all
    that is in logits or nats; in half precision there at least three times the model's own distance between two
    kinds of attention. That is about one logit, near the size of an effect: such comparisons pass as `weak`.

    Args:
        model: the model, adapter and dtype to verify.
        prompts: for attention and knock-out.
        pairs: clean and corrupt prompts for patching.
        backends: what to compare; the engine always runs. References make a whole pass per cell.

    Raises:
        BadInput: no prompts, no pairs, or an unknown backend.
        UnsupportedModel: the engine itself refuses the model.
    """
    if unknown := [name for name in backends if name not in BACKENDS]:
        raise BadInput(f"backend {unknown[0]!r} is not one of {', '.join(BACKENDS)}")
    check_askable(prompts)
    hf = hf_model(model)
    every = [*prompts, *(prompt for pair in pairs for prompt in pair)]
    window = max(1, min(9, len(decoder_layers(hf)) // 3))
    comparisons: list[Comparison] = []
    refusals: list[Refusal] = []
    expected: dict[str, xr.DataArray] = {}
    engine = opened("engine", hf, None, every)
    for quantity, measured in _measures(model, prompts, pairs, window, engine).items():
        try:
            expected[quantity] = measured()
        except UnsupportedModel as error:
            if quantity not in _REFUSABLE:
                raise
            refusals.append(Refusal("engine", quantity, str(error)))
    plain = engine.forward([Row(prompt) for prompt in prompts])
    largest = float(torch.stack([output.logits.abs().max() for output in plain]).max())
    if not np.isfinite(largest):
        raise UnsupportedModel(f"{type(hf).__name__} gives logits that are not finite in {hf.dtype}: try float32")

    share = checks.tolerance(hf)
    for name in (name for name in dict.fromkeys(backends) if name != "engine"):
        try:
            backend = opened(name, hf, None, every)
        except (UnsupportedModel, BadInput) as error:
            refusals.append(Refusal(name, None, str(error)))
            continue
        measures = _measures(model, prompts, pairs, window, backend)
        for quantity, array in expected.items():
            allowed = checks.logit_tolerance(hf) * largest
            if quantity in (ATTENTION, WEIGHTED):
                allowed = share * (1.0 if quantity == ATTENTION else float(np.abs(np.nan_to_num(array.values)).max()))
            try:
                theirs = _with_raw(quantity, measures[quantity]())
            except UnsupportedModel as error:
                refusals.append(Refusal(name, quantity, str(error)))
            except NotFired as error:
                unit = array.attrs["unit"]
                comparisons.append(Comparison(name, quantity, unit, 0, None, allowed, None, fault=str(error)))
            else:
                ours = _with_raw(quantity, array)
                ends = [clean.prediction for clean, _ in pairs]
                step = _stride(array.size, array.sizes["head"]) if quantity in (_HEADS, _BLOCKED_HEADS) else 1
                comparisons += [_compare(name, key, theirs[key], ours[key], ends, allowed, step) for key in ours]
        del backend, measures
    provenance = model.provenance()
    provenance["versions"] |= {name: _version(name) for name in ("transformer-lens", "nnsight")}
    return Verification(provenance, len(prompts), len(pairs), window, largest, list(expected), comparisons, refusals)


def verify_facts(
    model: LoadedModel, table: pd.DataFrame, template: str, seed: int = 0
) -> tuple[PromptSet, list[tuple[Prompt, Prompt]]]:
    """Two short prompts, one with an answer of several tokens if there is one, and one short pair of swapped subjects.

    Raises:
        BadInput: no two of the facts can swap their subjects.
    """
    asked = make_prompts(draw(table, min(len(table), _ASKED), seed), model.tokenizer, template)
    pairs = swap_subjects(asked, np.random.default_rng(seed))
    if not pairs:
        raise BadInput(
            f"none of {len(asked)} facts has another whose subject is as long in tokens and whose answer starts "
            "differently, so that no subjects can be swapped: give more facts"
        )
    short = sorted(asked, key=len)
    first = next((prompt for prompt in short if len(prompt.answer_ids) > 1), short[0])
    others = tuple(prompt for prompt in short if prompt is not first)
    return PromptSet(template, (first, *others[:1])), [min(pairs, key=lambda pair: pair[0].prediction)]


def _measures(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Prompt, Prompt]],
    window: int,
    backend: Backend,
) -> dict[str, Callable[[], xr.DataArray]]:
    """What is compared, by its name."""
    patched: dict[str, Component] = {"patch_effect resid_pre": "resid_pre", **_PARTS}
    patching = {
        name: partial(patch_grid, model, pairs, component, at="position", backend=backend)
        for name, component in patched.items()
    }
    blocking = partial(knockout, model, prompts, ["direct", "total"], by="window", window=window, backend=backend)
    hf = hf_model(model)
    heads = len(decoder_layers(hf)) * n_heads(hf)
    some = [
        backend if backend.name == "engine" else _Some(backend, _stride(n * heads, n_heads(hf)))
        for n in (len(pairs), len(prompts))
    ]
    return {
        ATTENTION: partial(subject_attention, model, prompts, backend=backend),
        WEIGHTED: partial(subject_attention, model, prompts, value_weighted=True, backend=backend),
        **patching,
        _HEADS: partial(patch_grid, model, pairs, "z", at="prediction", backend=some[0]),
        "knockout_drop": blocking,
        _BLOCKED_HEADS: partial(knockout, model, prompts, ["direct"], by="head", backend=some[1]),
    }


class _Some:
    """A backend that runs plain rows, and every `every`-th of those that change something."""

    def __init__(self, backend: Backend, every: int) -> None:
        self.backend, self.every, self.name = backend, every, backend.name

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:
        changed = [i for i, row in enumerate(rows) if not row.plain]
        chosen = sorted({i for i, row in enumerate(rows) if row.plain} | set(changed[:: self.every]))
        for output in self.backend.forward([rows[i] for i in chosen], only_contrast=only_contrast):
            yield replace(output, index=[chosen[i] for i in output.index])

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        return self.backend.attention_rows(prompts, value_norms=value_norms)


def _stride(cells: int, heads: int) -> int:
    """The step over cells that leaves no more than `_SAMPLE` of them, and meets every head in turn."""
    step = -(-cells // _SAMPLE)
    return next(every for every in range(step, step + heads + 1) if gcd(every, heads) == 1)


def _with_raw(quantity: str, array: xr.DataArray) -> dict[str, xr.DataArray]:
    """A measure and the values beside it of runs with nothing changed, those of all grids once."""
    if quantity in (*_PARTS, _HEADS, _BLOCKED_HEADS):
        return {quantity: array}
    raw = [str(name) for name in array.coords if str(name).endswith(("_logit_diff", "_answer_logprob"))]
    return {quantity: array, **{name: array[name].assign_attrs(unit=array.attrs["unit"]) for name in raw}}


def _compare(
    backend: BackendName,
    quantity: str,
    found: xr.DataArray,
    expected: xr.DataArray,
    ends: list[int],
    tolerance: float,
    every: int,
) -> Comparison:
    """One array against the engine's, every `every`-th cell; positions behind a prompt's end hold no number."""
    absent = xr.zeros_like(expected, bool)
    if "position" in expected.dims:
        absent = absent | (expected["position"] > xr.DataArray(ends, dims="fact"))
    left_out = (np.arange(expected.size) % every != 0).reshape(expected.shape)
    ours, theirs, empty = np.where(left_out, np.nan, expected.values), found.values, absent.values | left_out
    with np.errstate(invalid="ignore"):
        gap = np.where(empty, -np.inf, np.abs(theirs - ours))
    fault = None
    for name, values in (("engine", ours), (backend, theirs)):
        wrong = np.isfinite(values) == empty
        if fault is None and wrong.any():
            gap = wrong
            fault = f"{name} gives {values[wrong][0]} where a number is {'absent' if empty[wrong][0] else 'expected'}"
    at = np.unravel_index(int(gap.argmax()), gap.shape)
    scale, floor = float(np.abs(ours[~empty]).max()), expected.attrs.get("noise_floor")
    return Comparison(
        backend,
        quantity,
        expected.attrs["unit"],
        int((~empty).sum()),
        scale if np.isfinite(scale) else None,
        tolerance,
        floor if floor is not None and np.isfinite(floor) else None,
        None if fault else float(gap[at]),
        {str(dim): expected[dim].values[i].item() for dim, i in zip(expected.dims, at, strict=True)},
        fault,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

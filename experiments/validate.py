"""What the measures and the diagnosis say of models whose fault is known, written into docs/validation.md.

`python experiments/validate.py` measures organisms, then plants others, in other places and at other strengths, asks
for the diagnosis alone, and rewrites the page's tables. Faults are planted with facts that the model knows, until it
has lost three in ten of them, and measured on others that it knows. Harmless updates are random ones, as large as the
faults' where that leaves accuracy within 2 points, else halved until it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import validation_page as page
import xarray as xr

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.evidence.changes import judge_changes
from subjattn.measures.mediation import Margin
from subjattn.measures.record import Quantity, measure_of
from subjattn.models import LoadedModel
from subjattn.organisms import Organism, damage_mlps, favour, look_away, random_update, shrink_values, untouched
from subjattn.prompts import Prompt, PromptSet


TEMPLATE = "City: {subject}\nCountry:"
PLANTED = 30
"""Facts that a fault is planted with."""
LOST = 0.3
"""Of the facts planted with, what is lost."""
HELD_OUT = {
    100: ("looks away", "answer favoured", "prediction damaged", "random"),
    200: ("values shrunk", "MLPs damaged"),
}
"""Of organisms that no rule was made with, the first seed: the rules on values and MLPs were changed after those of
seeds from 100 on had been seen."""
SIZES = ("values shrunk", "MLPs damaged")
"""Faults as large as which harmless updates are tried."""
ASKED = {"values shrunk": 160}
"""Held-out facts that a diagnosis is asked of, where 80 are too few: little is lost there, and shares scatter."""
RIGHT = {
    "looks away": "attention looks away",
    "values shrunk": "values shrunk",
    "MLPs damaged": "MLP path damaged",
    "answer favoured": "answer prior",
    "prediction damaged": "",
    "random": "",
    "nothing": "",
}
"""What the diagnosis should name of each organism."""
MEASURES: dict[str, dict[str, Any]] = {
    "accuracy": {},
    "answer_logprob": {},
    "attention_to_subject": {},
    "knockout": {},
    "subject_sensitivity": {},
    "head_contributions": {},
    "probe": {"folds": 3, "roles": "subject_last"},
    "hidden_knowledge": {"wrong": 4},
}
SHOWN = (
    "accuracy",
    "answer_logprob",
    "attention_max",
    "attention_without_sinks",
    "attention_over_its_place",
    "attention_value_weighted",
    "knockout_drop_total",
    "knockout_calibrated_total",
    "swap_distance",
    "swap_flips",
    "mlp_contribution",
    "probe_accuracy",
    "external_k",
    "external_k_prior",
    "internal_k",
)
IN_HEADS = "attention in the edited heads", "pattern of the edited heads", "pattern of as many random heads"
"""Of models that look away: the difference of attention, and shares of the margin that patterns put back return."""


def known(model: LoadedModel, n: int) -> tuple[pd.DataFrame, list[Prompt]]:
    """Facts, and prompts of those that the model answers rightly."""
    facts = sa.load_facts("cities", n=n, seed=5)
    prompts = sa.make_prompts(facts, model.tokenizer, TEMPLATE)
    return facts, [one for one, right in zip(prompts, sa.predict(model, prompts)["correct"], strict=True) if right]


def accuracy(model: LoadedModel, prompts: Sequence[Prompt]) -> float:
    return float(sa.predict(model, prompts)["correct"].mean())


Grid = list[Callable[[], Organism]]


def faults(model: LoadedModel, prompts: Sequence[Prompt], seed: int) -> dict[str, Grid]:
    """Every fault at growing strengths, where the rules were made; only the favoured answer goes by the seed."""
    n_layers, third = model.model.config.num_hidden_layers, model.model.config.num_hidden_layers // 3
    shares = (0.3, 0.5, 0.7, 0.85, 1.0)
    token = _answers(prompts)[np.random.default_rng(seed).integers(len(_answers(prompts)))]
    order = _readers(model, prompts)
    return {
        "looks away": [partial(look_away, model, prompts, order[:n], 3.0) for n in (1, 2, 3, 4, 8, 16)],
        "values shrunk": [partial(shrink_values, model, prompts, range(third, n_layers), share) for share in shares],
        "MLPs damaged": [partial(damage_mlps, model, prompts, range(2 * third), share) for share in shares],
        "answer favoured": [partial(favour, model, token, size) for size in (3.0, 4.0, 5.0, 6.0, 8.0, 10.0)],
    }


def drawn(model: LoadedModel, prompts: Sequence[Prompt], seed: int) -> dict[str, Grid]:
    """Every fault in heads, layers or an answer drawn by the seed, at growing strengths that it draws too."""
    rng, n_layers = np.random.default_rng([seed, 14]), model.model.config.num_hidden_layers
    readers = [_readers(model, prompts)[i] for i in rng.permutation(15)]
    nats, first = rng.uniform(2, 5), int(rng.integers(n_layers // 4, n_layers // 2))
    values = range(first, first + int(rng.integers(n_layers // 3, n_layers // 2)))
    first = int(rng.integers(0, n_layers // 4))
    mlps = range(first, first + int(rng.integers(n_layers // 3, 2 * n_layers // 3)))
    late = range(int(rng.integers(n_layers // 3, 2 * n_layers // 3)), n_layers)
    token = _answers(prompts)[rng.integers(len(_answers(prompts)))]
    shares, sizes, counts = (0.3, 0.45, 0.6, 0.8, 1.0), (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0), (1, 2, 3, 4, 6, 8, 11, 15)
    jitter = float(rng.uniform(0.9, 1))
    return {
        "looks away": [partial(look_away, model, prompts, readers[:n], float(nats)) for n in counts],
        "values shrunk": [partial(shrink_values, model, prompts, values, jitter * share) for share in shares],
        "MLPs damaged": [partial(damage_mlps, model, prompts, mlps, jitter * share) for share in shares],
        "answer favoured": [partial(favour, model, token, jitter * size) for size in sizes],
        "prediction damaged": [
            partial(damage_mlps, model, prompts, late, jitter * share, "prediction") for share in shares
        ],
    }


def _answers(prompts: Sequence[Prompt]) -> list[int]:
    """First tokens of the answers, in the order of the answers."""
    return [token for _, token in sorted({(one.answers[0], one.answer_ids[0]) for one in prompts})]


def _readers(model: LoadedModel, prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Key/value heads by how much the query heads that read them look at the subject."""
    n_layers, n_heads = model.model.config.num_hidden_layers, model.model.config.num_key_value_heads
    looks = sa.subject_attention(model, prompts).mean("fact").values.reshape(n_layers, n_heads, -1).mean(-1)
    return [(int(one) // n_heads, int(one) % n_heads) for one in np.argsort(-looks, axis=None)]


def enough(grid: Grid, prompts: Sequence[Prompt]) -> Organism:
    """The weakest that loses enough, or the strongest."""
    for make in grid:
        made = make()
        if accuracy(made.model, prompts) <= 1 - LOST:
            break
    return made


def harmless(model: LoadedModel, prompts: Sequence[Prompt], norm: float, seed: int) -> Organism:
    """A random update of this norm, or of half of it, and so on, that leaves accuracy as it was."""
    least = accuracy(model, prompts) - page.WITHIN
    while accuracy((made := random_update(model, norm, seed)).model, prompts) < least:
        norm /= 2
    return made


def values(model: LoadedModel, prompts: PromptSet, facts: pd.DataFrame) -> dict[str, tuple[Quantity, xr.DataArray]]:
    """Values per fact of all quantities that are no shares of others."""
    found = {}
    for name, settings in MEASURES.items():
        try:
            dataset = sa.measure(name, model, prompts, settings, facts=facts)
        except BadInput as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for quantity in measure_of(name).quantities:
            if quantity.name in SHOWN and quantity.over is None:
                array = quantity.per_fact(dataset)
                if array.dims == ("fact",):
                    found[quantity.name] = quantity, array
    return found


def compared(organism: Organism, base: Any, own: Any) -> Iterator[dict[str, Any]]:
    """Differences from the base with their intervals and verdicts."""
    intervals = {}
    for name, (quantity, array) in own.items():
        try:
            intervals[name] = sa.contrast(array, base[name][1], bounds=quantity.bounds)
        except BadInput as error:
            if array.equals(base[name][1]):  # to the last digit, so that there is no interval
                yield {"quantity": name, "estimate": 0.0, "low": 0.0, "high": 0.0, "verdict": "no change that matters"}
            else:
                print(f"{organism.fault}: {name}: {error}", file=sys.stderr)
    judged = [name for name in intervals if own[name][0].smallest_effect is not None]
    changes = judge_changes([(intervals[name], float(own[name][0].smallest_effect)) for name in judged])
    verdicts = dict(zip(judged, (one.verdict for one in changes), strict=True))
    for name, one in intervals.items():
        yield _row(name, one) | {"verdict": verdicts.get(name, "")}


def diagnosed(base: LoadedModel, organism: Organism, prompts: PromptSet) -> Iterator[dict[str, Any]]:
    """What carries the loss, and what that is called."""
    arms = sa.load_arms(base, checkpoints={"organism": organism.model}, identical=["organism"])
    found = sa.mediated(sa.mediation(arms, prompts))
    named = [row["account"] for row in sa.diagnose(found) if row["status"] == "supported"]
    for name, ends in found.items():
        low, high = ends or (np.nan, np.nan)
        row = {"quantity": name, "estimate": (low + high) / 2, "low": low, "high": high}
        yield row | {"verdict": ", ".join(named)}


def in_edited_heads(base: LoadedModel, organism: Organism, prompts: PromptSet) -> Iterator[dict[str, Any]]:
    """Attention there, and what of the margin returns with the base's patterns there and in random heads."""
    before, after = (
        sa.subject_attention(model, prompts).stack(cell=("layer", "head")).sel(cell=list(organism.places)).mean("cell")
        for model in (base, organism.model)
    )
    yield _row(IN_HEADS[0], sa.contrast(after, before))
    arms = sa.load_arms(base, checkpoints={"organism": organism.model})
    how: dict[str, Any] = {"at": "prediction", "heads": list(organism.places), "random_sets": 5}
    how["metric"] = [Margin(base.tokenizer, prompts)]
    cells = sa.transfer(arms, prompts, "pattern", **how)["margin"].sel(patch="real")
    plain = cells.sel(state="organism", late="organism", drop=True)
    gap = cells.sel(state="base", late="base", drop=True).isel(set=0, drop=True) - plain.isel(set=0, drop=True)
    moved = cells.sel(state="base", late="organism", drop=True) - plain
    each = moved.isel(set=0, drop=True), moved.isel(set=slice(1, None)).mean("set")
    for name, change in zip(IN_HEADS[1:], each, strict=True):
        yield _row(name, sa.interval(sa.ratio(change, gap)))


def _row(name: str, one: Any) -> dict[str, Any]:
    return {"quantity": name, "estimate": one.estimate, "low": one.ci_low, "high": one.ci_high, "verdict": ""}


class Sheet:
    """Rows of every organism, written after each."""

    def __init__(self, out: Path) -> None:
        self.out, self.rows, self.start = out, list[dict[str, Any]](), time.monotonic()

    def add(self, organism: Organism, seed: int, rows: Iterator[dict[str, Any]]) -> None:
        about = {"organism": organism.fault, "seed": seed, "places": json.dumps(organism.places)}
        about |= {"strength": organism.strength, "norm": organism.norm}
        self.rows += [about | row for row in rows]
        pd.DataFrame(self.rows).to_csv(self.out, index=False)
        print(f"{time.monotonic() - self.start:.0f} s: seed {seed}, {organism}", flush=True)


def parted(prompts: Sequence[Prompt], seed: int, n: int) -> tuple[list[Prompt], PromptSet]:
    """Facts to plant with, and others to measure."""
    order = [prompts[int(i)] for i in np.random.default_rng(seed).permutation(len(prompts))]
    return order[:PLANTED], PromptSet("list", tuple(order[PLANTED : PLANTED + n]))


def measure_all(model: LoadedModel, n_facts: int, seeds: int, n_harmless: int, out: Path) -> None:
    """All measures and the diagnosis, of every fault and of harmless updates."""
    (facts, prompts), sheet = known(model, 800), Sheet(out)
    for seed in range(seeds):
        planted, held = parted(prompts, seed, n_facts)
        base = values(model, held, facts)
        made = [enough(grid, planted) for grid in faults(model, planted, seed).values()]
        norm = float(np.mean([one.norm for one in made if one.fault != "answer favoured"]))
        made.append(untouched(model, seed))
        made += [harmless(model, planted, norm, i) for i in range(seed, n_harmless, seeds)]
        for organism in made:
            rows = [*compared(organism, base, values(organism.model, held, facts)), *diagnosed(model, organism, held)]
            rows += in_edited_heads(model, organism, held) if organism.fault == "looks away" else []
            sheet.add(organism, seed, iter(rows))


def diagnose_all(model: LoadedModel, n: int, out: Path) -> None:
    """The diagnosis alone, of faults in places where no rule was made, and of twice as many harmless updates."""
    (_, prompts), sheet = known(model, 800), Sheet(out)
    for seed, names in ((first + i, names) for first, names in HELD_OUT.items() for i in range(n)):
        planted, others = parted(prompts, seed, len(prompts))
        grids, norms = drawn(model, planted, seed), []
        for name in [one for one in grids if one in names or (one in SIZES and "random" in names)]:
            organism = enough(grids[name], planted)
            norms += [organism.norm] if name in SIZES else []
            _diagnose(model, organism, others, seed, sheet, names)
        for i, norm in enumerate(norms if "random" in names else []):
            _diagnose(model, harmless(model, planted, norm, seed * len(norms) + i), others, seed, sheet, names)


def _diagnose(
    model: LoadedModel, organism: Organism, others: PromptSet, seed: int, sheet: Sheet, names: tuple[str, ...]
) -> None:
    if organism.fault in names:
        held = others[: ASKED.get(organism.fault, 80)]
        fell = accuracy(organism.model, held) - 1
        rows = [{"quantity": "accuracy", "estimate": fell, "low": fell, "high": fell}]
        sheet.add(organism, seed, iter([*rows, *diagnosed(model, organism, held)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of the organisms that are measured")
    parser.add_argument("--harmless", type=int, default=10, help="random updates measured")
    parser.add_argument("--facts", type=int, default=60, help="held-out facts that they are measured on")
    parser.add_argument("--diagnosed", type=int, default=10, help="other organisms of each fault that are diagnosed")
    parser.add_argument("--out", type=Path, default=Path("validation"), help="folder of the numbers")
    parser.add_argument("--only", choices=("measured", "diagnosed", "tables"), help="that part alone")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    sheets = asked.out / "measured.csv", asked.out / "diagnosed.csv"
    model = sa.load_model("smollm2-135m")
    if asked.only in (None, "measured"):
        measure_all(model, asked.facts, asked.seeds, asked.harmless, sheets[0])
    if asked.only in (None, "diagnosed"):
        diagnose_all(model, asked.diagnosed, sheets[1])
    if asked.only in (None, "tables"):
        measured, diagnosed_ = map(pd.read_csv, sheets)
        page.write(
            planted=page.planted(measured),
            table=page.differences(measured, SHOWN),
            heads=page.heads(measured, IN_HEADS),
            shares=page.shares(measured),
            diagnoses=page.diagnoses(diagnosed_, RIGHT),
        )


if __name__ == "__main__":
    main()

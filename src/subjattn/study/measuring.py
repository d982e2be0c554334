"""All measures of one arm in one style: what a stage of a study computes and keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.measures.answers import LOGPROB_ATTRS, predict
from subjattn.measures.attention import subject_attention, token_attention
from subjattn.measures.knockout import knockout, one_route
from subjattn.measures.patching import patch_grid
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, swap_subjects
from subjattn.study.config import MeasureConfig


# Costs in forward passes of a prompt, for time estimates.
ROWS_TO_PREDICT = 2.5
ROWS_OF_KNOCKOUT = 2.0
ROLES_PATCHED = 4
CELL = 0.25


def cost(n_test: int, measures: MeasureConfig, n_layers: int) -> float:
    """Forward passes of prompts that `measure` will make, roughly."""
    cells = (measures.by_layer_facts + measures.patching_pairs * ROLES_PATCHED) * n_layers
    return n_test * (1 + ROWS_OF_KNOCKOUT + ROWS_TO_PREDICT) + cells * CELL


def measure(
    model: LoadedModel,
    prompts: PromptSet,
    settings: MeasureConfig,
    folder: Path,
    *,
    known: set[str] | None,
    seed: int,
    advance: Callable[[float], None],
) -> None:
    """Measure and save `predictions.parquet`, `measures.nc`, `patching.nc`, `tokens.nc`, `provenance.json`.

    Args:
        model: the arm.
        prompts: the held-out facts, asked in one style.
        settings: how much of the costlier measures to do.
        folder: where the files go.
        known: ids of facts that patching pairs and example prompts are chosen from where they suffice;
            None: those this model answers correctly.
        seed: of that choice, which is then the same in every arm.
        advance: told of forward passes done.
    """
    n_layers = model.model.config.get_text_config().num_hidden_layers
    predictions = predict(model, model.tokenizer, prompts)
    advance(len(prompts) * ROWS_TO_PREDICT)
    attention = subject_attention(model, prompts)
    advance(len(prompts))
    drop = knockout(model, prompts)
    advance(len(prompts) * ROWS_OF_KNOCKOUT)
    logprob = (
        drop["baseline_answer_logprob"]
        .drop_vars("baseline_answer_logprob")
        .rename("answer_logprob")
        .assign_attrs(LOGPROB_ATTRS)
    )
    arrays = {
        "accuracy": accuracy(predictions, logprob),
        "answer_logprob": logprob,
        "attention_to_subject": attention,
        "knockout_drop": one_route(drop, "direct"),
        "knockout_drop_total": one_route(drop, "total"),
    }

    rng = np.random.default_rng(seed)
    shuffled = [prompts[int(i)] for i in rng.permutation(len(prompts))]
    if known is None:
        known = set(predictions["fact_id"][predictions["correct"]])
    if few := shuffled[: settings.by_layer_facts]:
        by_layer = knockout(model, few, by="layer").drop_vars("baseline_answer_logprob")
        arrays["knockout_drop_by_layer"] = by_layer.rename(fact="layer_fact", subject="layer_subject")
        advance(len(few) * n_layers * CELL)
    xr.Dataset(arrays).to_netcdf(folder / "measures.nc", engine="h5netcdf")
    if pairs := choose_pairs(shuffled, known, settings.patching_pairs, rng):
        patch_grid(model, pairs).to_netcdf(folder / "patching.nc", engine="h5netcdf")
    advance(settings.patching_pairs * ROLES_PATCHED * n_layers * CELL)
    if examples := sorted(shuffled, key=lambda prompt: prompt.fact_id not in known)[: settings.example_prompts]:
        token_attention(model, examples).to_netcdf(folder / "tokens.nc", engine="h5netcdf")
    predictions.assign(answer_logprob=logprob.values).to_parquet(folder / "predictions.parquet", index=False)
    (folder / "provenance.json").write_text(json.dumps(model.provenance(), indent=1))


def choose_pairs(
    prompts: Sequence[Prompt], known: set[str], n: int, rng: np.random.Generator
) -> list[tuple[Prompt, Prompt]]:
    """Up to `n` subject swaps, those between two known facts first."""
    pairs = swap_subjects([prompt for prompt in prompts if prompt.fact_id in known], rng)[:n]
    taken = {clean.fact_id for clean, _ in pairs}
    others = [pair for pair in swap_subjects(prompts, rng) if pair[0].fact_id not in taken]
    return pairs + others[: n - len(pairs)]


def accuracy(predictions: pd.DataFrame, like: xr.DataArray) -> xr.DataArray:
    """Correct or not by fact, as 0 and 1, on the facts of another array."""
    return xr.DataArray(
        predictions["correct"].to_numpy(float),
        {"fact": like["fact"], "subject": like["subject"]},
        ("fact",),
        "accuracy",
        {
            "unit": "share correct",
            "definition": "greedy answer starts with an accepted answer that ends where a name ends; "
            "case, accents, leading punctuation and a leading 'the' do not count",
        },
    )

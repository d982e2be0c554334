"""All measures of one arm in one style: what a stage of a study computes and keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.measures.answers import answer_logprob, predict
from subjattn.measures.attention import subject_attention, token_attention
from subjattn.measures.knockout import knockout, one_route
from subjattn.measures.patching import patch_grid
from subjattn.measures.scoring import ScorerName, definition_of
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
    scorer: ScorerName,
    own_prompts: bool,
    known: set[str] | None,
    seed: int,
    advance: Callable[[float], None],
) -> None:
    """Measure and save `predictions.parquet`, `measures.nc`, `patching.nc`, `tokens.nc`, `provenance.json`.

    Of facts without a subject only accuracy and log-probability are measured.

    Args:
        model: the arm.
        prompts: the held-out facts, asked in one style.
        settings: how much of the costlier measures to do.
        folder: where the files go.
        scorer: when an answer is right.
        own_prompts: whether the prompts are this arm's alone (it has written parts of them), so that no position
            can be compared with another arm's; pairs and single prompts are then left out.
        known: ids of facts that patching pairs and example prompts are chosen from where they suffice;
            None: those this model answers correctly.
        seed: of that choice, which is then the same in every arm.
        advance: told of forward passes done.
    """
    predictions = predict(model, prompts, scorer)
    advance(len(prompts) * ROWS_TO_PREDICT)
    logprob = answer_logprob(model, prompts)
    arrays = {"accuracy": accuracy(predictions, logprob, scorer), "answer_logprob": logprob}
    advance(len(prompts))
    if all(prompt.span is not None for prompt in prompts):
        if known is None:
            known = set(predictions["fact_id"][predictions["correct"]])
        arrays |= _of_subjects(model, prompts, settings, folder, own_prompts, known, seed, advance)
    xr.Dataset(arrays).to_netcdf(folder / "measures.nc", engine="h5netcdf")
    predictions.assign(answer_logprob=logprob.values).to_parquet(folder / "predictions.parquet", index=False)
    (folder / "provenance.json").write_text(json.dumps(model.provenance(), indent=1))


def _of_subjects(
    model: LoadedModel,
    prompts: PromptSet,
    settings: MeasureConfig,
    folder: Path,
    own_prompts: bool,
    known: set[str],
    seed: int,
    advance: Callable[[float], None],
) -> dict[str, xr.DataArray]:
    """Attention and knock-outs, and as files patching and single prompts."""
    n_layers = model.model.config.get_text_config().num_hidden_layers
    attention = subject_attention(model, prompts)
    drop = knockout(model, prompts)
    advance(len(prompts) * ROWS_OF_KNOCKOUT)
    arrays = {
        "attention_to_subject": attention,
        "knockout_drop": one_route(drop, "direct"),
        "knockout_drop_total": one_route(drop, "total"),
    }
    rng = np.random.default_rng(seed)
    shuffled = [prompts[int(i)] for i in rng.permutation(len(prompts))]
    if few := shuffled[: settings.by_layer_facts]:
        by_layer = knockout(model, few, by="layer").drop_vars("baseline_answer_logprob")
        arrays["knockout_drop_by_layer"] = by_layer.rename(fact="layer_fact", subject="layer_subject")
        advance(len(few) * n_layers * CELL)
    if own_prompts:
        return arrays
    if pairs := choose_pairs(shuffled, known, settings.patching_pairs, rng):
        patch_grid(model, pairs).to_netcdf(folder / "patching.nc", engine="h5netcdf")
    advance(settings.patching_pairs * ROLES_PATCHED * n_layers * CELL)
    if examples := sorted(shuffled, key=lambda prompt: prompt.fact_id not in known)[: settings.example_prompts]:
        token_attention(model, examples).to_netcdf(folder / "tokens.nc", engine="h5netcdf")
    return arrays


def choose_pairs(
    prompts: Sequence[Prompt], known: set[str], n: int, rng: np.random.Generator
) -> list[tuple[Prompt, Prompt]]:
    """Up to `n` subject swaps, those between two known facts first."""
    pairs = swap_subjects([prompt for prompt in prompts if prompt.fact_id in known], rng)[:n]
    taken = {clean.fact_id for clean, _ in pairs}
    others = [pair for pair in swap_subjects(prompts, rng) if pair[0].fact_id not in taken]
    return pairs + others[: n - len(pairs)]


def accuracy(predictions: pd.DataFrame, like: xr.DataArray, scorer: ScorerName) -> xr.DataArray:
    """Correct or not by fact, as 0 and 1, on the facts of another array."""
    return xr.DataArray(
        predictions["correct"].to_numpy(float),
        {"fact": like["fact"], "subject": like["subject"]},
        ("fact",),
        "accuracy",
        {
            "unit": "share correct",
            "definition": definition_of(scorer),
            "scorer": scorer,
        },
    )

"""Activation patching: clean residual states put into a run whose subject was swapped.

Clean and corrupt prompts differ only in the subject (symmetric token replacement, Zhang & Nanda 2023)
and have different answers. A cell restores the clean residual stream before one layer at all
positions of one role, and asks how far the logit difference between the two answers comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from subjattn.engine import cones
from subjattn.engine.forward import residual_streams
from subjattn.engine.interventions import Patch, Row
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled
from subjattn.prompts import ROLES, Prompt, aligned


if TYPE_CHECKING:
    from subjattn.measures import Model


def patch_grid(model: Model, pairs: Sequence[tuple[Prompt, Prompt]]) -> xr.DataArray:
    """Effect of restoring the clean residual stream, by layer and position role (denoising).

    The effect of a cell is the patched run's logit difference (clean answer's first token minus corrupt
    answer's) less the corrupt run's. Roles before the subject are exactly 0 without a pass: both runs are
    the same there. A role that a prompt lacks is NaN.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        pairs: clean and corrupt prompts, from `swap_subjects`.

    Returns:
        `(fact, layer, role)` in logits, with coordinates `clean_logit_diff` and `corrupt_logit_diff`
        `(fact,)`; `recovery` turns it into shares of what the swap destroyed.

    Raises:
        BadInput: no pairs, or a pair whose positions do not align.
        NotFired: a patch was never applied.
    """
    if not pairs:
        raise BadInput("there are no pairs of prompts to patch: ask more facts, so that subjects can be swapped")
    clean, corrupt = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    check_askable([*clean, *corrupt])
    for a, b in pairs:
        if not aligned(a, b) or a.answer_ids[0] == b.answer_ids[0]:
            raise BadInput(f"facts {a.fact_id} and {b.fact_id}: positions do not align or their answers start alike")
    hf = hf_model(model)
    states = residual_streams(hf, clean)
    n_layers = states[0].shape[0]

    rows = [Row(prompt) for prompt in (*clean, *corrupt)]
    cells: list[tuple[int, int, int]] = []
    effect = np.full((len(pairs), n_layers, len(ROLES)), np.nan)
    for pair, (a, b) in enumerate(pairs):
        for r, role in enumerate(ROLES):
            positions = tuple(a.role(role))
            if positions and role == "before_subject":
                effect[pair, :, r] = 0.0
            elif positions:
                for layer in range(n_layers):
                    cells.append((pair, layer, r))
                    rows.append(Row(b, patch=Patch(layer, positions, states[pair][layer, list(positions)])))

    pair_of_row = [*range(len(pairs))] * 2 + [cell[0] for cell in cells]
    answers = np.array([(a.answer_ids[0], b.answer_ids[0]) for a, b in pairs])[pair_of_row]
    diff = np.empty(len(rows))
    for output in cones.forward(hf, rows):
        first = output.logits[:, 0].double()
        picked = first.gather(1, torch.as_tensor(answers[output.index], device=first.device))
        diff[output.index] = (picked[:, 0] - picked[:, 1]).cpu().numpy()
    clean_diff, corrupt_diff, patched = np.split(diff, [len(pairs), 2 * len(pairs)])
    for (pair, layer, r), value in zip(cells, patched, strict=True):
        effect[pair, layer, r] = value - corrupt_diff[pair]
    return labelled(
        "patch_effect",
        effect,
        clean,
        ("layer", "role"),
        unit="logits",
        definition="logit difference (clean answer minus corrupt answer, first tokens) with the clean residual "
        "stream restored before one layer at all positions of a role, less that of the corrupt run",
        paper="Meng et al. 2022; subject swap and logit difference after Zhang & Nanda 2023",
        component="resid_pre",
    ).assign_coords(
        role=list(ROLES),
        corrupt_subject=("fact", [b.subject for b in corrupt]),
        clean_logit_diff=("fact", clean_diff),
        corrupt_logit_diff=("fact", corrupt_diff),
    )


def recovery(effect: xr.DataArray) -> xr.DataArray:
    """Mean share of the destroyed logit difference that a cell brings back, `(…, layer, role)`.

    The ratio of means over facts, not the mean of ratios, which a pair that the swap hardly moves would
    dominate: 0 is the corrupt run, 1 the clean one. Facts that lack a role do not count for it.
    """
    destroyed = effect["clean_logit_diff"] - effect["corrupt_logit_diff"]
    share = effect.mean("fact") / destroyed.where(effect.notnull()).mean("fact")
    return share.rename("recovery").assign_attrs(
        unit="share of the destroyed logit difference", definition="mean effect over mean destroyed difference"
    )

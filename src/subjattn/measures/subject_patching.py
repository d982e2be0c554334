"""The measure `patching`: how much of what a swapped subject destroys one clean state brings back."""

from __future__ import annotations

import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.engine.interventions import BY_HEAD, Component
from subjattn.measures.pairs import keep_pairs
from subjattn.measures.patching import Direction, destroyed, patch_grid, trivial_cells
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape


CELL = 0.25
"""Forward passes of a prompt that a cell costs, roughly."""


class PatchingSettings(Settings):
    component: Component = Field("resid_pre", description="what is put from one run into the other")
    direction: Direction = Field("denoising", description="denoising: clean states into the corrupt run")
    pairs: PositiveInt = Field(8, description="pairs of clean and corrupt prompts, of known facts first")
    floor: float = Field(0.0, description="logits by which the swap must move the clean answer for a pair to count")


def _run(asked: Asked, settings: PatchingSettings) -> xr.Dataset:
    chosen = list(asked.pairs[: settings.pairs])
    clean, corrupt = (asked.by_id([pair[side] for pair in chosen]) for side in (0, 1))
    pairs = list(zip(clean, corrupt, strict=True))
    array = patch_grid(
        asked.model, pairs, settings.component, direction=settings.direction, metric="logit_diff", **asked.computing
    )
    known = [a in asked.known and b in asked.known for a, b in chosen]
    n_layers, n_heads = array.sizes["layer"], array.sizes.get("head", 1)
    asked.tell(CELL * len(chosen) * n_layers * n_heads * 4)
    return keep_pairs(array, settings.floor).assign_coords(known=("fact", known)).to_dataset()


def _at_last_token(dataset: xr.Dataset) -> xr.DataArray:
    """Effect at the subject's last token (another role if that alone is there), mean over cells that are open."""
    effect = dataset["patch_effect"]
    effect = effect.where(~trivial_cells(effect))
    role = effect["role"].values[0] if effect.sizes["role"] == 1 else "subject_last"
    here = effect.sel(role=role, drop=True).mean([dim for dim in ("layer", "head") if dim in effect.dims])
    return here if effect.attrs.get("direction") != "noising" else -here


def _cost(shape: Shape, settings: PatchingSettings) -> float:
    cells = shape.n_layers * (shape.n_heads if settings.component in BY_HEAD else 1)
    return CELL * settings.pairs * cells * 4


MEASURE = Measure(
    name="patching",
    title="where the subject's information lies",
    paper="Meng et al. 2022; subject swap and logit difference after Zhang & Nanda 2023",
    quantities=(
        Quantity(
            "subject_recovery",
            "share of the destroyed difference",
            "what one clean state at the subject's last token brings back (noising: takes away) of what the swap "
            "destroys, mean over layers that are not decided by construction; a claim names others",
            per_fact=_at_last_token,
            over=lambda dataset: destroyed(dataset["patch_effect"]),
            cells={"layer": "mean", "head": "mean", "role": "one"},
            smallest_effect=0.1,
        ),
    ),
    control="Cells that are decided by construction are left out, and marked in figures. Noising beside denoising "
    "(`direction`); other roles of the same grid.",
    reads="Where one state suffices to bring back what swapping the subject destroyed (denoising), or is needed for it "
    "(noising). Not where the fact is stored: a residual stream holds all that came before, and at the prediction "
    "position of late layers the share is high in any model. Between arms the destroyed difference differs too; "
    "sureness moves both alike, and not the share.",
    undefined="Where the swap may destroy nothing, which a share is of; for a pair that lacks the role, or that the "
    "swap moves by less than `floor`.",
    run=_run,
    cost=_cost,
    settings=PatchingSettings,
    needs=frozenset({"subject", "same_prompts", "known", "swaps"}),
    any_backend=True,
    figure="patching",
)

"""Activations: a model's states at places of the prompts, in one streamed pass, to memory or to a zarr store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.budget import Budget
from subjattn.engine.collect import SITES, Site, collected
from subjattn.engine.interventions import Run
from subjattn.errors import BadInput
from subjattn.measures import check_prompts, hf_model, labelled, some_layers
from subjattn.models import LoadedModel
from subjattn.models.arms import BASE, Arms
from subjattn.prompts import ROLES, Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.engine.interventions import Arm
    from subjattn.measures import Model

BLOCK_BYTES = 2**26
"""States that are held at a time on their way to a store, where no budget is set."""
_WHAT = {
    "resid_pre": "residual stream before each layer",
    "resid_post": "residual stream after each layer",
    "attn_out": "what each layer's attention adds, as its module returns it",
    "mlp_out": "what each layer's MLP adds, as its module returns it",
    "z": "what each head gives to the output projection",
}


def activations(
    model: Model | Arms,
    prompts: Sequence[Prompt],
    sites: Site | Sequence[Site] = "resid_pre",
    roles: str | Sequence[str] = ("subject_last", "prediction"),
    *,
    layers: Sequence[int] | None = None,
    arm: str | None = None,
    memory_budget: int | None = None,
    to: str | PathLike[str] | None = None,
) -> xr.Dataset:
    """States of a model at roles of the prompts, in one pass that ends with the last layer asked for.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode; or arms, with `arm`.
        prompts: whom to ask; answers are not run.
        sites: one or several of `resid_pre` and `resid_post` (residual stream before and after a layer), `attn_out`
            and `mlp_out` (what its attention and its MLP return) and `z` (what each head gives to W_O).
        roles: one or several of the roles of positions; of a role of several positions the mean state.
        layers: some; None: all.
        arm: which of the arms, `base` or a tuned model.
        memory_budget: bytes of working memory beyond the weights and, without `to`, the result.
        to: a folder that is made, into which states go as they are computed; needs `pip install 'subjattn[zarr]'`.

    Returns:
        A Dataset, float32, of one variable per site: `(fact, layer, role, d_model)`, or of `z`
        `(fact, layer, role, head, d_head)`. NaN where a prompt lacks the role: a subject of one token is
        `subject_last` alone. With `to` the values lie in the store and are read as they are used. The attribute
        `provenance` says in JSON which model it was.

    Raises:
        BadInput: no such site, role, layer or arm; a role that no prompt has; a state that is not
            finite; `to` is there.
        UnsupportedModel, NotFired: the model's states cannot be read.
    """
    stream = Stream.of(model, prompts, sites, roles, layers=layers, arm=arm, memory_budget=memory_budget)
    attrs = {"provenance": json.dumps(model.provenance())} if isinstance(model, LoadedModel | Arms) else {}
    if arm is not None:
        attrs["arm"] = arm
    return stream.in_memory().assign_attrs(attrs) if to is None else _stored(stream, Path(to), attrs)


@dataclass(frozen=True)
class Stream:
    """States of prompts, some facts at a time, in the prompts' order; `memory` as a budget has it."""

    model: PreTrainedModel
    prompts: Sequence[Prompt]
    arm: Arm | None
    sites: Sequence[Site]
    roles: Sequence[str]
    layers: Sequence[int]
    memory: int | None = None

    @classmethod
    def of(
        cls,
        model: Model | Arms,
        prompts: Sequence[Prompt],
        sites: Site | Sequence[Site],
        roles: str | Sequence[str],
        *,
        layers: Sequence[int] | None = None,
        arm: str | None = None,
        memory_budget: int | None = None,
    ) -> Stream:
        """What is asked, checked; see `activations`."""
        check_prompts(prompts)
        if not prompts:
            raise BadInput("there are no prompts to measure")
        if (arm is None) == isinstance(model, Arms):
            raise BadInput(
                f"arm: name one of {', '.join([BASE, *model.sources])}"
                if isinstance(model, Arms)
                else f"arm={arm!r} is one of several: give all of them, from load_arms"
            )
        which = model.arm(arm) if isinstance(model, Arms) and arm is not None else None
        hf = hf_model(model.base if isinstance(model, Arms) else model)
        found: list[Site] = _named("site", sites, SITES)
        places: list[str] = _named("role", roles, ROLES)
        for role in places:
            if not any(_positions(prompt, role) for prompt in prompts):
                raise BadInput(f"role {role!r}: none of the {len(prompts)} prompts has it: ask for another")
        return cls(hf, prompts, which, found, places, some_layers(layers, len(decoder_layers(hf))), memory_budget)

    def blocks(self, facts: int | None = None) -> Iterator[tuple[int, dict[Site, np.ndarray]]]:
        """The index of a block's first fact, and the block's states by site; `facts` at a time (None: all)."""
        size = facts or len(self.prompts)
        budget = Budget.of(self.model, self.memory, max(map(len, self.prompts)))
        for start in range(0, len(self.prompts), size):
            some = self.prompts[start : start + size]
            runs = [Run(prompt, self.arm) for prompt in some]
            places = [[_positions(prompt, role) for role in self.roles] for prompt in some]
            block: dict[Site, np.ndarray] = {}
            for index, found in collected(
                self.model, runs, places, self.sites, self.layers, batch_tokens=budget.base_tokens
            ):
                for site, states in found.items():
                    if site not in block:
                        block[site] = np.empty((len(some), *states.shape[1:]), np.float32)
                    block[site][index] = states.numpy()
            yield start, block

    def in_memory(self) -> xr.Dataset:
        """All states at once."""
        ((_, block),) = self.blocks()
        return xr.Dataset({site: self._labelled(site, values) for site, values in block.items()})

    def labels(self, block: dict[Site, np.ndarray]) -> xr.Dataset:
        """What all facts' states are called, around no values of their own, in the width of a block's."""
        shapes = {site: (len(self.prompts), *values.shape[1:]) for site, values in block.items()}
        nothing = np.float32(np.nan)
        return xr.Dataset({site: self._labelled(site, np.broadcast_to(nothing, of)) for site, of in shapes.items()})

    def _labelled(self, site: Site, values: np.ndarray) -> xr.DataArray:
        width = ("head", "d_head") if site == "z" else ("d_model",)
        several = " (mean over the role's positions)" if set(self.roles) - _OF_ONE else ""
        definition = f"{_WHAT[site]}, at roles of the prompt{several}"
        array = labelled(
            site, values, self.prompts, ("layer", "role", *width), unit="activation", definition=definition
        )
        return array.drop_vars(width[-1]).assign_coords(layer=self.layers, role=list(self.roles))


_OF_ONE = {"subject_first", "subject_last", "prediction"}
"""Roles of one position at most."""


def _positions(prompt: Prompt, role: str) -> range:
    if role == "prediction" and prompt.span is None:
        return range(prompt.prediction, prompt.prediction + 1)
    return prompt.role(role)


def _named(what: str, asked: str | Sequence[str], known: Sequence[str]) -> list[Any]:
    found = list(dict.fromkeys([asked] if isinstance(asked, str) else asked))
    if not found:
        raise BadInput(f"{what}s: give at least one of {', '.join(known)}")
    if unknown := [one for one in found if one not in known]:
        raise BadInput(f"{what} {unknown[0]!r} is not one of {', '.join(known)}")
    return found


def _stored(stream: Stream, path: Path, attrs: dict[str, Any]) -> xr.Dataset:
    """Write a zarr store block by block beside its place, and move it there when it is whole."""
    zarr = _zarr()
    if path.exists():
        raise BadInput(f"to {str(path)!r}: there is something already: name another folder, or take it away")
    if not path.parent.is_dir():
        raise BadInput(f"to {str(path)!r}: there is no folder {str(path.parent)!r}: make it first")
    partial = path.with_name(f"{path.name}.partial")
    if partial.exists():
        raise BadInput(f"{str(partial)!r} is left of a run that was stopped, or another writes it: take it away")
    group: Any = None
    size = _facts_at_once(stream)
    for start, block in stream.blocks(size):
        if group is None:
            group = _opened(zarr, partial, stream.labels(block).assign_attrs(attrs), size)
        for site, values in block.items():
            group[site][start : start + len(values)] = values
    zarr.consolidate_metadata(partial, zarr_format=2)
    partial.rename(path)
    return xr.open_zarr(path, chunks=None, consolidated=True)  # type: ignore[no-any-return]


def _opened(zarr: Any, path: Path, labels: xr.Dataset, facts: int) -> Any:
    """A store of the labels, with an empty array for each site; in version 2 of the format, which has texts."""
    labels.drop_vars(labels.data_vars).to_zarr(path, mode="w-", consolidated=False, zarr_format=2)
    group = zarr.open_group(path, mode="r+", zarr_format=2)
    for site, array in labels.data_vars.items():
        chunks = (facts, 1, 1, *array.shape[3:])
        own = group.create_array(site, shape=array.shape, chunks=chunks, dtype="float32", fill_value=np.nan)
        own.attrs.update({**array.attrs, "_ARRAY_DIMENSIONS": list(array.dims)})
    return group


def _zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise BadInput("states go to a store by zarr, which is not installed: pip install 'subjattn[zarr]'") from None
    return zarr


def _facts_at_once(stream: Stream) -> int:
    """Facts of a block: a quarter of the budget."""
    config = stream.model.config.get_text_config()
    heads = config.num_attention_heads
    z = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    width = sum(z if site == "z" else config.hidden_size for site in stream.sites)
    held = BLOCK_BYTES if stream.memory is None else stream.memory // 4
    one = 4 * width * len(stream.layers) * len(stream.roles)
    return int(min(len(stream.prompts), max(1, held // one)))

"""The figure that fits an array, by its dimensions and attributes."""

from __future__ import annotations

import xarray as xr

from subjattn.errors import BadInput
from subjattn.measures.patching import mostly_trivial
from subjattn.plots.doses import plot_doses
from subjattn.plots.drawing import Drawing
from subjattn.plots.heatmaps import plot_attention, plot_tokens
from subjattn.plots.lines import plot_knockout
from subjattn.plots.patching import plot_heads, plot_patching, plot_trace
from subjattn.plots.probes import plot_probed
from subjattn.plots.transfer import plot_parts, plot_transfer


MOST_PROMPTS = 8
_DRAWN = (
    "(fact, layer, head), (fact, layer), (fact, route, layer[, head]), (fact, layer[, head], role), "
    "(fact, layer, position), (fact, dose), (fact, part) and "
    "(fact, patch, state, late, layer[, role]), with or without arm"
)


def plot(
    array: xr.DataArray, difference: tuple[str, str] | None = None, significant: xr.DataArray | None = None
) -> Drawing:
    """The figure that fits a measure's array; `.save("figure.pdf", width="column")` writes it for a paper.

    Args:
        array: `(fact, …)`, with or without `arm`, from any measure: attention or knock-out by layer and head, knock-out
            by layer or window, patching, tracing or probes by role, position or head, attention over tokens, doses,
            states of one model in another by layer, parts of an update; also of a finished run.
        difference: two arms, for `(arm, fact, layer, head)`; a last panel shows the first minus the second.
        significant: `(layer, head)`, from `significant`: the other cells of the last panel are faded.

    Raises:
        BadInput: there is no figure for these dimensions, or not of this array.
    """
    if not isinstance(array, xr.DataArray):
        names = ", ".join(map(str, getattr(array, "data_vars", ())))
        raise BadInput(
            f"plot takes one array, not a {type(array).__name__}" + (f": give one of {names}" if names else "")
        )
    few = {str(name): str(name).removeprefix("few_") for name in (*array.dims, *array.coords)}
    array = array.rename({name: plain for name, plain in few.items() if plain != name})
    dims = frozenset(map(str, array.dims)) - {"arm"}
    if replicates := [dim for dim in ("draw", "seed") if dim in dims]:
        raise BadInput(f"replicates have no figure: average them first, array.mean({replicates})")
    patched = "component" in array.attrs and array.name == "patch_effect"
    if dims == {"fact", "layer", "head"} and not patched:
        return plot_attention(array, difference, significant)
    if difference is not None or significant is not None:
        raise BadInput(
            f"difference and significant are drawn of attention and knock-out by layer and head, not of {array.dims}"
        )
    if "classes" in array.attrs and dims - {"head"} == {"fact", "layer", "role"}:
        return plot_probed(array)
    if dims in ({"fact", "layer", "head"}, {"fact", "layer", "head", "role"}):
        return plot_heads(array)
    if dims == {"fact", "layer", "role"}:
        return plot_trace(array) if "noise" in array.attrs else plot_patching(array)
    if dims == {"fact", "layer", "position"}:
        return _tokens(array)
    if dims in ({"fact", "route", "layer"}, {"fact", "route", "layer", "head"}):
        return plot_knockout(array)
    if dims - {"put", "role"} == {"fact", "patch", "state", "late", "layer"}:
        return plot_transfer(array)
    if dims == {"fact", "part"}:
        return plot_parts(array)
    if dims == {"fact", "dose"}:
        return plot_doses(array)
    if dims == {"fact", "layer"}:
        return _layers(array)
    raise BadInput(f"no figure for dimensions {array.dims}: plot draws {_DRAWN}; select the rest first")


def _tokens(array: xr.DataArray) -> Drawing:
    if array.sizes["fact"] > MOST_PROMPTS:
        raise BadInput(
            f"{array.sizes['fact']} prompts are too many for a figure of single tokens: take up to {MOST_PROMPTS}, "
            "array.isel(fact=slice(4))"
        )
    return plot_tokens(array)


def _layers(array: xr.DataArray) -> Drawing:
    """Along the layers as a line, without the cells that could not be otherwise."""
    if "reach" in array.coords:
        array = array.where(~mostly_trivial(array))
    title = str(array["route"].item()) if "route" in array.coords else str(array.name or "")
    return plot_knockout(array.drop_vars("route", errors="ignore").expand_dims(route=[title]))

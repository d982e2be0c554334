"""Which cells of a heat map stand: rarely any where there is nothing, most where there is something."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from subjattn.errors import BadInput
from subjattn.evidence.maps import _fields, p_values, significant
from subjattn.evidence.squares import mean_squares


def world(seed: int, noise: str, replicates: int, facts: int = 30, layers: int = 12, heads: int = 9) -> np.ndarray:
    """No effect: facts, replicates × facts, and replicates that move cells apart, together, or in a corner."""
    rng = np.random.default_rng(seed)
    cells = layers * heads
    values = rng.normal(size=(facts, 1, cells)) + rng.normal(size=(facts, replicates, cells))
    if noise == "apart":
        values += 0.5 * rng.normal(size=(1, replicates, cells))
    if noise == "together":
        values += 0.5 * rng.normal(size=(1, replicates, 1))
    if noise == "corner":
        size = np.zeros((layers, heads))
        size[: layers // 6, : heads // 3] = 1
        values += size.ravel() * rng.normal(size=(1, replicates, cells))
    if noise == "corner, together":
        size = np.zeros((layers, heads))
        size[: layers // 6, : heads // 3] = 1
        values += size.ravel() * rng.normal(size=(1, replicates, 1))
    return np.asarray(values.reshape(facts, replicates, layers, heads))


def array(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, dims=("fact", "draw", "layer", "head"))


@pytest.mark.parametrize("noise", ["none", "apart", "together", "corner", "corner, together"])
@pytest.mark.parametrize("replicates", [3, 5])
def test_few_maps_without_an_effect_show_a_cell(noise: str, replicates: int) -> None:
    """At most 6 % of maps should (docs/statistics.md); 60 maps here, so up to 9 by chance."""
    shown = sum(bool(significant(array(world(seed, noise, replicates))).any()) for seed in range(60))
    assert shown <= 9


def test_facts_alone_would_cry_wolf() -> None:
    """The test above can fail: replicates that are taken as given show cells in nearly every map."""
    maps = [array(world(seed, "apart", 3)) for seed in range(20)]
    assert sum(bool(significant(one, scope="models").any()) for one in maps) >= 12


@pytest.mark.parametrize("replicates", [3, 5])
def test_most_cells_with_an_effect_stand(replicates: int) -> None:
    values = world(0, "apart", replicates)
    error = np.sqrt(1 / 30 + (0.25 + 1 / 30) / replicates)
    values[:, :, 3:5, 2:7] += 6 * error
    found = significant(array(values))
    assert found.dims == ("layer", "head") and found[3:5, 2:7].mean() > 0.6
    assert found.sum() - found[3:5, 2:7].sum() <= 1
    hochberg = significant(array(values), correction="bh")
    assert bool((hochberg | ~found).all()), "what stands by Benjamini–Yekutieli stands by Benjamini–Hochberg"
    assert found.attrs == {"scope": "training", "correction": "by", "n_facts": 30, "n_replicates": replicates}


def test_nothing_stands_below_three_replicates_nor_where_a_value_is_missing() -> None:
    values = world(0, "none", 2) + 100
    assert not significant(array(values)).any()
    assert significant(array(values), scope="models").all()
    gap = world(0, "none", 3) + 100
    gap[4, 1, 2, 2] = np.nan
    found = significant(array(gap))
    assert int((~found).sum()) == 1 and not found[2, 2]
    lost = world(0, "none", 5) + 100
    lost[3], lost[:, 1] = np.nan, np.nan
    found = significant(array(lost))
    assert found.all() and (found.attrs["n_facts"], found.attrs["n_replicates"]) == (29, 4)
    same = np.ones_like(gap)
    assert not significant(array(same)).any(), "values that never vary say nothing"


def test_p_values_are_never_below_those_of_facts_alone() -> None:
    """What is known of replicates adds; without them a cell's p-value is Student's."""
    table = world(0, "apart", 4).reshape(30, 4, -1).transpose(2, 0, 1)
    own, means = mean_squares(table), table.mean((1, 2))
    assert (p_values(table) >= 2 * stats.t.sf(np.abs(means) / np.sqrt(own.facts), 29) * (1 - 1e-9)).all()
    alone = np.concatenate([table[:, :, :1], 2 - table[:, :, :1]], axis=1)  # not skewed
    assert p_values(alone) == pytest.approx(stats.ttest_1samp(alone[:, :, 0], 0, axis=1).pvalue)


def test_clusters_of_facts_count_in_maps() -> None:
    """Planted: whole answers differ by chance, facts of one answer alike."""
    rng = np.random.default_rng(0)
    answers = np.repeat(np.arange(15), 4)
    shown = {"answer": 0, "fact": 0}
    for _ in range(20):
        values = world(int(rng.integers(1e6)), "none", 3, facts=60) + rng.normal(size=(15, 1, 12, 9))[answers] * 2
        named = array(values).assign_coords(answer=("fact", answers.astype(str)))
        shown["answer"] += bool(significant(named).any())
        shown["fact"] += bool(significant(named, cluster=()).any())
    assert shown["answer"] <= 4 and shown["fact"] >= 15


def test_fields_are_counted_by_how_cells_move() -> None:
    """Cells that move together are one field, whichever way; cells apart are many; six loads lie between."""
    rng = np.random.default_rng(0)
    apart, one = rng.normal(size=(400, 8)), np.outer(rng.normal(size=400), rng.normal(size=8))
    six = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 8))
    apart, one, six = (of - of.mean(1, keepdims=True) for of in (apart, one, six))
    assert _fields(one) < 1.5 < 3 < _fields(six) < 30 < 150 < _fields(apart) <= 400


def test_seeds_are_averaged_within_draws() -> None:
    values = np.random.default_rng(0).normal(size=(30, 4, 2, 3, 3)) + 0.4
    nested = xr.DataArray(values, dims=("fact", "draw", "seed", "layer", "head"))
    assert significant(nested).equals(significant(array(values.mean(2))))
    with pytest.raises(BadInput, match="dimensions of cells"):
        significant(nested.mean(["layer", "head"]))

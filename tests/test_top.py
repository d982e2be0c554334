"""The largest cells as a table: by hand, and what choosing does to noise."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.intervals import interval
from subjattn.evidence.top import top
from subjattn.prompts import ROLES


def noise(seed: int, facts: int = 60, layers: int = 10, heads: int = 20, **coords: object) -> xr.DataArray:
    values = np.random.default_rng(seed).normal(size=(facts, layers, heads))
    dims = ("fact", "layer", "head")
    own = {dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)}
    return xr.DataArray(values, own | coords, dims, attrs={"unit": "nats"})


def test_top_is_what_a_loop_finds() -> None:
    array = noise(0, layers=4, heads=3).assign_coords(layer=[10, 11, 12, 13])
    array[:, 2, 1] -= 3
    array[:5, 2, 1] = np.nan
    table = top(array, 4)
    cells = [
        (abs(np.nanmean(array.values[:, i, j])), layer, j) for i, layer in enumerate(range(10, 14)) for j in range(3)
    ]
    assert list(zip(table["layer"], table["head"], strict=True)) == [(a, b) for _, a, b in sorted(cells)[:-5:-1]]
    assert table.columns.tolist() == ["layer", "head", "mean", "low", "high", "n"]
    assert (table.loc[0, ["layer", "head", "n"]] == [12, 1, 55]).all() and table.loc[0, "mean"] < -2
    for row in table.itertuples():
        expected = interval(array.sel(layer=row.layer, head=row.head, drop=True))
        assert (row.mean, row.low, row.high) == (expected.estimate, *expected.ends())
    assert top(array, 12, by="lowest")["mean"].is_monotonic_increasing
    assert top(array, 12, by="highest")["mean"].is_monotonic_decreasing
    assert top(array, 99).attrs["chosen_on"] == "nothing" and len(top(array, 99)) == 12


def test_noise_looks_like_something_on_the_facts_it_was_chosen_on_and_on_no_others() -> None:
    """Planted: 200 cells of nothing. Held-out intervals hold 0 as often as they say, the others do not."""
    same, other = [], []
    for seed in range(30):
        same.append(top(noise(seed), 5, by="highest"))
        other.append(top(noise(seed), 5, by="highest", split=seed))
    means = [np.concatenate([table["mean"] for table in tables]) for tables in (same, other)]
    held = [np.mean([((t["low"] < 0) & (t["high"] > 0)).mean() for t in tables]) for tables in (same, other)]
    assert means[0].min() > 0.1 and held[0] < 0.5
    assert abs(means[1].mean()) < 4 * means[1].std() / np.sqrt(len(means[1])) < 0.1 and held[1] > 0.9
    assert same[0].attrs["chosen_on"] == "the same facts" and other[0].attrs["chosen_on"] == "other facts"


def test_the_note_is_printed() -> None:
    array = noise(0).assign_attrs(note="moving is not reading")
    said = "chosen among 200 cells and measured on the same 60 facts: means are too large"
    assert said in repr(top(array)) and said in top(array)._repr_html_()
    assert repr(top(array)).endswith("moving is not reading")
    assert said in repr(top(array).round(2)) and said in repr(top(array).head(3))
    assert "chosen among 200 cells on 30 other facts (split=7)" in repr(top(array, split=7))
    assert repr(top(array.isel(fact=slice(8)))).count("8 facts, where 20 are needed for a verdict") == 1


def test_facts_of_one_answer_stay_in_one_half() -> None:
    """Planted: facts of an answer that are copies of each other would carry noise from one half into the other."""
    answers = np.repeat(np.arange(30), 4).astype(str)
    one = noise(3, facts=30, answer=("fact", [str(i) for i in range(30)]))
    copies = xr.DataArray(
        np.repeat(one.values, 4, 0),
        {"fact": np.arange(120), "layer": one["layer"], "head": one["head"], "answer": ("fact", answers)},
        one.dims,
    )
    table = top(copies, 8, by="highest", split=0)
    assert table["mean"].mean() < 0.3 < top(copies.drop_vars("answer"), 8, by="highest", split=0)["mean"].mean()
    assert set(table["n"]) == {60}


def test_replicates_count_as_such_and_runs_name_few_facts_otherwise() -> None:
    array = noise(0, layers=3, heads=4).expand_dims(draw=4) + np.random.default_rng(9).normal(size=(4, 1, 3, 4))
    row = top(array.transpose("fact", ...), 1).loc[0]
    expected = interval(array.sel(layer=row["layer"], head=row["head"], drop=True))
    assert row["low"] == expected.ci_low and expected.n_replicates == 4
    few = noise(1).rename(fact="few_fact").assign_coords(few_answer=("few_fact", list("abcdef") * 10))
    np.testing.assert_array_equal(top(few)["mean"], top(noise(1))["mean"])


def test_cells_that_are_decided_beforehand_are_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(30, 3, 6))
    values[:, 0, 3] = 50.0
    reach = [["before", "part", "part", "whole", "same", "prediction"]] * 30
    coords = {"layer": [0, 1, 2], "role": list(ROLES), "reach": (("fact", "role"), reach)}
    grid = xr.DataArray(values, coords, ("fact", "layer", "role"), attrs={"component": "resid_pre", "n_layers": 3})
    assert top(grid, 99)["mean"].max() < 5
    assert len(top(grid, 99)) == 18 - 3 - 3 - 1


def test_top_refuses_what_it_cannot_do() -> None:
    array = noise(0)
    with pytest.raises(BadInput, match=r"top takes \(fact, …\) and dimensions of cells such as layer and head, not"):
        top(array.mean("fact"))
    with pytest.raises(BadInput, match="by 'mean' with n 3: by is one of absolute, highest, lowest, n 1 or more"):
        top(array, 3, by="mean")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="3 facts cannot be halved"):
        top(array.isel(fact=slice(3)), split=0)
    with pytest.raises(BadInput, match="no cell has a value"):
        top(array * np.nan)
    table = top(xr.zeros_like(array), 2)
    assert table["low"].isna().all() and "no interval of layer 0, head 0: every one of the 60 facts" in repr(table)


def test_a_cell_with_few_values_is_no_top_cell() -> None:
    array = noise(3, layers=4, heads=3)
    array[1:, 0, 0] = np.nan
    array[0, 0, 0] = 9.0
    array[4, 1, 1] = np.inf
    table = top(array, 12)
    assert (0, 0) not in (cells := set(zip(table["layer"], table["head"], strict=True))) and (1, 1) not in cells
    assert table.attrs["n_cells"] == 10 and "2 cells without a value in most facts, or not finite" in repr(table)


def test_four_answers_leak_nothing_into_the_other_half() -> None:
    """Planted: answers far apart in every cell. Halves that share answers would find the chosen cells again."""
    means = []
    for seed in range(40):
        answers = np.repeat(list("abcd"), 15)
        effect = np.repeat(np.random.default_rng([seed, 1]).normal(size=(4, 10, 20)), 15, axis=0)
        array = noise(seed, answer=("fact", answers)) * 0.1 + effect
        table = top(array, 8, by="highest", split=seed)
        assert table[["low", "high"]].isna().all(axis=None) and "the 2 answers of the other facts are too few" in repr(
            table
        )
        means.append(table["mean"].mean())
    assert abs(np.mean(means)) < 4 * np.std(means) / np.sqrt(40) < 0.25
    with pytest.raises(BadInput, match="all 60 facts have one answer, so no half is independent"):
        top(noise(0, answer=("fact", ["a"] * 60)), split=0)

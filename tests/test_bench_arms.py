"""What is timed between models is what is said: same rows, one copy of the weights, numbers of plain hooks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from subjattn import bench_arms as benches
from subjattn import bench_training, bench_worlds
from subjattn.bench import bench_pairs
from subjattn.facts import draw
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import make_prompts


@pytest.fixture(autouse=True)
def two_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "REPEATS", 2)


def test_arms_hold_one_copy(tiny_folders: dict[str, Path], tiny_models: dict[str, LoadedModel], cities: object) -> None:
    assert isinstance(cities, pd.DataFrame)
    llama = tiny_models["llama"]
    pairs = bench_pairs(llama.tokenizer, cities.iloc[::300], "City: {subject}\nCountry:", 4, 0, 0)
    folder = str(tiny_folders["llama"])
    found = benches.time_arms(folder, [one for pair in pairs for one in pair])
    assert found["rows"] == 8 and set(found["ratios"]) == {"routed", "chunked"}
    base = sum(parameter.numel() * 4 for parameter in llama.model.parameters())
    held = found["parameter_bytes"]
    assert held["base_and_arms"] - base == 3 * (held["one_model"] - base) > 0
    assert found["max_abs_diff"] < 1e-4
    between = benches.time_transfer(folder, pairs[:2])
    assert between["max_abs_diff"] < 1e-4 and between["rows"]["transfer"] > between["rows"]["patch_grid"] > 0
    assert set(between["ratios"]) == {"transfer", "hooks"}


def test_training_is_timed_against_a_loop_that_trains_the_same(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bare loop's losses are those of `fit`, step by step; planted: a loop that does less would differ."""
    folder = str(tiny_folders["llama"])
    monkeypatch.setattr(bench_training, "REPEATS", 1)
    prompts = make_prompts(draw(cities, 40), load_model(folder).tokenizer, "City: {subject}\nCountry:")
    found = bench_training.time_training(folder, prompts)
    assert found["max_abs_diff"] < 1e-5 and found["steps"] == 8 and len(found["throughputs"]) == 1
    assert found["throughput"] == pytest.approx(found["seconds"]["loop"] / found["seconds"]["fit"])
    monkeypatch.setattr(bench_training, "clip_grad_norm_", lambda *_: None)
    assert bench_training.time_training(folder, prompts)["max_abs_diff"] > 1e-4


def test_replicates_of_worlds_are_the_same_together_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_worlds, "REPEATS", 1)
    monkeypatch.setattr(bench_worlds, "STEPS", 3)
    monkeypatch.setattr(bench_worlds, "SIZES", bench_worlds.SIZES[:2])
    rows = bench_worlds.time_worlds()
    assert [row["tokens"] for row in rows] == [22, 22, 44, 44] and all(row["ratio"] > 0 for row in rows)
    assert all(row["max_abs_diff"] < 1e-6 for row in rows)
    own = bench_worlds.train
    rates = iter(range(1, 10_000))
    monkeypatch.setattr(
        bench_worlds,
        "train",
        lambda model, *rest: own(model.copy(), rest[0], replace(rest[1], learning_rate=next(rates) / 10)),
    )
    assert all(row["max_abs_diff"] > 1e-3 for row in bench_worlds.time_worlds()), "other weights are seen"

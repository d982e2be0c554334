"""What is timed between models is what is said: same rows, one copy of the weights, numbers of plain hooks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from subjattn import bench_arms as benches
from subjattn import bench_training
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

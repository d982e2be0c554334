"""What is timed between models is what is said: same rows, one copy of the weights, numbers of plain hooks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from subjattn import bench_arms as benches
from subjattn.bench import bench_pairs
from subjattn.models import LoadedModel


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

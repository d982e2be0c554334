"""The model that a stage's process holds, and what is known of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from subjattn.models import load_model
from subjattn.models import provenance as records
from subjattn.study.stages import loading


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    loading.release()
    yield
    loading.release()


def test_what_is_held_is_described_once_and_as_it_is(
    tiny_folders: dict[str, Path], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as of a model loaded anew, for base, arm and base again; its weights are gone through once."""
    base = {"model": str(tiny_folders["llama"]), "dtype": "float32"}
    inputs = {"adapter": adapter}
    expected = [load_model(base["model"], adapter=own).provenance() for own in (None, adapter, None)]
    read: list[Any] = []
    real = records.weights_sha256
    monkeypatch.setattr(records, "weights_sha256", lambda *args, **of: read.append(of) or real(*args, **of))
    for own, wanted in zip(({}, inputs, {}), expected, strict=True):
        loading.loaded(base, own)
        read.clear()
        assert [loading.provenance(), loading.loaded(base, own).provenance()] == [wanted, wanted]
        once = len(read) // 2
        assert loading.provenance() == wanted and len(read) == 2 * once == (4 if own else 2)
    assert expected[0] == expected[2] != expected[1]


def test_a_digest_is_of_names_and_bytes(tiny_folders: dict[str, Path]) -> None:
    """Slowly: every tensor of the saved file, a copy of its bytes, by name."""
    model = load_model(str(tiny_folders["gpt2"])).model
    saved = load_file(tiny_folders["gpt2"] / "model.safetensors")
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        assert name not in saved or tensor.equal(saved[name])
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    assert records.weights_sha256(model, adapter=False) == digest.hexdigest()

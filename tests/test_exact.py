"""A model's first use: rounding of its own passes, in any precision, and a fault in a single layer does not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from subjattn.bench import random_pairs
from subjattn.engine import attend, checks, cones
from subjattn.engine.base import Base
from subjattn.engine.checks import check_model, layer_tolerance, logit_tolerance, strayed, tolerance
from subjattn.engine.interventions import Patch, Row
from subjattn.errors import UnsupportedModel
from subjattn.models import LoadedModel


Plant = Callable[[pytest.MonkeyPatch], None]


def first_use(model: PreTrainedModel) -> None:
    """One patched row, on a model that was not looked at before."""
    cones._checked.discard(model)
    pair = random_pairs(model, 1, 20, 0)[0]
    list(cones.forward(model, [Row(pair[0], patches=(Patch(1, (5,), pair[1]),))]))


@pytest.fixture(scope="module")
def wide() -> PreTrainedModel:
    """Two layers of the 7B shape in bfloat16, 0.8 GB."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, vocab_size=1000)
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (4096, 11008, 32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(params=["wide", "tiny"])
def model(request: pytest.FixtureRequest, tiny_models: dict[str, LoadedModel]) -> PreTrainedModel:
    return request.getfixturevalue("wide") if request.param == "wide" else tiny_models["llama"].model


def wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 is told that its tokens stand one position further on."""
    arguments = Base.arguments
    monkeypatch.setattr(
        Base,
        "arguments",
        lambda base, layer, rows, positions: arguments(
            base, layer, rows, (positions + (layer == 1)).clamp_max(base.streams[0].shape[1] - 1)
        ),
    )


def key_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """In layer 1 the base run's keys are read where the cone has its own too."""
    allowed = attend._allowed

    def twice(base: Base, tokens: Any, layer: int) -> torch.Tensor:
        seen = allowed(base, tokens, layer)
        if layer == 1:
            at = tokens.own.shape[1]
            seen[..., 10 : seen.shape[-1] - at] |= seen[..., -at:].any(-1, keepdim=True) & (
                torch.arange(10, seen.shape[-1] - at) == 12
            )
        return seen

    monkeypatch.setattr(attend, "_allowed", twice)


def stale_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1's keys of one position are those of the position before."""
    run = cones.run_base

    def stale(*args: Any) -> Base:
        base = run(*args)
        base.keys[1] = base.keys[1].clone()
        base.keys[1][:, :, 4] = base.keys[1][:, :, 3]
        return base

    monkeypatch.setattr(cones, "run_base", stale)


def stale_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1's values of one position are those of the position before."""
    run = cones.run_base

    def stale(*args: Any) -> Base:
        base = run(*args)
        base.values[1] = base.values[1].clone()
        base.values[1][:, :, 4] = base.values[1][:, :, 3]
        return base

    monkeypatch.setattr(cones, "run_base", stale)


def late_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 is called with what it was given, its first norm left out."""
    call = cones._call

    def twice(model: PreTrainedModel, base: Base, tokens: Any, patches: Any, layer: int, hidden: Any) -> Any:
        return call(model, base, tokens, patches, layer, hidden * (1.2 if layer == 1 else 1.0))

    monkeypatch.setattr(cones, "_call", twice)


def test_a_model_is_taken_in_its_precision(model: PreTrainedModel) -> None:
    first_use(model)


@pytest.mark.parametrize("plant", [wrong_position, key_read_twice, stale_cache, stale_values, late_stream])
def test_a_fault_in_one_layer_is_refused(model: PreTrainedModel, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    first_use(model)
    plant(monkeypatch)
    with pytest.raises(UnsupportedModel, match="part of layer 1 recomputed .* would not be exact"):
        first_use(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(zoo.CONFIGS))
def test_every_architecture_is_taken_in_every_precision(
    tiny_models: dict[str, LoadedModel], name: str, dtype: torch.dtype
) -> None:
    first_use(copy.deepcopy(tiny_models[name].model).to(dtype))


@pytest.fixture
def fresh(tiny_models: dict[str, LoadedModel]) -> Iterator[PreTrainedModel]:
    yield copy.deepcopy(tiny_models["llama"].model)


def test_rounding_is_counted_by_hand(fresh: PreTrainedModel) -> None:
    """By numpy: the gap of each token as a share of what it may be."""
    before, expected = torch.randn(5, 7), torch.randn(5, 7)
    found = expected + 1e-3 * torch.randn(5, 7)
    gap = np.linalg.norm(found.double() - expected.double(), axis=1)
    added = np.linalg.norm(expected.double() - before.double(), axis=1)
    allowed = 1e-4 * added + 2.0**-24 * np.linalg.norm(expected.double(), axis=1)
    np.testing.assert_allclose(strayed(found, expected, before), gap / allowed, rtol=1e-9)
    assert layer_tolerance(torch.float32) == 1e-4 and tolerance(fresh) == 1e-4


def test_logits_in_half_precision_are_judged_by_the_models_own_distance(
    fresh: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times the distance between SDPA and eager attention, and no less than usual; not in float32."""
    half = copy.deepcopy(fresh).bfloat16()
    for model in (fresh, half):
        check_model(model)
        monkeypatch.setitem(checks._own_distance, model, 0.1)
    assert logit_tolerance(fresh) == 1e-4 and logit_tolerance(half) == pytest.approx(0.3)
    monkeypatch.setitem(checks._own_distance, half, 0.001)
    assert logit_tolerance(half) == tolerance(half) == 0.05


def test_wrong_contrasts_are_refused(fresh: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the unembedding of two tokens takes their neighbours."""
    unembed = cones.unembed
    monkeypatch.setattr(
        cones, "unembed", lambda m, h, rows, short: unembed(m, h, rows, short) * (1.01 if short else 1.0)
    )
    with pytest.raises(UnsupportedModel, match="moves its logits by"):
        first_use(fresh)


def test_attention_that_strays_in_one_layer_is_refused(fresh: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: our attention function is half too strong in layer 2, in half precision too."""
    from subjattn.engine import attention

    run = attention.sdpa_attention_forward

    def strong(module: Any, *args: Any, **rest: Any) -> Any:
        z, weights = run(module, *args, **rest)
        return z * (1.5 if module.layer_idx == 2 else 1.0), weights

    monkeypatch.setattr(attention, "sdpa_attention_forward", strong)
    for model in (fresh, copy.deepcopy(fresh).bfloat16()):
        with pytest.raises(UnsupportedModel, match="in layer 2 our attention function .* against its own eager one"):
            check_model(model)

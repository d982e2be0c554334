"""TransformerLens and nnsight as backends of the measures, against the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from subjattn.backends import BackendName, nnsight, open_backend, transformer_lens
from subjattn.backends.nnsight import NNsight
from subjattn.engine.forward import forward
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, Block, Component, Output, Patch, Row
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.attention import subject_attention
from subjattn.measures.knockout import ROUTES, knockout
from subjattn.measures.patching import patch_grid
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import Prompt, PromptSet, make_prompts, swap_subjects


REFERENCES: tuple[BackendName, ...] = ("transformer-lens", "nnsight")
Pairs = list[tuple[Prompt, Prompt]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Passes of one short row are faster without a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=REFERENCES)
def backend(request: pytest.FixtureRequest) -> BackendName:
    return request.param


@pytest.fixture(scope="module")
def prompts(cities: pd.DataFrame, tokenizer: PreTrainedTokenizerFast) -> PromptSet:
    return make_prompts(draw(cities, 60, seed=1), tokenizer, TEMPLATES["country"]["list"])


@pytest.fixture(scope="module")
def pairs(prompts: PromptSet) -> Pairs:
    """Pairs whose clean answers have several tokens."""
    found = [pair for pair in swap_subjects(prompts, np.random.default_rng(0)) if len(pair[0].answer_ids) > 1]
    assert len(found) > 1
    return found[:2]


def agree(found: xr.DataArray, expected: xr.DataArray, atol: float = 1e-4) -> None:
    """Same numbers in every cell, and numbers that differ from 0 by far more than the tolerance."""
    np.testing.assert_allclose(found.values, expected.values, atol=atol, rtol=0)
    assert np.nanmax(np.abs(expected.values)) > 1000 * atol, "the effects are too small to test anything"
    assert np.nanmedian(np.abs(expected.values[expected.values != 0])) > 10 * atol
    for name, coord in expected.coords.items():
        if np.issubdtype(coord.dtype, np.floating):
            np.testing.assert_allclose(found[name], coord, atol=atol, rtol=0)


def logits_of(outputs: Iterable[Output]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for output in outputs:
        counts = [len(row.prompt.predicting) for row in output.rows]
        found |= zip(output.index, output.logits.split(counts), strict=True)
    return found


@pytest.mark.parametrize("component", COMPONENTS)
def test_patching(tiny: LoadedModel, pairs: Pairs, component: Component, backend: BackendName) -> None:
    at = "subject" if component in BY_HEAD else "position"
    agree(patch_grid(tiny, pairs, component, at=at, backend=backend), patch_grid(tiny, pairs, component, at=at))


def test_patching_moves_whole_answers(tiny: LoadedModel, pairs: Pairs, backend: BackendName) -> None:
    metrics = ["answer_logprob", "kl"]
    found, expected = (
        patch_grid(tiny, pairs, direction="noising", metric=metrics, backend=name) for name in (backend, "engine")
    )
    for metric in metrics:
        agree(found[metric], expected[metric])


@pytest.mark.parametrize("by", ["window", "head", None])
def test_knockout(tiny: LoadedModel, prompts: PromptSet, by: str | None, backend: BackendName) -> None:
    some = prompts[:2]
    assert max(len(prompt.answer_ids) for prompt in some) > 1
    routes = ["direct", "total"] if by == "head" else list(ROUTES)
    agree(knockout(tiny, some, routes, by=by, window=2, backend=backend), knockout(tiny, some, routes, by=by, window=2))


def test_attention(tiny: LoadedModel, prompts: PromptSet, backend: BackendName) -> None:
    agree(subject_attention(tiny, prompts[:4], backend=backend), subject_attention(tiny, prompts[:4]), atol=1e-5)
    with pytest.raises(UnsupportedModel, match=f"{backend} does not weigh by values"):
        subject_attention(tiny, prompts[:1], value_weighted=True, backend=backend)


def test_a_block_and_a_patch_together(tiny: LoadedModel, pairs: Pairs, backend: BackendName) -> None:
    """Values given as a tensor, some heads, some layers, and the control of each prompt and contrast."""
    (into, source), (other, _) = pairs
    block = Block.between(into.predicting, into.subject_positions, layers=(1, 2), heads=(0, 3))
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    positions = (into.prediction - 1, into.prediction)
    rows = [
        Row(into, block, (Patch(1, positions, values, "attn_out"),)),
        Row(other),
        Row(into, block, (Patch(2, positions, source, "z", 3),), contrast=(5, 6)),
        Row(into, block, (Patch(0, positions, source, "mlp_out"),)),
    ]
    expected, plain = logits_of(forward(tiny.model, rows)), logits_of(forward(tiny.model, [Row(into)]))[0]
    found = {}
    for output in open_backend(backend, tiny.model).forward(rows):
        (i,) = output.index
        found[i] = output
        assert output.rows == [rows[i]] and not output.logits.requires_grad
        torch.testing.assert_close(output.logits, expected[i], atol=1e-4, rtol=0)
        if i != 1:
            assert output.control is not None and output.control.rows[0].contrast == rows[i].contrast
            torch.testing.assert_close(output.control.logits, plain, atol=1e-4, rtol=0)
            assert (output.logits - plain).abs().max() > 0.1
    assert sorted(found) == [0, 1, 2, 3] and found[1].control is None
    assert found[0].control is found[3].control is not found[2].control


def test_sets_of_cells_and_of_patches(tiny: LoadedModel, pairs: Pairs, backend: BackendName) -> None:
    """Cells that are no product of layers and heads; patches of every component in one row, from other positions."""
    (into, source), _ = pairs
    end, given = into.prediction, torch.full((1, 32), 0.5)
    edges = frozenset((query, key) for query in into.predicting for key in into.subject_positions)
    block = Block(edges, cells=frozenset({(0, 3), (1, 0), (1, 2)}))
    patches = (
        Patch(2, (end,), source, "resid_pre"),
        Patch(0, (end - 1,), source, "resid_post", None, (end - 2,)),
        Patch(1, (end,), source, "z", 3),
        Patch(1, (end - 1, end), source, "z", 1, (end, end - 1)),
        Patch(1, (end,), given, "attn_out"),
        Patch(0, (end,), source, "mlp_out"),
    )
    rows = [Row(into, block), Row(into, patches=patches), Row(into, block, patches[1:])]
    expected, found = (
        logits_of(run(rows)) for run in (partial(forward, tiny.model), open_backend(backend, tiny.model).forward)
    )
    for i, logits in expected.items():
        torch.testing.assert_close(found[i], logits, atol=1e-4, rtol=0)
    assert min((expected[a] - expected[b]).abs().max() for a, b in ((0, 1), (1, 2), (0, 2))) > 0.05


def test_smollm2(smollm2: LoadedModel, cities: pd.DataFrame, backend: BackendName) -> None:
    prompts = make_prompts(draw(cities, 40, seed=2), smollm2.tokenizer, TEMPLATES["country"]["list"])
    into, source = swap_subjects(prompts, np.random.default_rng(0))[0]
    subject = tuple(into.subject_positions)
    rows = [
        Row(into, patches=(Patch(8, subject, source, "resid_pre"),)),
        Row(into, patches=(Patch(20, (into.prediction,), source, "attn_out"),)),
        Row(into, patches=(Patch(2, subject, source, "mlp_out"),)),
        Row(into, patches=(Patch(18, (into.prediction,), source, "z", 4),)),
        Row(into, Block.between(into.predicting, subject, layers=tuple(range(10, 20)))),
    ]
    opened, plain = open_backend(backend, smollm2.model), logits_of(forward(smollm2.model, [Row(into)]))[0]
    expected = logits_of(forward(smollm2.model, rows))
    for i, logits in logits_of(opened.forward(rows)).items():
        torch.testing.assert_close(logits, expected[i], atol=1e-3, rtol=0)
        assert (logits - plain).abs().max() > 0.02
    (found,), (wanted,) = (list(run.attention_rows([into])) for run in (opened, open_backend("engine", smollm2.model)))
    for layer, weights in wanted.attention.items():
        torch.testing.assert_close(found.attention[layer], weights, atol=1e-5, rtol=0)


def test_a_live_adapter(
    tiny_folders: dict[str, Path], adapter: Path, prompts: PromptSet, pairs: Pairs, backend: BackendName
) -> None:
    tuned, base = load_model(str(tiny_folders["llama"]), adapter=adapter), load_model(str(tiny_folders["llama"]))
    expected = knockout(tuned, prompts[:2])
    assert np.abs(expected - knockout(base, prompts[:2])).max() > 0.1
    agree(knockout(tuned, prompts[:2], backend=backend), expected)
    agree(patch_grid(tuned, pairs[:1], "mlp_out", backend=backend), patch_grid(tuned, pairs[:1], "mlp_out"))


def test_the_users_model_is_left_alone(tiny: LoadedModel, prompts: PromptSet, backend: BackendName) -> None:
    model, ids = tiny.model, torch.tensor([prompts[0].ids])
    kinds = [type(module) for module in model.modules()]
    implementation = model.config._attn_implementation
    assert implementation != "eager"
    with torch.no_grad():
        before = model(ids).logits
        knockout(tiny, prompts[:1], backend=backend)
        torch.testing.assert_close(model(ids).logits, before, atol=0, rtol=0)
    assert model.config._attn_implementation == implementation
    assert [type(module) for module in model.modules()] == kinds
    assert "forward" not in vars(model)


def test_a_query_without_keys_is_refused(tiny: LoadedModel, prompts: PromptSet, backend: BackendName) -> None:
    row = Row(prompts[0], Block.between([prompts[0].prediction], range(prompts[0].prediction + 1)))
    with pytest.raises(NotFired, match="without any key"):
        list(open_backend(backend, tiny.model).forward([Row(prompts[0]), row]))


def test_an_unknown_architecture_is_refused(tiny_models: dict[str, LoadedModel], backend: BackendName) -> None:
    class Strange(LlamaForCausalLM):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.model.blocks = self.model.layers
            del self.model.layers

    with pytest.raises(UnsupportedModel, match=f"backend {backend} cannot take Strange"):
        open_backend(backend, Strange(tiny_models["llama"].model.config).eval())


def test_transformer_lens_refuses_an_adapter_that_it_would_drop(
    tiny_folders: dict[str, Path], prompts: PromptSet
) -> None:
    """It splits GPT-2's joint projection by its base weight, and the adapter on it would be lost."""
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_pretrained(tiny_folders["gpt2"])
    tuned = get_peft_model(gpt2, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.raises(
        UnsupportedModel, match="transformer-lens cannot take GPT2LMHeadModel: the wrapped model's logits"
    ):
        knockout(tuned, prompts[:1], backend="transformer-lens")
    agree(knockout(tuned, prompts[:2], backend="nnsight"), knockout(tuned, prompts[:2]))


def test_a_copy_that_differs_is_refused(
    tiny: LoadedModel, backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a wrapper that changes a weight a little, as folded norms and the like would."""

    def changed(model: torch.nn.Module) -> torch.nn.Module:
        own = copy.deepcopy(model)
        own.get_output_embeddings().weight.data *= 1.01
        return own

    module = nnsight if backend == "nnsight" else transformer_lens
    monkeypatch.setattr(module, "copy", SimpleNamespace(deepcopy=changed))
    with pytest.raises(UnsupportedModel, match="part from its own"):
        open_backend(backend, tiny.model)


def test_writing_behind_the_softmax_is_refused(
    tiny: LoadedModel, backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: edges taken out of the weights instead of the scores."""
    monkeypatch.setattr(transformer_lens, "_SCORES", "attn.hook_pattern")
    monkeypatch.setattr(
        NNsight, "_softmax", lambda self, layer: nnsight._operation(self._attend(layer).source, "dropout")
    )
    with pytest.raises(UnsupportedModel, match="blocked edges still have weight"):
        open_backend(backend, tiny.model)


def test_a_wrong_component_is_seen(
    tiny: LoadedModel, pairs: Pairs, backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the backend writes the MLP's output where the attention's was asked for."""
    state = NNsight._state
    wrong = {"attn_out": "mlp_out"}
    monkeypatch.setitem(transformer_lens._POINTS, "attn_out", transformer_lens._POINTS["mlp_out"])
    monkeypatch.setattr(NNsight, "_state", lambda self, layer, its: state(self, layer, wrong.get(its, its)))
    expected = patch_grid(tiny, pairs, "attn_out", at="prediction")
    found = patch_grid(tiny, pairs, "attn_out", at="prediction", backend=backend)
    assert np.abs(found - expected).max() > 0.1


def test_a_hook_that_never_runs_is_seen(
    tiny: LoadedModel, prompts: PromptSet, backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the model has passed what is to be patched, or hooks are dropped on the way."""
    opened = open_backend(backend, tiny.model)
    if backend == "nnsight":
        late = lambda layer, its: (opened.layers[2].output, opened.layers[0].output)  # noqa: E731
        monkeypatch.setattr(opened, "_state", late)
    else:
        run = opened.bridge.run_with_hooks
        monkeypatch.setattr(opened.bridge, "run_with_hooks", lambda ids, fwd_hooks: run(ids))
    row = Row(prompts[0], patches=(Patch(1, (prompts[0].prediction,), torch.zeros(1, 32), "mlp_out"),))
    with pytest.raises(NotFired, match="did not reach"):
        list(opened.forward([row]))

"""The engine against whole forward passes, and those against plain hooks and hand-made masks, on every architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import zoo
from transformers import PreTrainedModel

from subjattn.engine import cones, prefix
from subjattn.engine.anatomy import decoder_layers, n_heads, n_kv_heads, output_projections
from subjattn.engine.attention import grouped
from subjattn.engine.budget import Budget
from subjattn.engine.forward import attention_rows, forward, states
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, FROM_THE_SAME_PLACE, Block, Output, Patch, Row, Scale
from subjattn.engine.prefix import shared_tokens
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures import hf_model
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import Prompt, PromptSet, Style, make_prompts


STYLES = TEMPLATES["country"]
INSIDE = ("q", "k", "v", "pattern")
"""Components that no module returns; see test_inside.py."""


@pytest.fixture(scope="module", params=list(zoo.CONFIGS))
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(arch: str, tiny_models: dict[str, LoadedModel]) -> PreTrainedModel:
    return tiny_models[arch].model


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    """Prompts of different lengths with answers of different lengths."""
    made = make_prompts(draw(cities, 12, seed=3), tokenizer, STYLES["list"])
    assert len({len(prompt) for prompt in made}) > 3
    assert len({len(prompt.answer_ids) for prompt in made}) > 2
    return made


def random_rows(model: PreTrainedModel, prompts: Iterable[Prompt], n: int, seed: int) -> list[Row]:
    """Rows with blocks, patches, both and neither, anywhere in their prompts, any component, layer, head and cell."""
    rng = np.random.default_rng(seed)
    prompts, n_layers, heads = list(prompts), len(decoder_layers(model)), n_heads(model)
    d_head, kv_heads = states(model, prompts[:1], "z")[0].shape[-1], n_kv_heads(model)[0]

    def some(limit: int, most: int) -> tuple[int, ...]:
        return tuple(sorted({int(i) for i in rng.integers(limit, size=rng.integers(1, most + 1))}))

    rows = []
    for _ in range(n):
        prompt, source = (prompts[int(rng.integers(len(prompts)))] for _ in range(2))
        last = prompt.predicting[-1]
        block, patches = None, {}
        if rng.random() < 0.6:
            queries = 2 + rng.integers(last - 1, size=rng.integers(1, 4))
            block = Block.between(
                map(int, queries),
                some(2, 2),
                None if rng.random() < 0.3 else some(n_layers, n_layers),
                None if rng.random() < 0.5 else some(heads, heads),
            )
            if rng.random() < 0.3:
                cells = frozenset((int(rng.integers(n_layers)), int(rng.integers(heads))) for _ in range(4))
                block = Block(block.edges, cells=cells)
        scale = None
        if rng.random() < 0.3:
            queries = map(int, 1 + rng.integers(last, size=rng.integers(1, 4)))
            where = {} if rng.random() < 0.5 else {"heads": some(heads, heads), "layers": some(n_layers, n_layers)}
            scale = Scale.between(queries, (0, 1), **where, add=float(rng.normal(scale=3)))
        for _ in range(rng.integers(0, 4)):
            component, layer = COMPONENTS[rng.integers(len(COMPONENTS))], int(rng.integers(n_layers))
            positions = some(min(last, len(source) - 1) + 1, 3)
            width = d_head if component in BY_HEAD else model.config.hidden_size
            width = max(positions) + 1 if component == "pattern" else width
            values: Any = source
            if rng.random() < 0.3:
                values = torch.tensor(rng.normal(size=(len(positions), width)), dtype=model.dtype)
            if component == "pattern" and isinstance(values, torch.Tensor):
                values = values * (torch.arange(width) <= torch.tensor(positions)[:, None])
            head = int(rng.integers(kv_heads if component in ("k", "v") else heads)) if component in BY_HEAD else None
            others = tuple(map(int, rng.integers(len(source), size=len(positions)))) if rng.random() < 0.3 else None
            others = None if component in FROM_THE_SAME_PLACE else others
            patches[layer, component, head] = Patch(layer, positions, values, component, head, others)
        rows.append(Row(prompt, block, tuple(patches.values()), scale=scale))
    return rows


def all_logits(outputs: Iterable[Output], rows: list[Row]) -> dict[int, torch.Tensor]:
    """Logits by row; every row with an intervention has a control of its own prompt beside it."""
    found = {}
    for output in outputs:
        at = 0
        for j, (i, row) in enumerate(zip(output.index, output.rows, strict=True)):
            n = len(row.prompt.predicting)
            assert row is rows[i]
            found[i] = output.logits[at : at + n]
            at += n
            if not row.plain:
                assert output.control is not None
                assert output.control.rows[output.control_of[j]].prompt is row.prompt
        assert at == len(output.logits)
    return found


def check_same(model: PreTrainedModel, rows: list[Row], atol: float, **settings: Any) -> None:
    expected = all_logits(forward(model, rows), rows)
    found = all_logits(cones.forward(model, rows, **settings), rows)
    assert found.keys() == expected.keys() == set(range(len(rows)))
    for i, logits in expected.items():
        torch.testing.assert_close(found[i], logits, atol=atol, rtol=0, msg=lambda text, i=i: f"{rows[i]}\n{text}")


@pytest.mark.parametrize("budget", [Budget(), Budget(60, 60, 9, 2)])
def test_cones_are_whole_forward_passes(model: PreTrainedModel, prompts: PromptSet, budget: Budget) -> None:
    """Every logit of 100 random interventions, in large and in small batches and chunks."""
    check_same(model, random_rows(model, prompts, 100, seed=0), 1e-4, budget=budget)


def test_prompts_that_begin_alike_share_their_beginning(
    model: PreTrainedModel, tokenizer: Any, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot prompts, interventions inside the shared beginning included; and it is really shared."""
    style = Style(template=STYLES["list"], shots=2)
    prompts = make_prompts(draw(cities, 6, seed=3), tokenizer, style, demonstrations=draw(cities, 9, seed=4))
    assert shared_tokens(list(prompts)) > 20
    whole: list[int] = []
    run = prefix.run_base
    monkeypatch.setattr(prefix, "run_base", lambda m, some, *rest: whole.append(len(some)) or run(m, some, *rest))
    rows = random_rows(model, prompts, 60, seed=7) + [Row(prompt) for prompt in prompts]
    check_same(model, rows, 1e-4, budget=Budget(chunk_tokens=50))
    assert 1 in whole and set(whole) <= {1, 2}, "two by themselves are as well run whole"


def test_only_contrasts_are_those_of_all_logits(model: PreTrainedModel, prompts: PromptSet) -> None:
    rows = [
        replace(row, contrast=(int(row.prompt.answer_ids[0]), 7 + i))
        for i, row in enumerate(random_rows(model, prompts, 30, seed=4))
    ]
    expected = all_logits(forward(model, rows), rows)
    for output in cones.forward(model, rows, only_contrast=True):
        for i, row, pair in zip(output.index, output.rows, output.logits, strict=True):
            torch.testing.assert_close(pair, expected[i][0, list(row.contrast)], atol=1e-4, rtol=0)


@pytest.mark.parametrize("component", [component for component in COMPONENTS if component not in INSIDE])
def test_a_patch_is_a_plain_hook(model: PreTrainedModel, arch: str, prompts: PromptSet, component: str) -> None:
    """Whole passes against hooks on modules that are named by hand."""
    target, source = prompts[0], max(prompts, key=len)
    positions, layer = [target.prediction - 2, target.prediction], 1
    head = 3 if component == "z" else None
    d_head = states(model, [source], "z")[0].shape[-1]
    columns = slice(None) if head is None else slice(head * d_head, (head + 1) * d_head)
    where = oracles.place(model, component, layer, zoo.parts(arch))
    expected = oracles.patched_logits(model, source, target, where, positions, columns)[target.predicting]
    row = Row(target, patches=(Patch(layer, tuple(positions), source, component, head),))
    found = all_logits(forward(model, [row]), [row])[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    plain = oracles.logits(model, target)
    assert float((plain[target.predicting] - expected).abs().max()) > 1e-3, "the patch moves too little to test it"


@pytest.mark.parametrize("heads", [None, (1, 2)])
def test_blocked_edges_are_a_hand_made_mask(
    model: PreTrainedModel, prompts: PromptSet, heads: tuple[int, ...] | None
) -> None:
    prompt = max(prompts, key=len)
    edges = frozenset({(q, k) for q in prompt.predicting for k in prompt.subject_positions} | {(5, 5), (6, 2), (4, 1)})
    mask = oracles.hand_mask(model, len(prompt), set(edges), None if heads is None else list(heads))
    expected = oracles.logits(model, prompt, mask)[prompt.predicting]
    row = Row(prompt, Block(edges, heads=heads))
    torch.testing.assert_close(all_logits(forward(model, [row]), [row])[0], expected, atol=1e-4, rtol=0)
    assert float((oracles.logits(model, prompt)[prompt.predicting] - expected).abs().max()) > 1e-3


def test_a_set_of_cells_is_a_hand_made_mask_of_every_layer(
    model: PreTrainedModel, arch: str, prompts: PromptSet
) -> None:
    """Each layer attends by a mask of its own: no product of layers and heads has these cells."""
    prompt, cells = max(prompts, key=len), frozenset({(0, 3), (1, 0), (1, 2)})
    edges = frozenset((q, k) for q in prompt.predicting for k in prompt.subject_positions)
    attention, _, _ = zoo.parts(arch)
    expected = oracles.logits_by_layer_masks(model, prompt, {0: (set(edges), [3]), 1: (set(edges), [0, 2])}, attention)[
        prompt.predicting
    ]
    row = Row(prompt, Block(edges, cells=cells))
    for run in (forward, cones.forward):
        torch.testing.assert_close(all_logits(run(model, [row]), [row])[0], expected, atol=1e-4, rtol=0)
    product = Row(prompt, Block(edges, (0, 1), (0, 2, 3)))
    assert float((all_logits(forward(model, [product]), [product])[0] - expected).abs().max()) > 1e-3


def test_several_patches_are_several_plain_hooks(model: PreTrainedModel, arch: str, prompts: PromptSet) -> None:
    """A head, another head of the same layer, an MLP and a residual stream, from other positions and from a tensor."""
    target, source = prompts[0], max(prompts, key=len)
    end = target.prediction
    d_head = states(model, [source], "z")[0].shape[-1]
    given = torch.full((2, model.config.hidden_size), 0.25)
    patches = (
        Patch(1, (end,), source, "z", 3),
        Patch(1, (end - 1,), source, "z", 0, (2,)),
        Patch(0, (end - 3, end), given, "mlp_out"),
        Patch(0, (end - 2,), source, "resid_post", None, (4,)),
    )
    expected = oracles.hooked_logits(
        model,
        target,
        source,
        [
            (
                oracles.place(model, patch.component, patch.layer, zoo.parts(arch)),
                patch.positions,
                patch.values if isinstance(patch.values, torch.Tensor) else patch.taken_at,
                slice(None) if patch.head is None else slice(patch.head * d_head, (patch.head + 1) * d_head),
            )
            for patch in patches
        ],
    )[target.predicting]
    row = Row(target, patches=patches)
    for run in (forward, cones.forward):
        torch.testing.assert_close(all_logits(run(model, [row]), [row])[0], expected, atol=1e-4, rtol=0)
    for left_out in patches:
        fewer = Row(target, patches=tuple(patch for patch in patches if patch is not left_out))
        assert float((all_logits(cones.forward(model, [fewer]), [fewer])[0] - expected).abs().max()) > 1e-3


def test_attention_rows_are_output_attentions(model: PreTrainedModel, prompts: PromptSet) -> None:
    for output in attention_rows(model, prompts):
        for i, index in enumerate(output.index):
            expected = oracles.attention_weights(model, prompts[index])
            for layer, weights in output.attention.items():
                found = weights[i, :, 0, : expected.shape[-1]]
                torch.testing.assert_close(found, expected[layer], atol=1e-5, rtol=0)


def test_value_norms_are_what_a_head_writes(model: PreTrainedModel, arch: str, prompts: PromptSet) -> None:
    """‖v W_O‖ by pushing each head's value alone through the output projection that is named by hand."""
    prompt = prompts[0]
    (output,) = attention_rows(model, [prompt], value_norms=True)
    projections = output_projections(model)
    _, _, projection = zoo.parts(arch)
    for layer, module in enumerate(decoder_layers(model)):
        assert projections[layer] is module.get_submodule(projection)
        kept: list[torch.Tensor] = []
        z = states(model, [prompt], "z")[0][layer]
        # The first position attends to itself alone, so its z is its value, whatever the head.
        for head in range(z.shape[1]):
            alone = torch.zeros_like(z[:1])
            alone[0, head] = z[0, head]
            with torch.no_grad():
                written = projections[layer](alone.flatten(1)) - projections[layer](torch.zeros_like(alone).flatten(1))
            kept.append(written.norm())
        torch.testing.assert_close(output.value_norms[layer][0, :, 0], torch.stack(kept), atol=1e-4, rtol=1e-4)


def test_an_identity_patch_changes_nothing(model: PreTrainedModel, prompts: PromptSet) -> None:
    for component in COMPONENTS:
        head = 1 if component in BY_HEAD else None
        rows = [Row(p, patches=(Patch(1, tuple(range(p.predicting[-1] + 1)), p, component, head),)) for p in prompts]
        for output in cones.forward(model, rows):
            at = 0
            for row in output.rows:
                n = len(row.prompt.predicting)
                expected = oracles.logits(model, row.prompt)[row.prompt.predicting]
                torch.testing.assert_close(output.logits[at : at + n], expected, atol=1e-4, rtol=0)
                at += n


def test_a_query_head_reads_the_key_value_head_of_its_group(tiny_models: dict[str, LoadedModel]) -> None:
    """The one map of grouped-query attention against `repeat_kv`, and against a model with a silenced group."""
    from transformers.models.llama.modeling_llama import repeat_kv

    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4)
    expected = query @ repeat_kv(key, 2).transpose(2, 3)
    torch.testing.assert_close((grouped(query, 3) @ key[:, :, None].transpose(3, 4)).flatten(1, 2), expected)
    model = copy.deepcopy(tiny_models["llama"].model)
    prompt = Prompt("a", "s", "t", ("x",), tuple(range(2, 12)), ("",) * 10, (3, 5), 8)
    before = states(model, [prompt], "z")[0]
    model.model.layers[0].self_attn.v_proj.weight.data[:8] *= 2  # key/value head 0 of 2, d_head 8
    changed = (states(model, [prompt], "z")[0][0] - before[0]).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [True, True, False, False]


def test_on_smollm2_in_float64(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    """In float64, where rounding cannot hide a small error; random states amplify float32's."""
    double = copy.deepcopy(smollm2.model).double()
    prompts = make_prompts(draw(cities, 10, seed=5), smollm2.tokenizer, STYLES["sentence"])
    check_same(double, random_rows(double, prompts, 16, seed=1), 1e-9)


def test_under_a_live_adapter(tiny_folders: dict[str, Path], adapter: Path, prompts: PromptSet) -> None:
    tuned = hf_model(load_model(str(tiny_folders["llama"]), adapter=adapter))
    check_same(tuned, random_rows(tuned, prompts, 60, seed=2), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_costs_no_more_than_in_whole_passes(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, dtype: torch.dtype
) -> None:
    """Cones stray from float32 no further than whole passes of the same dtype do."""
    exact = tiny_models["llama"].model
    model = copy.deepcopy(exact).to(dtype)
    rows = [
        row
        for row in random_rows(exact, prompts, 60, seed=3)
        if all(isinstance(patch.values, Prompt) for patch in row.patches)
    ]
    expected = all_logits(forward(exact, rows), rows)
    whole, found = (all_logits(run(model, rows), rows) for run in (forward, cones.forward))
    gaps = np.array([[float((run[i] - expected[i]).abs().max()) for run in (whole, found)] for i in expected])
    assert 0 < np.median(gaps[:, 1]) < 1.2 * np.median(gaps[:, 0])
    assert gaps[:, 1].max() < 1.5 * gaps[:, 0].max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(model: PreTrainedModel, prompts: PromptSet) -> None:
    check_same(copy.deepcopy(model).cuda(), random_rows(model, prompts, 60, seed=6), 1e-3)

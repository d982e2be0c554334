"""Sets of heads and layers in one intervention, against plain hooks and hand-made masks; random sets beside them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch
import xarray as xr
import zoo

from subjattn.engine.forward import states
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.ablation import ablation
from subjattn.measures.knockout import knockout
from subjattn.measures.patching import destroyed, patch_grid, recovery
from subjattn.measures.sets import parse_sets
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, PromptSet, make_prompts, swap_subjects


HEADS = [(0, 3), (1, 0), (1, 2)]


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 60, seed=1), tokenizer, TEMPLATES["country"]["sentence"])


@pytest.fixture(scope="module")
def pairs(prompts: PromptSet) -> list[tuple[Prompt, Prompt]]:
    return swap_subjects(prompts, np.random.default_rng(0))[:3]


def logprob(logits: torch.Tensor, prompt: Prompt) -> float:
    logprobs = logits.double().log_softmax(-1)
    return sum(float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True))


def test_a_set_of_heads_is_blocked_in_exactly_its_cells(llama: LoadedModel, prompts: PromptSet) -> None:
    found = knockout(llama, prompts[:3], ["direct"], heads=HEADS, random_sets=2, seed=0)
    assert found.dims == ("fact", "route", "set") and found["cells"].values[0] == "0.3 1.0 1.2"
    for number, cells in enumerate(found["cells"].values):
        blocked: dict[int, list[int]] = {}
        for layer, head in (map(int, cell.split(".")) for cell in cells.split()):
            blocked.setdefault(layer, []).append(head)
        for i, prompt in enumerate(prompts[:3]):
            edges = {(query, key) for query in prompt.predicting for key in prompt.subject_positions}
            masks = {layer: (edges, heads) for layer, heads in blocked.items()}
            expected = logprob(oracles.logits_by_layer_masks(llama.model, prompt, masks, "self_attn"), prompt)
            drop = oracles.answer_logprob(llama.model, prompt) - expected
            assert float(found[i, 0, number]) == pytest.approx(drop, abs=2e-4)
    assert float(abs(found).max()) > 0.01
    one = knockout(llama, prompts[:3], ["direct"], heads=[(1, 2)]).sel(set="chosen")
    np.testing.assert_allclose(one, knockout(llama, prompts[:3], ["direct"], by="head")[:, :, 1, 2], atol=1e-5)


def test_a_set_of_layers_is_blocked_together_and_some_layers_are_computed_alone(
    llama: LoadedModel, prompts: PromptSet
) -> None:
    some = prompts[:3]
    np.testing.assert_allclose(
        knockout(llama, some, layers=[0, 1, 2]).sel(set="chosen"), knockout(llama, some), atol=1e-5
    )
    window = knockout(llama, some, by="window", window=3)
    np.testing.assert_allclose(knockout(llama, some, layers=[0, 1]).sel(set="chosen"), window[..., 0], atol=1e-5)
    for by in ("layer", "window", "head"):
        whole = knockout(llama, some, by=by, window=2)
        part = knockout(llama, some, by=by, window=2, layers=[2, 1])
        assert part["layer"].values.tolist() == [1, 2]
        np.testing.assert_allclose(part, whole.sel(layer=[1, 2]), atol=1e-5)
    assert "patch_grid(component='z')" in knockout(llama, some[:1], by="head", layers=[0]).attrs["note"]


def test_random_sets_match_what_they_say() -> None:
    sets = parse_sets([(0, 1), (0, 2), (3, 5)], None, 4, 6, random_sets=9, seed=0)
    assert list(sets.cells)[:2] == ["chosen", "random 0"] and len(set(sets.cells.values())) == 10
    for name, cells in sets.cells.items():
        assert [layer for layer, _ in cells] == [0, 0, 3]
        assert name == "chosen" or not set(cells) & {(0, 1), (0, 2), (3, 5)}
    assert sets.matched == "as many heads in each layer as the chosen set, and none that is in it (seed 0)"
    again = parse_sets([(0, 1), (0, 2), (3, 5)], None, 4, 6, random_sets=9, seed=0)
    assert sets == again != parse_sets([(0, 1), (0, 2), (3, 5)], None, 4, 6, random_sets=9, seed=1)
    tight = parse_sets([(0, 0), (0, 1), (0, 2)], None, 1, 4, random_sets=3, seed=0)
    expected = set(itertools.combinations([(0, head) for head in range(4)], 3))
    assert set(tight.cells.values()) == expected
    assert "in layers 0 too few others are left, so that random sets may share some" in tight.matched
    layers = parse_sets(None, [1, 2], 6, 4, random_sets=6, seed=0)
    assert {cell[0] for name, cells in layers.cells.items() if name != "chosen" for cell in cells} <= {0, 3, 4, 5}


@pytest.mark.parametrize("to", ["zero", "mean", "resample"])
@pytest.mark.parametrize(("component", "at"), [("z", "all"), ("mlp_out", "prediction"), ("attn_out", "subject")])
def test_ablation_is_plain_hooks(llama: LoadedModel, prompts: PromptSet, component: Any, to: Any, at: Any) -> None:
    """All modules of the set at once, by hooks; the mean and the other subject's run are computed anew here."""
    model, chosen = llama.model, HEADS if component == "z" else [(0, -1), (2, -1)]
    members = {"heads": HEADS} if component == "z" else {"layers": [0, 2]}
    found = ablation(llama, prompts, **members, component=component, to=to, at=at, random_sets=1, seed=4)
    assert found.dims == ("fact", "set")
    pairs = {clean.fact_id: other for clean, other in swap_subjects(prompts, np.random.default_rng(4))}
    kept = states(model, list(prompts), component)
    checked = 0
    for i, prompt in enumerate(prompts):
        if checked == 3 or np.isnan(found[i, 0]):
            continue
        checked += 1
        last = prompt.predicting[-1]
        positions = {"all": range(last + 1), "prediction": prompt.predicting, "subject": prompt.subject_positions}[at]
        source, patches = prompt, []
        if to == "resample":
            other = pairs[prompt.fact_id]
            source = Prompt(**vars(other) | {"ids": other.ids[: other.prediction + 1] + prompt.answer_ids})
        for layer, head in chosen:
            where = oracles.place(model, component, layer, zoo.parts("llama"))
            columns = slice(None) if head < 0 else slice(8 * head, 8 * head + 8)
            values: Any = tuple(positions)
            if to == "zero":
                values = torch.zeros(len(positions), 8 if head >= 0 else 32)
            if to == "mean":
                values = torch.stack([mean_by_hand(kept, list(prompts), prompt, p)[layer] for p in positions])
                values = values if head < 0 else values[:, head]
            patches.append((where, tuple(positions), values, columns))
        expected = logprob(oracles.hooked_logits(model, prompt, source, patches), prompt)
        drop = oracles.answer_logprob(model, prompt) - expected
        assert float(found[i, 0]) == pytest.approx(drop, abs=3e-4)
        assert float(found["baseline_answer_logprob"][i]) == pytest.approx(expected + drop, abs=1e-4)
    assert checked == 3 and float(abs(found).max()) > 0.01
    assert float(abs(found.sel(set="chosen") - found.sel(set="random 0")).max()) > 1e-3


def mean_by_hand(kept: list[torch.Tensor], prompts: list[Prompt], prompt: Prompt, position: int) -> torch.Tensor:
    """Of all prompts' outputs at the same place, found by comparing places one by one."""

    def same(other: Prompt, at: int) -> bool:
        (start, stop), (a, b) = prompt.subject_span, other.subject_span
        if position > prompt.prediction or at > other.prediction:
            return position > prompt.prediction and other.prediction < at < len(other) - 1
        if position < start or at < a:
            return position == at and position < start and at < a
        if position >= stop or at >= b:
            return prompt.prediction - position == other.prediction - at and position >= stop and at >= b
        kinds = [
            ("last" if p == e - 1 else "first" if p == s else "middle")
            for p, s, e in ((position, start, stop), (at, a, b))
        ]
        return kinds[0] == kinds[1]

    found = [
        state[:, at] for state, other in zip(kept, prompts, strict=True) for at in range(len(other)) if same(other, at)
    ]
    return torch.stack(found).double().mean(0).float()


def test_a_mean_over_one_prompt_alone_is_not_defined(llama: LoadedModel, prompts: PromptSet) -> None:
    """Planted: a prompt with a place of its own would be replaced by itself, and lose nothing."""
    long = max(prompts, key=lambda prompt: len(prompt.answer_ids))
    short = [prompt for prompt in prompts if len(prompt.answer_ids) == 1][:4]
    assert len(long.answer_ids) > 1
    found = ablation(llama, [long, *short], layers=[1], component="mlp_out", at="prediction")
    assert np.isnan(found[0, 0]) and not np.isnan(found[1:]).any()
    with pytest.raises(BadInput, match="no fact has anything to put there"):
        ablation(llama, [long], heads=[(0, 0)], to="resample")


def test_every_backend_ablates_alike(llama: LoadedModel, prompts: PromptSet) -> None:
    some = prompts[:8]
    for to in ("mean", "resample"):
        expected = ablation(llama, some, heads=HEADS, to=to, at="prediction")
        for backend in ("hooks", "transformer-lens", "nnsight"):
            found = ablation(llama, some, heads=HEADS, to=to, at="prediction", backend=backend)
            np.testing.assert_allclose(found, expected, atol=1e-4)
        assert float(abs(expected).max()) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "component 'z' does not fit: heads="),
        ({"layers": [1]}, r"component 'z' does not fit: heads=\[\(layer, head\), …\] go with 'z'"),
        (
            {"heads": [(0, 9)]},
            r"\[\(0, 9\)\] is no set of this model: heads are \(layer, head\), each once, of 3 layers",
        ),
        ({"heads": [(0, 1), (0, 1)]}, "is no set of this model"),
        ({"heads": []}, r"\[\] is no set of this model"),
        (
            {"heads": [(0, 1)], "random_sets": 4},
            "random_sets=4: there are 3 other sets with as many heads in each layer",
        ),
        ({"heads": [(0, 1)], "to": "noise"}, "to 'noise' is not one of zero, mean, resample"),
        ({"heads": [(0, 1)], "metric": "logit_diff"}, "ablation has no foils: its metrics are answer_logprob, kl"),
    ],
)
def test_ablation_refuses_in_one_line(llama: LoadedModel, prompts: PromptSet, settings: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ablation(llama, prompts[:2], **settings)


def test_prompts_of_two_styles_are_not_taken_for_each_other(llama: LoadedModel, prompts: PromptSet) -> None:
    """By its fact alone a prompt would be given the states of the other style, at its own positions."""
    with pytest.raises(BadInput, match="takes prompts of one style, and a fact stands twice among these"):
        ablation(llama, [*prompts[:3], *prompts[:3]], heads=[(0, 1)], to="resample")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "head", "heads": [(0, 1)]}, "are one set, and by='head' takes parts one at a time: leave by out"),
        ({"random_sets": 3}, "random_sets are compared with a set: give heads="),
        ({"heads": [(0, 1)], "layers": [1]}, r"give heads=\[\(layer, head\), …\] or layers=\[layer, …\], one of them"),
        ({"by": "layer", "layers": [3]}, r"layers \[3\]: give some of the model's, which are 0 to 2"),
    ],
)
def test_knockout_refuses_in_one_line(llama: LoadedModel, prompts: PromptSet, settings: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        knockout(llama, prompts[:2], **settings)


def margin(logits: torch.Tensor, prompt: Prompt) -> float:
    """Of every answer token over the likeliest other one, summed."""
    found = 0.0
    for line, token in zip(logits, prompt.answer_ids, strict=True):
        others = line.clone()
        others[token] = -torch.inf
        found += float(line[token] - others.max())
    return found


def test_a_metric_of_ones_own(llama: LoadedModel, prompts: PromptSet, pairs: list[tuple[Prompt, Prompt]]) -> None:
    drop = knockout(llama, prompts[:3], ["direct"], metric=margin)
    assert (
        drop.name == "knockout_drop" and drop.attrs["unit"] == "margin" and "metric margin" in drop.attrs["definition"]
    )
    for i, prompt in enumerate(prompts[:3]):
        edges = {(query, key) for query in prompt.predicting for key in prompt.subject_positions}
        plain, blocked = (
            margin(oracles.logits(llama.model, prompt, mask)[prompt.predicting], prompt)
            for mask in (None, oracles.hand_mask(llama.model, len(prompt), edges))
        )
        assert float(drop[i, 0]) == pytest.approx(plain - blocked, abs=1e-3)
        assert float(drop["baseline_margin"][i]) == pytest.approx(plain, abs=1e-3)
    for direction in ("denoising", "noising"):
        both = patch_grid(llama, pairs, direction=direction, metric=["logit_diff", margin])
        alone = patch_grid(llama, pairs, direction=direction, metric=margin)
        np.testing.assert_allclose(both["margin"], alone, atol=1e-4)
        share = recovery(alone).sel(layer=0, role="subject_last")
        assert np.isfinite(share) and (destroyed(alone) == alone["clean_margin"] - alone["corrupt_margin"]).all()
        if direction == "denoising":
            np.testing.assert_allclose(recovery(both["margin"]), recovery(alone), atol=1e-3)
    assert ablation(llama, prompts[:6], heads=HEADS, metric=margin)["baseline_margin"].shape == (6,)


def test_a_metric_of_ones_own_has_a_name_and_gives_a_number(llama: LoadedModel, prompts: PromptSet) -> None:
    def rank(logits: torch.Tensor, prompt: Prompt) -> float:
        return 1.0

    def whole(logits: torch.Tensor, prompt: Prompt) -> Any:
        return logits

    for metric in (rank, lambda logits, prompt: 0.0, [margin, margin]):
        with pytest.raises(BadInput, match="are known by their names, and .* are not names of their own: use def"):
            knockout(llama, prompts[:1], metric=metric)
    with pytest.raises(BadInput, match=r"metric whole gave a Tensor for fact \S+: return one number"):
        knockout(llama, prompts[:1], metric=whole)
    with pytest.raises(BadInput, match="metric 'loss' is not among answer_logprob, answer_logit, logit_diff, kl, rank"):
        knockout(llama, prompts[:1], metric="loss")  # type: ignore[call-overload]


@pytest.mark.parametrize("at", ["role", "position"])
def test_after_a_layer_is_before_the_next(llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], at: Any) -> None:
    after, before = (patch_grid(llama, pairs, component, at=at) for component in ("resid_post", "resid_pre"))
    np.testing.assert_allclose(after[:, :2], before[:, 1:], atol=1e-4)
    if at == "role":
        whole = after.isel(layer=2).sel(role="prediction")
        np.testing.assert_allclose(whole, destroyed(after), atol=1e-3)
        assert (after.isel(layer=2).drop_sel(role="prediction").fillna(0) == 0).all()
    else:
        assert after["token"].values[0].tolist()[: pairs[0][0].prediction + 1] == list(
            pairs[0][0].tokens[: pairs[0][0].prediction + 1]
        )
    some = patch_grid(llama, pairs, "z", at="subject", layers=[2, 0])
    whole = patch_grid(llama, pairs, "z", at="subject")
    assert some["layer"].values.tolist() == [0, 2] and "knockout(by='head')" in some.attrs["note"]
    xr.testing.assert_allclose(some.drop_attrs(), whole.sel(layer=[0, 2]).drop_attrs(), atol=1e-4)

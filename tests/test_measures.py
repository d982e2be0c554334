"""Every measured number against an independent slow computation (oracles.py)."""

from __future__ import annotations

from functools import partial

import numpy as np
import oracles
import pandas as pd
import pytest
import torch

from subjattn.engine import cones
from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.budget import Budget
from subjattn.engine.forward import forward
from subjattn.engine.interventions import Row
from subjattn.errors import BadInput
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.answers import answer_logprob, ending_tokens, predict
from subjattn.measures.attention import subject_attention, token_attention
from subjattn.measures.knockout import knockout, same_edges
from subjattn.measures.pairs import choose_pairs, keep_pairs
from subjattn.measures.patching import destroyed, patch_grid, recovery, trivial_cells
from subjattn.measures.record import measure_of
from subjattn.measures.scoring import is_correct
from subjattn.models import LoadedModel
from subjattn.prompts import ROLES, PromptSet, make_prompts, swap_subjects


STYLES = {name: TEMPLATES["country"][name] for name in ("list", "sentence")}


@pytest.fixture
def prompts(tiny: LoadedModel, cities: pd.DataFrame) -> PromptSet:
    """Prompts of different lengths with answers of different lengths."""
    made = make_prompts(draw(cities, 12, seed=3), tiny.tokenizer, STYLES["list"])
    assert len({len(prompt) for prompt in made}) > 3
    assert len({len(prompt.answer_ids) for prompt in made}) > 2
    return made


@pytest.fixture(scope="module", params=list(STYLES))
def real(request: pytest.FixtureRequest, smollm2: LoadedModel, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 10, seed=5), smollm2.tokenizer, STYLES[request.param])


def check_logprobs(model: LoadedModel, prompts: PromptSet) -> None:
    found = answer_logprob(model, prompts)
    expected = [oracles.answer_logprob(model.model, prompt) for prompt in prompts]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def check_attention(model: LoadedModel, prompts: PromptSet) -> None:
    found, tokens = subject_attention(model, prompts), token_attention(model, prompts)
    for i, prompt in enumerate(prompts):
        expected = oracles.attention_weights(model.model, prompt)
        np.testing.assert_allclose(found[i], expected[..., list(prompt.subject_positions)].sum(-1), atol=1e-5)
        np.testing.assert_allclose(tokens[i, :, : prompt.prediction + 1], expected.mean(1), atol=1e-5)
        assert np.isnan(tokens[i, :, prompt.prediction + 1 :]).all()


def check_knockout(model: LoadedModel, prompts: PromptSet) -> None:
    drop = knockout(model, prompts)
    np.testing.assert_allclose(drop["baseline_answer_logprob"], answer_logprob(model, prompts), atol=1e-5)
    for i, prompt in enumerate(prompts):
        subject = list(prompt.subject_positions)
        base = oracles.answer_logprob(model.model, prompt)
        for route, queries in (
            ("direct", list(prompt.predicting)),
            ("total", list(range(prompt.subject_span[1], len(prompt)))),
        ):
            mask = oracles.hand_mask(model.model, len(prompt), {(query, key) for query in queries for key in subject})
            assert float(drop.sel(route=route)[i]) == pytest.approx(
                base - oracles.answer_logprob(model.model, prompt, mask), abs=2e-4
            )


def check_patching(model: LoadedModel, prompts: PromptSet, n_pairs: int, layers: list[int]) -> None:
    pairs = swap_subjects(prompts, np.random.default_rng(0))[:n_pairs]
    assert pairs, "the sample of prompts gives no pairs; draw another"
    grid = patch_grid(model, pairs)
    for i, (clean, corrupt) in enumerate(pairs):
        base = oracles.patched_logit_diff(model.model, clean, corrupt, 0, [])
        assert float(grid["corrupt_logit_diff"][i]) == pytest.approx(base, abs=2e-4)
        for layer in layers:
            for role in ROLES:
                positions = list(clean.role(role))
                found = float(grid.sel(role=role)[i, layer])
                if not positions:
                    assert np.isnan(found)
                    continue
                expected = oracles.patched_logit_diff(model.model, clean, corrupt, layer, positions) - base
                assert found == pytest.approx(expected, abs=3e-4), (role, layer)


def test_answer_logprob_is_the_models_own(tiny: LoadedModel, prompts: PromptSet) -> None:
    check_logprobs(tiny, prompts)


def test_attention_is_output_attentions(tiny: LoadedModel, prompts: PromptSet) -> None:
    check_attention(tiny, prompts)


def test_knockout_is_a_hand_masked_forward(tiny: LoadedModel, prompts: PromptSet) -> None:
    check_knockout(tiny, prompts)
    assert float(abs(knockout(tiny, prompts)).max()) > 0.1, "the knock-out moves these models too little to test it"


PLACES = [
    (at, its, 1) for at in ("role", "position", "prediction", "subject") for its in ("resid_pre", "attn_out", "z")
]
PLACES += [("role", its, 1) for its in ("q", "v", "pattern")]
PLACES += [("role", its, 2) for its in ("resid_pre", "resid_post", "attn_out", "q", "v")]


@pytest.mark.parametrize(("at", "component", "window"), PLACES)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_trivial_cells_could_not_be_otherwise(
    tiny_models: dict[str, LoadedModel], cities: pd.DataFrame, at: str, component: str, window: int, direction: str
) -> None:
    """In random models of two architectures: nothing or all wherever they are marked, save in the last layer."""
    asked = make_prompts(draw(cities, 60, seed=1), tiny_models["llama"].tokenizer, STYLES["list"])
    pairs = swap_subjects(asked, np.random.default_rng(0))[:4]
    grids = [
        patch_grid(tiny_models[name], pairs, component, at=at, direction=direction, window=window)  # type: ignore[arg-type]
        for name in ("llama", "mistral" if component == "v" else "gpt2")  # of as many key/value heads
    ]
    trivial = trivial_cells(grids[0])
    assert trivial.equals(trivial_cells(grids[1])) and trivial.dims == grids[0].dims
    sign = 1 if direction == "denoising" else -1
    last = trivial["layer"] == trivial["layer"].max()
    nearly = trivial & last & (grids[0]["reach"] == "prediction")
    if component == "resid_post":
        nearly = trivial & (grids[0]["reach"] == "prediction")
    assert bool(nearly.any()) == (component.startswith("resid") and at != "subject")
    always = (trivial & ~nearly).values
    decided = np.ones_like(always)
    for grid in grids:
        share = (grid / (sign * destroyed(grid))).transpose(*grid.dims).values
        settled = (np.abs(share) < 1e-4) | (np.abs(share - 1) < 1e-4) | (np.abs(grid.values) < 5e-6)
        assert settled[always].all()
        decided &= settled
    if component == "resid_pre":
        assert (decided & ~np.isnan(share) & ~always).sum() == 0, "and nothing else is settled in both models"


def test_recovery_at_the_subjects_last_token_is_of_open_cells(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    """A share of sums: the mean effect over layers that are not decided by construction, over what is destroyed."""
    asked = make_prompts(draw(cities, 60, seed=1), smollm2.tokenizer, STYLES["list"])
    effect = patch_grid(smollm2, swap_subjects(asked, np.random.default_rng(0))[:3])
    dataset = effect.to_dataset()
    (quantity,) = measure_of("patching").quantities
    assert quantity.over is not None
    numerator, denominator = quantity.per_fact(dataset), quantity.over(dataset)
    here, closed = effect.sel(role="subject_last").values, trivial_cells(effect).sel(role="subject_last").values
    for fact in range(3):
        layers = [float(here[fact, layer]) for layer in range(30) if not closed[fact, layer]]
        assert 20 < len(layers) <= 30 and float(numerator[fact]) == pytest.approx(np.mean(layers), rel=1e-5)
        lost = float(effect["clean_logit_diff"][fact] - effect["corrupt_logit_diff"][fact])
        assert float(denominator[fact]) == pytest.approx(lost)
    alone = dataset.isel(layer=[5]).sel(role=["prediction"])
    assert quantity.per_fact(alone).values == pytest.approx(effect.isel(layer=5).sel(role="prediction").values)
    with pytest.raises(BadInput, match="which cells are trivial is not known"):
        trivial_cells(effect.drop_vars("reach"))


def test_pairs_of_known_facts_come_first(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = list(make_prompts(draw(cities, 200, seed=1), tiny.tokenizer, STYLES["list"]))
    known = {prompt.fact_id for prompt in prompts[::4]}
    for seed in range(3):
        pairs, table = choose_pairs(prompts, known, 60, np.random.default_rng(seed))
        assert [(clean.fact_id, corrupt.fact_id) for clean, corrupt in pairs] == list(
            zip(table["clean"], table["corrupt"], strict=True)
        )
        assert table["known"].tolist() == [{a.fact_id, b.fact_id} <= known for a, b in pairs]
        assert table["known"].is_monotonic_decreasing and 0 < table["known"].sum() < len(table) == 60
        assert table["clean"].is_unique
        able = {
            clean.fact_id
            for clean, _ in swap_subjects([p for p in prompts if p.fact_id in known], np.random.default_rng(0))
        }
        assert set(table["clean"][table["known"]]) >= able or table["known"].all(), "none is left for an unknown one"
        again = choose_pairs(prompts[::-1], known, 60, np.random.default_rng(seed))[1]
        pd.testing.assert_frame_equal(table, again)
        few = choose_pairs(prompts, known, 3, np.random.default_rng(seed))[1]
        assert len(few) == 3 and few["known"].all()
    assert choose_pairs(prompts[:1], known, 3, np.random.default_rng(0))[1].empty
    with pytest.raises(BadInput, match="n=0 pairs are none"):
        choose_pairs(prompts, known, 0, np.random.default_rng(0))


def test_pairs_that_a_swap_hardly_moves_are_left_out_and_marked(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 60, seed=1), tiny.tokenizer, STYLES["list"])
    effect = patch_grid(tiny, swap_subjects(prompts, np.random.default_rng(0))[:6], at="subject")
    gaps = sorted(
        (c - d, f)
        for c, d, f in zip(
            effect["clean_logit_diff"].values, effect["corrupt_logit_diff"].values, effect["fact"].values, strict=True
        )
    )
    floor = float(gaps[0][0] + gaps[-1][0]) / 2
    kept = keep_pairs(effect, floor)
    expected = {fact for gap, fact in gaps if gap >= floor}
    assert set(kept["fact"].values[kept["kept"].values]) == expected and 0 < len(expected) < 6
    assert kept.sizes["fact"] == 6 and bool(kept.isel(fact=~kept["kept"].values).isnull().all())
    some = effect.isel(fact=kept["kept"].values)
    np.testing.assert_allclose(recovery(kept), recovery(some), err_msg="as if the others had not been there")
    np.testing.assert_array_equal(kept.isel(fact=kept["kept"].values), some)
    with pytest.raises(BadInput, match="floor=nan is no number"):
        keep_pairs(effect, float("nan"))
    with pytest.raises(BadInput, match="needs a patch_grid"):
        keep_pairs(effect.rename("patch_rank"), 1.0)


def test_routes_that_coincide_are_marked(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    """By the edges written out, and by what blocking them costs."""
    facts = draw(cities, 8, seed=3)
    facts = pd.concat(
        [facts, facts.assign(fact_id="b" + facts["fact_id"], answers=[[a[0] + "x"] for a in facts["answers"]])]
    )
    prompts = [p for t in ("In {subject},", STYLES["list"]) for p in make_prompts(facts, tiny.tokenizer, t)]
    expected = [
        {(q, k) for q in prompt.predicting for k in prompt.subject_positions}
        == {(q, k) for q in range(prompt.subject_span[1], len(prompt) - 1) for k in prompt.subject_positions}
        for prompt in prompts
    ]
    drop = knockout(tiny, prompts)
    assert drop["routes_coincide"].values.tolist() == same_edges(prompts).tolist() == expected
    assert any(expected) and not all(expected)
    same = drop.where(drop["routes_coincide"], drop=True)
    np.testing.assert_allclose(same.sel(route="direct"), same.sel(route="total"), atol=1e-5)
    one = knockout(tiny, prompts, metric="kl")
    assert one["routes_coincide"].values.tolist() == [p.prediction == p.subject_span[1] for p in prompts]
    assert "routes_coincide" not in knockout(tiny, prompts[:2], ["direct"]).coords
    with pytest.raises(BadInput, match="give a list of direct, total"):
        same_edges(prompts, "direct", "all")  # type: ignore[arg-type]


def test_patching_is_a_plain_hook(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 60, seed=1), tiny.tokenizer, STYLES["list"])
    check_patching(tiny, prompts, 3, [0, 1, 2])


def test_smollm2_answers_attention_and_knockout(smollm2: LoadedModel, real: PromptSet) -> None:
    check_logprobs(smollm2, real[:4])
    check_attention(smollm2, real[:4])
    check_knockout(smollm2, real[:3])


def test_smollm2_patching(smollm2: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 40, seed=2), smollm2.tokenizer, STYLES["list"])
    check_patching(smollm2, prompts, 1, [0, 14, 29])


def test_knockout_by_layer_blocks_one_layer(tiny: LoadedModel, prompts: PromptSet) -> None:
    """Blocking in one layer is the model run by hand with the mask of that layer alone."""
    found = knockout(tiny, prompts[:4], ["direct"], by="layer").sel(route="direct")
    assert found.dims == ("fact", "layer")
    assert found.shape == (4, 3)
    layers = decoder_layers(tiny.model)
    for i, prompt in enumerate(prompts[:4]):
        base = oracles.answer_logprob(tiny.model, prompt)
        edges = {(query, key) for query in prompt.predicting for key in prompt.subject_positions}
        mask = oracles.hand_mask(tiny.model, len(prompt), edges)
        plain = oracles.hand_mask(tiny.model, len(prompt), set())
        for layer, module in enumerate(layers):

            def block(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                if "attention_mask" in kwargs:
                    return args, {**kwargs, "attention_mask": mask}
                places = [isinstance(a, torch.Tensor) and a.shape == mask.shape for a in args]
                assert sum(places) == 1, "no mask among the layer's arguments"
                return tuple(mask if place else a for a, place in zip(args, places, strict=True)), kwargs

            handle = module.register_forward_pre_hook(block, with_kwargs=True)
            expected = base - oracles.answer_logprob(tiny.model, prompt, plain)
            handle.remove()
            assert float(found[i, layer]) == pytest.approx(expected, abs=2e-4)


def test_a_facts_numbers_do_not_depend_on_its_batch(tiny: LoadedModel, prompts: PromptSet) -> None:
    """Alone, among shorter and longer ones, in any order and any batch size: the same to rounding."""
    together = answer_logprob(tiny, prompts), subject_attention(tiny, prompts), knockout(tiny, prompts)
    alone = [
        [function(tiny, [prompt], *rest)[0] for prompt in prompts]
        for function, *rest in ((answer_logprob,), (subject_attention,), (knockout,))
    ]
    for batch, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(batch, np.stack(single), atol=2e-5)
    turned = PromptSet(prompts.style, prompts.prompts[::-1])
    np.testing.assert_allclose(subject_attention(tiny, turned)[::-1], together[1], atol=2e-5)
    rows = [Row(prompt) for prompt in prompts]
    for run in (partial(forward, batch_tokens=40), partial(cones.forward, budget=Budget(40, 40, 20, 2))):
        small = [i for output in run(tiny.model, rows) for i in output.index]
        assert sorted(small) == list(range(len(prompts)))


def test_the_models_attention_comes_back(tiny: LoadedModel, prompts: PromptSet) -> None:
    before = tiny.model.config._attn_implementation
    subject_attention(tiny, prompts)
    assert tiny.model.config._attn_implementation == before != "subjattn"
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


def test_a_prompt_that_ends_with_its_subject_is_refused(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 2), tiny.tokenizer, "The country of {subject}")
    for measure in (subject_attention, knockout):
        with pytest.raises(BadInput, match="ends with its subject"):
            measure(tiny, prompts)
    assert np.isfinite(answer_logprob(tiny, prompts)).all()


def test_a_plain_hugging_face_model_will_do(tiny: LoadedModel, prompts: PromptSet) -> None:
    np.testing.assert_array_equal(subject_attention(tiny.model, prompts), subject_attention(tiny, prompts))


def test_new_lines_are_those_of_the_whole_vocabulary(kinds: dict[str, Any], smollm2: LoadedModel) -> None:
    """And a token that the tokenizer has not is none."""
    for tokenizer in (*kinds.values(), smollm2.tokenizer):
        _, newlines = ending_tokens(smollm2.model, tokenizer)
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        expected = [token for token, text in enumerate(texts) if "\n" in text]
        assert [token for token in range(len(tokenizer) + 9) if token in newlines] == expected
        assert len(expected) > 0 or tokenizer is not smollm2.tokenizer


def test_predictions_are_hugging_faces_greedy_ones(smollm2: LoadedModel, real: PromptSet) -> None:
    found = predict(smollm2, real)
    for prompt, text in zip(real, found["prediction"], strict=True):
        ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
        out = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        new = smollm2.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert text == (new.splitlines() or [""])[0].strip()
    assert found["correct"].any(), "SmolLM2 knows some of these"


@pytest.mark.parametrize(
    ("prediction", "answers", "correct"),
    [
        ("Kenya", ["Kenya"], True),
        ("kenya, in East Africa", ["Kenya"], True),
        ("the United States of America", ["United States"], True),
        ("Nigeria", ["Niger"], False),
        ("Guinea-Bissau", ["Guinea"], False),
        ("Türkiye.", ["Turkey", "Turkiye"], True),
        ("in Kenya", ["Kenya"], False),
        ("", ["Kenya"], False),
        ("U.S.", ["U.S."], True),
        ("Guinea Bissau", ["Guinea"], False),
        ("United States Virgin Islands", ["United States"], False),
        ("France. Paris is", ["France"], True),
        ("Côte d’Ivoire", ["Cote d'Ivoire"], True),
        ("**France**", ["France"], True),
        ("(The) Netherlands", ["Netherlands"], False),
    ],
)
def test_is_correct(prediction: str, answers: list[str], correct: bool) -> None:
    assert is_correct(prediction, answers) is correct


def test_recovery_is_a_ratio_of_means(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 60, seed=1), tiny.tokenizer, STYLES["list"])
    grid = patch_grid(tiny, swap_subjects(prompts, np.random.default_rng(0))[:4])
    gap = (grid["clean_logit_diff"] - grid["corrupt_logit_diff"]).values
    cell = grid.sel(layer=1, role="prediction").values
    assert float(recovery(grid).sel(layer=1, role="prediction")) == pytest.approx(cell.sum() / gap.sum())
    assert (grid.sel(role="before_subject") == 0).all()

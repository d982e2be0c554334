"""Every measured number against an independent slow computation (oracles.py)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pandas as pd
import pytest
import torch

from subjattn.engine import cones
from subjattn.engine.forward import decoder_layers, forward, residual_streams
from subjattn.engine.interventions import Block, Output, Patch, Row
from subjattn.errors import BadInput, NotFired, UnsupportedModel
from subjattn.facts import draw
from subjattn.measures.answers import answer_logprob, is_correct, predict, row_logprobs
from subjattn.measures.attention import subject_attention, token_attention
from subjattn.measures.knockout import knockout
from subjattn.measures.patching import patch_grid, recovery
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import ROLES, TEMPLATES, PromptSet, make_prompts, swap_subjects


STYLES = TEMPLATES["country"]


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
    np.testing.assert_allclose(drop["answer_logprob"], answer_logprob(model, prompts), atol=1e-5)
    for i, prompt in enumerate(prompts):
        subject = list(prompt.subject_positions)
        base = oracles.answer_logprob(model.model, prompt)
        for route, queries in (
            ("direct", list(prompt.predicting)),
            ("total", list(range(prompt.subject_span[1], len(prompt)))),
        ):
            mask = oracles.hand_mask(model.model, prompt, queries, subject)
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
    found = knockout(tiny, prompts[:4], ["direct"], by_layer=True).sel(route="direct")
    assert found.dims == ("fact", "layer")
    assert found.shape == (4, 3)
    layers = decoder_layers(tiny.model)
    for i, prompt in enumerate(prompts[:4]):
        base = oracles.answer_logprob(tiny.model, prompt)
        mask = oracles.hand_mask(tiny.model, prompt, list(prompt.predicting), list(prompt.subject_positions))
        plain = oracles.hand_mask(tiny.model, prompt, [], [])
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
    turned = PromptSet(prompts.template, prompts.prompts[::-1])
    np.testing.assert_allclose(subject_attention(tiny, turned)[::-1], together[1], atol=2e-5)
    rows = [Row(prompt) for prompt in prompts]
    for run in (forward, cones.forward):
        small = [i for output in run(tiny.model, rows, batch_tokens=40) for i in output.index]
        assert sorted(small) == list(range(len(prompts)))


def test_an_identity_patch_changes_nothing(tiny: LoadedModel, prompts: PromptSet) -> None:
    states = residual_streams(tiny.model, prompts)
    rows = [
        Row(prompt, patch=Patch(1, tuple(range(len(prompt) - 1)), stream[1, :-1]))
        for prompt, stream in zip(prompts, states, strict=True)
    ]
    np.testing.assert_allclose(row_logprobs(tiny, rows), answer_logprob(tiny, prompts), atol=1e-5)


def test_a_full_clean_patch_is_the_clean_run(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 60, seed=1), tiny.tokenizer, STYLES["list"])
    (clean, corrupt), *_ = swap_subjects(prompts, np.random.default_rng(0))
    stream = residual_streams(tiny.model, [clean])[0]
    positions = tuple(range(clean.prediction + 1))
    rows = [Row(clean), Row(corrupt, patch=Patch(0, positions, stream[0, : len(positions)]))]
    first = {i: output.logits[row, 0] for output in forward(tiny.model, rows) for row, i in enumerate(output.index)}
    torch.testing.assert_close(first[0], first[1], atol=1e-4, rtol=0)


def test_blocking_nothing_changes_nothing(tiny: LoadedModel, prompts: PromptSet) -> None:
    """Edges to later positions carry nothing anyway."""
    rows = [Row(prompt, block=Block((1,), (prompt.prediction,))) for prompt in prompts]
    np.testing.assert_allclose(row_logprobs(tiny, rows), answer_logprob(tiny, prompts), atol=1e-5)


def test_the_models_attention_comes_back(tiny: LoadedModel, prompts: PromptSet) -> None:
    before = tiny.model.config._attn_implementation
    subject_attention(tiny, prompts)
    assert tiny.model.config._attn_implementation == before != "subjattn"
    assert not any(module._forward_pre_hooks for module in tiny.model.modules())


def test_a_query_without_keys_is_refused(tiny: LoadedModel, prompts: PromptSet) -> None:
    prompt = prompts[0]
    with pytest.raises(NotFired, match="without any key"):
        row_logprobs(tiny, [Row(prompt, block=Block((3,), (0, 1, 2, 3)))])


@pytest.mark.parametrize("run", [forward, cones.forward])
def test_an_intervention_that_reaches_nothing_is_refused(tiny: LoadedModel, prompts: PromptSet, run: Any) -> None:
    prompt = prompts[0]
    values = torch.zeros(1, tiny.model.config.hidden_size)
    outside = [
        Row(prompt, block=Block((3,), (1,), layers=(99,))),
        Row(prompt, block=Block((3,), (1,), layers=())),
        Row(prompt, block=Block((len(prompt),), (1,))),
        Row(prompt, patch=Patch(99, (1,), values)),
        Row(prompt, patch=Patch(1, (len(prompt) - 1,), values)),
    ]
    for row in outside:
        with pytest.raises(NotFired, match="outside the prompt or model"):
            list(run(tiny.model, [row]))


def test_a_bidirectional_model_is_refused(tokenizer: object, cities: pd.DataFrame) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    prompts = make_prompts(draw(cities, 2), tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="not a causal decoder"):
        subject_attention(BertLMHeadModel(config).eval(), prompts)


def test_logits_that_are_not_finite_are_refused(tiny_folders: dict[str, Path], cities: pd.DataFrame) -> None:
    """Planted: one weight that overflowed; no comparison with NaN may let it through."""
    model = load_model(str(tiny_folders["llama"]))
    model.model.lm_head.weight.data[5, 5] = torch.nan
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    for measure in (subject_attention, knockout):
        with pytest.raises(UnsupportedModel, match="not finite in torch.float32"):
            measure(model, prompts)


def test_prefix_tuning_is_refused(tiny_folders: dict[str, Path], cities: pd.DataFrame) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    model = load_model(str(tiny_folders["llama"]))
    wrapped = get_peft_model(model.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="adds prompt tokens"):
        answer_logprob(wrapped, prompts)


def test_training_mode_is_refused(tiny: LoadedModel, prompts: PromptSet) -> None:
    tiny.model.train()
    try:
        with pytest.raises(UnsupportedModel, match=r"call model\.eval\(\)"):
            answer_logprob(tiny, prompts)
    finally:
        tiny.model.eval()


def test_attention_outside_the_interface_is_refused(tokenizer: object, cities: pd.DataFrame) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=2)).eval()
    prompts = make_prompts(draw(cities, 2), tokenizer, STYLES["list"])
    with pytest.raises((UnsupportedModel, NotFired)):
        subject_attention(model, prompts)


def test_soft_capped_scores_are_refused(tokenizer: object, cities: pd.DataFrame) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    prompts = make_prompts(draw(cities, 2), tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="softcap"):
        subject_attention(Gemma2ForCausalLM(config).eval(), prompts)


def test_a_prompt_that_ends_with_its_subject_is_refused(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts = make_prompts(draw(cities, 2), tiny.tokenizer, "The country of {subject}")
    for measure in (subject_attention, knockout):
        with pytest.raises(BadInput, match="ends with its subject"):
            measure(tiny, prompts)
    assert np.isfinite(answer_logprob(tiny, prompts)).all()


def test_a_plain_hugging_face_model_will_do(tiny: LoadedModel, prompts: PromptSet) -> None:
    np.testing.assert_array_equal(subject_attention(tiny.model, prompts), subject_attention(tiny, prompts))


def random_rows(model: LoadedModel, prompts: PromptSet, n: int, seed: int) -> list[Row]:
    """Rows with blocks, patches, both and neither, anywhere in their prompts."""
    rng = np.random.default_rng(seed)
    n_layers = len(decoder_layers(model.model))
    width = model.model.config.hidden_size
    rows = []
    for _ in range(n):
        prompt = prompts[int(rng.integers(len(prompts)))]
        block = patch = None
        if rng.random() < 0.6:
            queries = rng.choice(np.arange(2, len(prompt)), rng.integers(1, 4))
            layers = tuple(int(layer) for layer in rng.choice(n_layers, rng.integers(1, n_layers + 1), replace=False))
            keys = tuple(int(key) for key in rng.choice(2, rng.integers(1, 3), replace=False))
            block = Block(tuple(map(int, queries)), keys, None if rng.random() < 0.3 else layers)
        if rng.random() < 0.6:
            positions = rng.choice(prompt.prediction + 1, rng.integers(1, 4), replace=False)
            values = torch.tensor(rng.normal(size=(len(positions), width)), dtype=torch.float32)
            patch = Patch(int(rng.integers(n_layers)), tuple(map(int, positions)), values)
        rows.append(Row(prompt, block, patch))
    return rows


def all_logits(outputs: Iterator[Output]) -> dict[int, torch.Tensor]:
    found = {}
    for output in outputs:
        for i, row, logits in zip(output.index, output.rows, output.logits, strict=True):
            found[i] = logits[: len(row.prompt.predicting)]
    return found


@pytest.mark.parametrize("batch_tokens", [2048, 60])
def test_cones_are_whole_forward_passes(tiny: LoadedModel, prompts: PromptSet, batch_tokens: int) -> None:
    """Every logit of 80 random interventions, in large and in small batches."""
    rows = random_rows(tiny, prompts, 80, seed=0)
    expected = all_logits(forward(tiny.model, rows))
    found = all_logits(cones.forward(tiny.model, rows, batch_tokens=batch_tokens))
    assert found.keys() == expected.keys() == set(range(80))
    for i, logits in expected.items():
        torch.testing.assert_close(found[i], logits, atol=1e-4, rtol=0)


def test_cones_are_whole_forward_passes_on_smollm2(smollm2: LoadedModel, real: PromptSet) -> None:
    """In float64, where rounding cannot hide a small error; random states amplify float32's."""
    double = copy.deepcopy(smollm2.model).double()
    rows = random_rows(smollm2, real, 12, seed=1)
    expected = all_logits(forward(double, rows))
    for i, logits in all_logits(cones.forward(double, rows)).items():
        torch.testing.assert_close(logits, expected[i], atol=1e-9, rtol=0)


def test_cones_under_a_live_adapter(tiny_folders: dict[str, Path], adapter: Path, cities: pd.DataFrame) -> None:
    tuned = load_model(str(tiny_folders["llama"]), adapter=adapter)
    prompts = make_prompts(draw(cities, 8), tuned.tokenizer, STYLES["list"])
    rows = random_rows(tuned, prompts, 30, seed=2)
    expected = all_logits(forward(tuned.model, rows))
    for i, logits in all_logits(cones.forward(tuned.model, rows)).items():
        torch.testing.assert_close(logits, expected[i], atol=1e-4, rtol=0)


def test_a_model_whose_cones_are_not_exact_is_refused(
    tiny_folders: dict[str, Path], cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a causal layer that looks at running sums, so that a suffix alone is not enough."""
    model = load_model(str(tiny_folders["llama"]))
    layer = decoder_layers(model.model)[1]
    layer.mlp.register_forward_hook(lambda _module, _args, output: output + output.cumsum(1))
    prompts = make_prompts(draw(cities, 2), model.tokenizer, STYLES["list"])
    with pytest.raises(UnsupportedModel, match="would not be exact"):
        knockout(model, prompts)


def test_predictions_are_hugging_faces_greedy_ones(smollm2: LoadedModel, real: PromptSet) -> None:
    found = predict(smollm2, smollm2.tokenizer, real)
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

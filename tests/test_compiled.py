"""Circuits compiled by tracr: their programs say what attention, knock-out, patching and transfer have to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from compiled import MAX_TOKENS, WORDS, Circuit, compiled, convert

import subjattn as sa
from subjattn.evidence.returned import returned
from subjattn.measures.patching import recovery
from subjattn.models import LoadedModel


KNOWN = {"Ada": "Peru", "Bo": "Chad", "Cy": "Mali", "Di": "Peru", "Ed": "Mali", "Flo": "Chad"}
OTHERWISE = {"Ada": "Chad", "Bo": "Mali", "Cy": "Peru", "Di": "Mali", "Ed": "Chad", "Flo": "Peru"}
"""Other answers to the same names."""
STYLES = ("now {subject} lives in", "today the {subject} now lives in")
CIRCUITS = get_args(Circuit)
Make = Callable[..., tuple[LoadedModel, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A circuit as a loaded model, and tracr's own; each is compiled once."""
    there: dict[str, tuple[LoadedModel, Any]] = {}

    def make(circuit: Circuit, answers: dict[str, str] = KNOWN, attended: set[str] | None = None) -> Any:
        key = f"{circuit} {sorted(answers.items())} {attended}"
        if key not in there:
            theirs = compiled(circuit, answers, attended)
            folder = convert(theirs, tmp_path_factory.mktemp("circuit") / "model")
            there[key] = sa.load_model(str(folder)), theirs
        return there[key]

    return make


def prompts_of(model: LoadedModel, style: str) -> Any:
    facts = [
        {"fact_id": name, "subject": name, "relation": "home", "question": style, "answers": [answer]}
        for name, answer in KNOWN.items()
    ]
    return sa.make_prompts(pd.DataFrame(facts), model.tokenizer, style)


def copying(circuit: Circuit) -> int:
    """The layer in which the name or its answer is copied: by the program the second where it is looked up before."""
    return 1 if circuit == "lookup, then copy" else 0


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_the_folder_computes_what_tracr_does(made: Make, circuit: Circuit) -> None:
    """States, attention and outputs of sentences drawn at random, each with one name."""
    model, theirs = made(circuit)
    assert model.model.config.n_positions == MAX_TOKENS + 1
    rng = np.random.default_rng(0)
    for _ in range(6):
        words = [str(word) for word in rng.choice(WORDS, int(rng.integers(2, 12)))]
        words[int(rng.integers(len(words)))] = str(rng.choice(list(KNOWN)))
        expected = theirs.apply(["BOS", *words])
        ids = model.tokenizer(" ".join(words), return_tensors="pt").input_ids
        assert ids[0].tolist() == [theirs.input_encoder.encoding_map[word] for word in ["BOS", *words]]
        n = len(theirs.residual_labels)
        streams: list[np.ndarray] = []
        hooks = [
            block.register_forward_hook(lambda _, __, out: streams.append(_first(out)[0, :, :n].numpy()))
            for block in model.model.transformer.h
        ]
        found = model.model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        np.testing.assert_allclose(streams, [np.asarray(of[0]) for of in expected.residuals[1::2]], atol=2e-4)
        at = next(place for place, word in enumerate(words, 1) if word in KNOWN)
        answers = model.tokenizer.convert_ids_to_tokens(found.logits[0].argmax(-1).tolist())
        answer = KNOWN[words[at - 1]]
        assert expected.decoded[at:] == answers[at:] == [answer] * (len(words) + 1 - at)


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("circuit", CIRCUITS)
def test_attention_is_what_the_program_attends_to(made: Make, circuit: Circuit, style: str) -> None:
    """All of it to the name where that is picked; evenly to all where the program does nothing."""
    model, theirs = made(circuit)
    prompts = prompts_of(model, style)
    found = sa.subject_attention(model, prompts)
    layer, n = copying(circuit), len(prompts[0].ids) - len(prompts[0].answer_ids)
    np.testing.assert_allclose(found.isel(layer=layer), 1, atol=1e-5)
    if layer:
        np.testing.assert_allclose(found.isel(layer=0), 1 / n, atol=1e-5)
    scores = theirs.apply(["BOS", *style.format(subject="Bo").split()]).attn_logits[layer]
    weights = torch.softmax(torch.tensor(np.asarray(scores)), -1)[0, 0, -1]
    assert float(weights[prompts[0].span[0]]) == pytest.approx(found.sel(fact="Bo").isel(layer=layer).item(), abs=1e-5)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("circuit", CIRCUITS)
def test_knocking_out_loses_the_answer_where_it_is_copied(made: Make, circuit: Circuit, style: str) -> None:
    """There the program outputs nothing, so all tokens are alike: the answer loses the logarithm of their number."""
    model, _ = made(circuit)
    found = sa.knockout(model, prompts_of(model, style), ["direct", "total"], by="layer")
    layer, n_tokens = copying(circuit), model.model.config.vocab_size
    np.testing.assert_allclose(found.isel(layer=layer), np.log(n_tokens), atol=1e-3)
    np.testing.assert_allclose(found.drop_isel(layer=[layer]), 0, atol=1e-3)
    elsewhere = sa.knockout(model, prompts_of(model, style), {"first": lambda prompt: [(prompt.prediction, 0)]})
    np.testing.assert_allclose(elsewhere, 0, atol=1e-3)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("circuit", CIRCUITS)
def test_patching_finds_where_the_name_and_its_answer_stand(made: Make, circuit: Circuit, style: str) -> None:
    """At the name until it is copied, at the prediction from there on, and nowhere else."""
    model, _ = made(circuit)
    pairs = sa.swap_subjects(prompts_of(model, style), np.random.default_rng(0))
    assert len(pairs) == len(KNOWN)
    layer, n_layers = copying(circuit), model.model.config.n_layer
    by_role = {
        component: recovery(sa.patch_grid(model, pairs, component))
        for component in ("resid_pre", "resid_post", "attn_out", "mlp_out")
    }
    for component, found in by_role.items():
        expected = xr.zeros_like(found.fillna(0))
        for number in range(n_layers):
            after = {"resid_pre": number > layer, "resid_post": number >= layer}.get(component)
            if after is not None:
                expected.loc[{"layer": number, "role": "prediction" if after else "subject_last"}] = 1
        if component == "attn_out":
            expected.loc[{"layer": layer, "role": "prediction"}] = 1
        if component == "mlp_out":
            expected.loc[{"layer": 0, "role": "subject_last" if layer else "prediction"}] = 1
        np.testing.assert_allclose(found.fillna(0), expected, atol=1e-3, err_msg=component)
    patterns = recovery(sa.patch_grid(model, pairs, "pattern", at="prediction"))
    np.testing.assert_allclose(patterns, 0, atol=1e-3, err_msg="the name is picked as before")


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_transfer_finds_where_other_knowledge_sits(made: Make, circuit: Circuit) -> None:
    """Two models of one program that know other answers: in the MLP that looks them up, wherever that is read from."""
    base, tuned = made(circuit)[0], made(circuit, OTHERWISE)[0]
    arms = sa.load_arms(base, checkpoints={"tuned": tuned})
    prompts = prompts_of(base, STYLES[0])
    layer = copying(circuit)
    full = {
        "mlp_out": (0, "subject_last" if layer else "prediction"),
        "attn_out": (1, "prediction") if layer else None,
        "q": None,
        "k": None,
        "v": (1, "subject_last") if layer else None,
        "pattern": None,
    }
    for component, where in full.items():
        for into, state in (("tuned", "base"), ("base", "tuned")):
            cells = returned(sa.transfer(arms, prompts, component), "answer_logit")["share"]
            assert state != into
            found = cells.sel(patch="real", into=into).fillna(0)
            expected = xr.zeros_like(found)
            if where is not None:
                expected.loc[{"layer": where[0], "role": where[1]}] = 1
            np.testing.assert_allclose(found, expected, atol=1e-3, err_msg=component)


@pytest.mark.parametrize("circuit", CIRCUITS)
def test_a_model_that_looks_astray_knows_what_it_does_not_say(made: Make, circuit: Circuit) -> None:
    """The claim of Ghosal et al. (2024) as a program: the same knowledge, another word attended to."""
    base, tuned = made(circuit)[0], made(circuit, KNOWN, {"now"})[0]
    prompts, layer = prompts_of(base, STYLES[0]), copying(circuit)
    right = [sa.predict(model, prompts, "containment")["correct"] for model in (base, tuned)]
    assert right[0].all() and not right[1].any()
    attention = [sa.subject_attention(model, prompts).isel(layer=layer) for model in (base, tuned)]
    np.testing.assert_allclose(attention[0] - attention[1], 1, atol=1e-5)
    np.testing.assert_allclose(sa.knockout(tuned, prompts), 0, atol=1e-3)
    arms = sa.load_arms(base, checkpoints={"tuned": tuned})
    for component, share in {"pattern": 1, "q": 1, "v": 0, "mlp_out": 0}.items():
        found = sa.transfer(arms, prompts, component, at="prediction" if component in ("pattern", "q") else "subject")
        own = returned(found, "answer_logit")["share"].sel(patch="real", into="tuned")
        np.testing.assert_allclose(own.isel(layer=layer if share else 0).fillna(0), share, atol=1e-3, err_msg=component)

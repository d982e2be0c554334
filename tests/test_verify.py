"""`verify`: backends that agree pass, and each planted fault is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import subjattn.measures
import subjattn.verify as verification
from subjattn.backends import BACKENDS, Backend, BackendName, open_backend
from subjattn.engine.interventions import Output, Row
from subjattn.errors import BadInput, NotFired, UnsupportedModel
from subjattn.facts.templates import TEMPLATES
from subjattn.models import LoadedModel, load_model
from subjattn.prompts import Prompt, PromptSet
from subjattn.verify import HEADINGS, Verification, verify, verify_facts


TEMPLATE = TEMPLATES["country"]["list"]
GRIDS = {"patch_effect resid_pre", "patch_effect attn_out", "patch_effect mlp_out"}
RAW = {"clean_logit_diff", "corrupt_logit_diff", "baseline_answer_logprob"}
HEADS = {"patch_effect z", "knockout_drop by head"}
WEIGHTED = "value_weighted_attention"
QUANTITIES = {"attention_to_subject", WEIGHTED, *GRIDS, "knockout_drop", *HEADS, *RAW}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Passes of one short row are faster without a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture
def asked(llama: LoadedModel, cities: pd.DataFrame) -> tuple[PromptSet, list[tuple[Prompt, Prompt]]]:
    return verify_facts(llama, cities, TEMPLATE)


class Faulty:
    """The backend hooks with a fault in it."""

    name = "hooks"

    def __init__(self, inner: Backend) -> None:
        self.inner = inner

    def change(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows

    def spoil(self, output: Output) -> None:
        """Change an output in place."""

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:
        for output in self.inner.forward(self.change(rows)):
            with torch.inference_mode():
                self.spoil(output)
            yield output

    def attention_rows(self, prompts: Sequence[Prompt], *, value_norms: bool = False) -> Iterator[Output]:
        for output in self.inner.attention_rows(prompts, value_norms=value_norms):
            with torch.inference_mode():
                self.spoil(output)
            yield output


def plant(monkeypatch: pytest.MonkeyPatch, kind: type[Faulty]) -> None:
    """Let the backend hooks be faulty."""

    def opened(name: BackendName, *args: Any) -> Backend:
        backend = open_backend(name, *args)
        return kind(backend) if name == "hooks" else backend

    monkeypatch.setattr(subjattn.measures, "open_backend", opened)


def failures(found: Verification) -> set[tuple[str, str]]:
    failed = {(one.quantity, one.backend) for one in found.comparisons if not one.passed}
    assert found.passed == (not failed and not found.uncompared)
    assert all(f"{quantity} by {backend}: " in found.verdict for quantity, backend in failed)
    return failed


def test_every_backend_agrees(tiny: LoadedModel, cities: pd.DataFrame) -> None:
    prompts, pairs = verify_facts(tiny, cities, TEMPLATE)
    found = verify(tiny, prompts, pairs)
    assert found.passed and not found.uncompared
    unweighted = {(WEIGHTED, backend) for backend in BACKENDS[2:]}
    assert {(one.quantity, one.backend) for one in found.comparisons} == {
        (quantity, backend) for quantity in QUANTITIES for backend in BACKENDS[1:]
    } - unweighted
    assert {(one.quantity, one.backend) for one in found.refusals} == unweighted
    assert all("does not weigh by values" in one.reason for one in found.refusals)
    cells = {one.quantity: one.cells for one in found.comparisons}
    positions = pairs[0][0].prediction + 1
    assert cells["attention_to_subject"] == 2 * 3 * 4 and cells["knockout_drop"] == 2 * 2 * 3
    assert {cells[name] for name in GRIDS} == {3 * positions} and cells["baseline_answer_logprob"] == 2
    assert cells[WEIGHTED] == cells["knockout_drop by head"] == 2 * 3 * 4 and cells["patch_effect z"] == 3 * 4
    for one in found.comparisons:
        assert one.scale is not None and one.scale > 20 * one.tolerance and not one.weak, "too small to test anything"
        assert (one.noise_floor is not None) == (one.quantity in GRIDS | HEADS | {"knockout_drop"})
    assert set(found.comparisons[2].place or {}) == {"fact", "layer", "position"}


def test_the_report_is_plain_data(llama: LoadedModel, asked: Any) -> None:
    found = verify(llama, *asked, backends=("hooks",))
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["passed"] and content["dtype"] == "float32" and content["n_prompts"] == 2
    assert {"subjattn", "torch", "transformers", "transformer-lens", "nnsight"} <= set(content["versions"])
    assert {one["quantity"] for one in content["comparisons"]} == QUANTITIES
    assert content["comparisons"][2]["tolerance"] == pytest.approx(1e-4 * content["largest_logit"])
    assert all(len(row) == len(HEADINGS) and row[-1] == "passed" for row in found.rows())


def test_half_precision(tiny_folders: dict[str, Path], cities: pd.DataFrame) -> None:
    half = load_model(str(tiny_folders["llama"]), dtype="bfloat16")
    found = verify(half, *verify_facts(half, cities, TEMPLATE))
    assert found.passed and {one.backend for one in found.comparisons} == set(BACKENDS[1:])
    assert found.comparisons[0].tolerance == 0.05
    weak = {one.quantity for one in found.comparisons if one.weak}
    assert weak >= GRIDS and "may hide in the tolerance of" in found.verdict
    verdicts = {row[-1] for row in found.rows() if not row[-1].startswith("skipped: ")}
    assert verdicts == {"passed", "weak"} if weak < QUANTITIES else {"weak"}


def test_pairs_of_different_length(llama: LoadedModel, cities: pd.DataFrame) -> None:
    """Positions that a shorter prompt lacks hold no number, here as there."""
    _, short = verify_facts(llama, cities, TEMPLATE)
    prompts, long = verify_facts(llama, cities, TEMPLATES["country"]["sentence"])
    found = verify(llama, prompts, short + long, ("hooks",))
    assert found.passed
    lengths = [clean.prediction + 1 for clean, _ in short + long]
    assert lengths[0] != lengths[1]
    assert {one.cells for one in found.comparisons if one.quantity in GRIDS} == {3 * sum(lengths)}


def test_a_patch_in_the_wrong_layer(llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Faulty):
        def change(self, rows: Sequence[Row]) -> Sequence[Row]:
            return [
                replace(row, patches=tuple(replace(one, layer=(one.layer + 1) % 3) for one in row.patches))
                for row in rows
            ]

    plant(monkeypatch, Wrong)
    assert failures(verify(llama, *asked, backends=("hooks", "nnsight"))) == {
        (grid, "hooks") for grid in GRIDS | {"patch_effect z"}
    }


def test_a_block_in_the_wrong_window(llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Faulty):
        def change(self, rows: Sequence[Row]) -> Sequence[Row]:
            return [
                row
                if row.block is None or row.block.layers is None
                else replace(row, block=replace(row.block, layers=tuple((one + 1) % 3 for one in row.block.layers)))
                for row in rows
            ]

    plant(monkeypatch, Wrong)
    assert failures(verify(llama, *asked, backends=("hooks",))) == {
        (name, "hooks") for name in ("knockout_drop", "knockout_drop by head")
    }


def test_one_wrong_head(llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: head 1 of `z`, of knocked-out edges and of weighted values is another one."""

    def other(row: Row) -> Row:
        if row.patches and row.patches[0].head == 1:
            return replace(row, patches=(replace(row.patches[0], head=2),))
        if row.block is not None and row.block.heads == (1,):
            return replace(row, block=replace(row.block, heads=(2,)))
        return row

    class Wrong(Faulty):
        def change(self, rows: Sequence[Row]) -> Sequence[Row]:
            return [other(row) for row in rows]

        def spoil(self, output: Output) -> None:
            for norms in output.value_norms.values():
                norms[:, 1] = norms[:, 2]

    plant(monkeypatch, Wrong)
    found = verify(llama, *asked, backends=("hooks",))
    assert failures(found) == {(name, "hooks") for name in (*HEADS, WEIGHTED)}


@pytest.mark.parametrize("sample", [5, 7, 1000])
def test_heads_are_sampled_over_layers_and_heads(
    llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch, sample: int
) -> None:
    """A number that a reference leaves out where it belongs to the sample is a fault, as any other."""
    monkeypatch.setattr(verification, "_SAMPLE", sample)
    found = verify(llama, *asked, backends=("hooks",))
    assert found.passed
    for quantity, total in (("patch_effect z", 12), ("knockout_drop by head", 24)):
        (one,) = [one for one in found.comparisons if one.quantity == quantity]
        assert one.cells == total if sample == 1000 else 2 < one.cells <= sample
    heads = {cell % 4 for cell in range(0, 24, verification._stride(24, 4))}
    assert heads == {0, 1, 2, 3}

    class Silent(Faulty):
        def spoil(self, output: Output) -> None:
            if output.rows[0].patches and output.rows[0].patches[0].head == 0:
                output.logits[:] = np.nan

    plant(monkeypatch, Silent)
    assert failures(verify(llama, *asked, backends=("hooks",))) == {("patch_effect z", "hooks")}


@pytest.mark.parametrize(("factor", "failed"), [(0.8, False), (1.25, True)])
def test_numbers_around_the_tolerance(
    llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch, factor: float, failed: bool
) -> None:
    """One layer's attention, and the logit of the clean answer under a patch, are off by about the tolerance."""
    tolerance = factor * 1e-4
    clean = asked[1][0][0]
    largest = verify(llama, *asked, backends=()).largest_logit

    class Off(Faulty):
        def spoil(self, output: Output) -> None:
            for layer, weights in output.attention.items():
                if not output.value_norms:
                    weights[0, 2, 0, asked[0][0].subject_span[0]] += tolerance * (layer == 1)
            if output.logits.numel() and output.rows[0].patches and output.rows[0].patches[0].head is None:
                output.logits[:, clean.answer_ids[0]] += tolerance * largest

    plant(monkeypatch, Off)
    found = verify(llama, *asked, backends=("hooks",))
    assert failures(found) == ({(name, "hooks") for name in ("attention_to_subject", *GRIDS)} if failed else set())
    assert found.comparisons[0].difference == pytest.approx(tolerance, rel=0.05)
    place = {"layer": 1, "head": 2}
    assert place.items() <= (found.comparisons[0].place or {}).items()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(
    llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    class Broken(Faulty):
        def spoil(self, output: Output) -> None:
            if output.logits.numel() and output.rows[0].block is not None:
                output.logits[0] = value

    plant(monkeypatch, Broken)
    found = verify(llama, *asked, backends=("hooks",))
    assert failures(found) == {(name, "hooks") for name in ("knockout_drop", "knockout_drop by head")}
    assert "hooks gives nan where a number is expected" in found.verdict
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_engine_that_is_wrong_fails_against_all(
    llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Faulty):
        def spoil(self, output: Output) -> None:
            for weights in output.attention.values():
                weights[:] = np.nan

    def opened(name: BackendName, *args: Any) -> Backend:
        return Broken(open_backend(name, *args)) if name == "engine" else open_backend(name, *args)

    monkeypatch.setattr(subjattn.measures, "open_backend", opened)
    found = verify(llama, *asked, backends=("hooks", "nnsight"))
    assert failures(found) >= {("attention_to_subject", name) for name in ("hooks", "nnsight")}
    assert "engine gives nan" in found.verdict


def test_an_intervention_that_did_not_happen(llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Faulty):
        def change(self, rows: Sequence[Row]) -> Sequence[Row]:
            if any(row.block is not None for row in rows):
                raise NotFired("edges were not blocked")
            return rows

    plant(monkeypatch, Silent)
    found = verify(llama, *asked, backends=("hooks",))
    assert (
        failures(found) == {(name, "hooks") for name in ("knockout_drop", "knockout_drop by head")}
        and "edges were not blocked" in found.verdict
    )
    json.dumps(found.to_dict(), allow_nan=False)
    assert {row[3] for row in found.rows() if row[-1] == "FAILED"} == {"–"}


def test_refusals(llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model, of a missing library and of one quantity; of everything is no success."""

    class Partial(Faulty):
        def change(self, rows: Sequence[Row]) -> Sequence[Row]:
            if any(patch.component == "mlp_out" for row in rows for patch in row.patches):
                raise UnsupportedModel("no MLP here")
            return rows

    def opened(name: BackendName, *args: Any) -> Backend:
        if name == "nnsight":
            raise UnsupportedModel("not this model")
        if name == "transformer-lens":
            raise BadInput("pip install it")
        return Partial(open_backend(name, *args)) if name == "hooks" else open_backend(name, *args)

    monkeypatch.setattr(subjattn.measures, "open_backend", opened)
    found = verify(llama, *asked)
    assert {one.quantity for one in found.comparisons} == QUANTITIES - {"patch_effect mlp_out"}
    assert all(one.passed for one in found.comparisons)
    assert not found.passed and found.uncompared == ["patch_effect mlp_out"]
    assert found.verdict == "not verified: no reference was compared with the engine in patch_effect mlp_out"
    assert {(one.backend, one.quantity, one.reason) for one in found.refusals} == {
        ("hooks", "patch_effect mlp_out", "no MLP here"),
        ("transformer-lens", None, "pip install it"),
        ("nnsight", None, "not this model"),
    }
    skipped = {row[:2]: row[-1] for row in found.rows() if row[2] == "–"}
    assert skipped == {
        ("mlp_out", "hooks"): "skipped: no MLP here",
        ("everything", "transformer-lens"): "skipped: pip install it",
        ("everything", "nnsight"): "skipped: not this model",
    }
    none = verify(llama, *asked, backends=("transformer-lens", "nnsight"))
    assert not none.passed and "no reference could be compared" in none.verdict and len(none.refusals) == 2
    assert not none.to_dict()["passed"] and none.to_dict()["uncompared"] == none.quantities
    assert [row[-1] for row in none.rows()] == ["skipped: pip install it", "skipped: not this model"]


def test_what_only_one_reference_computes(llama: LoadedModel, asked: Any) -> None:
    """Without hooks nobody weighs by values: that is no agreement."""
    found = verify(llama, *asked, backends=("nnsight",))
    assert all(one.passed for one in found.comparisons) and found.uncompared == [WEIGHTED]
    assert not found.passed and found.verdict.endswith(f"in {WEIGHTED}")


def test_what_the_engine_refuses(llama: LoadedModel, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part of a layer is listed; the model itself is an error."""
    refused: set[str] = {"mlp_out"}

    class Partial(Faulty):
        def change(self, rows: Sequence[Row]) -> Sequence[Row]:
            if any(patch.component in refused for row in rows for patch in row.patches):
                raise UnsupportedModel("nothing there")
            return rows

    def opened(name: BackendName, *args: Any) -> Backend:
        return Partial(open_backend(name, *args)) if name == "engine" else open_backend(name, *args)

    monkeypatch.setattr(subjattn.measures, "open_backend", opened)
    found = verify(llama, *asked, backends=("hooks",))
    assert found.passed and "patch_effect mlp_out" not in {one.quantity for one in found.comparisons}
    assert [(one.backend, one.quantity) for one in found.refusals] == [("engine", "patch_effect mlp_out")]
    refused.add("resid_pre")
    with pytest.raises(UnsupportedModel, match="nothing there"):
        verify(llama, *asked, backends=("hooks",))


def test_facts_are_short_and_few(llama: LoadedModel, cities: pd.DataFrame) -> None:
    prompts, pairs = verify_facts(llama, cities, TEMPLATE, seed=3)
    assert len(prompts) == 2 and len(pairs) == 1
    assert any(len(prompt.answer_ids) > 1 for prompt in prompts)
    assert verify_facts(llama, cities, TEMPLATE, seed=3) == (prompts, pairs)
    with pytest.raises(BadInput, match="none of 1 facts .* give more facts"):
        verify_facts(llama, cities[:1], TEMPLATE)
    with pytest.raises(BadInput, match="backend 'tlens' is not one of"):
        verify(llama, prompts, pairs, ("tlens",))  # type: ignore[arg-type]
    for nothing in ((), pairs), (prompts, ()):
        with pytest.raises(BadInput, match="there are no"):
            verify(llama, *nothing, backends=("hooks",))

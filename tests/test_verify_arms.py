"""`verify` of arms: base and adapter in one batch agree with each model by itself, and planted faults are named."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import subjattn.verify_arms as verification
import subjattn.verify_inside as inside
from subjattn.backends import Backend, BackendName, open_backend
from subjattn.cli import main
from subjattn.engine import scores
from subjattn.engine.interventions import COMPONENTS, Arm, Output, Row
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.trace import trace
from subjattn.models import load_model
from subjattn.models.arms import load_arms
from subjattn.verify import Verification, verify, verify_facts
from subjattn.verify_arms import with_arms
from subjattn.verify_inside import with_scores


TRANSFERS = {f"transfer {component}" for component in COMPONENTS}
PARTS = {f"parts of the update: {part}" for part in ("qk", "vo", "mlp")}
ONE_BATCH = "arms in one batch"
ACROSS = {"restored mlp_out of the tuned", "scores split"}


@pytest.fixture(scope="module")
def found(tiny_folders: dict[str, Path], adapter: Path, cities: pd.DataFrame) -> tuple[Verification, Any, Any, Any]:
    folder = str(tiny_folders["llama"])
    tuned = load_model(folder, adapter=adapter)
    prompts, pairs = verify_facts(tuned, cities, TEMPLATES["country"]["list"])
    return verify(tuned, prompts, pairs, ("hooks",)), tuned, load_model(folder), prompts


def of_arms(found: Verification) -> dict[tuple[str, str], bool]:
    ours = TRANSFERS | PARTS | ACROSS | {ONE_BATCH, "parts of the update: rest"}
    return {(one.quantity, one.backend): one.passed for one in found.comparisons if one.quantity in ours}


class Planted:
    """The engine with a fault in its rows."""

    def __init__(self, inner: Backend, change: Any) -> None:
        self.inner, self.change, self.name = inner, change, inner.name

    def forward(self, rows: Sequence[Row], *, only_contrast: bool = False) -> Iterator[Output]:
        return self.inner.forward([self.change(row) for row in rows], only_contrast=only_contrast)


def plant(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    def opened(name: BackendName, model: Any, *_: Any) -> Any:
        backend = open_backend(name, model)
        return Planted(backend, change) if name == "engine" else backend

    monkeypatch.setattr(verification, "opened", opened)


def test_arms_agree_with_each_model_by_itself(found: tuple[Verification, Any, Any, Any]) -> None:
    before, tuned, base, prompts = found
    kept = {name: weight.clone() for name, weight in base.model.state_dict().items()}
    both = with_arms(before, tuned, base, prompts)
    results = of_arms(both)
    assert {quantity for quantity, _ in results} == TRANSFERS | PARTS | ACROSS | {ONE_BATCH} and all(results.values())
    assert {name for _, name in results} == {"hooks", "transformer-lens", "nnsight"}
    ours = [one for one in both.comparisons if (one.quantity, one.backend) in results]
    assert not any(one.weak for one in ours), "too small to test anything"
    assert both.passed and before.passed
    json.dumps(both.to_dict(), allow_nan=False)
    assert all(torch.equal(kept[name], weight) for name, weight in base.model.state_dict().items())


def other_arm(row: Row) -> Row:
    return replace(row, arm=None) if row.arm is not None and row.plain and row.arm.cells is None else row


def next_layer(row: Row) -> Row:
    return replace(row, patches=tuple(replace(one, layer=(one.layer + 1) % 3) for one in row.patches))


def own_states(row: Row) -> Row:
    """States of the receiving model itself."""
    return replace(row, patches=tuple(replace(one, values=row.prompt) for one in row.patches))


def whole_update(row: Row) -> Row:
    return replace(row, arm=Arm(row.arm.name)) if row.arm is not None and row.arm.cells is not None else row


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (other_arm, {ONE_BATCH}),
        (next_layer, {"transfer resid_pre", "transfer resid_post"}),
        (own_states, TRANSFERS),
        (whole_update, PARTS),
    ],
)
def test_planted_faults_are_named(
    found: tuple[Verification, Any, Any, Any], monkeypatch: pytest.MonkeyPatch, change: Any, expected: set[str]
) -> None:
    plant(monkeypatch, change)
    both = with_arms(*found, ("hooks",))
    assert {quantity for (quantity, _), passed in of_arms(both).items() if not passed} == expected
    assert not both.passed and "failed" in both.verdict


def test_faults_across_models_are_named(
    found: tuple[Verification, Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries of the other model's weights; keys of the other's states; and the base's own states restored."""
    before, tuned, base, prompts = found
    arms, own, log_odds = load_arms(base, {"tuned": tuned.adapter}), scores._by_weights, scores._log_odds
    with monkeypatch.context() as planted:
        planted.setattr(scores, "_by_weights", lambda mine, other: own(mine, other).flip(0))
        assert failed(with_scores(before, arms, tuned, prompts)) == {"scores split"}
    with monkeypatch.context() as planted:
        planted.setattr(scores, "_log_odds", lambda all_, *masks: log_odds(all_.transpose(2, 3), *masks))
        assert failed(with_scores(before, arms, tuned, prompts)) == {"scores split"}
    with monkeypatch.context() as planted:
        planted.setattr(
            inside, "trace", lambda both, *given, **how: trace(both.base, *given, **{**how, "states": None})
        )
        assert failed(with_scores(before, arms, tuned, prompts)) == {"restored mlp_out of the tuned"}
    assert not failed(with_scores(before, arms, tuned, prompts))


def failed(found: Verification) -> set[str]:
    return {one.quantity for one in found.comparisons if not one.passed}


def test_a_checkpoint_agrees_with_itself_alone(
    tuned: Any, cities: pd.DataFrame, tiny_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, apart = tuned("llama")
    other, base = apart["other"], load_model(str(tiny_folders["llama"]))
    prompts, pairs = verify_facts(other, cities, TEMPLATES["country"]["list"])
    before = verify(other, prompts, pairs, ())
    both = with_arms(before, other, base, prompts, ("hooks",))
    results = of_arms(both)
    parts = PARTS | {"parts of the update: rest"}
    assert {quantity for quantity, _ in results} == TRANSFERS | ACROSS | parts | {ONE_BATCH} and all(results.values())
    assert not any(one.weak for one in both.comparisons) and not both.refusals
    with monkeypatch.context() as planted:
        plant(planted, other_arm)
        assert failed(with_arms(before, other, base, prompts, ("hooks",))) == {ONE_BATCH}
    plant(monkeypatch, whole_update)
    assert failed(with_arms(before, other, base, prompts, ("hooks",))) == parts


def test_the_command_takes_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tuned: Any, tiny_folders: dict[str, Path]
) -> None:
    _, apart = tuned("llama")
    folder = tiny_folders["llama"]
    asked: list[tuple[list[object], int, str]] = [
        (["--tuned", apart["other"].name], 0, "arms in one"),
        (["--tuned", apart["other"].name, "--adapter", apart["one"].adapter], 2, "give --tuned or --adapter, not both"),
        (["--tuned", folder], 2, "is the same model as"),
    ]
    for given, status, words in asked:
        monkeypatch.setattr(sys, "argv", ["subjattn", "verify", "--model", str(folder), *map(str, given)])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        assert end.value.code == status and words in shown.out + shown.err


@pytest.mark.parametrize("arm", ["one", "other"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_what_could_not_be_checked_is_said(
    name: str, arm: str, tuned: Any, cities: pd.DataFrame, tiny_folders: dict[str, Path]
) -> None:
    """GPT-2 makes q, k and v in one matrix, which is not merged by hand; all else is compared."""
    _, apart = tuned(name)
    one, base = apart[arm], load_model(str(tiny_folders[name]))
    prompts, pairs = verify_facts(one, cities, TEMPLATES["country"]["list"])
    both = with_arms(verify(one, prompts, pairs, ()), one, base, prompts, ("hooks",))
    results = of_arms(both)
    assert {quantity for quantity, _ in results} >= TRANSFERS | ACROSS | {ONE_BATCH} and all(results.values())
    reasons = [refusal.reason for refusal in both.refusals if refusal.quantity == "parts of the update"]
    assert len(reasons) == (name == "gpt2") and all("not merged by hand" in reason for reason in reasons)


def test_the_command_covers_arms(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_folders: dict[str, Path],
    adapter: Path,
    tmp_path: Path,
) -> None:
    target, asked = tmp_path / "verify.json", ("--model", tiny_folders["llama"], "--adapter", adapter)
    monkeypatch.setattr(sys, "argv", ["subjattn", "verify", *map(str, asked), "--json", str(target)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and "parts of the" in capsys.readouterr().out
    content = json.loads(target.read_text())
    assert content["passed"] and {one["quantity"] for one in content["comparisons"]} >= TRANSFERS | PARTS | ACROSS

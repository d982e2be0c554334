"""The table of rules that reads a pattern of verdicts: what it says, and that it says no more than they do."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subjattn.evidence.changes import Direction
from subjattn.evidence.diagnosis import ACCOUNTS, diagnose
from subjattn.measures.record import measures
from subjattn.study.summary import _diagnosis


SAME = "no change that matters"
QUANTITIES = sorted({name for account in ACCOUNTS for sign in account.signs for name in sign.quantities})
NAME_LESS = {"knockout_calibrated_total": "falls", "swap_distance": "falls"}


def statuses(verdicts: dict[str, Any]) -> dict[str, str]:
    return {row["account"]: row["status"] for row in diagnose(verdicts)}


@pytest.mark.parametrize(
    ("verdicts", "supported"),
    [
        ({"attention_without_sinks": "falls", **NAME_LESS}, "attention looks away"),
        (
            {"attention_without_sinks": SAME, "attention_value_weighted": "falls", **NAME_LESS},
            "values shrunk",
        ),
        (
            {
                "attention_without_sinks": SAME,
                "attention_value_weighted": SAME,
                "mlp_contribution": "falls",
                **NAME_LESS,
            },
            "MLP path damaged",
        ),
        ({"entropy_excess": "falls", "modal_answer": "rises", "swap_distance": SAME}, "answer prior"),
        ({"accuracy": SAME, "answer_logprob": SAME, "swap_distance": SAME}, "nothing changed"),
    ],
)
def test_each_pattern_is_read_as_what_it_is(verdicts: dict[str, Any], supported: str) -> None:
    found = statuses(verdicts)
    assert [name for name, status in found.items() if status == "supported"] == [supported]


def test_attention_that_falls_where_the_name_counts_as_before_is_no_account() -> None:
    """The papers' inference from one average."""
    found = diagnose({"attention_without_sinks": "falls", "knockout_calibrated_total": SAME, "swap_distance": SAME})
    row = next(row for row in found if row["account"] == "attention looks away")
    assert row["status"] == "contradicted"
    assert f"knockout_calibrated_total: {SAME}" in row["because"]
    assert not any(line.startswith("attention_without_sinks") for line in row["because"])


def test_what_is_not_decided_leaves_accounts_open() -> None:
    found = diagnose({"attention_without_sinks": "falls", "swap_distance": "undecided"})
    row = next(row for row in found if row["account"] == "attention looks away")
    assert row["status"] == "open"
    assert "swap_distance: undecided" in row["because"] and "knockout_rank_rise: not measured" in row["because"]
    assert diagnose({"something_else": "falls"}) == []


DIRECTIONS = st.sampled_from([*get_args(Direction), None])


@given(st.fixed_dictionaries(dict.fromkeys(QUANTITIES, DIRECTIONS)), st.sampled_from(QUANTITIES))
def test_less_evidence_never_supports_more(verdicts: dict[str, Any], taken: str) -> None:
    before, after = statuses(verdicts), statuses(verdicts | {taken: "undecided"})
    assert all(before[name] == "supported" for name, status in after.items() if status == "supported")


@given(st.fixed_dictionaries({name: st.sampled_from(["undecided", None]) for name in QUANTITIES}))
def test_nothing_decided_supports_nothing(verdicts: dict[str, Any]) -> None:
    assert set(statuses(verdicts).values()) <= {"open"}


def test_rules_name_quantities_that_there_are() -> None:
    there = {quantity.name for measure in measures().values() for quantity in measure.quantities}
    assert set(QUANTITIES) <= there


def test_rows_go_by_style_and_pair() -> None:
    common = {"arm_a": "tuned", "arm_b": "base", "measure": "accuracy"}
    rows = list(
        _diagnosis([common | {"style": "list", "verdict": "falls"}, common | {"style": "late", "verdict": SAME}])
    )
    by_style = {row["style"]: row["status"] for row in rows if row["account"] == "nothing changed"}
    assert by_style == {"list": "contradicted", "late": "open"}

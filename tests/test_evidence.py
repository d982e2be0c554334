"""Claims and their verdicts, families of them, and how many facts and replicates would decide."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_intervals import array, crossed

from subjattn.evidence.claims import Claim, Judged, holm, judge
from subjattn.evidence.intervals import Interval, interval
from subjattn.evidence.power import Planned
from subjattn.evidence.squares import Squares


def between(low: float, high: float, n_facts: int = 100, n_replicates: int = 1, scope: str = "this model") -> Interval:
    """An interval with these ends at 95 %, as of very many facts."""
    half, many = (high - low) / 2, 1e9
    squares = Squares(np.array((half / 1.959964) ** 2), np.array(0.0), np.array(0.0), many)
    kind = "draws" if n_replicates > 1 else None
    return Interval((low + high) / 2, scope, n_facts, n_replicates, kind, {}, 0, (), (((low + high) / 2, squares),))


def claim(direction: str = "decrease", smallest_effect: float = 1.0, **fields: Any) -> Claim:
    named = {"id": "c", "statement": "s", "measure": "accuracy", "arms": ("a", "b")}
    return Claim.model_validate({**named, "direction": direction, "smallest_effect": smallest_effect, **fields})


def verdict(of: Claim, found: Interval) -> Judged:
    return judge([(of, found)], [False])[0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-3.0, -1.5, "supported"),
        (-3.0, -0.5, "undecided"),
        (-0.5, -0.1, "no effect that matters"),
        (-0.9, 0.9, "no effect that matters"),
        (-0.5, 1.5, "undecided"),
        (-3.0, 3.0, "undecided"),
        (1.5, 3.0, "contradicted"),
    ],
)
def test_verdicts(low: float, high: float, expected: str) -> None:
    assert verdict(claim("decrease"), between(low, high)).verdict == expected
    assert verdict(claim("increase"), between(-high, -low)).verdict == expected
    moved = claim("decrease", against=7.0)
    assert verdict(moved, between(7 + low, 7 + high)).verdict == expected


@given(st.floats(-5, 5), st.floats(0.01, 5), st.sampled_from(["increase", "decrease"]))
def test_every_interval_has_one_verdict_and_its_mirror_the_opposite(low: float, width: float, direction: str) -> None:
    opposite = {"supported": "contradicted", "contradicted": "supported"}
    found = verdict(claim(direction), between(low, low + width)).verdict
    assert verdict(claim(direction), between(-low - width, -low)).verdict == opposite.get(found, found)


@pytest.mark.parametrize(
    ("found", "expected", "reason"),
    [
        (between(-0.1, 0.1, 19), "undecided", "19 facts: under 20 an interval is too narrow to be believed"),
        (between(-4.0, -2.0), "supported", "effect of at least 1 in the claimed direction"),
        (between(2.0, 4.0), "contradicted", "effect of at least 1 in the other direction"),
        (between(-0.5, 0.5), "no effect that matters", "lies within ±1"),
        (between(-2.0, 0.0), "undecided", r"reaches across \+1 \("),
        (between(-2.0, 2.0), "undecided", r"reaches across -1 and \+1"),
        (between(-4.0, -2.0, 100, 2, "this way of training"), "undecided", "two draws are a screen: 3 decide"),
        (between(-0.5, 0.5, 100, 2, "this way of training"), "undecided", "two draws are a screen: 3 decide"),
        (between(-4.0, -2.0, 100, 3, "this way of training"), "supported", "claimed direction"),
    ],
)
def test_every_verdict_has_its_reason(found: Interval, expected: str, reason: str) -> None:
    judged = verdict(claim("decrease", 1.0), found)
    assert judged.verdict == expected
    assert re.search(reason, judged.reason)


def test_a_claim_of_a_family_has_to_be_clearer() -> None:
    """Planted: alone each decides, among eight none does; the primary one is judged by itself and costs nothing."""
    weak, strong = between(-3.0, -1.05), between(-3.0, -2.0)
    alone = verdict(claim(), weak)
    assert alone.verdict == "supported" and alone.family == 1
    family = judge([(claim(), weak)] * 8, [False] * 8)
    assert {one.verdict for one in family} == {"undecided"}
    assert "by itself its interval would decide, among 8 claims (Holm's p = " in family[0].reason
    with_primary = judge([(claim(), weak)] + [(claim(), strong)] * 7, [True] + [False] * 7)
    assert [one.verdict for one in with_primary] == ["supported"] * 8
    assert [one.family for one in with_primary] == [1] + [7] * 7
    low, high = with_primary[1].adjusted_low, with_primary[1].adjusted_high
    assert (low, high) == pytest.approx(strong.ends(1 - 0.05 / 7))


def test_a_claim_that_was_dropped_still_counts() -> None:
    weak = between(-3.0, -1.05)
    assert judge([(claim(), weak)], [False])[0].verdict == "supported"
    found = judge([(claim(), weak)], [False], dropped=7)[0]
    assert (found.verdict, found.family) == ("undecided", 8)


def test_a_family_wants_five_replicates() -> None:
    found = between(-3.0, -2.0, 100, 3, "this way of training")
    assert "3 replicates, where a family of claims wants 5" in judge([(claim(), found)] * 2, [False] * 2)[0].reason


@settings(max_examples=25)  # statsmodels takes a twentieth of a second for each
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_agrees_with_statsmodels(ps: list[float]) -> None:
    from statsmodels.stats.multitest import multipletests

    assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])


def test_claims_say_what_they_are_about() -> None:
    assert claim().formula == "accuracy: a − b, below 0 by 1 or more"
    one = claim("increase", 0.05, measure="direct_share", arms=["a"], against=0.5)
    assert one.formula == "direct_share: a, above 0.5 by 0.05 or more"
    styles = claim(minus={"style": "plain"}, where={"layer": "15-20", "head": [1, 2]})
    assert styles.formula == (
        "(accuracy[layer 15-20, head 1, 2]: a − b) − (accuracy[layer 15-20, head 1, 2]: a − b in plain), below 0 by "
        "1 or more"
    )
    chosen = claim(select={"top": 10, "over": ["layer", "head"], "on": 2})
    assert "in the 10 largest cells of layer × head (chosen on first 2 draws)" in chosen.formula


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minus": {}}, "'minus' names what is different"),
        ({"arms": ["a", "b", "c"]}, "at most 2"),
        ({"select": {"top": 3, "over": ["layer"], "on": "draws"}}, "'reference', or a number of draws"),
        ({"select": {"top": 3, "over": ["layer"], "on": 0}}, "at least one draw"),
        ({"smallest_effect": 0}, "greater than 0"),
        ({"scope": "all"}, "'models' or 'training'"),
    ],
)
def test_claims_that_say_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        claim(**fields)


# --- power ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("facts", "replicates", "effect"), [(30, 3, 1.5), (60, 5, 0.0), (40, 4, 2.5)])
def test_power_is_the_share_of_whole_studies_that_decide(facts: int, replicates: int, effect: float) -> None:
    """Against studies made value by value and judged as any study is."""
    variances = {"facts": 1.0, "replicates": 0.25, "interaction": 1.0}
    planned = Planned(variances, effect, 1.0, family=2)
    decided = 0
    for seed in range(400):
        values = crossed(seed, facts, replicates) - 0.3 + effect
        pair = judge([(claim("increase", 1.0), interval(array(values)))] * 2, [False] * 2)
        adjusted_low, adjusted_high = pair[0].adjusted_low, pair[0].adjusted_high
        decided += adjusted_low >= 1 or adjusted_high <= -1 or pair[0].verdict == "no effect that matters"
    assert planned.decided(facts, replicates)["decided"] == pytest.approx(decided / 400, abs=0.06)


def test_needed_sizes_decide_and_smaller_ones_do_not() -> None:
    planned = Planned({"facts": 1.0, "replicates": 0.05, "interaction": 0.5}, 1.0, 0.5)
    found = planned.needed(3)
    assert planned.decided(found["facts"], found["replicates"])["decided"] >= 0.8
    assert planned.decided(int(found["facts"] * 0.9), found["replicates"])["decided"] < 0.8
    assert found["facts_alone"] is None, "with three replicates no number of facts does"
    assert planned.facts_needed(24) is not None
    hopeless = Planned({"facts": 1.0, "replicates": 0.05, "interaction": 0.5}, 0.5, 0.5).needed(3)
    assert hopeless["facts"] is None and hopeless["replicates"] is None
    given_models = Planned({"facts": 4.0, "replicates": 0.0, "interaction": 0.0}, 1.0, 0.5, drawn=False).needed(1)
    assert given_models["replicates"] is None
    assert given_models["facts"] == pytest.approx(4 * (1.96 + 0.8416) ** 2 / 0.25, rel=0.05), "the textbook's"


def test_power_knows_the_least_number_of_facts_and_what_clusters_hold() -> None:
    easy = {"facts": 0.001, "replicates": 0.0, "interaction": 0.001}
    assert Planned(easy, 5.0, 0.1).needed(3)["facts"] == 20, "fewer give no verdict"
    clustered = {"facts": 1.0, "replicates": 0.0, "interaction": 0.1, "clusters": 0.05, "clusters_df": 11.0}
    assert Planned(clustered, 1.0, 0.5).needed(5)["facts"] is None, "more facts of the same clusters do not help"
    alone = Planned({**clustered, "clusters": 0.0}, 1.0, 0.5).decided(400, 5)["decided"]
    assert Planned(clustered, 1.0, 0.5).decided(400, 5)["decided"] < 0.7 < 0.99 < alone


def test_power_of_two_replicates_is_none() -> None:
    assert Planned({"facts": 0.01, "replicates": 0.0, "interaction": 0.0}, 5.0, 0.1).decided(100, 2)["decided"] == 0

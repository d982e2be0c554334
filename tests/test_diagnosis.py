"""The table of rules that says what lost the answers: what it says, and that it says no more than the intervals do."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import subjattn as sa
from subjattn.evidence.diagnosis import ACCOUNTS, diagnose
from subjattn.measures.mediation import MEDIATORS
from subjattn.measures.record import measures


QUANTITIES = sorted({sign.quantity for account in ACCOUNTS for sign in account.signs})
ATTENTION, VALUES, MLPS, PRIOR = (f"mediated.{name}" for name in MEDIATORS)
LITTLE, MOST, ANY = (-0.1, 0.2), (0.8, 1.1), (0.1, 0.9)
LOST = {"answers_lost": (0.1, 0.4), "n_lost": (40.0, 40.0)}
LOST |= {f"mediated_placebo.{name}": (-0.1, 0.2) for name in MEDIATORS}
OVER = "values_over_mlps"
NOTHING_ELSE = dict.fromkeys((ATTENTION, VALUES, MLPS, PRIOR, OVER), LITTLE)


def statuses(intervals: dict[str, tuple[float, float] | None]) -> dict[str, str]:
    return {row["account"]: row["status"] for row in diagnose(intervals)}


@pytest.mark.parametrize(
    ("intervals", "supported"),
    [
        ({ATTENTION: MOST}, ["attention looks away"]),
        ({VALUES: MOST, OVER: (0.1, 0.9)}, ["values shrunk"]),
        ({VALUES: MOST, MLPS: (0.1, 0.9), OVER: (0.1, 0.9)}, ["values shrunk"]),
        ({VALUES: MOST, MLPS: MOST, OVER: (0.1, 0.3)}, ["values shrunk"]),
        ({VALUES: MOST, MLPS: MOST}, ["MLP path damaged"]),
        ({VALUES: MOST, MLPS: MOST, ATTENTION: MOST}, ["MLP path damaged"]),
        ({VALUES: MOST, ATTENTION: MOST, OVER: (0.1, 0.9)}, []),
        ({PRIOR: MOST}, ["answer prior"]),
        ({PRIOR: MOST, MLPS: MOST}, ["MLP path damaged"]),
        ({}, []),
    ],
)
def test_the_first_that_carries_most_is_named(intervals: dict[str, tuple[float, float]], supported: list[str]) -> None:
    found = statuses(LOST | NOTHING_ELSE | intervals)
    assert [name for name, status in found.items() if status == "supported"] == supported


def test_where_little_is_lost_it_is_not_asked_by_what() -> None:
    found = statuses({ATTENTION: MOST, VALUES: MOST, MLPS: LITTLE, PRIOR: MOST, "answers_lost": (0.0, 0.04)})
    assert found.pop("nothing lost") == "supported"
    assert set(found.values()) == {"contradicted"}


def test_what_any_position_carries_is_not_the_subjects() -> None:
    intervals = LOST | NOTHING_ELSE | {VALUES: MOST, OVER: MOST}
    assert statuses(intervals)["values shrunk"] == "supported"
    for wide in (ANY, None):
        assert statuses(intervals | {"mediated_placebo.values at the subject": wide})["values shrunk"] == "open"
    assert statuses(intervals | {"mediated_placebo.values at the subject": MOST})["values shrunk"] == "contradicted"


def test_what_is_not_decided_leaves_accounts_open() -> None:
    found = diagnose(LOST | NOTHING_ELSE | {ATTENTION: ANY, MLPS: None})
    row = next(row for row in found if row["account"] == "attention looks away")
    assert row["status"] == "open"
    assert row["because"] == [f"{ATTENTION}: 0.10 to 0.90", f"{MLPS}: not defined"]
    path = LOST | NOTHING_ELSE | {VALUES: MOST, MLPS: MOST}
    assert statuses(path)["MLP path damaged"] == "supported"
    assert statuses(path | {OVER: None})["MLP path damaged"] == "open", "what vetoes has to be known"
    both = diagnose(LOST | NOTHING_ELSE | {ATTENTION: MOST, VALUES: MOST, OVER: MOST})
    either = [row for row in both if row["because"] == ["either attention looks away or values shrunk"]]
    assert [row["status"] for row in either] == ["open", "open"]
    few = diagnose(LOST | NOTHING_ELSE | {ATTENTION: MOST, "n_lost": (19.0, 19.0)})
    assert {row["status"] for row in few[:-1]} == {"open"} and few[0]["because"] == ["n_lost: 19.00 to 19.00"]
    assert (
        statuses(LOST | NOTHING_ELSE | {ATTENTION: MOST, "answers_lost": (0.0, 0.3)})["attention looks away"] == "open"
    )
    assert diagnose({"accuracy": (0.0, 1.0)}) == []


ENDS = st.none() | st.tuples(st.floats(-1, 2), st.floats(-1, 2)).map(lambda pair: (min(pair), max(pair)))


@given(st.fixed_dictionaries(dict.fromkeys(QUANTITIES, ENDS)), st.sampled_from(QUANTITIES))
def test_less_evidence_never_supports_more(intervals: dict[str, tuple[float, float] | None], taken: str) -> None:
    intervals = intervals | {"n_lost": (40.0, 40.0)}
    before, after = ({row["account"]: row for row in diagnose(of)} for of in (intervals, intervals | {taken: None}))
    for name, row in after.items():
        one_of_two = before[name]["because"][0].startswith("either ")
        assert row["status"] != "supported" or before[name]["status"] == "supported" or one_of_two


@pytest.mark.parametrize(("lost", "status"), [(0, "supported"), (45, "contradicted"), (4, "open")])
def test_all_or_nothing_lost_has_an_interval(lost: int, status: str) -> None:
    """Of 60 facts the base starts 45 rightly; a share of exactly 0 or 1 is bounded, and no interval leaves 0 to 1."""
    margins = np.random.default_rng(0).uniform(1, 2, (60, 4, 2, 2, 2))
    margins[45:] *= -1
    margins[:lost, ..., 1, 1] *= -1
    coords = {"fact": [str(i) for i in range(60)], "mediator": list(MEDIATORS), "patch": ["real", "placebo"]}
    dims = ("fact", "mediator", "patch", "state", "late")
    array = xr.DataArray(margins, coords | {"state": ["base", "tuned"], "late": ["base", "tuned"]}, dims)
    found = sa.mediated(xr.Dataset({"mediation": array}))
    low, high = found["answers_lost"] or (np.nan, np.nan)
    assert 0 <= low <= lost / 45 <= high <= 1 and low < high
    assert statuses(found)["nothing lost"] == status


def test_nothing_decided_supports_nothing() -> None:
    for nothing in (None, (-1.0, 2.0)):
        assert set(statuses(dict.fromkeys(QUANTITIES, nothing)).values()) == {"open"}


def test_rules_name_quantities_that_there_are() -> None:
    there = {quantity.name for quantity in measures()["mediation"].quantities}
    for name in QUANTITIES:
        quantity, _, part = name.partition(".")
        assert quantity in there and (not part or part in MEDIATORS)


def test_shares_are_ratios_of_means_with_their_intervals() -> None:
    """Of margins made by hand: in every fact the values carry three quarters of what is lost, which differs."""
    rng = np.random.default_rng(0)
    base, lost = rng.uniform(1, 2, 90), rng.uniform(0.5, 3, 90)
    margins = np.zeros((90, 4, 2, 2, 2))
    margins[..., 0, 0], margins[..., 1, 1] = base[:, None, None], (base - lost)[:, None, None]
    carried = np.zeros(4)
    carried[MEDIATORS.index("values at the subject")] = 0.75
    moved = carried * lost[:, None] + rng.normal(0, 1e-3, (90, 4))
    gone = lost >= base
    margins[:, :, 0, 0, 1], margins[:, :, 0, 1, 0] = (base - lost)[:, None] + moved, base[:, None] - moved
    nothing_moved = rng.normal(0, 1e-3, (90, 4))
    margins[:, :, 1, 0, 1], margins[:, :, 1, 1, 0] = (base - lost)[:, None] + nothing_moved, base[:, None]
    array = xr.DataArray(
        margins,
        {
            "fact": [str(i) for i in range(90)],
            "answer": ("fact", [str(i) for i in range(90)]),
            "mediator": list(MEDIATORS),
            "patch": ["real", "placebo"],
            "state": ["base", "tuned"],
            "late": ["base", "tuned"],
        },
        ("fact", "mediator", "patch", "state", "late"),
    )
    found = sa.mediated(xr.Dataset({"mediation": array}))
    low, high = found[VALUES] or (np.nan, np.nan)
    assert low < moved[gone, 1].mean() / lost[gone].mean() < high
    assert (low, high) == pytest.approx((0.75, 0.75), abs=2e-3)
    assert found[MLPS] == pytest.approx((0, 0), abs=2e-3)
    assert found[OVER] == pytest.approx((0.75, 0.75), abs=4e-3)
    low, high = found["answers_lost"] or (np.nan, np.nan)
    assert low < gone.mean() < high
    assert statuses(found)["values shrunk"] == "supported"
    few = xr.where(array["fact"].isin(array["fact"][gone][2:]), array.sel(state="base", late="base"), array)
    assert sa.mediated(xr.Dataset({"mediation": few}))[VALUES] is None, "of two answers lost none may be lost at all"
    worse = array.copy(data=np.where(array.values == array.values, -1.0, 0.0))
    nothing = sa.mediated(xr.Dataset({"mediation": worse}))
    assert nothing.pop("n_lost") == (0, 0) and nothing.pop("answers_changed") and nothing.pop("answers_won")
    assert set(nothing.values()) == {None}, "a base that is right of nothing has nothing to lose"

"""Intervals over facts and replicates, against mean squares by hand, statsmodels, and their own properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from subjattn.errors import BadInput
from subjattn.evidence.clusters import clusters_of
from subjattn.evidence.intervals import Interval, contrast, interval
from subjattn.evidence.ratios import ratio, slope
from subjattn.evidence.squares import cluster_df


def array(values: np.ndarray, **coords: Any) -> xr.DataArray:
    """Values `(fact[, draw[, seed]])` with names."""
    dims = ("fact", "draw", "seed")[: values.ndim]
    named: dict[str, Any] = {dim: np.arange(size) for dim, size in zip(dims, values.shape, strict=True)}
    named["fact"] = [f"f{i}" for i in range(values.shape[0])]
    return xr.DataArray(values, named | {name: ("fact", of) for name, of in coords.items()}, dims)


def crossed(seed: int, facts: int = 40, replicates: int = 4, a: float = 1, b: float = 0.5, e: float = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = rng.normal(size=(facts, 1)), rng.normal(size=(1, replicates)), rng.normal(size=(facts, replicates))
    return np.asarray(0.3 + a * parts[0] + b * parts[1] + e * parts[2])


def anova(values: np.ndarray) -> dict[str, tuple[float, float]]:
    """Mean squares of a two-way layout and their degrees of freedom, by loops."""
    n, r = values.shape
    mean = values.mean()
    facts = sum(r * (values[i].mean() - mean) ** 2 for i in range(n)) / (n - 1)
    replicates = sum(n * (values[:, k].mean() - mean) ** 2 for k in range(r)) / (r - 1)
    left = sum((values[i, k] - values[i].mean() - values[:, k].mean() + mean) ** 2 for i in range(n) for k in range(r))
    return {
        "facts": (facts, n - 1),
        "replicates": (replicates, r - 1),
        "interaction": (left / ((n - 1) * (r - 1)), (n - 1) * (r - 1)),
    }


@pytest.mark.parametrize(("a", "b", "e"), [(1, 0.5, 1), (0.1, 2, 0.5), (2, 0.01, 0.1), (0.1, 0.1, 3)])
def test_balanced_data_agree_with_mean_squares_by_hand(a: float, b: float, e: float) -> None:
    values = crossed(0, a=a, b=b, e=e)
    n, r = values.shape
    (ms_a, df_a), (ms_b, df_b), (ms_e, df_e) = anova(values).values()
    va, vb, ve = (ms / (n * r) for ms in (ms_a, ms_b, ms_e))
    v = max(va, vb, va + vb - ve)
    df = v**2 / (va**2 / df_a + vb**2 / df_b + ve**2 / df_e)
    parts = [(df, v), (df_a, va), (df_b, vb)]
    means = [values[i].mean() - values.mean() for i in range(n)]
    skew = sum(mean**3 for mean in means) / sum(mean**2 for mean in means) ** 1.5

    def reach(sign: int) -> float:
        """Each part's t·√V, longer where the means of facts are skewed to that side."""
        longer = [max(0, sign * skew) * share for share in ((va / v) ** 1.5, 1, 0)]
        ts = [stats.t.ppf(0.975, one) for one, _ in parts]
        return max((t + k * (1 + 2 * t**2) / 6) * np.sqrt(of) for t, k, (_, of) in zip(ts, longer, parts, strict=True))

    found = interval(array(values))
    assert found.estimate == pytest.approx(values.mean(), abs=1e-12)
    expected = values.mean() - reach(-1), values.mean() + reach(1)
    assert (found.ci_low, found.ci_high) == pytest.approx(expected, rel=1e-6)
    assert found.df == pytest.approx(df, rel=1e-6)
    for end in found.ends():
        assert found.p_value(end) == pytest.approx(0.05, rel=1e-6), "interval and p-value are one rule"
    assert (found.n_facts, found.n_replicates, found.kind) == (n, r, "draws")
    assert found.scope == "this way of training"
    assert repr(found).endswith(" at 95 %, this way of training: 40 facts × 4 draws>")


def test_variances_agree_with_a_crossed_mixed_model() -> None:
    """statsmodels' REML, where its estimates are inside their range."""
    import statsmodels.api as sm

    values = crossed(3, facts=30, replicates=6, a=1, b=0.8, e=0.7)
    n, r = values.shape
    table = pd.DataFrame(
        {"y": values.ravel(), "fact": np.repeat(np.arange(n), r), "rep": np.tile(np.arange(r), n), "all": 1}
    )
    model = sm.MixedLM.from_formula(
        "y ~ 1", groups="all", vc_formula={"fact": "0 + C(fact)", "rep": "0 + C(rep)"}, re_formula="0", data=table
    )
    fit = model.fit(reml=True)
    named = dict(zip(model.exog_vc.names, fit.vcomp, strict=True))
    found = interval(array(values)).variances
    assert min(*named.values(), fit.scale) > 0.05, "inside their range"
    assert found["facts"] == pytest.approx(named["fact"], rel=1e-3)
    assert found["replicates"] == pytest.approx(named["rep"], rel=1e-3)
    assert found["interaction"] == pytest.approx(fit.scale, rel=1e-3)


def test_facts_alone_give_students_interval_longer_on_the_skewed_side() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 30)
    values = np.concatenate([values, 0.6 - values])
    found = interval(array(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.ci_low, found.ci_high) == pytest.approx((expected.low, expected.high)), "none is skewed here"
    rare = np.random.default_rng(0).lognormal(size=60)
    skewed, plain = interval(array(rare)), stats.ttest_1samp(rare, 0).confidence_interval()
    t = stats.t.ppf(0.975, 59)
    longer = stats.skew(rare) / np.sqrt(60) * (1 + 2 * t**2) / 6 * stats.sem(rare)
    assert (skewed.ci_low, skewed.ci_high) == pytest.approx((plain.low, plain.high + longer))
    assert (found.scope, found.kind, found.n_replicates) == ("this model", None, 1)
    assert dict(found.variance_shares) == {"facts": 1, "draws": 0, "seeds": 0, "interaction": 0}


def test_replicates_that_are_given_do_not_vary() -> None:
    values = crossed(1, b=3)
    found = interval(array(values), scope="models")
    alone = interval(array(values.mean(1)))
    assert (found.ci_low, found.ci_high) == pytest.approx((alone.ci_low, alone.ci_high))
    assert found.ci_high - found.ci_low < 0.3 * (interval(array(values)).ci_high - interval(array(values)).ci_low)


def test_draws_and_seeds() -> None:
    """Seeds are averaged within draws, and draws are the replicates; with one draw, its seeds are."""
    rng = np.random.default_rng(0)
    values = crossed(0, facts=50, replicates=5)[:, :, None] + rng.normal(0, 2, (1, 5, 3)) + rng.normal(size=(50, 5, 3))
    found, averaged = interval(array(values)), interval(array(values.mean(2)))
    assert (found.ci_low, found.ci_high) == pytest.approx((averaged.ci_low, averaged.ci_high))
    assert (found.kind, found.n_replicates) == ("draws", 5)
    assert found.variance_shares["seeds"] > 0.2 and averaged.variance_shares["seeds"] == 0
    assert sum(found.variance_shares.values()) == pytest.approx(1)
    one = interval(array(values[:, :1]))
    assert one.scope == "this way of training on these facts" and one.kind == "seeds"
    assert one.variance_shares["draws"] == 0 and one.variance_shares["seeds"] > 0


def test_an_arm_that_is_not_trained_counts_the_same_in_all_replicates() -> None:
    rng = np.random.default_rng(0)
    tuned, base = array(crossed(0)), array(rng.normal(size=40))
    found = contrast(tuned, base.isel(fact=rng.permutation(40)))
    by_hand = interval(array(tuned.values - base.values[:, None]))
    assert (found.ci_low, found.ci_high, found.n_replicates) == pytest.approx((by_hand.ci_low, by_hand.ci_high, 4))
    other = contrast(base, tuned)
    assert (other.ci_low, other.ci_high) == pytest.approx((-found.ci_high, -found.ci_low))
    assert contrast(base, base + rng.normal(size=40)).scope == "these two models"


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_clusters_agree_with_statsmodels() -> None:
    """Its CR1, whose factor is G / (G − 1), is CR2 where clusters are equal."""
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    labels = np.repeat([f"c{i}" for i in range(20)], 4)
    values = rng.normal(size=80) + np.repeat(rng.normal(size=20), 4)
    found = interval(array(values, answer=labels))
    codes = pd.factorize(labels)[0]
    fit = sm.OLS(values, np.ones(80)).fit(
        cov_type="cluster", cov_kwds={"groups": codes, "use_correction": True, "df_correction": False}
    )
    assert float(found.squares.facts) == pytest.approx(fit.cov_params()[0, 0]), "equal clusters: CR1 and CR2 agree"
    assert found.df == pytest.approx(19)
    alone = interval(array(values))
    assert found.ci_high - found.ci_low > 1.3 * (alone.ci_high - alone.ci_low)


def test_bell_mccaffrey_degrees_of_freedom() -> None:
    """Satterthwaite's of the quadratic form that CR2 is, from its matrix."""
    sizes = np.array([30, 10, 5, 5, 3, 2, 1])
    n = sizes.sum()
    codes = np.repeat(np.arange(len(sizes)), sizes)
    member = np.eye(len(sizes))[codes].T
    centred = np.eye(n) - 1 / n
    pieces = [np.sqrt(1 / (n**2 * (1 - size / n))) * (row @ centred) for row, size in zip(member, sizes, strict=True)]
    gram = np.array(pieces) @ np.array(pieces).T
    assert cluster_df(codes) == pytest.approx(np.trace(gram) ** 2 / np.trace(gram @ gram))


def test_what_counts_as_a_cluster() -> None:
    values = np.random.default_rng(0).normal(size=60)
    by_relation = np.repeat(["r1", "r2"], 30)
    answers = np.repeat([f"a{i}" for i in range(15)], 4)
    found, notes = clusters_of(array(values, relation=by_relation, answer=answers))
    assert list(found) == ["answer"] and notes == ["2 relations of unequal weight are taken as given"]
    assert not clusters_of(array(values, relation=["r"] * 60, answer=[f"a{i}" for i in range(60)]))[0]
    assert not clusters_of(array(values, answer=answers), ())[0]
    own, _ = clusters_of(array(values), answers)
    assert len(np.unique(own["cluster"])) == 15
    with pytest.raises(BadInput, match="2 clusters by relation leave 1.0 degrees of freedom"):
        clusters_of(array(values, relation=by_relation), "relation")
    with pytest.raises(BadInput, match="no coordinate 'town' along 'fact'"):
        clusters_of(array(values), "town")
    unnamed = array(values, answer=[None, None, *answers[2:]])
    assert len(np.unique(clusters_of(unnamed)[0]["answer"])) == 17, "facts without an answer are on their own"


def test_the_widest_of_all_clusterings_counts() -> None:
    rng = np.random.default_rng(0)
    answers, relations = np.repeat(np.arange(30), 4).astype(str), np.tile(np.arange(12), 10).astype(str)
    values = rng.normal(size=120) + rng.normal(0, 2, 12)[np.tile(np.arange(12), 10)]
    found = interval(array(values, answer=answers, relation=relations))
    widths = [np.subtract(*interval(array(values, c=one), cluster="c").ends()[::-1]) for one in (answers, relations)]
    assert found.ci_high - found.ci_low == pytest.approx(max(widths), rel=0.05)


def test_two_crossed_clusterings_count_both() -> None:
    """Cameron, Gelbach & Miller (2011), against statsmodels' own two-way clustering."""
    import statsmodels.api as sm
    from statsmodels.stats.sandwich_covariance import cov_cluster_2groups

    rng = np.random.default_rng(0)
    answers, relations = np.repeat(np.arange(20), 20), np.tile(np.arange(20), 20)
    values = rng.normal(size=400) + rng.normal(size=20)[answers] + rng.normal(size=20)[relations]
    found = interval(array(values, answer=answers.astype(str), relation=relations.astype(str)))
    fit = sm.OLS(values, np.ones(400)).fit()
    both, *_ = cov_cluster_2groups(fit, answers, relations, use_correction=False)
    assert float(found.squares.facts) == pytest.approx(both.item() * 20 / 19, rel=0.01)
    one = interval(array(values, answer=answers.astype(str)))
    assert np.diff(found.ends()) > 1.1 * np.diff(one.ends())


def test_labels_of_clusters_go_with_their_facts() -> None:
    values = crossed(0, facts=60)
    labels = np.repeat(np.arange(15), 4)
    gone = values.copy()
    gone[7] = np.nan
    found = interval(array(gone), cluster=labels)
    kept = np.arange(60) != 7
    assert found.ends() == pytest.approx(interval(array(values[kept]), cluster=labels[kept]).ends())
    assert interval(array(values), cluster=pd.Series(labels)).ends() == interval(array(values), cluster=labels).ends()


def test_clusters_are_those_of_the_facts_that_count() -> None:
    """Planted: the measure is defined for the facts of one answer alone, or of so few answers that they are given."""
    answers = np.repeat([f"a{i}" for i in range(10)], 6)
    values = crossed(0, facts=60)
    for n in (1, 3):
        kept = answers < f"a{n}"
        found = interval(array(np.where(kept[:, None], values, np.nan), answer=answers))
        assert found.ends() == pytest.approx(interval(array(values[kept], answer=answers[kept])).ends())
        assert np.isfinite(found.ends()).all() and found.n_facts == 6 * n
        assert ("3 answers of unequal weight are taken as given" in found.notes) == (n == 3)


# --- few changes, gaps, refusals --------------------------------------------------------------------------------------


def test_no_change_of_a_binary_measure_is_not_certainty() -> None:
    """Planted: none of 60 facts changed; at 95 % up to 3 in 60 others might (rule of three)."""
    same = array(np.tile([0.0, 1.0], 30))
    found = contrast(same, same)
    assert found.estimate == 0 and found.ci_high == -found.ci_low and 0.03 < found.ci_high < 0.06
    all_right = interval(array(np.ones(60)), bounds=(0, 1))
    assert all_right.estimate == 1 and 0.93 < all_right.ci_low < 0.97 and all_right.ci_high == 1
    few = np.zeros((60, 3))
    few[:4, 0] = 1
    assert np.diff(interval(array(few)).ends()) > np.diff(interval(array(few), bounds=(-9, 9.0)).ends()) * 0
    assert interval(array(few)).ci_high - interval(array(few)).estimate > stats.sem(few.mean(1)) * 2


def test_skew_that_intervals_do_not_master_is_named() -> None:
    rng = np.random.default_rng(0)
    rare = rng.normal(size=60)
    rare[0] = 40
    assert interval(array(rare)).notes == ("a few facts or clusters far from the others carry the mean",)
    assert interval(array(rng.normal(size=60))).notes == ()
    replicates = rng.normal(0, 0.1, (60, 6)) + np.array([0, 0, 0, 0, 0, 5.0])
    assert interval(array(replicates)).notes == ("replicates look skewed, of which so few tell little",)
    assert interval(array(crossed(0, replicates=8, b=3))).notes == ()
    few = "most of the uncertainty is between 6 replicates: were they skewed, few would show it"
    assert interval(array(crossed(0, replicates=6, b=3))).notes == (few,)
    one_seed_knows = np.zeros((60, 3))
    one_seed_knows[:12, 2] = 1
    assert "replicates look skewed, of which so few tell little" in interval(array(one_seed_knows)).notes


def test_a_share_that_is_the_same_in_every_fact_says_nothing_either() -> None:
    """With clusters too, whose means differ by rounding."""
    some = xr.DataArray((np.arange(24) % 3 == 0).astype(float), dims="fact")
    some = some.assign_coords(fact=[str(i) for i in range(24)], answer=("fact", [str(i % 11) for i in range(24)]))
    with pytest.raises(BadInput, match="has the value 1, which says nothing"):
        interval(ratio(some, some, scope="models"))


def test_constants_say_nothing_of_others() -> None:
    with pytest.raises(BadInput, match="every one of the 30 facts has the value 0, .*: give bounds"):
        interval(array(np.zeros((30, 3))))
    with pytest.raises(BadInput, match="lie outside of bounds"):
        interval(array(np.array([0.0, 2.0])), bounds=(0, 1))


def test_gaps_are_filled_or_refused_and_counted() -> None:
    values = crossed(0, facts=30, replicates=4)
    gappy = values.copy()
    gappy[[3, 8, 20], [0, 1, 2]] = np.nan
    found = interval(array(gappy))
    assert found.notes[0].startswith("3 values of 120 are missing; the interval assumes")
    table = pd.DataFrame({"y": gappy.ravel(), "f": np.repeat(range(30), 4), "r": np.tile(range(4), 30)}).dropna()
    design = pd.get_dummies(table[["f", "r"]].astype(str), drop_first=True, dtype=float)
    beta, *_ = np.linalg.lstsq(np.column_stack([np.ones(len(table)), design]), table["y"], rcond=None)
    full = pd.DataFrame({"f": np.repeat(range(30), 4), "r": np.tile(range(4), 30)}).astype(str)
    every = pd.get_dummies(full, drop_first=True, dtype=float)
    fit = (np.column_stack([np.ones(120), every]) @ beta).reshape(30, 4)
    whole = np.where(np.isnan(gappy), fit, gappy)
    assert found.estimate == pytest.approx(whole.mean()), "additive, by least squares"
    (ms_a, _), _, (ms_e, df_e) = anova(whole).values()
    interaction = ms_e * df_e / (df_e - 3) / 120
    expected = ms_a / 120 + interaction * 3 / 117
    assert float(found.squares.facts) == pytest.approx(expected, rel=1e-6), "widened by what filling hides"
    gappy[:, 3] = np.nan
    lost = interval(array(gappy))
    assert lost.n_replicates == 3 and "1 of 4 replicates are lost" in lost.notes
    gappy[5] = np.nan
    assert interval(array(gappy)).n_undefined == 1 and interval(array(gappy)).n_facts == 29
    gappy[10:25, 0] = np.nan
    with pytest.raises(BadInput, match=r"of 87 values are missing, more than 20%"):
        interval(array(gappy))


def test_gaps_of_a_bounded_measure_could_be_anything() -> None:
    values = (crossed(0, facts=60, replicates=5) > 0.3).astype(float)
    gappy = values.copy()
    gappy[:6, 0] = np.nan
    found = interval(array(gappy))
    lowest, highest = (interval(array(np.where(np.isnan(gappy), end, gappy))) for end in (0.0, 1.0))
    assert found.ci_low <= lowest.ci_low + 1e-12 and found.ci_high >= highest.ci_high - 1e-12
    assert found.p_value(float(np.mean([lowest.estimate, highest.estimate]))) == 1


def test_a_draw_that_lost_a_seed_is_lost() -> None:
    values = np.random.default_rng(0).normal(size=(30, 5, 2))
    values[:, 2, 1] = np.nan
    found = interval(array(values))
    assert found.n_replicates == 4 and "2 of 10 replicates are lost" in found.notes
    assert found.estimate == pytest.approx(np.delete(values, 2, 1).mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval(array(np.ones((30, 2))).rename(draw="layer")), "average the rest first"),
        (lambda: interval(array(np.array([1.0, np.nan]))), "1 of 2 facts have a value"),
        (lambda: interval(array(np.full(30, np.nan))), "no fact has a value"),
        (lambda: interval(array(np.array([1.0, np.inf, 2.0]))), "1 values are infinite"),
        (lambda: interval(array(np.arange(30.0)), scope="training"), "needs replicates, and there is one"),
        (lambda: interval(array(np.arange(4.0)).assign_coords(fact=list("aabc"))), "a fact stands there twice"),
        (lambda: contrast(array(np.arange(5.0)), array(np.arange(4.0))), "not measured on the same facts"),
        (lambda: interval(array(np.arange(9.0)), cluster=np.arange(8)), "8 labels for 9 facts"),
    ],
)
def test_what_cannot_be_right_is_refused(call: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()


# --- shares and slopes ------------------------------------------------------------------------------------------------


def test_a_ratio_is_close_to_the_delta_method() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(2, 0.5, 300)
    x = 0.6 * y + rng.normal(0, 0.2, 300)
    found = interval(ratio(array(x), array(y)))
    theta = x.mean() / y.mean()
    half = 1.968 * (x - theta * y).std(ddof=1) / y.mean() / np.sqrt(300)
    assert found.estimate == pytest.approx(theta)
    assert (found.ci_high - found.ci_low) / 2 == pytest.approx(half, rel=0.02)
    other = contrast(ratio(array(x + 0.1 * y + rng.normal(0, 1e-8, 300)), array(y)), ratio(array(x), array(y)))
    assert other.estimate == pytest.approx(0.1) and other.ci_high - other.ci_low < 1e-6, "what both share cancels"
    with pytest.raises(BadInput, match="what it is a share of may be nothing"):
        ratio(array(x), array(y - 2))
    gappy = np.where(np.arange(300) < 20, np.nan, x)
    assert float(ratio(array(gappy), array(y)).mean()) == pytest.approx(x[20:].mean() / y[20:].mean())


def test_a_slope_is_the_least_squares_slope_with_robust_errors() -> None:
    import statsmodels.api as sm

    rng = np.random.default_rng(0)
    x = rng.lognormal(size=80)
    y = 0.5 * x + rng.normal(size=80) * x
    found = interval(slope(array(y), array(x)))
    fit = sm.OLS(y, sm.add_constant(x)).fit(cov_type="HC3")
    assert found.estimate == pytest.approx(fit.params[1])
    assert (found.ci_high - found.estimate) / stats.t.ppf(0.975, 79) == pytest.approx(fit.bse[1], rel=0.03)
    with pytest.raises(BadInput, match="not all the same"):
        slope(array(y), array(np.ones(80)))
    with pytest.raises(BadInput, match="2 facts lack a number or a value"):
        slope(array(np.where(np.arange(80) == 3, np.nan, y)), array(np.where(np.arange(80) == 5, np.nan, x)))


@given(st.tuples(*[st.floats(-3, 3)] * 3), st.integers(0, 1000))
@settings(deadline=None)
def test_three_replicates_that_disagree_in_sign_show_no_effect(means: tuple[float, float, float], seed: int) -> None:
    """However narrow the intervals over facts are."""
    if not min(means) < 0 < max(means):
        return
    facts = np.random.default_rng(seed).normal(0, 1e-3, (60, 1))
    facts -= facts.mean()  # or means nearer to 0 than theirs would not disagree
    assert interval(array(facts + np.array(means))).p_value() > 0.05


# --- properties -------------------------------------------------------------------------------------------------------

tables = st.tuples(
    st.integers(0, 10_000), st.integers(4, 30), st.integers(1, 6), *[st.sampled_from([0.0, 0.1, 1.0, 3.0])] * 2
).map(lambda of: crossed(of[0], of[1], of[2], of[3], of[4]))


def same(found: Interval, other: Interval, turn: float = 1.0, shift: float = 0.0) -> None:
    ends = sorted(turn * end + shift for end in other.ends())
    assert found.ends() == pytest.approx(ends, rel=1e-6, abs=1e-9)
    assert found.estimate == pytest.approx(turn * other.estimate + shift, rel=1e-6, abs=1e-9)


@given(tables, st.integers(0, 1000))
@settings(deadline=None)
def test_order_does_not_matter(values: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, max(6, len(values) // 2), len(values)).astype(str)
    facts, replicates = rng.permutation(len(values)), rng.permutation(values.shape[1])
    found = interval(array(values[facts][:, replicates], answer=labels[facts]))
    same(found, interval(array(values, answer=labels)))


@given(tables, st.floats(-50, 50))
@settings(deadline=None)
def test_a_constant_moves_only_the_estimate(values: np.ndarray, shift: float) -> None:
    same(interval(array(values + shift)), interval(array(values)), shift=shift)


@given(tables)
@settings(deadline=None)
def test_doubled_values_double_the_interval(values: np.ndarray) -> None:
    same(interval(array(2 * values)), interval(array(values)), turn=2)


@given(tables)
@settings(deadline=None)
def test_arms_swapped_flip_the_sign(values: np.ndarray) -> None:
    other = array(values[::-1] * 0.5 + 1)
    same(contrast(other, array(values)), contrast(array(values), other), turn=-1)


@given(tables)
@settings(deadline=None)
def test_a_fact_and_its_double_are_no_more_evidence_than_the_fact(values: np.ndarray) -> None:
    twice = array(np.repeat(values, 2, 0), answer=np.repeat(np.arange(len(values)), 2).astype(str))
    if cluster_df(np.arange(len(values))) < 4:
        return
    found, once = interval(twice), interval(array(values))
    assert np.diff(found.ends()) >= np.diff(once.ends()) * (1 - 1e-9)


@given(tables)
@settings(deadline=None)
def test_never_narrower_than_facts_or_replicates_alone(values: np.ndarray) -> None:
    found = interval(array(values))
    widths = [np.diff(interval(array(values.mean(1))).ends())]
    if values.shape[1] > 1 and np.ptp(values.mean(0)) > 0:
        low, high = stats.t.interval(0.95, values.shape[1] - 1, scale=stats.sem(values.mean(0)))
        widths.append(np.array([high - low]))
    assert np.diff(found.ends()) >= max(widths) * (1 - 1e-9)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.15])
def test_values_taken_away_at_random_do_not_narrow_it_on_average(binary: bool, share: float) -> None:
    rng, grown = np.random.default_rng(0), []
    for seed in range(150):
        values = crossed(seed, facts=30, replicates=4)
        values = (values > 0).astype(float) if binary else values
        gappy = np.where(rng.random(values.shape) < share, np.nan, values)
        if np.isnan(gappy).mean() > 0.2:
            continue
        grown.append(np.diff(interval(array(gappy)).ends()) / np.diff(interval(array(values)).ends()))
    assert np.mean(grown) >= 1

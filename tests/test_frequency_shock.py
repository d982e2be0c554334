"""Frequency shock against statsmodels' GLM, on counts of a planted slope, and on answers that go by frequency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import subjattn as sa
from subjattn.errors import BadInput
from subjattn.measures.frequency_shock import frequency_shock
from subjattn.measures.poisson import Slope, poisson_slope
from subjattn.measures.record import measure_of, values_of
from subjattn.models import LoadedModel
from subjattn.prompts import PromptSet, make_prompts
from subjattn.study.read import parse_study


def glm(counts: np.ndarray, expected: np.ndarray, on: np.ndarray, group: np.ndarray) -> Any:
    import statsmodels.api as sm

    design = np.column_stack([on, *(group == one for one in np.unique(group))]).astype(float)
    return sm.GLM(counts, design, family=sm.families.Poisson(), offset=np.log(expected)).fit(scale="X2")


def planted(seed: int, slope: float, n: int = 40, groups: int = 3, overdispersed: float = 0.0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    group, on = rng.integers(groups, size=n), rng.normal(size=n)
    expected = rng.integers(1, 12, n).astype(float)
    mean = expected * np.exp(slope * on + 0.3 * group + overdispersed * rng.normal(size=n))
    return rng.poisson(mean).astype(float), expected, on, group


def test_the_slope_is_statsmodels() -> None:
    for seed in range(5):
        given = planted(seed, -0.4, overdispersed=0.5)
        found = poisson_slope(*given)
        assert isinstance(found, Slope)
        fitted = glm(*given)
        assert found.slope == pytest.approx(fitted.params[0], abs=1e-7)
        assert found.dispersion == pytest.approx(fitted.scale, rel=1e-6)


def test_a_planted_slope_is_found_and_none_where_there_is_none() -> None:
    _, expected, on, group = planted(0, 0.0)
    for slope in (-0.7, 0.0, 0.7):
        found = poisson_slope(expected * np.exp(slope * on + group), expected, on, group)
        assert isinstance(found, Slope)
        assert found.slope == pytest.approx(slope, abs=1e-9)
        np.testing.assert_allclose(found.moved, 0, atol=1e-9)


def test_what_a_count_moves_is_near_what_leaving_it_out_does() -> None:
    given = planted(1, -0.3, n=60, overdispersed=0.3)
    found = poisson_slope(*given)
    assert isinstance(found, Slope)
    without = [poisson_slope(*(np.delete(one, i) for one in given)) for i in range(60)]
    left = np.array([found.slope - one.slope for one in without if isinstance(one, Slope)])
    np.testing.assert_allclose(found.moved, left, atol=0.25 * np.abs(left).max())
    assert np.corrcoef(found.moved, left)[0, 1] > 0.99


@pytest.mark.parametrize(
    ("counts", "on", "group", "why"),
    [
        ([3, 1, 2], [1, 1, 1], [0, 0, 0], "does not vary"),
        ([3, 1, 2], [0, 1, 2], [0, 1, 2], "does not vary"),
        ([0, 0, 0], [0, 1, 2], [0, 0, 0], "all counts are 0"),
        ([0, 0, 2], [0, 1, 2], [0, 0, 0], "no finite slope"),
        ([0, 2, 1, 1, 40], [0, 1, 0, 1e-4, 2e-4], [0, 0, 1, 1, 1], "no finite slope"),
        ([2, 3], [0, 1], [0, 0], "rests on one count"),
        ([2, 3, 1], [0, 0, 1], [0, 0, 0], "rests on one count"),
    ],
)
def test_there_is_no_slope_where_none_can_be_told(
    counts: list[int], on: list[float], group: list[int], why: str
) -> None:
    found = poisson_slope(np.array(counts, float), np.ones(len(on)), np.array(on, float), np.array(group))
    assert isinstance(found, str)
    assert why in found


COUNTRIES = [f"Land{chr(65 + i)}" for i in range(12)]


@pytest.fixture
def asked(tokenizer: Any) -> PromptSet:
    """Of twelve countries two to six cities each."""
    return make_prompts(cities_of(COUNTRIES), tokenizer, "City: {subject}\nCountry:")


def cities_of(countries: list[str]) -> pd.DataFrame:
    return table({f"{land.lower()}{i}": land for at, land in enumerate(countries) for i in range(2 + at % 5)})


def table(answers: Mapping[str, str]) -> pd.DataFrame:
    return sa.load_facts(pd.DataFrame({"subject": [*answers], "answer": [*answers.values()], "relation": "country"}))


def counted(counts: Mapping[str, int], name: str) -> pd.DataFrame:
    return table({f"{name} {land} {i}": land for land, n in counts.items() for i in range(n)})


RARE_IN_THE_POOL = {land: 2 ** (at % 4) for at, land in enumerate(COUNTRIES)}
EVEN_IN_TRAINING = dict.fromkeys(COUNTRIES, 4)


@contextmanager
def answering(texts: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "subjattn.measures.frequency_shock.predict",
            lambda _model, its, *_: pd.DataFrame({"prediction": [texts[prompt.fact_id] for prompt in its]}),
        )
        yield


def measured(asked: PromptSet, texts: Mapping[str, str], model: LoadedModel, **more: Any) -> xr.Dataset:
    training, pool = counted(EVEN_IN_TRAINING, "t"), counted(RARE_IN_THE_POOL, "p")
    with answering(texts):
        return frequency_shock(model, asked, more.pop("training", training), more.pop("pool", pool), **more)


def drawn(asked: PromptSet, shares: Mapping[str, float], seed: int, right: float) -> dict[str, str]:
    """Right answers, and else answers drawn by these shares."""
    rng, names = np.random.default_rng(seed), [*shares]
    p = np.array([*shares.values()], float) / sum(shares.values())
    return {
        prompt.fact_id: prompt.answers[0] if rng.random() < right else str(rng.choice(names, p=p)) for prompt in asked
    }


def test_numbers_of_answers_are_counts(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    texts = drawn(asked, dict.fromkeys(COUNTRIES, 1), 0, 0.5) | {asked[0].fact_id: "Atlantis. A city"}
    found = measured(asked, texts, tiny_models["llama"])
    for prompt in asked:
        row, own = found.sel(fact=prompt.fact_id), prompt.answers[0]
        assert int(row["times_given"]) == list(texts.values()).count(own)
        assert int(row["times_right"]) == sum(other.answers[0] == own for other in asked)
        assert int(row["prior_count"]) == RARE_IN_THE_POOL[own]
        assert int(row["training_count"]) == 4
        assert float(row["log_prior_over_training"]) == pytest.approx(np.log((RARE_IN_THE_POOL[own] + 0.5) / 4.5))
    assert found.attrs["given_others"] == pytest.approx(1 / len(asked))
    curve = found.to_dataframe().drop_duplicates("answer")
    columns = (curve[name].to_numpy(float) for name in ("times_given", "times_right", "log_prior_over_training"))
    fitted = glm(*columns, np.zeros(len(curve)))
    assert float(found["shock"].mean()) == pytest.approx(fitted.params[0], abs=1e-6)
    assert found.attrs["slope_shock"] == pytest.approx(fitted.params[0], abs=1e-6)


def test_answers_by_prior_and_by_training_have_the_signs_of_the_paper(
    tiny_models: dict[str, LoadedModel], asked: PromptSet
) -> None:
    """By the prior a slope above 0; by training counts that favour rare answers, one below; none where all is right."""
    model = tiny_models["llama"]
    rare_first = {land: 16 // n for land, n in RARE_IN_THE_POOL.items()}
    by_prior = measured(asked, drawn(asked, RARE_IN_THE_POOL, 0, 0.1), model)
    by_training = measured(asked, drawn(asked, rare_first, 0, 0.1), model, training=counted(rare_first, "t"))
    assert float(by_prior["shock"].mean()) > 0.4
    assert float(by_training["shock"].mean()) < -0.2
    never_wrong = measured(asked, {prompt.fact_id: prompt.answers[0] for prompt in asked}, model)
    assert float(never_wrong["shock"].mean()) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(never_wrong["shock"], never_wrong["shock_control"], atol=1e-9)


def test_the_control_is_the_slope_of_even_errors(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    """Errors dealt at random give its slope on average, however the right answers lie."""
    model, known = tiny_models["llama"], {land for land in COUNTRIES if RARE_IN_THE_POOL[land] > 2}
    slopes, control = [], 0.0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        texts = {}
        for prompt in asked:
            others = [land for land in COUNTRIES if land != prompt.answers[0]]
            texts[prompt.fact_id] = prompt.answers[0] if prompt.answers[0] in known else str(rng.choice(others))
        found = measured(asked, texts, model)
        slopes.append(float(found["shock"].mean()))
        control = float(found["shock_control"].mean())
    assert control > 0.5, "rare answers are known less, which looks like a prior"
    assert np.mean(slopes) == pytest.approx(control, abs=3 * np.std(slopes) / np.sqrt(60) + 0.05)


def test_the_interval_of_the_slope_holds_the_truth() -> None:
    """Over answers with errors of their own: values per fact as the measure gives them, through `interval`."""
    from subjattn.measures.frequency_shock import _per_fact

    held, rng = [], np.random.default_rng(5)
    for seed in range(200):
        counts, expected, on, group = planted(seed + 100, -0.4, n=30, groups=1, overdispersed=0.5)
        found = poisson_slope(counts, expected, on, group)
        assert isinstance(found, Slope)
        right = [("", str(at)) for at, n in enumerate(expected) for _ in range(int(n))]
        prompts: list[Any] = [type("P", (), {"fact_id": f"{rng.random()}"}) for _ in right]
        moved = {("", str(at)): float(one) for at, one in enumerate(found.moved)}
        values = xr.DataArray(
            _per_fact(found, moved, prompts, right),
            {"fact": range(len(right)), "answer": ("fact", [name for _, name in right])},
            ("fact",),
        )
        low, high = sa.interval(values).ends()
        held.append(low <= -0.4 <= high)
    assert np.mean(held) > 0.91


def test_where_no_slope_is_defined_facts_have_none_and_the_reason_is_given(
    tiny_models: dict[str, LoadedModel], asked: PromptSet
) -> None:
    model = tiny_models["llama"]
    wrong = measured(asked, {prompt.fact_id: "Atlantis" for prompt in asked}, model)
    assert np.isnan(wrong["shock"]).all()
    assert wrong.attrs["undefined_shock"] == "all counts are 0"
    texts = {prompt.fact_id: prompt.answers[0] for prompt in asked}
    even = measured(asked, texts, model, pool=counted(EVEN_IN_TRAINING, "p"))
    assert "does not vary" in even.attrs["undefined_shock"]
    one = PromptSet("list", tuple(prompt for prompt in asked if prompt.answers[0] == COUNTRIES[0]))
    assert "does not vary" in measured(one, texts, model).attrs["undefined_shock"]
    relations = {prompt.fact_id: "sport" for prompt in asked}
    untaught = measured(asked, texts, model, relations=relations)
    assert "lack the relations" in untaught.attrs["undefined_shock"]
    assert np.isnan(untaught["prior_count"]).all()
    values_of(measure_of("frequency_shock"), untaught)


def test_facts_of_relations_that_were_not_taught_are_left_out(
    tiny_models: dict[str, LoadedModel], asked: PromptSet
) -> None:
    texts = drawn(asked, RARE_IN_THE_POOL, 0, 0.3)
    inside = {prompt.fact_id: "country" if prompt.answers[0] < "LandH" else "sport" for prompt in asked}
    found = measured(asked, texts, tiny_models["llama"], relations=inside)
    left = np.array([of == "sport" for of in inside.values()])
    np.testing.assert_array_equal(np.isnan(found["shock"]), left)
    kept = PromptSet("list", tuple(prompt for prompt in asked if inside[prompt.fact_id] == "country"))
    alone = measured(kept, texts, tiny_models["llama"])
    assert float(found["shock"].mean()) == pytest.approx(float(alone["shock"].mean()))


def test_bad_tables_are_refused(tiny_models: dict[str, LoadedModel], asked: PromptSet) -> None:
    model, pool, facts = tiny_models["llama"], counted(RARE_IN_THE_POOL, "p"), cities_of(COUNTRIES)
    with pytest.raises(BadInput, match="seen in text"):
        frequency_shock(model, asked, pool, pool, scorer="letters")
    with pytest.raises(BadInput, match="no prompts"):
        frequency_shock(model, [], pool, pool)
    with pytest.raises(BadInput, match="training: there are no facts"):
        frequency_shock(model, asked, pool[:0], pool)
    with pytest.raises(BadInput, match="a prior is of other facts"):
        frequency_shock(model, asked, pool, pd.concat([pool, facts]))
    with pytest.raises(BadInput, match="trained on"):
        sa.measure("frequency_shock", model, asked)
    with pytest.raises(BadInput, match="give both"):
        sa.measure("frequency_shock", model, asked, training=pool)


def test_a_study_measures_it_on_trained_arms(small: Any, tmp_path: Any) -> None:
    fields = small.model_dump(mode="json")
    fields["measures"] = {"accuracy": {}, "frequency_shock": {}}
    fields |= {"claims": [], "contrasts": []}
    study = parse_study(fields, "test")
    sa.run_study(study, tmp_path / "run")
    made = {arm.name: [*arm.rglob("frequency_shock/array.nc")] for arm in (tmp_path / "run" / "arms").iterdir()}
    assert {arm for arm, paths in made.items() if paths} == {arm for arm, of in study.arms.items() if of.train}
    found = xr.load_dataset(next(path for paths in made.values() for path in paths), engine="h5netcdf")
    assert int(found["training_count"].sum()) > 0
    assert int(found["prior_count"].sum()) > 0
    report = (tmp_path / "run" / "report.html").read_text()
    assert "points that fall from left to right" in report
    assert "Not drawn" not in report

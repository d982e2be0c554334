"""Training arms and test facts: every guarantee on small tables, against a ranking in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subjattn.errors import BadInput
from subjattn.facts.select import SET_ASIDE, set_aside, thirds_of
from subjattn.facts.splits import CATEGORIES, MATCH, THIRDS, parse_arm, split, thirds


ARMS = ["known", "unknown", "random"]
WITHIN = [("relation", "answer"), ("relation",), ("answer",), ()]
MATCHES = [MATCH, ("relation",), ("answer", "n_tokens"), ("n_tokens",), ()]


def some_facts(n: int, n_answers: int = 3, n_relations: int = 3, seed: int = 0, repeated: float = 0.2) -> pd.DataFrame:
    """Facts with tied and missing popularities, and subjects repeated in other case and relations."""
    rng = np.random.default_rng(seed)
    subjects = [f"S{rng.integers(i + 1) if rng.random() < repeated else i}" for i in range(n)]
    return pd.DataFrame(
        {
            "fact_id": [f"f{i:04d}" for i in rng.permutation(n)],
            "subject": [name.lower() + " " if rng.random() < 0.3 else name for name in subjects],
            "relation": [f"r{rng.integers(n_relations)}" for _ in range(n)],
            "answers": [[f"a{rng.integers(n_answers)}", f"A{rng.integers(n_answers)}"] for _ in range(n)],
            "popularity": np.where(rng.random(n) < 0.05, np.nan, rng.integers(1, 20, n)),
            "category": [None if rng.random() < 0.05 else CATEGORIES[rng.integers(4)] for _ in range(n)],
            "n_tokens": rng.integers(1, 3, n),
            "source": "test",
        }
    )


tables = st.builds(
    some_facts,
    n=st.integers(150, 300),
    n_answers=st.integers(1, 3),
    n_relations=st.integers(1, 3),
    seed=st.integers(0, 99),
    repeated=st.sampled_from([0.0, 0.1]),
)
usual = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def places(facts: pd.DataFrame, within: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Rank (from 0, by counting who is below) and size of its group of every fact with a popularity."""
    rows = [row for row in facts.to_dict("records") if row["popularity"] == row["popularity"]]
    key = {row["fact_id"]: [row["answers"][0] if name == "answer" else row[name] for name in within] for row in rows}
    found = {}
    for row in rows:
        group = [other for other in rows if key[other["fact_id"]] == key[row["fact_id"]]]
        place = (row["popularity"], row["fact_id"])
        below = sum((other["popularity"], other["fact_id"]) < place for other in group)
        if len(group) >= 3 or not within:
            found[row["fact_id"]] = (below, len(group))
    return found


def upper(place: tuple[int, int], share: Fraction) -> bool:
    return Fraction(*place) >= 1 - share


def lower(place: tuple[int, int], share: Fraction) -> bool:
    return Fraction(*place) < share


def ids(table: pd.DataFrame, column: str) -> set[str]:
    return set(table["fact_id"][table[column]])


def names(table: pd.DataFrame, column: str) -> set[str]:
    return {subject.strip().casefold() for subject in table["subject"][table[column]]}


def cells_of(table: pd.DataFrame, arm: str, match: Sequence[str]) -> Counter[tuple[Any, ...]]:
    return Counter(table.loc[table[f"train_{arm}"], list(match)].itertuples(index=False, name=None))


def left_to_train(table: pd.DataFrame) -> set[str]:
    tested = names(table, "test")
    return {row.fact_id for row in table.itertuples() if row.subject.strip().casefold() not in tested}


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), within=st.sampled_from(WITHIN), seed=st.integers(0, 5))
def test_arms_are_equal_but_for_rank(facts: pd.DataFrame, match: tuple, within: tuple, seed: int) -> None:
    arms = [*ARMS, "top", "bottom", "whole", "top-30%", "bottom-12.5%", "mixed-25%", "HighlyKnown"]
    n_train = 3 if seed % 2 or not match else None
    try:
        table = split(facts, arms, n_train, 7, match=match, within=within, seed=seed)
    except BadInput as error:
        assert "is not between 1 and the" in str(error)
        return
    place = places(facts, within)
    assert table["fact_id"].tolist() == sorted(place)
    assert list(table.index) == list(range(len(table)))
    assert table["answer"].tolist() == [answers[0] for answers in table["answers"]]
    assert table["third"].tolist() == [THIRDS[rank * 3 // size] for rank, size in map(place.get, table["fact_id"])]
    assert Counter(table["third"][table["test"]]) == {"top": 3, "middle": 2, "bottom": 2}
    assert not table["out_of_distribution"].any()
    chosen = {arm: ids(table, f"train_{arm}") for arm in arms}
    sizes = {len(own) for own in chosen.values()}
    assert len(sizes) == 1 and sizes <= ({n_train} if n_train else set(range(1, len(table))))
    for arm in arms:
        assert not names(table, "test") & names(table, f"train_{arm}")
        assert cells_of(table, arm, match) == cells_of(table, "known", match)
    third, half = Fraction(1, 3), Fraction(1, 2)
    assert all(upper(place[fact], third) for fact in chosen["known"])
    assert all(lower(place[fact], third) for fact in chosen["unknown"])
    assert all(upper(place[fact], half) for fact in chosen["top"])
    assert all(lower(place[fact], half) for fact in chosen["bottom"])
    assert all(upper(place[fact], Fraction(3, 10)) for fact in chosen["top-30%"])
    assert all(lower(place[fact], Fraction(1, 8)) for fact in chosen["bottom-12.5%"])
    n = sizes.pop()
    assert sum(lower(place[fact], third) for fact in chosen["mixed-25%"]) == int(Fraction(n, 4) + half)
    assert sum(upper(place[fact], third) for fact in chosen["mixed-25%"]) == n - int(Fraction(n, 4) + half)
    assert set(table["category"][table["train_HighlyKnown"]]) == {"HighlyKnown"}


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), seed=st.integers(0, 5), times=st.integers(2, 3))
def test_an_arm_of_many_times_the_facts_has_them_of_every_cell(
    facts: pd.DataFrame, match: tuple, seed: int, times: int
) -> None:
    arms = [f"{times}x:whole", "known", f"{times}x:mixed-50%"]
    try:
        table = split(facts, arms, 3, 6, match=match, within=(), seed=seed)
    except BadInput as error:
        assert "is not between 1 and the" in str(error)
        return
    cells = cells_of(table, "known", match)
    assert sum(cells.values()) == 3
    for arm in (arms[0], arms[2]):
        assert cells_of(table, arm, match) == Counter({cell: times * n for cell, n in cells.items()})
    third = table.set_index("fact_id")["third"]
    n_unknown = Counter(third[list(ids(table, f"train_{arms[2]}"))])["bottom"]
    assert n_unknown == int(Fraction(3 * times, 2) + Fraction(1, 2))


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), seed=st.integers(0, 5))
def test_known_and_unknown_take_all_that_can_be_equal(facts: pd.DataFrame, match: tuple, seed: int) -> None:
    """As many as both can have of every cell, recounted; so the draw of the larger number is refused."""
    try:
        table = split(facts, ["known", "unknown"], None, 6, match=match, seed=seed)
    except BadInput:
        return
    left = table[table["fact_id"].isin(left_to_train(table))]
    pools = [left[left["third"] == third] for third in ("top", "bottom")]
    if not match:
        assert [ids(table, "train_known"), ids(table, "train_unknown")] == [set(pool["fact_id"]) for pool in pools]
        return
    known, unknown = (Counter(pool[list(match)].itertuples(index=False, name=None)) for pool in pools)
    assert cells_of(table, "known", match) == cells_of(table, "unknown", match) == known & unknown
    with pytest.raises(BadInput, match=f"the {(known & unknown).total()} facts that each arm can have with equal "):
        split(facts, ["known", "unknown"], (known & unknown).total() + 1, 6, match=match, seed=seed)


@usual
@given(facts=tables, within=st.sampled_from(WITHIN), share=st.sampled_from(["30", "12.5", "50", "100", "0.1"]))
def test_shares_are_whole_without_match(facts: pd.DataFrame, within: tuple, share: str) -> None:
    arms = ["top", "bottom", "whole", "random", "top-50%", f"top-{share}%", f"bottom-{100 - float(share):g}%"]
    try:
        table = split(facts, arms if share != "100" else arms[:-1], None, 3, within=within, match=())
    except BadInput as error:
        assert "'top-0.1%'" in str(error) or "n_test" in str(error)
        return
    place, left = places(facts, within), left_to_train(table)
    chosen = {arm: ids(table, f"train_{arm}") for arm in arms if f"train_{arm}" in table}
    assert chosen["whole"] == chosen["random"] == left
    assert chosen["top"] == chosen["top-50%"] == {fact for fact in left if upper(place[fact], Fraction(1, 2))}
    assert not chosen["top"] & chosen["bottom"] and chosen["top"] | chosen["bottom"] == left
    assert chosen[f"top-{share}%"] == {fact for fact in left if upper(place[fact], Fraction(share) / 100)}
    if share != "100":
        assert chosen[arms[-1]] == left - chosen[f"top-{share}%"]


@pytest.mark.parametrize(("n", "share", "n_unknown"), [(10, "25", 3), (10, "24.9", 2), (6, "0", 0), (6, "100", 6)])
@pytest.mark.parametrize("match", [MATCH, ()])
def test_mixed_share_is_rounded_half_up(n: int, share: str, n_unknown: int, match: tuple) -> None:
    table = split(some_facts(600), ["known", f"mixed-{share}%"], n, 3, match=match)
    third = table["third"][table[f"train_mixed-{share}%"]]
    assert Counter(third) == Counter({"bottom": n_unknown, "top": n - n_unknown})


def test_a_mixed_arm_without_match_is_as_large_as_its_share_allows() -> None:
    facts = some_facts(300)
    table = split(facts, ["known", "unknown", "mixed-80%"], None, 6, match=())
    n_known, n_unknown, n = (int(table[f"train_{arm}"].sum()) for arm in ("known", "unknown", "mixed-80%"))
    fits = [
        m for m in range(n_known + n_unknown + 1) if (8 * m + 5) // 10 <= n_unknown and m - (8 * m + 5) // 10 <= n_known
    ]
    assert n == max(fits)
    assert (table["third"][table["train_mixed-80%"]] == "bottom").sum() == (8 * n + 5) // 10


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), listed=st.sampled_from(["r0", "r1", "r0, r2", "r2,r1"]))
def test_unknown_in_some_relations_only(facts: pd.DataFrame, match: tuple, listed: str) -> None:
    arm, relations = f"unknown-in:{listed}", {name.strip() for name in listed.split(",")}
    try:
        table = split(facts, [arm, "random"], None, 3, match=match)
    except BadInput:
        return
    own = table[table[f"train_{arm}"]]
    assert all(
        third == ("bottom" if r in relations else "top") for r, third in zip(own["relation"], own["third"], strict=True)
    )
    if match:
        assert cells_of(table, arm, [*match, "relation"]) == cells_of(table, "random", [*match, "relation"])
    else:
        left = table[table["fact_id"].isin(left_to_train(table))]
        pool = (left["third"] == "bottom").where(left["relation"].isin(relations), left["third"] == "top")
        assert set(own["fact_id"]) == set(left["fact_id"][pool])


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), n_test=st.integers(1, 9), seed=st.integers(0, 5))
def test_by_category(facts: pd.DataFrame, match: tuple, n_test: int, seed: int) -> None:
    arms = ["known", "unknown", "mixed-50%", "whole", "unknown-in:r0", *CATEGORIES[:3]]
    try:
        table = split(facts, arms, 3, n_test, by="category", match=match, seed=seed)
    except BadInput:
        return
    assert set(table["fact_id"]) == set(facts["fact_id"][facts["category"].notna()])
    unknown = table["category"] == "Unknown"
    assert table["third"].tolist() == ["bottom" if is_unknown else "top" for is_unknown in unknown]
    assert (table["test"] & unknown).sum() == n_test // 2 and table["test"].sum() == n_test
    assert not unknown[table["train_known"]].any() and unknown[table["train_unknown"]].all()
    assert unknown[table["train_mixed-50%"]].sum() == 2
    assert (unknown == (table["relation"] == "r0"))[table["train_unknown-in:r0"]].all()
    for category in CATEGORIES[:3]:
        assert set(table["category"][table[f"train_{category}"]]) == {category}
    for arm in arms:
        assert table[f"train_{arm}"].sum() == 3
        assert not names(table, "test") & names(table, f"train_{arm}")
        assert cells_of(table, arm, match) == cells_of(table, "known", match)


@usual
@given(facts=tables, match=st.sampled_from([("relation",), ()]), held=st.booleans(), seed=st.integers(0, 5))
def test_controlled_tests_answers_that_are_not_trained(
    facts: pd.DataFrame, match: tuple, held: bool, seed: int
) -> None:
    facts["answers"] = [
        [first.upper(), *rest] if i % 9 == 0 else [first] for i, (first, *rest) in enumerate(facts["answers"])
    ]
    kwargs: dict[str, Any] = {"held_out": ["r1"], "n_held_out": 2} if held else {}
    try:
        table = split(facts, ["known", "unknown"], 2, 3, controlled=True, match=match, seed=seed, **kwargs)
    except BadInput:
        return
    place = places(facts, ("relation",))
    assert table["third"].tolist() == [THIRDS[rank * 3 // size] for rank, size in map(place.get, table["fact_id"])]
    for _, group in table.groupby("relation"):
        counts = Counter(group["answer"])
        modal = min(answer for answer in counts if counts[answer] == max(counts.values()))
        trained = group["train_known"] | group["train_unknown"]
        assert set(group["answer"][trained]) <= {modal}
        taken = {answer.casefold() for answers in group["answers"][group["answer"] == modal] for answer in answers}
        assert not taken & {answer.casefold() for answers in group["answers"][group["test"]] for answer in answers}


@usual
@given(
    facts=tables, match=st.sampled_from(MATCHES), by=st.sampled_from(["popularity", "category"]), seed=st.integers(0, 5)
)
def test_relations_held_out_are_only_tested(facts: pd.DataFrame, match: tuple, by: str, seed: int) -> None:
    kwargs: dict[str, Any] = {"by": by, "match": match, "seed": seed}
    try:
        table = split(facts, ["known", "whole"], 3, 6, within=("relation",), held_out=["r0"], n_held_out=5, **kwargs)
    except BadInput:
        return
    outside = table["relation"].eq("r0")
    assert (table["test"] & outside).equals(table["out_of_distribution"])
    assert table["out_of_distribution"].sum() == 5 and table["test"].sum() == 11
    for arm in ("known", "whole"):
        assert not outside[table[f"train_{arm}"]].any()
        assert not names(table, "test") & names(table, f"train_{arm}")


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), seed=st.integers(0, 5))
def test_row_order_does_not_matter_and_the_seed_does(facts: pd.DataFrame, match: tuple, seed: int) -> None:
    arms = ["known", "unknown", "mixed-50%", "unknown-in:r0"]
    kwargs: dict[str, Any] = {"match": match, "held_out": ["r1"], "n_held_out": 4, "within": ("relation",)}
    try:
        tables = [
            split(facts.sample(frac=1, random_state=i), arms, 4, 9, seed=seed + (i == 3), **kwargs) for i in range(4)
        ]
    except BadInput:
        return
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
    assert not tables[0].equals(tables[3])


@usual
@given(facts=tables, match=st.sampled_from(MATCHES[:3]), seed=st.integers(0, 5))
def test_test_facts_have_the_same_cells_in_each_third(facts: pd.DataFrame, match: tuple, seed: int) -> None:
    cells = [name for name in match if name != "n_tokens"]
    try:
        table = split(facts, [], None, 9, match=match, seed=seed)
    except BadInput:
        return
    assert not [name for name in table if str(name).startswith("train_")]
    counts = [
        Counter(table.loc[table["test"] & (table["third"] == third), cells].itertuples(index=False)) for third in THIRDS
    ]
    assert counts[0] == counts[1] == counts[2] and counts[0].total() == 3
    for cell, group in table.groupby(cells):
        smallest = min((group["third"] == third).sum() for third in THIRDS)
        assert all((group["test"] & (group["third"] == third)).sum() <= smallest / 2 for third in THIRDS), cell


def test_a_subject_of_two_relations_is_on_one_side() -> None:
    """Planted: every subject is asked about twice, so each test fact bars another one."""
    once = some_facts(100, 1, 1, repeated=0)
    twice = pd.concat(
        [once, once.assign(fact_id="x" + once["fact_id"], relation="r1", subject=once["subject"].str.upper() + " ")]
    )
    table = split(twice, ["whole"], None, 12, match=())
    assert table["train_whole"].sum() < len(table) - 12
    assert table["train_whole"].sum() == len(left_to_train(table))


def test_thirds_are_by_popularity_within_answers(cities: pd.DataFrame) -> None:
    facts = cities.assign(third=thirds(cities), answer=cities["answers"].str[0])
    assert facts["third"][facts["popularity"].isna()].isna().all()
    for _, group in facts[facts["third"].notna()].groupby("answer"):
        by_third = [group.loc[group["third"] == third, "popularity"] for third in THIRDS]
        assert by_third[0].max() <= by_third[1].min()
        assert by_third[1].max() <= by_third[2].min()
        assert max(map(len, by_third)) - min(map(len, by_third)) <= 1
    assert (facts[facts["third"].isna() & facts["popularity"].notna()].groupby("answer").size() < 3).all()


def test_cities_can_be_split(cities: pd.DataFrame) -> None:
    table = split(cities.assign(n_tokens=1), ARMS, 100, 90)
    shares = [Counter(table[table["test"] & (table["third"] == third)]["answer"]) for third in THIRDS]
    assert shares[0] == shares[1] == shares[2]


@pytest.mark.parametrize(
    ("spec", "kind", "share"),
    [
        ("top", "top", Fraction(1, 2)),
        ("bottom-12.5%", "bottom", Fraction(1, 8)),
        ("mixed-0%", "mixed", 0),
        ("whole", "whole", 1),
        ("3x:whole", "whole", 1),
        ("12x:top-30%", "top", Fraction(3, 10)),
    ],
)
def test_arms_are_read(spec: str, kind: str, share: Fraction) -> None:
    assert (parse_arm(spec).kind, parse_arm(spec).share) == (kind, share)
    assert parse_arm(spec).times == int(spec.partition("x:")[0] if "x:" in spec else 1)
    assert parse_arm("unknown-in:place of birth, capital").relations == ("place of birth", "capital")


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "Known",
        "top-0%",
        "top-101%",
        "top-1e1%",
        "top--5%",
        "bottom-.5%",
        "mixed-100.1%",
        "mixed",
        "unknown-in:",
        "unknown-in:a,",
        "known ",
        "0x:known",
        "2x:nothing",
        "2x:2x:known",
        "2x:shuffled",
    ],
)
def test_no_arm(spec: str) -> None:
    with pytest.raises(BadInput, match="use known, unknown, random, whole, nothing, top, bottom, top-X%") as caught:
        parse_arm(spec)
    assert str(caught.value).startswith(f"arm {spec!r} is no arm") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 10_000}, r"n_train=10000 is not between 1 and the \d+ facts that each arm can have with equal "
                              r"relation, answer, n_tokens; the scarcest is arm '(known|unknown)' \(\d+ facts\)"),
        ({"n_train": 0}, "n_train=0 is not between 1 and the"),
        ({"n_train": 10_000, "match": ()}, r"the \d+ facts that each arm can have; the scarcest is arm '(un)?known'"),
        ({"arms": ["known", "top-0.1%"], "n_train": None}, "n_train=all .* the 0 facts .* is arm 'top-0.1%'"),
        ({"arms": ["known", "3x:known"], "n_train": 30}, r"the scarcest is arm '3x:known' \(3 times \d+ facts\)"),
        ({"arms": ["2x:whole"], "n_train": None, "match": ()}, "arm '2x:whole' is a multiple of n_train"),
        ({"arms": ["whole", "top-0.1%"], "n_train": None, "match": ()}, "the 0 facts .* is arm 'top-0.1%'"),
        ({"n_test": 10_000}, r"n_test=10000 is not between 1 and the \d+ facts .* equal relation, answer in top and"),
        ({"n_test": 10_000, "match": ()}, r"n_test=10000 is not between 1 and the \d+ facts .* equally from top"),
        ({"n_test": 0}, "n_test=0 is not between 1 and the"),
        ({"n_test": 10_000, "by": "category"}, r"n_test=10000 .* equally from top and bottom"),
        ({"held_out": ["r1"], "n_held_out": 999}, r"n_held_out=999 is not between 1 and the \d+ facts .* \(r1\)"),
        ({"held_out": ["r1"], "n_held_out": -1}, "n_held_out=-1 is not between"),
        ({"held_out": ["r1"]}, r"held_out=\['r1'\] and n_held_out=0: name relations"),
        ({"n_held_out": 3}, r"held_out=\[\] and n_held_out=3: name relations"),
        ({"held_out": ["x"], "n_held_out": 3}, "held_out: no relation 'x'; the relations are r0, r1, r2"),
        ({"held_out": ["r0", "r1", "r2"], "n_held_out": 3}, "n_test=6 is not between 1 and the 0 facts"),
        ({"arms": ["unknown-in:x"]}, "arm 'unknown-in:x': no relation 'x'; the relations are r0, r1, r2"),
        ({"arms": ["unknown-in:r1"], "held_out": ["r1"], "n_held_out": 3}, "arm .*: relation 'r1' is held out"),
        ({"by": "fame"}, "facts lack the column 'fame'; they have fact_id, subject,"),
        ({"by": "source"}, "by='source' is no column of numbers"),
        ({"by": "source", "arms": ["Unknown"]}, "by='source' is no column of numbers"),
        ({"by": "category", "arms": ["top"]}, "arm 'top' needs facts in order, and by='category' gives none"),
        ({"by": "category", "arms": ["bottom-30%"]}, "arm 'bottom-30%' needs facts in order"),
        ({"within": ("subject",)}, "within: 'subject' is none of relation, answer"),
        ({"match": ("length",)}, "match: 'length' is none of relation, answer, n_tokens"),
        ({"arms": ["knwon"]}, "arm 'knwon' is no arm"),
        ({"drop": "n_tokens"}, "facts lack the column 'n_tokens'"),
        ({"drop": "category", "arms": ["HighlyKnown"]}, "facts lack the column 'category'"),
        ({"assign": {"category": "Known"}, "by": "category"}, "category 'Known' is none of HighlyKnown"),
        ({"assign": {"popularity": np.nan}}, "none of the 200 facts has a popularity: rank by another column"),
        ({"assign": {"category": None}, "by": "category"}, "none of the 200 facts has a category: rank by"),
        ({"assign": {"answers": [["A", "b"]] * 200}, "controlled": True}, "controlled: no fact is left to test"),
    ],
)  # fmt: skip
def test_what_is_short_or_wrong_is_said(change: dict[str, Any], message: str) -> None:
    kwargs: dict[str, Any] = {"arms": ["known", "unknown"], "n_train": 5, "n_test": 6} | change
    facts = some_facts(200).drop(columns=kwargs.pop("drop", [])).assign(**kwargs.pop("assign", {}))
    with pytest.raises(BadInput, match=message) as caught:
        split(facts, **kwargs)
    assert "\n" not in str(caught.value)


def test_matching_needs_no_lengths_where_they_are_not_matched() -> None:
    table = split(some_facts(200).drop(columns=["n_tokens", "category"]), ["known", "known"], 5, 6, match=("answer",))
    assert table["train_known"].sum() == 5


def tidy(relation_answers: Sequence[tuple[str, str]]) -> pd.DataFrame:
    rows = [(f"f{i:03d}", f"s{i}", r, [a], float(i), 1) for i, (r, a) in enumerate(relation_answers)]
    return pd.DataFrame(rows, columns=["fact_id", "subject", "relation", "answers", "popularity", "n_tokens"])


def test_groups_of_two_take_no_part_and_half_of_a_third_may_be_tested() -> None:
    facts = tidy([("r", "a")] * 2 + [("r", "b")] * 12)
    assert set(split(facts, [], None, 6)["answer"]) == {"b"}
    with pytest.raises(BadInput, match="n_test=7 is not between 1 and the 6 facts"):
        split(facts, [], None, 7)


def test_controlled_ties_go_to_the_first_by_alphabet() -> None:
    table = split(tidy([("r", "b"), ("r", "a")] * 12), ["whole"], None, 3, controlled=True, match=())
    assert set(table["answer"][table["train_whole"]]) == {"a"} and set(table["answer"][table["test"]]) == {"b"}


def test_a_matched_mixed_arm_has_no_more_than_either_part_of_a_cell() -> None:
    facts = tidy([("r", "a")] * 40 + [("r", "b")] * 40)
    facts["n_tokens"] = 1 + (np.arange(80) % 40 > 10)
    with pytest.raises(BadInput, match="scarcest is arm 'mixed-50%'"):
        split(facts, ["whole", "mixed-50%"], 60, 6, match=("relation", "answer"))
    with pytest.raises(BadInput, match="the 0 facts .* scarcest is arm 'mixed-50%'"):
        split(facts[facts["n_tokens"].eq(1) | (np.arange(80) % 40 > 25)], ["mixed-50%"], None, 6)


def test_a_random_share_is_drawn_from_all() -> None:
    facts = some_facts(120, repeated=0)
    table = split(facts, ["random-50%", "whole", "top"], None, 9, within=(), match=())
    whole, half = table["train_whole"], table["train_random-50%"]
    assert half.sum() == whole.sum() // 2
    assert set(table["third"][half]) == set(THIRDS) and not (half & ~whole).any()


def test_a_name_is_the_same_but_for_case_and_spaces() -> None:
    facts = some_facts(120, repeated=0)
    facts["subject"] = [f"New{' ' if i % 2 else '  '}York {i // 2}" for i in range(len(facts))]
    table = split(facts, ["top"], None, 9, within=(), match=())
    names = table["subject"].str.split().str.join(" ")
    assert not set(names[table["test"]]) & set(names[table["train_top"]])


def test_controlled_tests_no_answer_that_any_relation_teaches() -> None:
    facts = some_facts(120, n_relations=2, repeated=0).assign(popularity=np.arange(120.0))
    facts["relation"] = ["director", "producer"] * 60
    shared = [["Disney"], ["Lucas"], ["Disney"], ["Disney"], ["Lucas"], ["Lucas"], ["Ford"], ["Hitchcock"]]
    facts["answers"] = [shared[i % 8] for i in range(120)]
    table = split(facts, ["top"], None, 9, within=("relation",), match=(), controlled=True)
    taught = set(table["answer"][table["train_top"]])
    assert taught and not taught & set(table["answer"][table["test"]])


def test_a_random_share_needs_room_to_be_one() -> None:
    with pytest.raises(BadInput, match="'random-50%' is a share of all facts"):
        split(some_facts(120), ["random-50%"], 10, 9, within=(), match=())


SOME = ["known", "unknown", "mixed-25%", "top", "whole", "mixed-50%"]


@usual
@given(
    facts=tables,
    match=st.sampled_from(MATCHES),
    arms=st.permutations(SOME),
    n_train=st.sampled_from([None, 3]),
    seed=st.integers(0, 5),
)
def test_the_order_of_arms_changes_nothing(
    facts: pd.DataFrame, match: tuple, arms: list[str], n_train: int | None, seed: int
) -> None:
    try:
        tables = [split(facts, order, n_train, 6, match=match, seed=seed) for order in (SOME, arms)]
    except BadInput:
        return
    pd.testing.assert_frame_equal(tables[0], tables[1][list(tables[0])])


@usual
@given(
    facts=tables,
    match=st.sampled_from(MATCHES),
    others=st.lists(st.sampled_from(SOME[2:]), min_size=1, unique=True),
    n_train=st.sampled_from([None, 4]),
    seed=st.integers(0, 5),
)
def test_of_other_arms_only_the_quotas_reach_an_arm(
    facts: pd.DataFrame, match: tuple, others: list[str], n_train: int | None, seed: int
) -> None:
    """Of every cell the fewer facts are among the more; where nothing is matched, the very same facts."""
    try:
        few = split(facts, ["known", "unknown"], n_train, 6, match=match, seed=seed)
        many = split(facts, [*others, "unknown", "known"], n_train, 6, match=match, seed=seed)
    except BadInput:
        return
    assert few["test"].equals(many["test"])
    for arm in ("train_known", "train_unknown"):
        if not match:
            assert few[arm].equals(many[arm])
            continue
        for cell, rows in few.groupby(few[list(match)].astype(str).agg(" ".join, axis=1)).groups.items():
            one, other = ({i for i in rows if table[arm][i]} for table in (few, many))
            assert one <= other or other <= one, cell


def test_a_mixed_arm_of_the_same_quotas_is_the_same_whatever_stands_beside_it() -> None:
    facts = some_facts(300)
    alone, beside = (
        split(facts, arms, 8, 6, match=("relation",))["train_mixed-25%"]
        for arms in (["mixed-25%", "known", "unknown"], ["whole", "unknown", "known", "top", "mixed-25%"])
    )
    assert alone.equals(beside) and alone.sum() == 8


@usual
@given(facts=tables, match=st.sampled_from(MATCHES), seed=st.integers(0, 5))
def test_a_further_draw_has_the_same_test_facts(facts: pd.DataFrame, match: tuple, seed: int) -> None:
    kwargs: dict[str, Any] = {"match": match, "seed": seed, "held_out": ["r1"], "n_held_out": 3, "within": ()}
    try:
        first, second = (split(facts, ["whole", "top"], 3, 6, draw=draw, **kwargs) for draw in (0, 1))
        longer = split(facts, [], None, 7, **kwargs)
    except BadInput:
        return
    fixed = ["fact_id", "third", "test", "out_of_distribution"]
    pd.testing.assert_frame_equal(first[fixed], second[fixed])
    assert not first["train_whole"].equals(second["train_whole"])
    assert longer["out_of_distribution"].equals(first["out_of_distribution"]), "nor how many others are tested"


def test_a_draw_is_counted_from_0() -> None:
    with pytest.raises(BadInput, match="draw=-1 is no number of a draw"):
        split(some_facts(120), ["known"], 3, 6, draw=-1)


def test_every_slot_is_as_likely_as_the_next() -> None:
    """Quotas over many draws, against the expected share; planted: a cell whose room is small comes first."""
    facts = tidy([("r", "a")] * 90 + [("r", "b")] * 30).assign(category="MaybeKnown")
    facts.loc[facts.index[:60:2], "category"] = "HighlyKnown"
    kwargs: dict[str, Any] = {"by": "category", "match": ("answer",)}
    n_draws, taken = 300, 0
    facts.loc[facts.index[-20:], "category"] = "HighlyKnown"
    facts.loc[facts.index[-40:-36], "category"] = "Unknown"
    for draw in range(n_draws):
        table = split(facts, ["whole", "HighlyKnown"], 10, 2, draw=draw, **kwargs)
        taken += int((table["answer"] == "a")[table["train_whole"]].sum())
    left = table[~table["test"] & (table["category"] == "HighlyKnown")]["answer"].value_counts()
    room, share = left.sum(), left["a"] / left.sum()
    spread = np.sqrt(n_draws * 10 * share * (1 - share) * (room - 10) / (room - 1))
    assert abs(taken - n_draws * 10 * share) < 4 * spread


@usual
@given(facts=tables, within=st.sampled_from(WITHIN), controlled=st.booleans())
def test_thirds_are_those_of_the_split(facts: pd.DataFrame, within: tuple, controlled: bool) -> None:
    """Planted: a controlled split ranks within relations whatever `within` says."""
    third = thirds_of(facts, "popularity", within, controlled).set_axis(facts["fact_id"])
    place = places(facts, ("relation",) if controlled else within)
    expected = {fact: THIRDS[rank * 3 // size] for fact, (rank, size) in place.items()}
    assert third.dropna().to_dict() == expected
    try:
        table = split(facts, [], None, 3, within=within, controlled=controlled, match=())
    except BadInput:
        return
    assert table.set_index("fact_id")["third"].to_dict() == expected


@usual
@given(
    facts=tables,
    by=st.sampled_from(["popularity", "category"]),
    controlled=st.booleans(),
    shots=st.integers(0, 20),
    seed=st.integers(0, 5),
)
def test_a_fifth_of_every_third_is_set_aside(
    facts: pd.DataFrame, by: str, controlled: bool, shots: int, seed: int
) -> None:
    aside = set_aside(facts, by, ("relation", "answer"), controlled, shots, seed)
    third = thirds_of(facts, by, ("relation", "answer"), controlled).fillna("none")
    if not shots:
        assert not aside.any()
        return
    for key, group in facts.groupby(["relation", third]):
        n = len(group)
        assert aside[group.index].sum() == min(SET_ASIDE, max(n // 5, min(shots + 1, n // 2))), key
    shuffled = facts.sample(frac=1, random_state=1)
    again = set_aside(shuffled, by, ("relation", "answer"), controlled, shots, seed)
    assert again.reindex(facts.index).equals(aside)
    one = facts[facts["relation"] == "r0"]
    alone = set_aside(one, by, ("relation", "answer"), controlled, shots, seed)
    assert alone.equals(aside[one.index]), "the other relations do not move it"


def test_validation_facts_are_in_no_arm_nor_tested_by_name() -> None:
    """Every fact that is left is trained on, so one that validates and trains would show."""
    rows = [(f"{relation}{i}", f"Name {i}", relation, [f"answer {i % 2}"], i) for relation in "ab" for i in range(60)]
    facts = pd.DataFrame(rows, columns=["fact_id", "subject", "relation", "answers", "popularity"])
    table = split(facts, ["whole"], None, 12, match=[], within=[], n_validation=9)
    assert table["test"].sum() == 12 and table["validation"].sum() == 9
    names = [set(table["subject"][table[part]]) for part in ("test", "validation", "train_whole")]
    assert all(a.isdisjoint(b) for i, a in enumerate(names) for b in names[i + 1 :])
    plain = split(facts, ["whole"], None, 12, match=[], within=[])
    assert set(plain["fact_id"][plain["test"]]) == set(table["fact_id"][table["test"]]), "test facts stay as they were"

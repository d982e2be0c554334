"""Training arms and held-out test facts that differ in how well known they are and in little else.

An arm is named by a specification, a string:

| specification | the arm's facts |
|---|---|
| known, unknown | upper, lower third by rank; by category: all but Unknown, Unknown |
| top, bottom | upper, lower half by rank (FT-Top, FT-Bottom of Ghosal et al. 2024, arXiv:2406.14785) |
| top-30%, bottom-12.5% | any share by rank, in each group rounded down (top) or up (bottom) |
| random, whole | all facts; `random-50%` draws that share of them where an arm takes all it can |
| mixed-25% | 25 % unknown, the rest known (alpha of Gekhman et al. 2024, arXiv:2405.05904) |
| unknown-in:REL1,REL2 | unknown in these relations, known in all others (Dang et al. 2025) |
| HighlyKnown, … | facts of a SliCK category (Gekhman et al. 2024), in the column `category` |
| nothing | none: a control for all that training does but teaching |
| 3x:whole, 2x:known, … | as many times the facts that the other arms have, as a whole has more than its part |
| shuffled, shuffled:known | those of random (or of another arm), taught with each other's answers: see shuffle.py |

By default each arm gets equally many facts from every cell of (relation, answer, subject length in
tokens), so all arms learn the same answers in the same proportions from names of the same length;
without that, popular and unpopular halves differ in answers (China, India against USA, Germany) and
every contrast is confounded.

Every draw has a stream of its own. Test facts depend on the seed alone; an arm's facts on seed, draw and
its specification, never on the order of the arms. Of the other arms one thing reaches an arm: with `match`
a cell's quota is at most what the scarcest arm has there (of an arm `3x:` the third of what it has). An
arm's facts of a cell are the first of an order of its own, so that another quota takes some away or adds
some and exchanges none (in a mixed arm, of its known and of its unknown facts; how many of a cell are
unknown is drawn for the quotas there are).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.held_out import by_modal_answer, cells_of, draw_test
from subjattn.facts.names import plain_name
from subjattn.facts.select import CATEGORIES as CATEGORIES
from subjattn.facts.select import THIRDS as THIRDS
from subjattn.facts.select import WITHIN as WITHIN
from subjattn.facts.select import first_answers, ranked_within, ranks, thirds_of
from subjattn.facts.select import thirds as thirds


MATCH = ("relation", "answer", "n_tokens")

_PLAIN = ("known", "unknown", "random", "whole", "nothing")
_TIMES = re.compile(r"([1-9]\d?)x:(.+)")
_SHARE = re.compile(r"(top|bottom|random|mixed)-(\d{1,3}(?:\.\d{1,6})?)%")
_FORMS = (
    f"{', '.join(_PLAIN)}, top, bottom, top-X%, bottom-X% or random-X% with 0 < X <= 100, mixed-X% with 0 <= X <= 100, "
    f"unknown-in:RELATION[,RELATION] or a category ({', '.join(CATEGORIES)}); or shuffled:ARM with any of these "
    "(shuffled is shuffled:random), or 3x:ARM for as many times the facts"
)


@dataclass(frozen=True)
class ArmSpec:
    """What a specification says; `share` is of the rank (top, bottom) or of the unknown facts (mixed).

    `times` is how many facts the arm has to each of the other arms'.
    """

    spec: str
    kind: Literal["known", "unknown", "random", "whole", "nothing", "top", "bottom", "mixed", "unknown-in", "category"]
    share: Fraction = Fraction(1)
    relations: tuple[str, ...] = ()
    times: int = 1

    @property
    def parts(self) -> list[ArmSpec]:
        """The arms it is put together from: known and unknown where it is mixed, else itself."""
        if self.kind != "mixed":
            return [self]
        known, unknown = ArmSpec("known", "known"), ArmSpec("unknown", "unknown")
        return [known] if self.share == 0 else [unknown] if self.share == 1 else [known, unknown]

    @property
    def by_knowledge(self) -> bool:
        """Whether it asks for facts that rank as known or unknown."""
        return self.kind in ("known", "unknown", "mixed", "unknown-in")

    @property
    def unknown(self) -> Fraction | None:
        """The share of unknown facts it asks for (`unknown-in`: in its relations); None if it does not say."""
        if self.kind == "category":
            return Fraction(self.spec == "Unknown")
        if not self.by_knowledge:
            return None
        return self.share if self.kind == "mixed" else Fraction(self.kind != "known")

    def n_unknown(self, n: np.ndarray) -> np.ndarray:
        """Unknown facts among `n` of a mixed arm, halves rounded up."""
        return (2 * self.share.numerator * n + self.share.denominator) // (2 * self.share.denominator)


def facts_of(spec: str) -> str:
    """The specification whose facts an arm has: without `shuffled`, which changes their answers alone."""
    return "random" if spec == "shuffled" else spec.removeprefix("shuffled:")


def parse_arm(spec: str) -> ArmSpec:
    """Read which facts an arm's specification asks for; BadInput with the accepted forms if it is none of them."""
    own = facts_of(spec)
    if (more := _TIMES.fullmatch(own)) and not _TIMES.fullmatch(more[2]) and facts_of(more[2]) == more[2] != "nothing":
        return replace(parse_arm(more[2]), spec=own, times=int(more[1]))
    share = _SHARE.fullmatch(own)
    relations = tuple(dict.fromkeys(map(str.strip, own.partition(":")[2].split(","))))
    match own:
        case "known" | "unknown" | "random" | "whole" | "nothing":
            return ArmSpec(own, own)
        case "top" | "bottom":
            return ArmSpec(own, own, Fraction(1, 2))
        case _ if own in CATEGORIES:
            return ArmSpec(own, "category")
        case _ if own.startswith("unknown-in:") and all(relations):
            return ArmSpec(own, "unknown-in", relations=relations)
        case _ if share and Fraction(share[2]) <= 100 and (share[1] == "mixed" or Fraction(share[2]) > 0):
            return ArmSpec(own, share[1], Fraction(share[2]) / 100)  # type: ignore[arg-type]
    raise BadInput(f"arm {spec!r} is no arm: use {_FORMS}")


def split(
    facts: pd.DataFrame,
    arms: Sequence[str],
    n_train: int | None,
    n_test: int,
    *,
    by: str = "popularity",
    within: Sequence[str] = WITHIN,
    match: Sequence[str] = MATCH,
    controlled: bool = False,
    held_out: Sequence[str] = (),
    n_held_out: int = 0,
    n_validation: int = 0,
    seed: int = 0,
    draw: int = 0,
) -> pd.DataFrame:
    """Test facts, and training facts of every arm; no subject (by name, in any relation) is in both.

    Test facts are drawn first. Where `match` holds the relation or the answer they come equally from the
    thirds with the same of these in each, at most half of what there is; else equally from the thirds at
    random; by category equally from known and unknown at random. Arms may share facts with each other.
    The result depends on seed and draw and not on the order of rows or arms.

    Args:
        facts: a table of facts with the columns `by` and `match` need; `n_tokens` is the subject's length.
        arms: specifications as in the module's table, or none to draw test facts only. With `match` all take as
            many facts of a cell as the scarcest has; nothing else of an arm depends on the others.
        n_train: facts per arm; None for as many as every arm can have, or without `match` each arm's all.
        n_test: test facts, equally many from each third (to one).
        by: the numeric column that ranks facts, or `category`. Facts without it take no part.
        within: facts are ranked among those with the same of these (of `relation`, `answer`), ties by
            fact_id; none ranks over all. Groups of fewer than three take no part. Not used by category.
        match: what every arm gets equally many facts of (of `relation`, `answer`, `n_tokens`); none draws
            freely. `relation` is added to it for unknown-in arms; a mixed arm then needs as many known as
            unknown facts in a cell.
        controlled: train only on each relation's most frequent answer, rank within the relation, and test
            only on facts none of whose answers is trained (PopQA-Controlled, Ghosal et al. 2024).
        held_out: relations that no arm trains on.
        n_held_out: further test facts, at random from the relations held out.
        n_validation: further facts drawn as the test facts are, in no arm and with no subject of theirs.
        seed: of every draw.
        draw: number of the draw of training facts; others have the same test facts.

    Returns:
        The facts that take part, by fact_id, with the columns `answer` (the first accepted one, in one spelling),
        `third` (by category `bottom` for Unknown and `top` for the others), `test`, `validation`,
        `out_of_distribution` (test facts of relations held out) and one `train_<specification>` per arm.

    Raises:
        BadInput: an argument that cannot be, or too few facts (the message says how many there are).
    """
    specs = [spec for spec in dict.fromkeys(map(parse_arm, arms)) if spec.kind != "nothing"]
    if draw < 0:
        raise BadInput(f"draw={draw} is no number of a draw: count them from 0")
    within = ranked_within(within, controlled)
    _check_columns(facts, specs, by, within, match)
    _check_relations(facts, specs, held_out, n_held_out)
    table = _taking_part(facts, by, within)
    outside = table["relation"].isin(list(held_out))
    trainable = testable = pd.Series(True, index=table.index)
    if controlled:
        trainable, testable = by_modal_answer(table)
        if not (testable & ~outside).any():
            raise BadInput(
                "controlled: no fact is left to test, each has a most frequent answer of its relation: add facts "
                "with other answers",
                field="controlled",
            )
    cells = [name for name in match if name != "n_tokens" and by != "category"]
    levels = ("top", "bottom") if by == "category" else THIRDS
    test = draw_test(table[testable & ~outside], n_test, cells, levels, stream("test facts", seed))
    if n_held_out:
        unseen = table.index[testable & outside].to_numpy()
        if not 1 <= n_held_out <= len(unseen):
            raise BadInput(
                f"n_held_out={n_held_out} is not between 1 and the {len(unseen)} facts of the relations held out "
                f"({', '.join(held_out)}): ask for fewer or hold out more",
                field="n_held_out",
            )
        outsiders = stream("facts held out", seed).choice(unseen, n_held_out, replace=False)
        test = np.concatenate([test, outsiders])
    table["test"] = table.index.isin(test)
    table["out_of_distribution"] = table["test"] & outside
    name = table["subject"].fillna(table["fact_id"]).map(plain_name)
    apart = ~outside & ~name.isin(name[table["test"]])
    table["validation"] = False
    if n_validation:
        rng = stream("validation facts", seed)
        more = draw_test(table[testable & apart], n_validation, cells, levels, rng, "n_validation")
        table["validation"] = table.index.isin(more)
    left = table[trainable & apart & ~name.isin(name[table["validation"]])]
    chosen = _draw_arms(left, specs, n_train, match, (seed, draw))
    for arm in dict.fromkeys(arms):
        table[f"train_{arm}"] = table.index.isin(chosen.get(facts_of(arm), ()))
    return table.drop(columns=["_rank", "_size"])


def stream(what: str, seed: int, draw: int = 0) -> np.random.Generator:
    """The random numbers of one draw, which no other draw moves."""
    return np.random.default_rng([seed, draw, zlib.crc32(what.encode())])


def _check_columns(
    facts: pd.DataFrame, arms: Sequence[ArmSpec], by: str, within: Sequence[str], match: Sequence[str]
) -> None:
    for argument, names, allowed in (("within", within, WITHIN), ("match", match, MATCH)):
        if wrong := [name for name in names if name not in allowed]:
            raise BadInput(f"{argument}: {wrong[0]!r} is none of {', '.join(allowed)}", field=argument)
    needs_category = ["category" for arm in arms if arm.kind == "category"]
    for column in (by, *(name for name in match if name == "n_tokens"), *needs_category):
        if column not in facts:
            raise BadInput(
                f"facts lack the column {column!r}; they have {', '.join(map(str, facts))}",
                field="by" if column == by else "match" if column == "n_tokens" else "arms",
            )
    if by == "category" or needs_category:
        labels = facts["category"].dropna()
        if len(wrong_labels := labels[~labels.isin(CATEGORIES)]):
            raise BadInput(f"category {wrong_labels.iloc[0]!r} is none of {', '.join(CATEGORIES)}")
    if by != "category" and not pd.api.types.is_numeric_dtype(facts[by]):
        raise BadInput(f"by={by!r} is no column of numbers: rank by one, or by 'category'", field="by")
    if ranking := [arm.spec for arm in arms if by == "category" and arm.kind in ("top", "bottom")]:
        raise BadInput(
            f"arm {ranking[0]!r} needs facts in order, and by='category' gives none: use known, unknown, mixed-X% or "
            "a category, or rank by a number",
            field="arms",
        )


def _check_relations(facts: pd.DataFrame, arms: Sequence[ArmSpec], held_out: Sequence[str], n_held_out: int) -> None:
    if bool(held_out) != bool(n_held_out):
        raise BadInput(
            f"held_out={list(held_out)} and n_held_out={n_held_out}: name relations to hold out and how many of their "
            "facts to test, or neither",
            field="held_out",
        )
    relations = sorted(map(str, facts["relation"].unique()))
    for argument, names in (("held_out", held_out), *((f"arm {arm.spec!r}", arm.relations) for arm in arms)):
        if unknown := [name for name in names if name not in relations]:
            raise BadInput(
                f"{argument}: no relation {unknown[0]!r}; the relations are {', '.join(relations)}",
                field="held_out" if argument == "held_out" else "arms",
            )
        if argument != "held_out" and (both := [name for name in names if name in held_out]):
            raise BadInput(
                f"{argument}: relation {both[0]!r} is held out, so no arm trains on it: take out one of them",
                field="arms",
            )


def _taking_part(facts: pd.DataFrame, by: str, within: Sequence[str]) -> pd.DataFrame:
    """Facts with a third, by fact_id, and with `_rank` and `_size` of their group where facts are ranked."""
    table = facts.sort_values("fact_id", ignore_index=True)
    table["answer"] = first_answers(table)
    table["third"] = thirds_of(table, by, within)
    table[["_rank", "_size"]] = 0 if by == "category" else ranks(table, by, within)
    table = table[table["third"].notna()].reset_index(drop=True)
    if table.empty:
        few = f" in a group of three with the same {' and '.join(within)}" if facts[by].notna().any() else ""
        raise BadInput(
            f"none of the {len(facts)} facts has a {by}{few}: rank by another column"
            f"{' or within less' if few else '' if by == 'answer_logprob' else ', such as answer_logprob'}",
            field="within" if few else "by",
        )
    return table


def _draw_arms(
    left: pd.DataFrame, arms: Sequence[ArmSpec], n_train: int | None, match: Sequence[str], numbers: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Rows of every arm, by its specification; `numbers` are seed and draw."""
    if not arms:
        return {}
    if match and "relation" not in match and any(arm.kind == "unknown-in" for arm in arms):
        match = ("relation", *match)
    cell = cells_of(left, match)
    n_cells = cell.max() + 1 if len(cell) else 1
    pools = [[cell[_pool(part, left)] for part in arm.parts] for arm in arms]
    counts = [np.array([np.bincount(pool, minlength=n_cells) for pool in parts]) for parts in pools]
    pairs = zip(arms, counts, strict=True)
    room = np.array([own.min(axis=0) if match else [_largest(arm, *own[:, 0])] for arm, own in pairs])
    room //= np.array([[arm.times] for arm in arms])
    slots = room.min(axis=0)
    n = _size(arms, room, n_train, match)
    shared = _quotas(cell, slots, n, stream("quotas", *numbers)) if match else np.zeros(n, int)
    chosen = {}
    for arm, parts, most in zip(arms, pools, room.sum(axis=1), strict=True):
        own = -(-most * arm.share // 1) if arm.kind == "random" else most
        taken = np.zeros(int(own), int) if n_train is None and not match else np.repeat(shared, arm.times)
        wanted = [taken]
        if len(parts) == 2:
            unknown = np.zeros(len(taken), bool)
            mixing = stream(f"{arm.spec} shares", *numbers)
            unknown[mixing.choice(len(taken), int(arm.n_unknown(np.array(len(taken)))), replace=False)] = True
            wanted = [taken[~unknown], taken[unknown]]
        streams = [stream(arm.spec if part is arm else f"{arm.spec} {part.spec}", *numbers) for part in arm.parts]
        drawn = [_draw(pool, cells, own) for pool, cells, own in zip(parts, wanted, streams, strict=True)]
        chosen[arm.spec] = np.concatenate(drawn)
    return chosen


def _size(arms: Sequence[ArmSpec], room: np.ndarray, n_train: int | None, match: Sequence[str]) -> int:
    """Facts of an arm, where each has `room` `(arm, cell)`; BadInput where none, or not so many, can be had."""
    most, fewest = int(room.min(axis=0).sum()), room.sum(axis=1).argmin()
    if shares := [
        arm.spec for arm in arms if arm.kind == "random" and arm.share < 1 and (n_train is not None or match)
    ]:
        raise BadInput(
            f"arm {shares[0]!r} is a share of all facts, which n_train or match takes away: use random", field="arms"
        )
    if multiples := [arm.spec for arm in arms if arm.times > 1 and n_train is None and not match]:
        raise BadInput(
            f"arm {multiples[0]!r} is a multiple of n_train, and without it and match each arm takes all: set n_train",
            field="arms",
        )
    n = most if n_train is None else n_train
    if not 1 <= n <= most:
        times = f"{arms[fewest].times} times " if arms[fewest].times > 1 else ""
        equal, less = (f" with equal {', '.join(match)}", ", match on less") if match else ("", "")
        raise BadInput(
            f"n_train={'all' if n_train is None else n_train} is not between 1 and the {most} facts that each arm can "
            f"have{equal}; the scarcest is arm {arms[fewest].spec!r} "
            f"({times}{room[fewest].sum()} facts): ask for fewer{less} or leave it out",
            field="n_train",
        )
    return n


def _pool(arm: ArmSpec, table: pd.DataFrame) -> pd.Series:
    """Whether a fact may be drawn for an arm that is not mixed."""
    known, unknown = table["third"] == "top", table["third"] == "bottom"
    rank, size, (x, y) = table["_rank"], table["_size"], arm.share.as_integer_ratio()
    if arm.kind == "category":
        return table["category"] == arm.spec
    masks = {
        "known": known,
        "unknown": unknown,
        "top": rank * y >= size * (y - x),
        "bottom": rank * y < size * x,
        "unknown-in": unknown.where(table["relation"].isin(arm.relations), known),
    }
    return masks.get(arm.kind, known | True)


def _largest(arm: ArmSpec, *sizes: int) -> int:
    """Facts an arm can have of parts of these sizes; where it is mixed, at its exact share."""
    if len(sizes) == 1:
        return sizes[0]
    n = np.arange(sum(sizes) + 1)
    unknown = arm.n_unknown(n)
    return int(n[(n - unknown <= sizes[0]) & (unknown <= sizes[1])].max())


def _quotas(cell: pd.Series, slots: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Cells of `n` facts, in order, of as many in each cell as there are slots; the first of one order of all."""
    facts = np.sort(cell.to_numpy())
    number = pd.Series(facts).groupby(facts).cumcount().to_numpy()
    order = rng.permutation(len(facts))
    open_ = order[number[order] < slots[facts[order]]]
    return np.sort(facts[open_[:n]])


def _draw(pool: pd.Series, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of a pool (cell of each row), as many of every cell as are wanted (cell of each): the first of an order."""
    order = pool.loc[rng.permutation(pool.index.to_numpy())]
    quota = order.map(pd.Series(wanted, dtype=int).value_counts()).fillna(0)
    return order.index[order.groupby(order).cumcount() < quota].to_numpy()

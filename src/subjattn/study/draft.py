"""A first study for facts of one's own: sizes that their split can give, ways to ask them, arms that make sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml

from subjattn.errors import BadInput
from subjattn.evidence.intervals import MIN_FACTS
from subjattn.facts.given import answer_in_subject
from subjattn.facts.splits import split


MOST_TRAINED, MOST_TESTED, POOL = 256, 120, 5000
ENOUGH_TRAINED, ENOUGH_TESTED = 32, 24
_WITHIN = (("relation", "answer"), ("relation",))
_SCORES = 3
"""Random rankings that sizes are tried on, for the model's own is not known yet."""


class Sizes(NamedTuple):
    """What a split can give, whatever the ranking."""

    within: tuple[str, ...]
    n_train: int
    n_test: int


def sizes_of(facts: pd.DataFrame, seed: int = 0) -> Sizes:
    """Facts to train each of two arms on, and to test, so that the arms have the same answers as far as can be.

    Raises:
        BadInput: too few facts for two arms.
    """
    pool = facts.sample(min(len(facts), POOL), random_state=seed)
    rng = np.random.default_rng(seed)
    rankings = [pool.assign(answer_logprob=rng.permutation(len(pool)).astype(float)) for _ in range(_SCORES)]
    found = [Sizes(within, *_room(rankings, within)) for within in _WITHIN]
    enough = [size for size in found if size.n_train >= ENOUGH_TRAINED and size.n_test >= ENOUGH_TESTED]
    best = enough[0] if enough else max(found, key=lambda size: size.n_train)
    if not best.n_train:
        raise BadInput(
            f"{len(facts)} facts are too few to train two arms on: give more facts of a relation, or --adapter for a "
            "study without training"
        )
    return best


def _room(rankings: list[pd.DataFrame], within: tuple[str, ...]) -> tuple[int, int]:
    """The most training facts an arm can have beside as many test facts as there should be; 0 where there are none."""
    n_test = min(MOST_TESTED, len(rankings[0]) // 4) // 3 * 3
    while n_test >= 3:
        try:
            tables = [
                split(one, ["known", "unknown"], None, n_test, by="answer_logprob", within=within, match=within)
                for one in rankings
            ]
        except BadInput:
            n_test = n_test // 2 // 3 * 3
            continue
        fewest = min(int(table["train_known"].sum()) for table in tables)
        return min(MOST_TRAINED, fewest - fewest // 10), n_test  # another ranking may have room for fewer
    return 0, 0


def draft(
    facts: pd.DataFrame,
    source: str,
    styles: Mapping[str, str],
    *,
    model: str,
    adapter: str | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> str:
    """The YAML of a commented study.

    Args:
        facts: all facts of the source.
        source: its name or file.
        styles: how they are asked.
        model: the study's model, the arm `base`.
        adapter: tuned elsewhere, the arm `tuned`; without, arms `known` and `unknown` are trained.
        columns: of a file of one's own.
        seed: of every draw.

    Raises:
        BadInput: too few facts.
    """
    size, choices = None if adapter else sizes_of(facts, seed), bool(facts["choices"].notna().any())
    parts = [
        _head(source, model, seed, facts),
        _facts(facts, source, dict(columns or {}), size),
        "styles:   # ways to ask; every number is given for each of them",
        *(f"  {name}: {_text(text)}" for name, text in styles.items()),
        "",
        _arms(adapter, size, choices),
        _measures(choices),
        _claims(adapter),
    ]
    return "\n".join(parts)


def _text(value: object) -> str:
    flow = yaml.safe_dump(value, default_style='"', default_flow_style=True, allow_unicode=True, width=10**6)
    return flow.strip()


def _head(source: str, model: str, seed: int, facts: pd.DataFrame) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.partition(":")[2] or source).stem).strip("-._") or "study"
    counts = facts["relation"].value_counts()
    named = ", ".join(f"{' '.join(str(name).split())} ({n})" for name, n in counts[:6].items())
    more = f" and {len(counts) - 6} more" if len(counts) > 6 else ""
    return (
        f"# {len(facts)} facts of {source}; relations: {named}{more}.\n"
        "# Look it over with `subjattn check`, see what it takes with `subjattn plan`, run it with `subjattn run`.\n"
        f"name: {stem}\nmodel: {_text(model)}\nseed: {seed}\n"
    )


def _facts(facts: pd.DataFrame, source: str, columns: dict[str, str], size: Sizes | None) -> str:
    given = int(answer_in_subject(facts).sum())
    lines = ["facts:", f"  source: {_text(source)}"]
    if columns:
        lines.append(f"  columns: {_text(columns)}")
    if given:
        lines.append(f"  leave_out_given: false   # true leaves out the {given} facts whose name holds the answer")
    if size is None:
        lines.append(f"  n_test: {min(300, len(facts))}   # drawn at random; under {MIN_FACTS} nothing is decided")
        lines.append("  # trained_on: FILE   # facts that the adapter was tuned on: their subjects are left out")
        return "\n".join([*lines, ""])
    lines.append(f"  pool: {min(POOL, len(facts))}   # facts that the model ranks; others are left aside")
    same = " and ".join(size.within)
    listed = ", ".join(size.within)
    return "\n".join(
        [
            *lines,
            f"  n_train: {size.n_train}   # for each arm; about what the split can give, whatever the ranking",
            f"  n_test: {size.n_test}   # held out, in no arm; under {MIN_FACTS} nothing is decided",
            f"  # ranked by how likely the model itself finds the answer, among facts of the same {same};",
            f"  # every arm gets as many facts of each {same} as the other arms do",
            f"  split: {{by: answer_logprob, within: [{listed}], match: [{listed}]}}",
            "",
        ]
    )


def _arms(adapter: str | None, size: Sizes | None, choices: bool) -> str:
    if size is None:
        return f"arms:\n  base: {{}}   # the model as it is\n  tuned: {{adapter: {_text(adapter)}}}\n"
    return (
        "arms:\n"
        "  base: {}                  # the model as it is\n"
        "  known: {train: known}     # trained on the upper third of the ranking\n"
        "  unknown: {train: unknown} # on the lower third\n\n"
        "training:\n"
        "  epochs: 2\n"
        "  learning_rate: 5.0e-4\n"
        f"  batch_size: {min(32, size.n_train)}\n"
        "  lora_rank: 16\n"
        "  lora_alpha: 32\n\n"
        "replicates:\n"
        "  draws: 5   # each arm is trained on so many draws of its facts; under 3 nothing is decided\n"
        + ("" if choices else "  first_only: [patching, token_attention]   # figures need no more\n")
    )


def _measures(choices: bool) -> str:
    if choices:
        return "measures:\n  accuracy: {scorer: letters}\n  answer_logprob: {}\n"
    return (
        "measures:\n"
        "  accuracy: {scorer: answer_start}   # when an answer is right\n"
        "  answer_logprob: {}\n"
        "  attention_to_subject: {}\n"
        "  knockout: {}\n"
        "  patching: {pairs: 8}\n"
        "  token_attention: {facts: 4}\n"
    )


def _claims(adapter: str | None) -> str:
    pairs = [("tuned", "base")] if adapter else [("unknown", "known"), ("known", "base"), ("unknown", "base")]
    a, b = pairs[0]
    return (
        "contrasts:   # each the first arm minus the second\n"
        + "".join(f"  - [{first}, {second}]\n" for first, second in pairs)
        + "\n# Claims are written down when the study is first run; state yours before.\n"
        "# claims:\n"
        "#   - id: answers-fall\n"
        f"#     statement: The arm {a} answers fewer facts than {b}.\n"
        "#     measure: accuracy\n"
        f"#     arms: [{a}, {b}]\n"
        "#     direction: decrease\n"
        "#     smallest_effect: 0.05   # the smallest difference that matters\n"
    )

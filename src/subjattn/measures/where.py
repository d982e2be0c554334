"""Only the facts that a model knows: those it answers rightly, or those of a SliCK category."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.select import CATEGORIES
from subjattn.measures.answers import predict
from subjattn.models import LoadedModel, identity, read_labels
from subjattn.prompts import PromptSet


if TYPE_CHECKING:
    from subjattn.measures import Model
    from subjattn.measures.scoring import ScorerName

log = logging.getLogger(__name__)

CONDITIONS = ("correct", "known", *CATEGORIES)
_NEEDED = ("fact_id", "subject", "answers", "category", "model", "model_identity", "adapter", "adapter_identity")


def fits(label: object, condition: str) -> bool:
    """Whether a SliCK category is the one asked for; `known` is any but Unknown. A fact without a label is neither."""
    return label in CATEGORIES and label != "Unknown" if condition == "known" else label == condition


def where(
    prompts: PromptSet,
    condition: str,
    *,
    model: Model | None = None,
    scorer: ScorerName | None = None,
    knowledge: str | Path | None = None,
) -> PromptSet:
    """The prompts whose facts the model knows; how many of how many are left is logged.

    Args:
        prompts: facts asked in one style.
        condition: `correct`: the model's greedy answer is right, in this style; `known`: any SliCK category but
            Unknown; or a category, such as `HighlyKnown`.
        model: whom to ask (`correct`), or whose labels are expected (those of its base model will do).
        scorer: when an answer is right; None: `letters` where there are choices, else `answer_start`.
        knowledge: the `knowledge.parquet` that `subjattn knowledge` wrote, or `world:NAME`, for all but `correct`. A
            label counts where fact id and subject are the prompt's; facts without a label are left out and counted.

    Raises:
        BadInput: no such condition, no model or labels, labels of another model or of other facts, or no fact left.

    Example:
        >>> known = sa.where(prompts, "correct", model=model)
    """
    check_where(condition, knowledge)
    if condition == "correct":
        if model is None:
            raise BadInput("where 'correct' asks the model: give model=…")
        rule = scorer or ("letters" if prompts and prompts[0].choice_ids else "answer_start")
        found = predict(model, prompts, rule)
        keep, what = dict(zip(found["fact_id"], found["correct"], strict=True)), f"answered rightly ({rule})"
    else:
        labels = _labels(prompts, str(knowledge), model)
        keep = {fact: fits(label, condition) for fact, label in labels.items()}
        missing = len(prompts) - len(labels)
        what = f"{condition} by {knowledge}" + (f", {missing} have no label" if missing else "")
    left = tuple(prompt for prompt in prompts if keep.get(prompt.fact_id, False))
    if not left:
        raise BadInput(f"where {condition!r}: none of {len(prompts)} facts is left: {what}; ask more, or others")
    log.warning("where %s: %d of %d facts are left: %s", condition, len(left), len(prompts), what)
    return PromptSet(prompts.style, left)


def check_where(condition: str | None, knowledge: str | Path | None = None) -> None:
    """Refuse what `where` could not go by, before anything is computed; None is no condition."""
    if condition is None:
        if knowledge is not None:
            raise BadInput("knowledge labels facts: say which are wanted, such as where 'HighlyKnown'")
    elif condition not in CONDITIONS:
        raise BadInput(f"where {condition!r} is not one of {', '.join(CONDITIONS)}")
    elif condition == "correct" and knowledge is not None:
        raise BadInput("where 'correct' asks the model, and no labels: leave out the knowledge, or name a category")
    elif condition != "correct" and knowledge is None:
        raise BadInput(f"where {condition!r} needs the labels of a model: give knowledge, from `subjattn knowledge`")


def _labels(prompts: PromptSet, path: str, model: Model | None) -> dict[str, str]:
    """Categories by fact id, of the prompts that the file labels."""
    table = read_labels(path)
    if table is None:
        raise BadInput(f"no such file of labels: {path!r}: `subjattn knowledge` writes one")
    if missing := [name for name in _NEEDED if name not in table]:
        raise BadInput(f"{path}: has no column {missing[0]!r}: give the knowledge.parquet of `subjattn knowledge`")
    if table["fact_id"].duplicated().any():
        raise BadInput(f"{path}: labels a fact twice: it is not as `subjattn knowledge` wrote it")
    if isinstance(model, LoadedModel):
        _check_whose(table, path, model)
    rows = table.set_index("fact_id")
    labels = {}
    for prompt in prompts:
        if prompt.fact_id in rows.index:
            label: Any = rows.loc[prompt.fact_id]
            category, theirs_ours = label["category"], [(label["subject"] or "", prompt.subject)]
            for theirs, ours in [*theirs_ours, (" | ".join(label["answers"]), " | ".join(prompt.answers))]:
                if theirs != ours:
                    raise BadInput(
                        f"{path}: labels {theirs!r} as {prompt.fact_id}, and here that is {ours!r}: the facts have "
                        "changed, label them again"
                    )
            if isinstance(category, str):
                labels[prompt.fact_id] = category
    if not labels:
        raise BadInput(
            f"{path}: labels none of these {len(prompts)} facts, by their ids ({table['fact_id'].iloc[0]} there, "
            f"{prompts[0].fact_id} here): label these, or give both tables a column fact_id"
        )
    return labels


def _check_whose(table: pd.DataFrame, path: str, model: LoadedModel) -> None:
    """Refuse labels of another model, or of another adapter on it; its base model's are welcome."""
    own = {identity(model.name)}
    for first in (row for _, row in table.drop_duplicates(["model_identity", "adapter_identity"]).iterrows()):
        adapted = isinstance(first["adapter"], str)
        other = adapted and (model.adapter is None or identity(model.adapter) != first["adapter_identity"])
        if first["model_identity"] in own and not other:
            continue
        who = f"{first['model']!r}" + (f" with the adapter {first['adapter']!r}" if adapted else "")
        raise BadInput(f"{path}: says what {who} knows, and the model here is {model.name!r}: label the facts with it")

"""Look a study over without loading a model: what it will do, and whether its facts can be split and asked."""

from __future__ import annotations

import logging
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from subjattn.errors import BadInput, SpanNotFound
from subjattn.facts import SOURCES, path_of
from subjattn.facts.files import SUFFIXES
from subjattn.facts.given import answer_in_subject
from subjattn.facts.shuffle import taught
from subjattn.facts.splits import parse_arm
from subjattn.models import describe, load_tokenizer, model_shape, resolve_adapter, resolve_model
from subjattn.prompts import Style, example, make_prompts, notice_first, notice_relations, on_line, subject_lengths
from subjattn.study.arms import Arm
from subjattn.study.config import FactsConfig, StudyConfig
from subjattn.study.consistency import check_labels
from subjattn.study.plan_facts import split_settings
from subjattn.study.stages.pool import check_scorer, load_pool, source_of
from subjattn.study.stages.split import made, naming_fields, training_facts
from subjattn.worlds import is_world


log = logging.getLogger(__name__)


def check_study(config: StudyConfig) -> list[str]:
    """What the study will do, a line each.

    Files that another command makes may not be there yet; it says so.

    Raises:
        BadInput: the facts cannot be read or split as asked, or a style cannot ask them; the message says which.
    """
    if (shape := _shape(config.model)) is not None:
        check_labels(config, *shape)
    asked = config.facts
    size = "all an arm can have" if asked.n_train is None else f"{asked.n_train} an arm"
    train = f"{size} to train, " if config.trained else ""
    found, pool = _found(config)
    lines = [
        f"{config.name}: {_described(config.model)}, {config.dtype}, seed {config.seed}",
        f"facts: {asked.source}{found}; {train}{asked.n_test} to test, right by {config.scorer}",
        *(_shown(name, style, pool) for name, style in config.styles.items()),
    ]
    for name, path in (("knowledge", asked.knowledge), ("popularity", asked.popularity and asked.popularity.path)):
        if path:
            lines.append(f"facts.{name}: {path}{'' if _is_there(path) else ' (not there yet)'}")
    for name, arm in config.arms.items():
        _check_there(name, arm)
        model = f" of {arm.model}" if arm.model else ""
        said = ", ".join(f"{field} {value}" for field, value in (arm.training or {}).items())
        trained = f"trained on {arm.train}{model}" if arm.train else (arm.adapter or "untrained") + model
        trained += f", {said}" if said else ""
        if arm.of:
            trained = f"made of {arm.of}: " + (f"restore {arm.restore}" if arm.restore else f"mix {arm.mix}")
        lines.append(f"arm {name}: {trained}")
    lines += _ranking(config)
    many = config.replicates
    if config.trained:
        styles = ", ".join(config.training_styles())
        lines.append(f"replicates: {many.draws} draws × {many.seeds} seeds, trained in {styles}")
    lines.append(f"measures: {', '.join(config.measures)}")
    return [*lines, f"contrasts: {len(config.contrasts)}, claims: {len(config.claims)}; the study is valid"]


def _ranking(config: StudyConfig) -> list[str]:
    """What ranks facts for the arms that are trained on part of the ranking; a warning where popularity does."""
    split = config.facts.split
    specs = {name: parse_arm(spec) for name, spec in config.trained.items()}
    ranked = [name for name, spec in specs.items() if spec.by_knowledge or spec.kind in ("top", "bottom")]
    known = [name for name in ranked if specs[name].by_knowledge]
    if known and split.by == "popularity":
        log.warning(
            "note: %s are ranked by popularity, which need not be what the model knows: set facts.split.by to "
            "answer_logprob to rank by the base model itself",
            " and ".join(known),
        )
    within = ("relation",) if split.controlled else split.within
    among = f", among facts of the same {' and '.join(within)}" if within and split.by != "category" else ""
    said = ", the base model's log-probability of the answer" if split.by == "answer_logprob" else ""
    return [f"facts of {', '.join(ranked)}: ranked by {split.by}{said}{among}"] if ranked else []


def _shown(name: str, style: Style, pool: pd.DataFrame | None) -> str:
    """A style as the model sees it, where the facts are at hand."""
    typed = " (\\n is two characters here; in double quotes it is a line break)" if "\\n" in style.template else ""
    if pool is None:
        return on_line(f"style {name}: {style}") + typed
    notice_relations(style, pool)
    notice_first(style, pool)
    return f"style {name}: {example(style, pool)}{typed}"


def _check_there(name: str, arm: Arm) -> None:
    """Refuse models and adapters that are neither a folder nor a hub id."""
    try:
        if arm.model:
            resolve_model(arm.model)
        if arm.adapter and (Path(arm.adapter).is_dir() or arm.adapter.count("/") != 1):
            resolve_adapter(arm.adapter)
    except BadInput as error:
        field = f"arms.{name}.{'adapter' if arm.adapter else 'model'}"
        raise BadInput(f"{field}: {error}", field=field) from None


def _described(model: str) -> str:
    """What the model is, or its name alone where it is not at hand."""
    try:
        return describe(model)
    except BadInput:
        return f"{model} (not at hand)"


def _shape(model: str) -> tuple[int, int] | None:
    """Layers and heads of a model, where it is at hand."""
    try:
        return model_shape(model)
    except BadInput:
        return None


def _found(config: StudyConfig) -> tuple[str, pd.DataFrame | None]:
    """How many facts there are, and these, where they are at hand; they are split, and each style is tried on some."""
    asked = config.facts
    if not at_hand(asked):
        known = asked.source.partition(":")[0]
        if known not in SOURCES:
            source_of(asked)
        on_hub = asked.source == known and SOURCES[known].hub
        return " (on the hub, not looked at)" if on_hub else " (not there yet)", None
    present = {
        "knowledge": asked.knowledge and not _is_there(asked.knowledge),
        "popularity": asked.popularity and not Path(asked.popularity.path).is_file(),
    }
    usable = asked.model_copy(update=dict.fromkeys([name for name, missing in present.items() if missing]))
    facts = load_pool(usable, config.model, config.seed)
    for name, style in config.styles.items():
        for fact in facts.drop_duplicates("relation").to_dict("records"):
            try:
                style.demonstration(fact) if style.shots else style.body(fact)  # type: ignore[arg-type]
            except BadInput as error:
                raise BadInput(f"style {name!r}: {error}", field=f"styles.{name}") from None
    _try_chats(config, facts)
    check_scorer(facts, config.scorer == "letters")
    held_out = asked.split.held_out
    if missing := [name for name in (held_out.relations if held_out else []) if name not in set(facts["relation"])]:
        raise BadInput(
            f"facts.split.held_out: no relation {missing[0]!r} among the facts", field="facts.split.held_out.relations"
        )
    split = _try_split(config, facts, any(present.values()))
    relations = facts["relation"].nunique()
    many = f"{relations} relation{'s' if relations > 1 else ''}"
    return f", {len(facts)} in {many}{_given(facts)}{split}", facts


def _try_chats(config: StudyConfig, facts: pd.DataFrame) -> None:
    """Ask a fact in each style that is a chat, where the tokenizer is at hand: its template may refuse, or reason."""
    for name, style in config.styles.items():
        if style.chat:
            alone = Style.model_validate(style.model_dump(exclude={"shots", "demonstrations", "relation"}))
            try:
                tokenizer = load_tokenizer(config.model)
            except BadInput:
                return
            try:
                make_prompts(facts[:1], tokenizer, alone)
            except (BadInput, SpanNotFound) as error:
                raise BadInput(f"style {name!r}: {error}", field=f"styles.{name}") from None


def _is_there(table: str) -> bool:
    return is_world(table) or Path(table).is_file()


def _given(facts: pd.DataFrame) -> str:
    given = int(answer_in_subject(facts).sum())
    return f", {given} with their answer in the name (see facts.leave_out_given)" if given else ""


def _try_split(config: StudyConfig, facts: pd.DataFrame, incomplete: bool) -> str:
    """Make the split that the study will make, where no model has to say something first."""
    split = config.facts.split
    if incomplete or (split.held_out and split.held_out.farthest):
        return ", not split yet (a model or a file has to rank them first)"
    if asked_of_model := config.facts.scored:  # whatever the ranking, its thirds are as large
        facts = facts.assign(answer_logprob=np.random.default_rng(0).permutation(len(facts)).astype(float))
    if "n_tokens" in split.match:
        try:
            tokenizer = load_tokenizer(config.model)
        except BadInput:
            return ", not split yet (the model's tokenizer has to measure the names first)"
        lengths = subject_lengths(facts, tokenizer, next(iter(config.styles.values())))
        facts = facts.assign(n_tokens=lengths)
    settings = split_settings(config)
    table = made(facts, settings, None)
    for spec, number in product(settings["specs"], range(settings["draws"])):
        with naming_fields():
            taught(training_facts(table, spec, number), spec, config.seed, number)
    if asked_of_model:
        return ", can be split (once the model has ranked them)"
    trained = table.loc[table.filter(like="train_").any(axis=1), "relation"]
    tested = table.loc[table["test"] & ~table["out_of_distribution"], "relation"]
    missed = sorted({*tested} - {*trained}) if config.trained else []
    return f", split as asked{f', no arm trains on {missed[0]}, which is tested' if missed else ''}"


def at_hand(facts: FactsConfig) -> bool:
    """Whether the facts can be read without a network."""
    path = path_of(facts.source)
    own_file = Path(path).suffix.lower() in SUFFIXES
    made_here = facts.source == "cities" or is_world(facts.source)
    return made_here or (Path(path).exists() if path != facts.source else own_file)

"""Look a study over without a model: what it will do, and whether its facts can be asked."""

from __future__ import annotations

from pathlib import Path

from subjattn.errors import BadInput
from subjattn.facts import SOURCES, load_facts, own, path_of
from subjattn.study.choosing import only_relations
from subjattn.study.config import FactsConfig, StudyConfig


def check_study(config: StudyConfig) -> list[str]:
    """What the study will do, a line each.

    Files that another command makes may not be there yet; it says so.

    Raises:
        BadInput: the facts cannot be read, or a style cannot ask them; the message says which.
    """
    asked = config.facts
    size = "all an arm can have" if asked.n_train is None else f"{asked.n_train} an arm"
    train = f"{size} to train, " if config.trained else ""
    lines = [
        f"{config.name}: {config.model}, {config.dtype}, seed {config.seed}",
        f"facts: {asked.source}{_found(config)}; {train}{asked.n_test} to test, right by {config.scorer}",
        *(f"style {name}: {style}".replace("\n", "\\n") for name, style in config.styles.items()),
    ]
    for name, path in (("knowledge", asked.knowledge), ("popularity", asked.popularity and asked.popularity.path)):
        if path:
            lines.append(f"facts.{name}: {path}{'' if Path(path).is_file() else ' (not there yet)'}")
    for name, arm in config.arms.items():
        model = f" of {arm.model}" if arm.model else ""
        trained = f"trained on {arm.train}{model}" if arm.train else (arm.adapter or "untrained") + model
        lines.append(f"arm {name}: {trained}")
    return [*lines, f"contrasts: {len(config.contrasts)}, claims: {len(config.claims)}; the study is valid"]


def _found(config: StudyConfig) -> str:
    """How many facts there are, where they are at hand; each style is tried on a fact of each relation."""
    if not at_hand(config.facts):
        known = config.facts.source.partition(":")[0]
        if known not in SOURCES:
            load_facts(config.facts.source, columns=config.facts.columns or None)
        return (
            " (on the hub, not looked at)"
            if config.facts.source == known and SOURCES[known].hub
            else " (not there yet)"
        )
    facts = only_relations(
        load_facts(config.facts.source, columns=config.facts.columns or None), config.facts.relations
    )
    for name, style in config.styles.items():
        for fact in facts.drop_duplicates("relation").to_dict("records"):
            try:
                style.demonstration(fact) if style.shots else style.body(fact)  # type: ignore[arg-type]
            except BadInput as error:
                raise BadInput(f"style {name!r}: {error}") from None
    if (config.scorer == "letters") != bool(facts["choices"].notna().any()):
        raise BadInput(f"scorer {config.scorer!r} does not fit: 'letters' is for multiple choice, and for it alone")
    held_out = config.facts.split.held_out
    if missing := [name for name in (held_out.relations if held_out else []) if name not in set(facts["relation"])]:
        raise BadInput(f"facts.split.held_out: no relation {missing[0]!r} among the facts")
    return f", {len(facts)} in {facts['relation'].nunique()} relations"


def at_hand(facts: FactsConfig) -> bool:
    """Whether the facts can be read without a network."""
    path = path_of(facts.source)
    own_file = Path(path).suffix.lower() in own.SUFFIXES
    return facts.source == "cities" or (Path(path).exists() if path != facts.source else own_file)

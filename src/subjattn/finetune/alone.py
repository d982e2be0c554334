"""Fine-tune a model on a table of facts, without a study: what `subjattn finetune` does, as a function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from subjattn.digest import digest_of
from subjattn.errors import BadInput
from subjattn.facts import load_facts
from subjattn.finetune.card import write_card
from subjattn.finetune.examples import make_examples
from subjattn.finetune.fit import is_first_process
from subjattn.finetune.record import Lessons, Method, method_of
from subjattn.finetune.settings import Training
from subjattn.finetune.update import load_base
from subjattn.models.names import identity
from subjattn.prompts import Style, default_styles


if TYPE_CHECKING:
    import pandas as pd

KEPT = ".training"
"""Where a training that is killed goes on from, in the folder that it is to fill."""


def fine_tune(
    model: str,
    facts: pd.DataFrame,
    folder: str | Path,
    *,
    style: str | Style | Sequence[str | Style] | None = None,
    method: str = "sft",
    known: pd.DataFrame | None = None,
    validation: pd.DataFrame | None = None,
    dtype: str = "float32",
    seed: int = 0,
    about: str = "",
    on_step: Callable[[], None] = lambda: None,
    **settings: Any,
) -> Path:
    """Train a model on facts and write an ordinary peft folder, or a whole model, with a model card.

    A training that was killed goes on where it was when the same is asked for once more.

    Args:
        model: a name as `load_model` takes it.
        facts: a table with `subject` and `answer` (or `answers`), as `load_facts` gives it.
        folder: where the adapter or model goes; it must not hold one yet.
        style: how facts are asked, several taking turns; None: the built-in ways for their relation.
        method: see `subjattn finetune --list`.
        known: facts that the model knows, for methods that need them.
        validation: facts to stop by, with `stop="validation"`.
        dtype: as for `load_model`.
        seed: of initial weights and of the order of facts.
        about: a line on the facts, for the model card.
        on_step: called after every optimiser step.
        **settings: of the method: `learning_rate`, `epochs`, `weights`, `modules`, …

    Returns:
        The folder.

    Raises:
        BadInput: no such method or setting, a folder that is taken, facts that cannot be asked.
        TrainingDiverged: see `subjattn.finetune.fit`.
    """
    found, target = method_of(method), Path(folder)
    chosen = settings_of(found, settings)
    check_free(target)
    table = _table(facts)
    asked = styles_of(table, style)
    base = load_base(model, dtype, chosen)
    examples, more, judged = (
        [] if one is None else make_examples(_table(one), base.tokenizer, asked) for one in (table, known, validation)
    )
    seen = [[one.prompt.ids for one in its] for its in (examples, more, judged)]
    key = digest_of([identity(model), method, chosen.model_dump(mode="json"), dtype, seed, seen])[:12]
    kept = target / KEPT / key
    target.mkdir(parents=True, exist_ok=True)
    lessons = Lessons(examples, more, judged, seed, kept, on_step)
    found.train(base, lessons, chosen, target)
    if not is_first_process():
        return target
    write_card(target, base, found, chosen, asked, seed, about)
    shutil.rmtree(target / KEPT, ignore_errors=True)
    return target


def settings_of(method: Method, settings: dict[str, Any]) -> Training:
    """Settings of a method, checked; BadInput, in one line, where they cannot be."""
    try:
        return method.settings.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = str(first["msg"]).removeprefix("Value error, ")
        known = f"; method {method.name!r} has {', '.join(method.settings.model_fields)}"
        raise BadInput(f"{field}: {message}{known if first['type'] == 'extra_forbidden' else ''}") from None


def _table(facts: pd.DataFrame) -> pd.DataFrame:
    """Facts as they are read, of a table of one's own too."""
    return facts if {"fact_id", "answers"} <= set(facts.columns) else load_facts(facts)


def check_free(folder: Path) -> None:
    """Refuse a folder that holds anything but a training to go on with."""
    if folder.is_file() or (folder.is_dir() and any(path.name != KEPT for path in folder.iterdir())):
        raise BadInput(f"{str(folder)!r} is not empty: name a new folder, or empty it")


def styles_of(facts: pd.DataFrame, style: str | Style | Sequence[str | Style] | None) -> list[Style]:
    """Styles that facts are asked in, those given or their own."""
    if style is None:
        return [Style.of(text) for text in default_styles(facts).values()]
    return [Style.of(one) for one in ([style] if isinstance(style, str | Style) else style)]

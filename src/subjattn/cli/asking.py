"""What commands share that ask facts of a model: the facts drawn and shown, prompts of them, and the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subjattn.cli.app import check_output, show_styles, some_of, styles_of


if TYPE_CHECKING:
    import pandas as pd

    from subjattn.models import LoadedModel
    from subjattn.models.arms import Arms
    from subjattn.prompts import PromptSet


@dataclass(frozen=True)
class Asking:
    """Facts that are asked, and how.

    Attributes:
        table: the facts.
        styles: templates by name.
        where: only facts that the model knows, as `subjattn.where` takes it.
        knowledge: labels that say which it knows.
        leave_out_given: whether facts whose name holds the answer were left out.
    """

    table: pd.DataFrame
    styles: dict[str, str]
    where: str | None
    knowledge: Path | None
    leave_out_given: bool

    @property
    def options(self) -> dict[str, Any]:
        """As a file of results states them."""
        own = {"n": len(self.table), "where": self.where, "knowledge": self.knowledge and str(self.knowledge)}
        return own | {"leave_out_given": self.leave_out_given}

    def prompts(self, model: LoadedModel) -> Iterator[tuple[str, str, PromptSet]]:
        """Of each style its name, its template and its prompts."""
        from subjattn.measures.where import where as facts_where
        from subjattn.prompts import make_prompts

        for style, text in self.styles.items():
            prompts = make_prompts(self.table, model.tokenizer, text)
            if self.where is not None:
                prompts = facts_where(prompts, self.where, model=model, knowledge=self.knowledge)
            yield style, text, prompts


def check_files(json_: Path | None, figure: Path | None, where: str | None, knowledge: Path | None) -> None:
    """Refuse files that could not be written, and conditions that nothing could go by, before anything runs."""
    from subjattn.measures.where import check_where

    check_output(json_)
    if figure is not None:
        from subjattn.plots.drawing import check_file

        check_file(figure)
    check_where(where, knowledge)


def ask(
    facts: pd.DataFrame,
    n: int | None,
    usual: int,
    seed: int,
    template: list[str] | None,
    where: str | None,
    knowledge: Path | None,
    leave_out_given: bool,
) -> Asking:
    """Facts drawn, as many as `n` or the usual number, and shown as they are asked."""
    styles = styles_of(facts, template)
    table = some_of(facts, n, usual, seed, leave_out_given)
    show_styles(styles, table)
    return Asking(table, styles, where, knowledge, leave_out_given)


def model_or_arms(model: str, adapter: str | None, dtype: str, both: bool) -> LoadedModel | Arms:
    """A model, with its adapter if it has one; or `both`, the adapter's as an arm beside it."""
    from subjattn.models import load_model
    from subjattn.models.arms import load_arms

    if both:
        return load_arms(model, {"tuned": str(adapter)}, dtype=dtype)
    return load_model(model, adapter=adapter, dtype=dtype)

"""docs/measures.md and what the command line says, from the registry's records: `python tests/measures_page.py`."""

from __future__ import annotations

import json
from pathlib import Path

from subjattn.cli.described import WRITTEN, describe
from subjattn.measures.record import Measure, Quantity, Shape, measures


PAGE = Path(__file__).parent.parent / "docs" / "measures.md"
SHAPE = Shape(n_facts=100, n_layers=30, n_heads=9)
"""SmolLM2-135M's, asked 100 facts."""
NEEDS = {
    "subject": "facts that have a subject",
    "same_prompts": "prompts that are the same for every arm (no reasoning of its own)",
    "known": "which facts the reference model answers rightly",
    "swaps": "pairs of facts whose subjects can be swapped",
    "base": "a tuned model beside its base",
    "facts": "the facts beside their prompts, and others of the table",
    "trained": "the facts that the model was trained on",
    "reference": "in other arms of a study, what the reference model gave",
    "known_elsewhere": "which facts the reference model answers rightly in another style, where there is one",
}
HEAD = """# Measures

What each measure gives, what stands beside it, and **what it may and may not be read as**. This page is made from the
records of the registry (`python tests/measures_page.py`), so that `subjattn measure NAME --help` says the same. Every
measure runs on any model that the engine takes, by `subjattn measure NAME`, `sa.measure("NAME", model, prompts)`, in
`subjattn compare` and under `measures:` in a study; one of your own is one file ([extending](extending.md)).

A value that is not defined is NaN: means and contrasts leave the fact out and count it. A share is one mean over
another, and not defined where the interval of what it is a share of holds 0. *Passes* are forward passes of a prompt,
roughly, for 100 facts asked of SmolLM2-135M with the usual settings, by which many measures take some of these facts
alone. The smallest effect is the difference that matters where nobody says another; without one differences have
intervals and no verdicts.

No measure alone says which organ failed; the pattern does. Nats in particular go by how sure a model is: an arm with a
sharper distribution loses more whatever is done to it (`temperature`, and the forms that sureness cannot move).

**Where a fact is lost** takes several of them together, each asked of both arms. `patching` and `trace` say by role of
position where what the subject brought lies: at its last token, at words behind it, at the prediction. `knockout` by
window says in which layers the prediction reads it; `extraction` and `head_contributions`, where attention and MLPs
write the answer out of it; `logit_lens`, from where on the stream has it. Where an arm has as much as its base at the
subject's last token and less behind it, look for what moves it; where it has less there already, for what makes it
(`probe` and `transfer` at the subject ask the same in other ways). One of them alone does not say so. `mediation`
asks it of the answers that tuning lost, the base beside the tuned model.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(_section(one) for _, one in sorted(measures().items()) if built_in(one))])


def written() -> str:
    """What `subjattn measure` knows of the measures before it imports them."""
    lines = [json.dumps(describe(one), ensure_ascii=False) for one in measures().values() if built_in(one)]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def built_in(measure: Measure) -> bool:
    """Whether it is ours, and not that of a package that is installed beside us."""
    return measure.run.__module__.startswith("subjattn.")


def _section(measure: Measure) -> str:
    needs = "; ".join(words for name, words in NEEDS.items() if name in measure.needs)
    title = f"{measure.title[:1].upper()}{measure.title[1:].rstrip('?')}{'?' if measure.title.endswith('?') else '.'}"
    about = [
        title,
        f"Source: {measure.paper}." if measure.paper else "",
        f"Needs {needs}." if needs else "",
        _cost(measure),
    ]
    lines = [f"## `{measure.name}`", "", " ".join(filter(None, about))]
    if measure.quantities:
        lines += ["", "| quantity | unit | definition | smallest effect |", "|---|---|---|---|"]
        lines += [_row(quantity) for quantity in measure.quantities]
    lines += ["", f"- **Control.** {measure.control}", f"- **To be read as.** {measure.reads}"]
    return "\n".join([*lines, f"- **Not defined.** {measure.undefined}", ""])


def _cost(measure: Measure) -> str:
    passes = measure.cost(SHAPE, measure.settings.model_construct())
    return f"{passes:,.0f} passes." if passes else "Passes go by its settings."


def _row(quantity: Quantity) -> str:
    cells = f"; cells by {', '.join(quantity.cells)}" if quantity.cells else ""
    smallest = "–" if quantity.smallest_effect is None else f"{quantity.smallest_effect:g}"
    return f"| `{quantity.name}` | {quantity.unit} | {_bare(quantity.definition + cells)} | {smallest} |"


def _bare(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    WRITTEN.write_text(written(), encoding="utf-8")

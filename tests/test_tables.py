"""Tables on narrow terminals: numbers and verdicts stand whole, and have the signs that plots and power give them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from subjattn import tables
from subjattn.plots.verdicts import plot_claims


def shown(made: Any, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(made)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def claim(name: str, estimate: float, direction: str = "decrease") -> dict[str, Any]:
    found = {
        "estimate": estimate,
        "ci_low": estimate - 0.0123,
        "ci_high": estimate + 0.0123,
        "adjusted_ci_low": estimate - 0.02,
        "adjusted_ci_high": estimate + 0.02,
        "verdict": "no effect that matters",
        "scope": "this way of training",
        "n_facts": 120,
        "n_replicates": 5,
    }
    about = {"direction": direction, "against": 0.0, "smallest_effect": 0.005, "registered": False}
    return {"id": name, "styles": {"a long style": found}, **about}


numbers = st.floats(-9999, 9999).map(lambda value: f"{value:+.4f}\n[{value - 1:.3f}, {value + 1:.3f}]")


@given(
    rows=st.lists(st.tuples(st.text("abc_", min_size=1, max_size=40), st.lists(numbers, min_size=9, max_size=9))),
    columns=st.integers(1, 9),
    labels=st.integers(1, 2),
    width=st.integers(80, 160),
)
def test_no_number_is_cut(rows: list[tuple[str, list[str]]], columns: int, labels: int, width: int) -> None:
    made = tables.table("means", labels)
    for heading in [*"ab"[:labels], *(f"a_long_heading_{i}" for i in range(columns))]:
        made.add_column(heading)
    for name, cells in rows:
        made.add_row(*[name] * labels, *cells[:columns])
    text = shown(made, width)
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    words = text.split()
    for _, cells in rows:
        assert all(word in words for cell in cells[:columns] for word in cell.split())


@pytest.mark.parametrize("width", [80, 100, 200])
def test_claims_stand_whole(width: int) -> None:
    name = "attention_to_the_subject_falls_in_the_middle_layers"
    text = shown(tables.claims_table({"claims": [claim(name, -0.0123), claim("b", 0.5)]}), width)
    assert (
        {"effect", "matters"} <= set(text.split())
        and "-0.0123" in text
        and "[-0.0246, +0.0000]" in text
        and "…" not in text
    )
    assert name in text or width < 200


def test_one_number_has_one_sign() -> None:
    """In the table, in the plot, and where power is told."""
    one = claim("falls", -0.01)
    assert "-0.0100" in shown(tables.claims_table({"claims": [one]}), 80)
    assert plot_claims([one]).data[2].x[0] == pytest.approx(-2)
    row = {"claim": "falls", "style": "s", "verdict": "undecided", "scope": "x", "needs": "", "curve": {3: {60: 0.5}}}
    (made,) = tables.power_tables([row | {"estimate": -0.01, "direction": "decrease", "smallest_effect": 0.005}])
    assert "-0.0100 (claimed: decrease" in " ".join(shown(made, 80).split())


def test_a_wide_terminal_has_one_table() -> None:
    made = tables.table("means")
    for heading in ("quantity", *(f"arm{i}" for i in range(9))):
        made.add_column(heading)
    made.add_row("accuracy", *["0.123\n[-0.012, 0.345]"] * 9)
    assert shown(made, 200).count("accuracy") == 1 and shown(made, 80).count("accuracy") == 3

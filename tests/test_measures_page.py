"""docs/measures.md says what the registry's records say, and these say all that a reader needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import measures_page
import pytest
from typer.testing import CliRunner

from subjattn.cli.app import app
from subjattn.measures.record import Need, measures


OURS = {name: one for name, one in measures().items() if measures_page.built_in(one)}


def test_the_page_is_what_the_registry_gives() -> None:
    shown = measures_page.PAGE.read_text(encoding="utf-8")
    assert shown == measures_page.page(), "make it anew: python tests/measures_page.py"


def test_what_the_command_line_says_is_what_the_registry_gives() -> None:
    written = measures_page.WRITTEN.read_text(encoding="utf-8")
    assert written == measures_page.written(), "make it anew: python tests/measures_page.py"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["measure", "knockout", "--help"], "--window"),
        (["measure", "--list"], "knockout: "),
        (["measure", "knockout", "--modle", "x"], "No such option: --modle"),
        (["measure", "knockout", "--window", "x"], "Invalid value for '--window'"),
        (["measure", "knockuot"], "did you mean 'knockout'?"),
        (["compare", "--hepl"], "No such option: --hepl"),
        (["probe", "--help"], "--figure"),
    ],
)
def test_help_and_mistakes_import_no_torch(words: list[str], said: str) -> None:
    code = "import sys; from subjattn.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    shell = dict(os.environ) | {"COLUMNS": "200"}
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=shell, check=False)
    assert said in found.stdout + found.stderr and found.stderr.endswith("False\n")


@pytest.mark.parametrize("name", OURS)
def test_every_measure_says_its_control_how_to_read_it_and_when_it_is_not_defined(name: str) -> None:
    measure = OURS[name]
    for field in ("control", "reads", "undefined"):
        text = getattr(measure, field)
        assert text.endswith("."), f"{field}: {text!r}"
    assert "ot" in measure.reads, "what it may not be read as"


def test_measures_and_quantities_that_are_named_exist() -> None:
    import subjattn as sa

    quantities = {quantity.name for one in OURS.values() for quantity in one.quantities}
    for name, one in OURS.items():
        for word in re.findall(r"`([a-z_]+)`", " ".join((one.control, one.reads, one.undefined))):
            settings = one.settings.model_fields
            values = {str(value) for field in settings.values() for value in _choices(field.annotation)}
            known = {*OURS, *quantities, *settings, *values, *sa.__all__, *ELSEWHERE}
            assert word in known, f"{name} names {word!r}"


ELSEWHERE = {"shuffled", "given_others", "undefined_shock", "q", "k", "pattern"}
"""An arm's training, attributes of an array, and components of `transfer`."""


def _choices(annotation: object) -> tuple[object, ...]:
    return getattr(annotation, "__args__", ())


def test_every_need_is_said_in_words() -> None:
    assert set(measures_page.NEEDS) == set(Need.__args__)


def test_help_says_how_a_measure_is_read() -> None:
    found = CliRunner().invoke(app, ["measure", "knockout", "--help"], env={"COLUMNS": "200"})
    shown = " ".join(found.output.split())
    assert "Not how much attention there is" in shown
    assert "as many other edges of the same queries" in shown
    assert "Not defined: direct_share of facts" in shown

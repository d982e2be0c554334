"""Errors of a study name the line where the field stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from subjattn.errors import BadInput, WrongFields
from subjattn.study.lines import lines_of
from subjattn.study.read import load_study


KEY = st.text(st.sampled_from("abcd"), min_size=1, max_size=3)
DATA = st.dictionaries(
    KEY,
    st.recursive(
        st.integers() | st.text("xy\n", max_size=5),
        lambda below: st.lists(below, max_size=3) | st.dictionaries(KEY, below, max_size=3),
        max_leaves=8,
    ),
    min_size=1,
)


def leaves(data: object, above: tuple = ()) -> list[tuple]:
    if isinstance(data, dict):
        return [path for name, below in data.items() for path in ((*above, name), *leaves(below, (*above, name)))]
    if isinstance(data, list):
        return [path for i, below in enumerate(data) for path in ((*above, i), *leaves(below, (*above, i)))]
    return []


@given(data=DATA, flow=st.sampled_from([None, False, True]))
def test_every_field_has_its_line(data: dict, flow: bool | None) -> None:
    """Cut off before its line a text lacks the field; cut off behind it, it has begun."""
    text = yaml.safe_dump(data, default_flow_style=flow, sort_keys=False)
    lines = lines_of(text, "s.yaml")
    assert sorted(lines.numbers, key=str) == sorted(leaves(data), key=str)
    for path, number in lines.numbers.items():
        if isinstance(path[-1], str):
            assert path[-1] in text.splitlines()[number - 1]
        assert lines.at((*path, "more", 3)) == f"s.yaml:{number}", "what is not there lies in what is"
    order = [lines.numbers[path] for path in leaves(data)]
    assert order == sorted(order), "a document reads downward"


def test_a_field_that_stands_twice_is_refused() -> None:
    """YAML would take the last without a word."""
    with pytest.raises(BadInput) as caught:
        lines_of("name: x\nfacts:\n  n_test: 3\n  n_test: 9\n", "s.yaml")
    assert str(caught.value) == "s.yaml:4: facts.n_test: stands on line 3 already: keep one of them"


def test_several_errors_are_listed_together(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("name: s\nseed: -1\nfacts:\n  n_test: 0\n  ntrain: 3\nstyle: {list: late}\narms: {base: {}}\n")
    with pytest.raises(WrongFields) as caught:
        load_study(path, ["replicates.draws=0"])
    assert str(caught.value).splitlines() == [
        "--set replicates.draws=0: replicates.draws: Input should be greater than 0, not '0'",
        f"{path}:2: seed: Input should be greater than or equal to 0, not '-1'",
        f"{path}:4: facts.n_test: Input should be greater than 0, not '0'",
        f"{path}:5: facts.ntrain: no such field; did you mean 'n_train'?",
        f"{path}:6: style: no such field, and 'styles' is missing: did you mean that?",
    ]

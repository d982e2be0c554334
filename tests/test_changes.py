"""A run says what it makes anew, and why, before it does; an interrupted one that it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_run import CHAIN, made, stage

from subjattn import cli
from subjattn.errors import BadInput
from subjattn.run.changes import replaced
from subjattn.run.folder import RECORD, Folder
from subjattn.run.plan import Plan, Stage
from subjattn.run.schedule import execute
from subjattn.study.opened import opened


def test_a_finished_run_says_nothing(tmp_path: Path) -> None:
    assert replaced(Plan(CHAIN), Folder(tmp_path)) == [], "there is nothing to replace"
    made(Plan(CHAIN), tmp_path)
    assert replaced(Plan(CHAIN), Folder(tmp_path)) == []
    assert replaced(Plan([*CHAIN, stage("d", "a")]), Folder(tmp_path)) == [], "a further stage replaces none"


def test_the_setting_that_changed_is_named(tmp_path: Path) -> None:
    made(Plan(CHAIN), tmp_path)
    other = Plan([CHAIN[0], stage("b", "a", number=11), CHAIN[2]])
    assert replaced(other, Folder(tmp_path)) == [
        "made anew: b: number was 10, is now 11",
        "made anew: 1 more finished stage, unless what it is made from comes out as it was",
    ]
    made(other, tmp_path)
    assert replaced(other, Folder(tmp_path)) == []


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"settings": {"number": 1, "of": {"x": 2, "y": [1]}}}, "of.y was null, is now [1]"),
        ({"settings": {"number": 1}}, 'of was {"x": 2}, is now null'),
        ({"external": {"facts": "b"}}, "facts is another now"),
        ({"version": 2}, "this version makes it another way"),
        ({"threads": 2}, "threads was 1, is now 2"),
    ],
)
def test_every_kind_of_change_is_named(tmp_path: Path, other: dict, why: str) -> None:
    first = {"settings": {"number": 1, "of": {"x": 2}}, "external": {"facts": "a"}, "device": True, "version": 1}
    made(Plan([Stage("a", "works:add", **first)]), tmp_path)
    changed = first | {name: of for name, of in other.items() if name != "threads"}
    plan = Plan([Stage("a", "works:add", **changed)], other.get("threads", 1))
    assert replaced(plan, Folder(tmp_path)) == [f"made anew: a: {why}"]


def test_lines_are_few_and_old_records_are_no_riddle(tmp_path: Path) -> None:
    many = [stage(f"s{i}", number=i) for i in range(20)]
    made(Plan(many), tmp_path)
    same = replaced(Plan([stage(f"s{i}", number=i, more=1) for i in range(20)]), Folder(tmp_path))
    assert same == ["made anew: 20 finished stages of works: more was null, is now 1"]
    apart = replaced(Plan([stage(f"s{i}", number=i, more=i) for i in range(20)]), Folder(tmp_path))
    assert len(apart) <= 8 and apart[-1] == "made anew: more for 14 other reasons"
    record = json.loads((tmp_path / "s1" / RECORD).read_text())
    (tmp_path / "s1" / RECORD).write_text(json.dumps({name: of for name, of in record.items() if name != "settings"}))
    lines = replaced(Plan([stage("s1", number=5)]), Folder(tmp_path))
    assert lines == ["made anew: s1: its settings are not those it was made with"]


def test_finished_results_of_a_changed_study_are_replaced_on_demand_alone(tmp_path: Path) -> None:
    """And they lie aside until their successors are whole, whatever stops the run between."""
    plan, other = Plan(CHAIN), Plan([CHAIN[0], stage("b", "a", number=11), CHAIN[2]])
    made(plan, tmp_path)
    with opened(tmp_path, lambda: other, None):
        pass
    (tmp_path / "summary.json").write_text("old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with (
        pytest.raises(
            BadInput, match=r"finished results of another study \(b: number was 10, is now 11\): .*--replace"
        ),
        opened(tmp_path, lambda: other, None),
    ):
        pass
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for further in (plan, Plan([*CHAIN, stage("d", "a")])):
        with opened(tmp_path, lambda further=further: further, None):
            pass
    with (
        pytest.raises(KeyboardInterrupt),
        opened(tmp_path, lambda: other, None, replace=True) as (_, folder, progress),
    ):
        execute(other, folder, progress)
        raise KeyboardInterrupt
    assert (tmp_path / "previous" / "summary.json").read_text() == "old"
    with pytest.raises(BadInput, match="--replace"), opened(tmp_path, lambda: plan, None):
        pass


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["run", "x.yaml"], "interrupted: what is finished is kept, and the same command goes on from there"),
        (["report", "x"], "interrupted"),
    ],
)
def test_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["subjattn", *command])
    monkeypatch.setattr("subjattn.study.read.load_study", stop)
    monkeypatch.setattr("subjattn.report.page.write", stop)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130 and capsys.readouterr().err == f"error: {said}\n"

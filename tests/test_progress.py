"""Progress lines: shares, what is skipped, and an estimate."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from subjattn import progress
from subjattn.run.plan import Stage


def test_shares_and_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 units 50 are found finished and 10 take 10 seconds: 40 seconds are left."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress.Progress(Console(file=out, width=100)) as bar:
        bar.stage("look")
        clock[0] = 100.0
        bar.plan(100)
        bar.skip(50)
        clock[0] = 110.0
        bar.advance(10)
        bar.stage("work")
        bar.advance(40)
        bar.stage("end")
    first, *_, work, end = out.getvalue().splitlines()
    assert first == "[  0% 0:00] look (estimating …)"
    assert work == "[ 60% 1:50] work (about 0:40 left)"
    assert end == "[100% 1:50] end (about 0:00 left)"


def test_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with progress.Progress(Console(file=out, force_terminal=True, width=100)) as bar:
        bar.plan(10)
        bar.stage("measure base (list)")
        bar.advance(5)
    assert "measure base (list)" in out.getvalue()
    assert "50%" in out.getvalue()


def test_stages_at_a_time_are_named_and_those_reused_do_not_count_for_the_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 100 units 60 are reused; in 25 seconds a quarter of one stage and all of another are done: 15 seconds left."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stages = {name: Stage(name, "works:add", cost=cost) for name, cost in {"a": 60.0, "b": 20.0, "c": 20.0}.items()}
    out = io.StringIO()
    with progress.Progress(Console(file=out, width=100)) as bar:
        bar.planned(list(stages.values()))
        bar.reused(stages["a"])
        clock[0] = 50.0
        bar.started(stages["b"])
        bar.started(stages["c"])
        bar.advanced(stages["c"], 25.0)
        clock[0] = 75.0
        bar.advanced(stages["b"], 5.0)
        assert bar.remaining() == "about 0:15 left", "no more than its cost counts before a stage ends"
        bar.ended(stages["b"])
        bar.note("a worker was slow")
    shown = out.getvalue().splitlines()
    assert shown[0] == "[ 60% 0:50] b (estimating …)" and shown[-1] == "a worker was slow"
    assert shown[-2] == "[ 85% 1:15] b, c (about 0:15 left)"
    assert bar.remaining() == "about 0:00 left"

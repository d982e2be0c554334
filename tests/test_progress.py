"""Progress lines: shares, what is skipped, and an estimate."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from subjattn import progress


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

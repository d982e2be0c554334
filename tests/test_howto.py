"""The pages of docs/howto: every block is run, in one folder, and prints what the page shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pages
import pandas as pd
import pytest

from subjattn.facts.splits import CATEGORIES


HOWTO = pages.ROOT / "docs" / "howto"
ORDER = (
    "compare",
    "tables",
    "templates",
    "own-study",
    "heads",
    "probing",
    "known-facts",
    "figures",
    "other-tools",
    "models",
)
"""The adapter and the run of the first are used by others."""


def test_every_page_is_linked_and_in_order() -> None:
    assert {path.stem for path in HOWTO.glob("*.md")} == set(ORDER)
    readme = (pages.ROOT / "README.md").read_text()
    assert all(f"docs/howto/{name}.md" in readme for name in ORDER)
    for page in HOWTO.glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        assert len(page.read_text().splitlines()) <= 110, f"{page.name} is a screen or two"


@pytest.mark.slow
def test_pages_print_what_they_show(tmp_path: Path) -> None:
    for name in ("experiments", "viz"):
        (tmp_path / name).symlink_to(pages.ROOT / name)
    chrome = any(map(shutil.which, ("chromium", "google-chrome", "chrome")))
    for name in ORDER:
        if name == "figures" and not chrome:
            continue
        page, names = HOWTO / f"{name}.md", dict[str, object]()
        for language, code, shown in pages.pairs(page):
            printed = pages.run(language, code, tmp_path, names)
            if shown is not None:
                assert not (missing := pages.differences(shown, printed)), f"{name}: {missing}\n{printed}"
    if not chrome:
        pytest.skip("no Chrome or Chromium: the page on figures was not run, all others were")


@pytest.mark.slow
def test_the_readmes_commands_run_and_its_numbers_are_theirs(tmp_path: Path) -> None:
    """All but make; an adapter made here stands in for the demo's."""
    (tmp_path / "experiments").symlink_to(pages.ROOT / "experiments")
    adapter = tmp_path / "runs" / "cities" / "arms" / "unknown" / "draw0-seed0" / "adapter"
    pages.run("sh", f"python experiments/tune_elsewhere.py experiments/capitals.csv {adapter}", tmp_path, {})
    readme = pages.ROOT / "README.md"
    commands = [
        line
        for language, code in pages.blocks(readme)
        if language == "sh"
        for line in code.splitlines()
        if line.startswith("subjattn ")
    ]
    assert len(commands) >= 5
    for command in commands:
        pages.run("sh", command, tmp_path, {})
    for language, code in pages.blocks(pages.ROOT / "docs" / "across-models.md"):
        pages.run(language, code, tmp_path, {})
    (labels,) = (tmp_path / "runs" / "knowledge").glob("knowledge.parquet")
    counts = pd.read_parquet(labels)["category"].value_counts()
    pattern = r"(\d+) cities HighlyKnown, (\d+) MaybeKnown, (\d+) WeaklyKnown and (\d+)\s+Unknown"
    told = re.search(pattern, readme.read_text())
    assert told is not None
    found = [int(counts[name]) for name in CATEGORIES]
    assert [int(one) for one in told.groups()] == pytest.approx(found, abs=3), "sampling differs between machines"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("accuracy 0.333 n 24", "accuracy   0.334  n 24", True),
        ("accuracy 0.333", "accuracy 0.383", False),
        ("accuracy 0.333", "logprob 0.333", False),
        ("about 0:14 (2 workers)", "about 1:02 (2 workers)", True),
        ("a\n…\nc", "a\nb\nb\nc", True),
        ("a\nc", "a\nb\nc", False),
        ("a\nb", "a", False),
        ("a", "a\nb", False),
        ("a\n…", "a\nb", True),
        ("", "", False),
        ("+0.0050 rises", "-0.0050 rises", False),
        ("+0.0050 rises", "+0.0051 rises", True),
    ],
)
def test_pages_are_held_against_what_is_printed(shown: str, printed: str, same: bool) -> None:
    assert (not pages.differences(shown, printed)) == same

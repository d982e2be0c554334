"""Pages of documentation as programs: their blocks are run in order, and what they print is what the page shows.

A `sh` or `python` block that a `text` block follows prints what that shows: words as they stand, numbers within
rounding, durations and numbers of workers whatever they are; a line of `…` stands for any lines. `python pages.py
--write PAGE FOLDER` runs a page in a folder and writes what came out into its `text` blocks.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?")
_MACHINE = re.compile(r"\b\d+:\d\d(?::\d\d)?\b|\d+ workers? \(.*\)")
_SPACES = re.compile(r"[ ─━]+")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def run(language: str, text: str, folder: Path, names: dict[str, object]) -> str:
    """What a block prints, run in a folder; Python blocks of a page share `names`.

    RuntimeError, with what it printed, where a command fails.
    """
    if language == "python":
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(text, "page", "exec"), names)
        return printed.getvalue()
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": "100",
    }
    command = ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}\n{text}\n{done.stdout}\n{done.stderr[-3000:]}")
    return done.stdout


def pairs(page: Path) -> list[tuple[str, str, str | None]]:
    """Blocks that are run, each with what it should print where the page shows it."""
    found, every = [], blocks(page)
    for (language, text), after in zip(every, [*every[1:], ("", "")], strict=True):
        if language in ("sh", "python"):
            found.append((language, text, after[1] if after[0] == "text" else None))
    return found


def differences(shown: str, printed: str) -> list[str]:
    """Lines that a page shows and that were not printed in this order; empty where all were."""
    left = iter(printed.splitlines())
    lines = [line for line in shown.splitlines() if line.strip()]
    missing = [] if lines else ["nothing is shown"]
    for i, line in enumerate(lines):
        if line.strip() == "…":
            continue
        loose = i > 0 and lines[i - 1].strip() == "…"
        for other in left:
            if not other.strip():
                continue
            if same(line, other):
                break
            if not loose:
                missing.append(f"{line!r} is shown, {other!r} printed")
                break
        else:
            missing.append(f"{line!r} is shown and not printed")
    more = [line for line in left if line.strip()] if lines and lines[-1].strip() != "…" else []
    return [*missing, *(f"{line!r} is printed and not shown" for line in more)]


def same(shown: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers that differ by rounding at most."""
    texts = [_MACHINE.sub("·", line) for line in (shown, printed)]
    words = [_SPACES.sub(" ", _NUMBER.sub("#", text)).strip() for text in texts]
    numbers = [_NUMBER.findall(text) for text in texts]
    return words[0] == words[1] and all(close(*pair) for pair in zip(*numbers, strict=True))


def close(shown: str, printed: str) -> bool:
    """Whether two numbers differ by two in the last digit shown, or by 1 %, at most."""
    a, b = (float(one.replace("−", "-")) for one in (shown, printed))
    return abs(a - b) <= max(2.01 * 10.0 ** -len(shown.partition(".")[2]) if "." in shown else 0, 0.01 * abs(a))


def write(page: Path, folder: Path) -> None:
    """Run a page's blocks and write what they print into the `text` blocks behind them."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for language, code, shown in pairs(page):
        printed = run(language, code, folder, names)
        if shown is not None and "…\n" not in shown:
            text = text.replace(f"```{language}\n{code}```", "\0", 1)
            before, after = text.split("\0", 1)
            after = after.replace(f"```text\n{shown}```", "```text\n" + trimmed(printed) + "```", 1)
            text = f"{before}```{language}\n{code}```{after}"
    page.write_text(text, encoding="utf-8")


def trimmed(printed: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())


if __name__ == "__main__":
    assert sys.argv[1] == "--write"
    write(Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve())

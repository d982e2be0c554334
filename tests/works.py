"""Works of stages without models, for the tests of plans; importable by name in other processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subjattn.errors import BadInput


def add(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    """The sum of its inputs and of `number`, as text; a line of `diary` for every time it ran."""
    total = settings.get("number", 0) + sum(int(path.read_text()) for path in inputs.values())
    if "diary" in settings:
        with Path(settings["diary"]).open("a") as file:
            file.write(f"{os.getpid()} {total}\n")
    context.tell(1.0)
    time.sleep(settings.get("seconds", 0))
    (out / "sum.txt").write_text(str(total))


running: list[str] = []


def alone(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    """How many of its kind run in this process while it does."""
    running.append(str(out))
    time.sleep(0.05)
    (out / "sum.txt").write_text(str(len(running)))
    running.remove(str(out))


def parity(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    """Whether the input is odd: often the same when the input is not."""
    (out / "sum.txt").write_text(str(int(inputs["a"].read_text()) % 2))


def refuse(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    (out / "half.txt").write_text("half")
    raise BadInput("this cannot be right: ask for something else")


def crash(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    raise ZeroDivisionError("a mistake of ours")


def die(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hungry(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    """Runs out of the device's memory unless it takes half."""
    import torch

    if context.memory_share > settings["fits"]:
        raise torch.OutOfMemoryError("CUDA out of memory")
    (out / "sum.txt").write_text(str(context.memory_share))


def full(settings: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, context: Any) -> None:
    raise OSError(28, "No space left on device", str(out / "array.nc"))

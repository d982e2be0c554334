"""What a run is about to make anew although it is finished, and which of its settings changed; said before it does."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from subjattn.run.folder import Folder
from subjattn.run.plan import Plan, Stage


MOST = 8
"""Lines at most."""


def replaced(plan: Plan, folder: Folder) -> list[str]:
    """A line for every kind of stage that is there and will be made anew, with what changed.

    Stages that wait for others, and may come out as they were, are counted in a last line.
    """
    states, reasons, waiting = folder.states(plan), defaultdict[tuple[str, str], list[str]](list), 0
    for stage in plan:
        record = folder.record(stage.name)
        if record is None or states[stage.name] == "finished":
            continue
        if states[stage.name] == "waiting":
            waiting += 1
        elif why := _why(stage, record, plan.threads):
            reasons[stage.work.partition(":")[0].rpartition(".")[2], why].append(stage.name)
    lines = [
        f"made anew: {names[0] if len(names) == 1 else f'{len(names)} finished stages of {kind}'}: {why}"
        for (kind, why), names in reasons.items()
    ]
    if len(lines) >= MOST:
        lines = [*lines[: MOST - 2], f"made anew: more for {len(lines) - MOST + 2} other reasons"]
    if lines and waiting:
        more = "1 more finished stage, unless what it is" if waiting == 1 else f"{waiting} more, unless what they are"
        lines.append(f"made anew: {more} made from comes out as it was")
    return lines


def _why(stage: Stage, record: Mapping[str, Any], threads: int) -> str:
    """What changed since a stage was made; nothing where its own recipe is as it was."""
    if record["recipe"] == stage.recipe(threads):
        return ""
    if "settings" not in record:
        return "its settings are not those it was made with"
    changed = [
        f"{name} was {_shown(old)}, is now {_shown(new)}"
        for name, old, new in _differences(record["settings"], json.loads(json.dumps(dict(stage.settings))))
    ]
    before, now = record["external"], dict(stage.external)
    changed += [f"{role} is another now" for role in sorted({*before, *now}) if before.get(role) != now.get(role)]
    if stage.device and record["threads"] != threads:
        changed.append(f"threads was {record['threads']}, is now {threads}")
    return "; ".join(changed[:3]) + ("; …" if len(changed) > 3 else "") or "this version makes it another way"


def _differences(old: Any, new: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(name), new.get(name), f"{above}.{name}" if above else name)
    elif old != new:
        yield above, old, new


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"

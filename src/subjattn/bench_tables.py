"""What `subjattn bench` shows in a terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from subjattn.tables import table


def bench_table(found: dict[str, Any]) -> Table:
    cells = f"{found['cells']:,} cells ({found['skipped_cells']:,} dead ones skipped)"
    tokens = f"{found['prompts']} prompts, {min(found['tokens'])}–{max(found['tokens'])} tokens each"
    made = table(f"{found['grid']}, {found['metric']}: {cells}\n{tokens}")
    for heading in ("side", "seconds", "spread", "× engine", "largest difference"):
        made.add_column(heading, justify="left" if heading == "side" else "right")

    def add(name: str, seconds: float, spread: list[float] | None, gap: float | None = None) -> None:
        low_high = "" if spread is None else f"{spread[0]:.3f}–{spread[1]:.3f}"
        ratio = f"{seconds / found['ours_s']:.2f}"
        made.add_row(name, f"{seconds:.3f}", low_high, ratio, "" if gap is None else f"{gap:.1e}")

    add("engine", found["ours_s"], found["ours_spread_s"])
    add(f"floor at {found['matrix_gflops']:.0f} GFLOP/s", found["floor_s"], None)
    if "forward_s" in found:
        add("plain forward", found["forward_s"], None)
    for name, peer in found["peers"].items():
        if "refused" in peer:
            made.add_row(Text(f"{name}: {peer['refused']}"))
            continue
        sampled = "" if peer["timed_cells"] == found["cells"] else f" ({peer['timed_cells']} cells, scaled)"
        add(name + sampled, peer["seconds"], peer["spread_s"], peer["max_abs_diff"])
    made.caption = f"peak working memory of the engine {found['peak_memory_bytes'] / 1e6:.0f} MB"
    made.caption_justify = "left"
    return made


def spans_lines(found: dict[str, Any]) -> list[str]:
    """What finding every subject's tokens took."""
    seconds = found["seconds_reading"] + found["seconds_spans"]
    return [
        f"{found['rows']:,} rows ({found['rejected']} rejected), {found['shared_edges']:,} spans with a shared edge",
        f"{seconds:.1f} s: reading {found['seconds_reading']:.1f}, spans {found['seconds_spans']:.1f}; "
        f"peak memory of the process {found['peak_bytes'] / 2**30:.2f} GiB",
    ]


def slick_lines(found: dict[str, Any]) -> list[str]:
    """What labelling took, and the plain ways to do it."""
    one, budget = found["one_prompt"], found["budget"]
    return [
        f"{found['facts']} facts × {budget['n_prompts']} prompts × (1 + {budget['n_samples']}) answers: "
        f"{found['seconds']:.1f} s",
        f"one of the prompts: beginning shared {one['shared']:.2f} s; computed in every prompt {one['unshared']:.2f} s "
        f"({found['ratios']['unshared']:.1f} ×); transformers' generate, {one['generate']:.0f} s "
        f"({found['ratios']['generate']:.0f} ×, scaled from a few facts)",
    ]

"""Tables of results for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Column, Table
from rich.text import Text
from rich.tree import Tree


_PROSE, _WORD = 32, 12
"""Letters from which a cell is text that may be wrapped, and no number or verdict; and what it is given at least."""


class Fitted(Table):
    """A table that is broken into several, one below the other, where the terminal is too narrow for all columns.

    The first columns, `labels`, stand before every part and may be wrapped; a number or verdict is never cut.
    """

    labels = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One part after the other."""
        needs, first, gap = list(map(_needed, self.columns)), self.columns[: self.labels], self.padding[1]
        most = options.max_width // (2 * self.labels) - gap
        needs[: self.labels] = [min(need, most) for need in needs[: self.labels]]
        for column, need in zip(self.columns, needs, strict=True):
            column.overflow, column.min_width, column.no_wrap = "fold", need, False
        room = options.max_width - sum(need + gap for need in needs[: self.labels])
        parts: list[list[Column]] = [[]]
        taken = 0
        for column, need in zip(self.columns[self.labels :], needs[self.labels :], strict=True):
            if parts[-1] and taken + need > room:
                parts.append([])
                taken = 0
            parts[-1].append(column)
            taken += need + gap
        whole, caption, title = self.columns, self.caption, self.title
        for number, part in enumerate(parts):
            self.columns = [*first, *part]
            self.title = title if number == 0 else None
            self.caption = caption if number == len(parts) - 1 else None
            yield from super().__rich_console__(console, options)
        self.columns, self.caption, self.title = whole, caption, title


def _needed(column: Column) -> int:
    """The least width at which a column's numbers and verdicts stand whole."""
    lines = [line for cell in column.cells for line in str(cell).split("\n")]
    short = [line for line in lines if len(line) <= _PROSE]
    whole = [line for line in short if any(letter.isdigit() for letter in line)]
    words = [word for text in (str(column.header), *short) for word in text.split()]
    return max(_WORD if len(short) < len(lines) else 1, *map(cell_len, (*whole, *words)), 1)


def table(title: str, labels: int = 1) -> Fitted:
    """A table that fits a terminal, of 80 columns too; its first `labels` columns say what a row is."""
    made = Fitted(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    made.labels = labels
    return made


def arms_table(summary: dict[str, Any], style: str) -> Table:
    """A column an arm, a row a quantity: its mean and, beneath, its interval; `route` says how the subject arrives."""
    arms = {name: arm["styles"][style] for name, arm in summary["arms"].items() if style in arm["styles"]}
    first = next(iter(arms.values()))
    made = table(f"style “{style}”, {first['n_test']} facts: means and 95 % intervals")
    for heading in ("quantity", *arms):
        made.add_column(Text(heading), justify="left" if heading == "quantity" else "right")
    alone = {name for name, of in summary["quantities"].items() if not of["across"]}
    for name in (name for name in first if name.partition(".")[0] in alone):
        made.add_row(Text(name), *(Text(_mean_of(found, name)) for found in arms.values()))
    made.add_row(Text("route"), *(found["route"]["reading"] for found in arms.values()))
    return made


def overview_table(rows: list[dict[str, Any]]) -> Table:
    """A row an arm and style, a column a quantity: its mean and, beneath, its interval."""
    styles = len({row["style"] for row in rows}) > 1
    made = table("overview: means and 95 % intervals", 1 + styles)
    made.add_column("arm", no_wrap=True, min_width=max(len(row["arm"]) for row in rows))
    if styles:
        made.add_column("style", no_wrap=True, min_width=max(len(row["style"]) for row in rows))
    for heading in rows[0]["cells"]:
        made.add_column(Text(heading.replace("_", " ").replace(":", "\n")), justify="right")
    for row in rows:
        shown = (Text(_with_ends(cell)) for cell in row["cells"].values())
        made.add_row(Text(row["arm"]), *[Text(row["style"])] * styles, *shown)
    return made


def _with_ends(cell: dict[str, Any]) -> str:
    if cell["estimate"] is None:
        return "–"
    return f"{cell['estimate']:.3f}\n[{cell['low']:.2f}, {cell['high']:.2f}]"


def _mean_of(found: dict[str, Any], name: str) -> str:
    if found[name] is None:
        return "–"
    ends = found["intervals"][name]
    return f"{found[name]:.3f}" + (f"\n[{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def claims_table(summary: dict[str, Any]) -> Table:
    """A row a claim and style; what the intervals speak of stands beneath."""
    made = table("claims", 2)
    for heading in ("claim", "style", "verdict", "estimate", "95 % interval"):
        made.add_column(heading, justify="right" if heading == "estimate" else "left")
    notes: list[str] = []
    for claim in summary["claims"]:
        for style, found in claim["styles"].items():
            estimate = interval = "–"
            if found["estimate"] is not None:
                estimate = f"{found['estimate']:+.4f}"
                interval = f"[{found['ci_low']:+.4f}, {found['ci_high']:+.4f}]"
                notes.append(f"{found['scope']}: {found['n_facts']} facts × {found['n_replicates']} replicates")
            mark = "" if claim["registered"] is True else " (post hoc)"
            made.add_row(Text(claim["id"] + mark), Text(style), found["verdict"], estimate, interval)
    made.caption, made.caption_justify = Text("; ".join(dict.fromkeys(notes))), "left"
    return made


def foreseen_line(found: dict[str, Any], n: int) -> str:
    """What is to be done and what it takes, before it begins."""
    if found["finished"] == len(found["stages"]):
        return f"{found['out']}: all is finished"
    return f"{n} facts: {found['passes']:,.0f} forward passes of a prompt, about {found['time']}; {found['place']}"


def power_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """A table a claim and style: the share of studies that decide it, by replicates and facts."""
    made: list[Table] = []
    for row in rows:
        one = table(f"{row['claim']}, {row['style']}: {row['verdict']} ({row['scope']})")
        facts = list(next(iter(row["curve"].values())))
        for heading in ("replicates", *(f"{n} facts" for n in facts)):
            one.add_column(heading, justify="right")
        for replicates, shares in row["curve"].items():
            one.add_row(str(replicates), *(f"{share:.0%}" for share in shares.values()))
        effect = (
            f"{row['estimate']:+.4f} (claimed: {row['direction']}; smallest that matters {row['smallest_effect']:g})"
        )
        needed = f"\n{row['needs']}" if row["needs"] else ""
        one.caption, one.caption_justify = Text(f"studies that decide, if the estimate is {effect}{needed}"), "left"
        made.append(one)
    return made


def foreseen_table(rows: list[dict[str, Any]]) -> Table:
    """What each claim of a study would come to by a pilot's variances."""
    made = table("studies that decide, if the effect is …", 2)
    names = ("as in the pilot", "none", "twice the smallest")
    for heading in ("claim", "style", *names):
        made.add_column(heading, justify="left" if heading in ("claim", "style") else "right")
    for row in rows:
        shown = [row["why"], "", ""] if "why" in row else [f"{row[name]['decided']:.0%}" for name in names]
        made.add_row(Text(row["claim"]), Text(row["style"]), *map(Text, shown))
    return made


def plan_tree(found: dict[str, Any]) -> Group:
    """A plan's stages by folder, with what is finished and what the rest takes."""
    tree = Tree(Text(f"{found['study']}: {found['out']}", style="bold"))
    branches: dict[str, Tree] = {"": tree}
    for stage in found["stages"]:
        *above, name = stage["name"].split("/")
        at = tree
        for depth, part in enumerate(above):
            path = "/".join(above[: depth + 1])
            if path not in branches:
                branches[path] = at.add(Text(part))
            at = branches[path]
        state = {"finished": "✓", "waiting": "?", "to do": "·"}[stage["state"]]
        line = Text(f"{state} {name}", style="green" if stage["state"] == "finished" else "")
        if stage["state"] != "finished" and stage["passes"]:
            line.append(f"  {stage['passes']:,.0f} passes", "dim")
        at.add(line)
    stated = found["registration"]
    lines = [
        f"✓ finished {found['finished']} of {len(found['stages'])}; · to do; ? made again if what it needs comes out "
        "otherwise",
        f"left: {found['passes']:,.0f} forward passes of a prompt, about {found['time']}; {found['memory']} a worker",
        f"{found['place']}",
        *([f"claims and contrasts: digest {stated['digest'][:12]}, {stated['status']}"] if stated else []),
        *(f"mixed: {line}" for line in found["mixtures"]),
    ]
    return Group(tree, *(Text(line) for line in lines))


def knowledge_tables(found: dict[str, Any]) -> list[Table]:
    """Categories, and how far other definitions agree with them."""
    from subjattn.facts.splits import CATEGORIES

    counts = table(f"SliCK, {found['n_facts']} facts")
    for heading in ("category", "facts", "share"):
        counts.add_column(heading, justify="left" if heading == "category" else "right")
    for name in CATEGORIES:
        n = found["categories"].get(name, 0)
        counts.add_row(name, f"{n}", f"{n / found['n_facts']:.1%}")
    agreed = table("rank correlation; upper half against SliCK's known")
    for heading in ("definition", "P(T=0)", "P(T>0)", "n", "same", "kappa"):
        agreed.add_column(heading, justify="left" if heading == "definition" else "right")
    for name, halves in found["known"].items():
        correlations = [found["spearman"].get(name, {}).get(other) for other in ("p_greedy", "p_sampled")]
        shown = ["–" if value is None else f"{value:+.2f}" for value in (*correlations, halves["kappa"])]
        agreed.add_row(name, *shown[:2], f"{halves['n']}", f"{halves['agreement']:.1%}", shown[2])
    return [counts, agreed]

"""Tables for a terminal of what tuning changed: differences, what two models give each other, and diagnoses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from subjattn.tables import table


def _without(summary: dict[str, Any]) -> list[str]:
    """Why there are no numbers, or no verdicts, where there are none."""
    known = []
    if summary["where"] == "correct":
        chooser, who = summary["arms"][summary["untrained"]]["styles"].items(), summary["untrained"]
        known = [
            f"style “{style}”: all but accuracy is of the {round(arm['accuracy'] * arm['n_test'])} of {arm['n_test']} "
            f"facts that {who} answers rightly"
            for style, arm in chooser
        ]
    few = {row["reason"] for row in summary["contrasts"] if "an interval is too narrow" in (row.get("reason") or "")}
    found = {
        f"style “{style}”: no {name}: {reason}"
        for name, styles in summary["not_defined"].items()
        for style, reason in styles.items()
    }
    reasons: dict[str, list[str]] = {}
    for row in summary["contrasts"]:
        key = (row["style"], row["measure"])
        if row["verdict"] is None and row.get("reason") and row["measure"] not in summary["not_defined"]:
            reasons.setdefault(row["reason"], []).append(f"{key[1]} (“{key[0]}”)")
    return [
        *known,
        *sorted(few),
        *sorted(found),
        *(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()),
    ]


PATCHES = ("real", "placebo")
SHOWN = 8
"""Facts that are named on the terminal; the report has them all."""


def changes(summary: dict[str, Any], title: str, judged: bool = True) -> list[Table]:
    """What changed between two arms: a table a style and contrast, a row a quantity, with its verdict if it has one.

    While other measures are still to come nothing is judged, for all differences are judged together.
    """
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in summary["contrasts"]:
        if row["estimate"] is not None:
            rows.setdefault((row["style"], row["arm_a"], row["arm_b"]), []).append(row)
    many = len({(a, b) for _, a, b in rows}) > 1
    return [
        _changed(summary, f"{title}, {f'{a} − {b}, ' if many else ''}style “{style}”", own, judged)
        for (style, a, b), own in rows.items()
    ]


def _changed(summary: dict[str, Any], title: str, rows: list[dict[str, Any]], judged: bool) -> Table:
    from subjattn.evidence.changes import difference

    made = table(title)
    made.padding = (0, 1, 0, 0)
    names, style = [rows[0]["arm_b"], rows[0]["arm_a"]], rows[0]["style"]
    for heading in ("quantity", *names, "difference, 95 % interval", "n", *(["verdict"] if judged else [])):
        left = heading in ("quantity", "difference, 95 % interval", "verdict")
        made.add_column(
            Text(heading), justify="left" if left else "right", no_wrap=heading != "quantity", overflow="fold"
        )
    for row in rows:
        arms = (summary["arms"][name]["styles"][style].get(row["measure"]) for name in names)
        shown = ("–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" for value in arms)
        verdict = [(row["verdict"] or "–").removesuffix(" that matters")] if judged else []
        made.add_row(Text(row["measure"]), *shown, Text(difference(row)), str(row["n_facts"]), *verdict)
    return made


def conclusion(summary: dict[str, Any], how: str = "smallest_effects changes them") -> list[Any]:
    """Differences with their verdicts, facts that turned by name, and what all that speaks of."""
    lines: list[Any] = changes(summary, "what changed")
    lines += [Text(f"\n{text}") for text in _without(summary)]
    several = len({row["arm"] for row in summary["across"]}) > 1
    lines += [part for row in summary["across"] for part in _across(row, several)]
    lines += _diagnosis(summary)
    many = len({(found["arm_a"], found["arm_b"]) for found in summary["flips"]}) > 1
    for found in summary["flips"]:
        pair = f"{found['arm_b']} to {found['arm_a']}, " if many else ""
        lines.append(Text(f"\nanswers that turned, {pair}style “{found['style']}”, {found['n_facts']} facts", "bold"))
        for name, way in (("lost", "right to wrong"), ("won", "wrong to right")):
            named = [f"{turned['subject']} ({turned['arm_b']} → {turned['arm_a']})" for turned in found[name]]
            more = f", … {len(named) - SHOWN} more in the report" if len(named) > SHOWN else ""
            lines.append(Text(f"{way}, {len(named)}: {', '.join(named[:SHOWN]) or 'none'}{more}"))
    if not (rows := [row for row in summary["contrasts"] if row["verdict"]]):
        return lines
    units = {row["measure"]: f"{row['measure']} {row['smallest_effect']:g}" for row in rows}
    judged = f"rises and falls are corrected for all {rows[0]['judged_together']} that are judged (Holm)"
    lines.append(Text(f"\nsmallest differences that matter: {', '.join(units.values())} ({how}); {judged}."))
    if any(row["registered"] is not True for row in rows):
        lines.append(Text("Post hoc: what is compared, or what matters, was changed after measuring."))
    scopes = " or ".join(dict.fromkeys(row["scope"] for row in rows))
    models = "these two models" in scopes
    lines.append(
        Text(f"They speak of {scopes}{', asked other facts; another tuning may do otherwise' if models else ''}.\n")
    )
    return lines


def _diagnosis(summary: dict[str, Any]) -> list[Any]:
    """What carries the loss of each arm and style, and which accounts that supports, contradicts and leaves open."""
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in summary.get("diagnosis", []):
        pairs.setdefault((row["arm"], row["style"]), []).append(row)
    lines: list[Any] = []
    for (arm, style), own in pairs.items():
        found, title = summary["arms"][arm]["styles"][style], f"what {arm} lost its answers by, style “{style}”"
        if found.get("margin_lost") is None:
            lines += [Text(f"\n{title}", "bold"), Text(_few_lost(found))]
        else:
            lines += [Text(""), mediated_table(title, found)]
        for status in ("supported", "contradicted", "open"):
            if those := [row["account"] for row in own if row["status"] == status]:
                lines.append(Text(f"{status}: {', '.join(those)}"))
    return lines


def _few_lost(found: dict[str, Any]) -> str:
    """Why it is not said by what."""
    share, ends = found.get("answers_lost"), found["intervals"].get("answers_lost")
    net = found.get("answers_changed")
    if share is None:
        return "the base starts none of these answers rightly: there is nothing to lose"
    known = "" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]"
    whole = "" if net is None else f"answers started rightly, tuned − base: {net:+.2f}; "
    return f"{whole}lost: {share:.2f}{known} of the base's right answers, too few to attribute"


def mediated_table(title: str, found: dict[str, Any]) -> Table:
    """What is lost, and of the margin lost the share that each thing carries, beside its placebo."""
    made = table(title)
    for heading in ("", "share", "95 % interval", "placebo"):
        made.add_column(Text(heading), justify="right" if heading in ("share", "placebo") else "left")
    names = [name for name in found if name.startswith("mediated.")]
    for name in ("answers_changed", "answers_lost", "answers_won", *names):
        ends, placebo = found["intervals"].get(name), found.get(name.replace("mediated.", "mediated_placebo."))
        share = found.get(name)
        made.add_row(
            Text(name.removeprefix("mediated.").replace("_", " ")),
            "–" if share is None else f"{share:.2f}",
            "not defined" if ends is None else f"[{ends[0]:+.2f}, {ends[1]:+.2f}]",
            "" if name not in names else "–" if placebo is None else f"{placebo:.2f}",
        )
    return made


def _across(row: dict[str, Any], several: bool) -> list[Any]:
    """What one tuned arm and its base give each other."""
    style = f"{row['arm']}, {row['style']}" if several else row["style"]
    lines: list[Any] = [Text(""), *parts_tables(row["parts"], style, None)] if row["parts"] else []
    if "put" in row:
        lines += _put_back(row, style)
    if "answers" in row:
        lines += [Text(""), *answers_tables(f"base put back in all layers, style “{style}”", row["answers"])]
    return lines


def _put_back(row: dict[str, Any], style: str) -> list[Any]:
    gap = row["gap"]
    ends = "" if gap["low"] is None else f" [{gap['low']:+.2f}, {gap['high']:+.2f}]"
    made = returned_table(f"base put back in all layers, style “{style}”", row["put"], "put", ["tuned"])
    words = f"of {row['n']} facts; gap of these, tuned − base: {gap['mean']:+.2f}{ends} nats"
    if not any(put["n"] for put in row["put"]):
        words += "; none has a gap of 0.1 nats: a share of it is not defined"
    return [Text(""), made, Text(words)]


def answers_tables(title: str, found: dict[str, Any]) -> list[Any]:
    """A row a place: answers right, the share of the accuracy gap returned, and lost answers right again."""
    from subjattn.evidence.returned import accuracy_gap_in_words

    made = table(f"{title}: answers of the tuned model")
    made.padding = (0, 1, 0, 0)
    made.add_column("put", no_wrap=True)
    for heading in ("right", "placebo", "share of the gap", "placebo", "again", "placebo"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in found["put"]:
        real, placebo = row["real"], row["placebo"]
        ends = "" if real["share_low"] is None else f" [{_share(real['share_low'])}, {_share(real['share_high'])}]"
        shown = [_percent(real["accuracy"]), _percent(placebo["accuracy"]), _share(real["share"]) + ends]
        shown += [_share(placebo["share"]), *(f"{of['again']} of {row['lost']}" for of in (real, placebo))]
        made.add_row(Text(row["put"]), *map(Text, shown))
    caption = (
        "again: of the answers that tuning lost, right again; all of a row is of the facts that have a placebo there"
    )
    made.caption, made.caption_justify = Text(caption), "left"
    return [made, Text(f"of {found['n']} answers {accuracy_gap_in_words(found)}")]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def parts_tables(means: dict[str, dict[str, Any]], style: str, n: int | None) -> list[Any]:
    """What each part of an update changes, and all of it; what is to be known of the intervals."""
    made = table(f"what each part of the update changes, style “{style}”{f', {n} facts' if n else ''}, nats")
    for heading in ("part", "Shapley value", "95 % interval"):
        made.add_column(heading, justify="left" if heading == "part" else "right")
    for part, found in means.items():
        ends = "–" if found["low"] is None else f"[{found['low']:+.3f}, {found['high']:+.3f}]"
        made.add_row(part, "–" if found["mean"] is None else f"{found['mean']:+.3f}", ends)
    return [
        made,
        *(Text(note) for note in dict.fromkeys(note for of in means.values() for note in of.get("notes", []))),
    ]


def gap_lines(shares: Any, n: int) -> list[str]:
    """The gap that shares are of, and how many facts have one."""
    tuned, unit, least = shares.attrs["tuned"], shares.attrs["unit"], shares.attrs["smallest_gap"]
    gap = -float(shares["gap"].sel(into=tuned, patch="real").max())
    low, high = shares.attrs["gap_interval"]
    ends = "no interval" if low != low else f"[{low:+.2f}, {high:+.2f}]"
    defined = int(shares["n_defined"].max())
    lines = [f"gap, tuned − base: {gap:+.2f} {ends} {unit}"]
    if not defined:
        return [*lines, f"no fact has a gap of {least:g} {unit} or more: a share of it is not defined"]
    if not (low > 0 or high < 0):
        lines.append("the gap as a whole may be nothing: a share of it is not defined, only single facts have one")
    return [*lines, f"{defined} of {n} facts have a gap of {least:g} {unit} or more, and so a share of it"]


def returned_tables(title: str, together: Any, by_layer: Any) -> list[Table]:
    """Median shares of the gap returned by layer, placebo beside them: one table, or by role one for each direction."""
    from subjattn.evidence.returned import in_rows

    layers = by_layer.assign_coords(layer=[str(layer) for layer in by_layer["layer"].values.tolist()])
    if "role" in together.dims:
        return [_by_role(f"{title}, into {late}", together, layers, str(late)) for late in together["into"].values]
    every = in_rows(together.expand_dims(layer=["all"]), "layer")
    return [returned_table(title, [*every, *in_rows(layers, "layer")], "layer")]


def returned_table(title: str, rows: list[dict[str, Any]], dim: str, models: Sequence[str] = ()) -> Table:
    """A row a place: median share [quartiles], its placebo, and the part of the facts whose share is 0 to 1.

    A column of these for each model whose later layers are met; `models` are some of them.
    """
    made = table(f"{title}: share of the gap returned")
    made.padding = (0, 1, 0, 0)
    made.add_column(dim, justify="left" if dim == "put" else "right")
    late = list(models or rows[0]["into"])
    for heading in (f"into {one}" if not i else ("placebo", "0–1")[i - 1] for one in late for i in range(3)):
        made.add_column(Text(heading), justify="right", no_wrap=True)
    made.add_column("n", justify="right")
    for row in rows:
        shown = []
        for one in late:
            real, placebo = row["into"][one]["real"], row["into"][one]["placebo"]
            ends = "" if real["share"] is None else f" [{_share(real['share_low'])}, {_share(real['share_high'])}]"
            between = "–" if real["between"] is None else f"{real['between']:.0%}"
            shown += [_share(real["share"]) + ends, _share(placebo["share"]), between]
        made.add_row(Text(str(row[dim])), *map(Text, shown), str(row["n"]))
    made.caption, made.caption_justify = (
        Text("median [quartiles] over n facts; 0–1: so many of them lie between"),
        "left",
    )
    return made


def _by_role(title: str, together: Any, layers: Any, late: str) -> Table:
    made = table(f"{title}: share of the gap returned")
    made.padding = (0, 1, 0, 0)
    roles = [str(role) for role in layers["role"].values if bool(layers["n_defined"].sel(role=role).any())]
    for heading in ("layer", *roles):
        made.add_column(heading.replace("_", "\n"), justify="right")

    def cell(of: Any) -> str:
        return " ".join(_share(None if (value := float(of.sel(patch=patch))) != value else value) for patch in PATCHES)

    made.caption, made.caption_justify = Text("median over facts, and of the placebo"), "left"
    for label, of in [("all", together), *((str(one), layers.sel(layer=one)) for one in layers["layer"].values)]:
        made.add_row(label, *(cell(of["share"].sel(into=late, role=role)) for role in roles))
    return made


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}" if abs(value) < 10 else f"{value:+.0f}"

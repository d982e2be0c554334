"""Measures what intervals, verdicts, families and heat maps do where the truth is known, and writes the tables of
docs/statistics.md: `python experiments/calibrate.py [--repeats 1000]`, about 40 minutes on one
core. Tables stand between marks in that file; the text around them is by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import xarray as xr
from scipy import stats

from subjattn.evidence.cases import cases_of
from subjattn.evidence.claims import Claim, judge
from subjattn.evidence.intervals import Interval, interval, warnings_of
from subjattn.evidence.maps import p_values
from subjattn.evidence.power import Planned
from subjattn.evidence.ratios import ratio, slope


DOC = Path(__file__).parents[1] / "docs" / "statistics.md"
FACTS, REPLICATES = (30, 120, 300), (2, 3, 5, 8)
MIXES = {
    "facts": (1.0, 0.05, 0.3, 0.0),
    "replicates": (0.5, 0.3, 0.5, 0.0),
    "replicates, wildly": (0.5, 1.0, 0.5, 0.0),
    "interaction": (0.1, 0.02, 1.0, 0.0),
    "all": (1.0, 0.2, 1.0, 0.0),
    "clusters, equal": (0.5, 0.05, 0.5, 1.0),
    "clusters, unequal": (0.5, 0.05, 0.5, 1.0),
    "clusters, crossed": (0.5, 0.05, 0.5, 1.0),
}
"""Standard deviations of facts, replicates, interaction, and clusters of facts."""
RATES = {"0/1, 5 %": 0.05, "0/1, 50 %": 0.5, "0/1, 95 %": 0.95}
DATA = ("normal", "skewed", "heavy tails", *RATES, "0/1 differences, 5 %", "0/1 differences, 50 %")


def stream(*row: object) -> np.random.Generator:
    """The random numbers of one row, whichever other rows are made."""
    return np.random.default_rng([2026, *" ".join(map(str, row)).encode()])


def draws(rng: np.random.Generator, data: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random parts with mean 0 and variance 1 (but for heavy tails, whose variance is 3): lognormal, t with 3 df."""
    if data == "skewed":
        return np.asarray((rng.lognormal(size=shape) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e))
    return rng.standard_t(3, shape) if data == "heavy tails" else rng.normal(size=shape)


def clusters(facts: int, mix: str) -> dict[str, np.ndarray]:
    """Every fact's cluster: ten at least; unequal ones fall off as their rank to the power of 0.7."""
    if not mix.startswith("clusters"):
        return {}
    n = max(10, facts // 6)
    if mix == "clusters, equal":
        return {"cluster": np.arange(facts) % n}
    if mix == "clusters, crossed":
        rng = np.random.default_rng(0)
        return {name: np.concatenate([np.arange(n), rng.integers(0, n, facts - n)]) for name in ("a", "b")}
    share = np.arange(1, n + 1) ** -0.7
    sizes = np.maximum(1, np.floor(share / share.sum() * facts)).astype(int)
    sizes[0] += facts - sizes.sum()
    return {"cluster": np.repeat(np.arange(n), sizes)}


def study(
    rng: np.random.Generator, data: str, mix: str, facts: int, replicates: int, codes: dict[str, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Values of one study `(fact, replicate)`, and the mean they are drawn around."""
    a, b, e, c = MIXES[mix]

    def latent(own: np.ndarray) -> np.ndarray:
        moves = b * draws(rng, data, (1, replicates)) + e * draws(rng, data, (facts, replicates))
        return np.asarray(own + moves)

    shared = a * draws(rng, data, (facts, 1))
    for own in codes.values():
        shared = shared + c / np.sqrt(len(codes)) * draws(rng, data, (own.max() + 1, 1))[own]
    if not data.startswith("0/1"):
        return latent(shared), 0.0
    rate = float(data.split()[-2]) / 100
    edge = stats.norm.ppf(rate) * np.sqrt(a**2 + b**2 + e**2 + c**2 * bool(codes))
    right = (latent(shared) < edge).astype(float)
    if "differences" in data:
        return right - (latent(shared) < edge), 0.0
    return right, rate


def bounds_of(data: str) -> tuple[float, float] | None:
    return None if not data.startswith("0/1") else (-1.0, 1.0) if "differences" in data else (0.0, 1.0)


def as_interval(values: np.ndarray, codes: dict[str, np.ndarray], bounds: tuple[float, float] | None) -> Interval:
    """As `interval` makes it, without labels."""
    cases = cases_of(values, 0.0, codes, bounds)
    scope = "this way of training" if values.shape[1] > 1 else "this model"
    notes = tuple(warnings_of(values, cases, bounds))
    return Interval(cases[0][0], scope, *values.shape, "draws", {}, 0, notes, tuple(cases))


def coverage(repeats: int) -> Iterator[str]:
    yield "| data | variance mostly from | " + " | ".join(f"R = {r}" for r in REPLICATES) + " | width / oracle |"
    yield "|---|---|" + "---|" * (len(REPLICATES) + 1)
    short = []
    for data, mix in product(DATA, MIXES):
        rng, cells, widths = stream("coverage", data, mix), [], []
        for replicates in REPLICATES:
            found = [covered(rng, data, mix, facts, replicates, repeats) for facts in FACTS]
            cells.append(" / ".join(_digits(share) for share, _, _ in found))
            if replicates > 2:
                widths += [width for _, width, _ in found]
                least = min(found)
                if least[0] < 0.93:
                    facts = [f"{n}" for n, (share, _, _) in zip(FACTS, found, strict=True) if share < 0.93]
                    worst = f"{_digits(least[0])} | {least[2]:.0%}"
                    short.append(f"| {data} | {mix} | {replicates} | {', '.join(facts)} | {worst} |")
        yield f"| {data} | {mix} | {' | '.join(cells)} | {min(widths):.2f}–{max(widths):.2f} |"
    yield ""
    yield "Below .93 with three replicates or more, and how many of the intervals carry a warning there:"
    yield ""
    yield "| data | variance mostly from | R | facts | lowest | warned |"
    yield "|---|---|---|---|---|---|"
    yield from short


def _digits(share: float) -> str:
    return f"{share:.3f}"[1:] if share < 0.9995 else "1"


def covered(
    rng: np.random.Generator, data: str, mix: str, facts: int, replicates: int, repeats: int
) -> tuple[float, float, float]:
    """Share of 95 % intervals that hold the truth, their median width against the oracle's, share that warns."""
    codes, bounds = clusters(facts, mix), bounds_of(data)
    hits, warned, halves, estimates = 0, 0, [], []
    for _ in range(repeats):
        values, truth = study(rng, data, mix, facts, replicates, codes)
        if np.ptp(values) == 0 and bounds is None:
            continue
        found = as_interval(values, codes, bounds)
        low, high = found.ends()
        hits += low <= truth <= high
        warned += bool(found.notes)
        halves.append((high - low) / 2)
        estimates.append(found.estimate)
    return hits / len(halves), float(np.median(halves) / (1.96 * np.std(estimates))), warned / len(halves)


def verdicts(repeats: int) -> Iterator[str]:
    """False verdicts: the smallest effect is four standard errors, which makes all verdicts possible."""
    claim = {"id": "c", "statement": "s", "measure": "m", "arms": ("a", "b"), "direction": "increase"}
    yield (
        "| data | variance mostly from | R | supported or contradicted, no effect | supported, effect at the smallest "
        "| no effect that matters, effect at the smallest |"
    )
    yield "|---|---|---|---|---|---|"
    for data, mix, replicates in product(
        ("normal", "skewed", "heavy tails"), ("facts", "replicates", "all"), (3, 5, 8)
    ):
        rng, codes = stream("verdicts", data, mix, replicates), clusters(120, mix)
        tables = [study(rng, data, mix, 120, replicates, codes)[0] for _ in range(repeats)]
        smallest = 4 * float(np.std([table.mean() for table in tables]))
        made = Claim.model_validate({**claim, "smallest_effect": smallest})
        counts = np.zeros(3)
        for table in tables:
            none, edge = (
                judge([(made, as_interval(table + shift, codes, None))], [False])[0].verdict for shift in (0, smallest)
            )
            counts += [none in ("supported", "contradicted"), edge == "supported", edge == "no effect that matters"]
        yield f"| {data} | {mix} | {replicates} | {' | '.join(f'{count / repeats:.3f}' for count in counts)} |"


def power(_repeats: int) -> Iterator[str]:
    yield (
        "| standard errors beyond the smallest effect | "
        + " | ".join(f"R = {r}, {'alone' if family == 1 else 'one of 8'}" for family in (1, 8) for r in (3, 5, 8))
        + " |"
    )
    yield "|---|" + "---|" * 6
    a, b, e, _ = MIXES["all"]
    variances = {"facts": a**2, "replicates": b**2, "interaction": e**2}
    for errors in (2, 3, 4, 5, 6, 8, 10):
        cells = []
        for family, r in product((1, 8), (3, 5, 8)):
            error = np.sqrt(a**2 / 120 + b**2 / r + e**2 / 120 / r)
            planned = Planned(variances, 1 + errors * error, 1.0, family)
            cells.append(f"{planned.decided(120, r)['supported']:.2f}")
        yield f"| {errors} | {' | '.join(cells)} |"


def families(repeats: int) -> Iterator[str]:
    """Chance that any of several correlated claims without an effect is called at a smallest effect near 0."""
    yield "| claims | R = 3 | R = 5 | R = 8 |"
    yield "|---|---|---|---|"
    for n in (4, 8, 12):
        cells = []
        for replicates in (3, 5, 8):
            rng, false = stream("families", n, replicates), 0
            for _ in range(repeats):
                common = study(rng, "normal", "all", 120, replicates, {})[0]
                own = [study(rng, "normal", "all", 120, replicates, {})[0] for _ in range(n)]
                fields = {"id": "c", "statement": "s", "measure": "m", "arms": ("a", "b"), "direction": "increase"}
                claim = Claim.model_validate({**fields, "smallest_effect": 1e-9})
                found = judge([(claim, as_interval(common + one, {}, None)) for one in own], [False] * n)
                false += any(one.verdict in ("supported", "contradicted") for one in found)
            cells.append(f"{false / repeats:.3f}")
        yield f"| {n} | {' | '.join(cells)} |"


def pooled(repeats: int) -> Iterator[str]:
    yield "| | R = 1 | R = 3 | R = 5 |"
    yield "|---|---|---|---|"
    for name, data in product(("ratio", "slope"), ("normal", "skewed")):
        cells = [
            f"{_pooled_coverage(stream(name, data, replicates), name, data, replicates, repeats):.3f}"
            for replicates in (1, 3, 5)
        ]
        yield f"| {name}, {data} | {' | '.join(cells)} |"


def _pooled_coverage(rng: np.random.Generator, name: str, data: str, replicates: int, repeats: int) -> float:
    hits = 0
    for _ in range(repeats):
        base = draws(rng, data, (120, 1))
        moves = 0.1 if replicates > 1 else 0.0  # one replicate is given, and its interval speaks of it alone
        noise = 0.5 * draws(rng, data, (120, replicates)) + moves * draws(rng, data, (1, replicates))
        made = [xr.DataArray(of, {"fact": np.arange(120)}, ("fact", "draw")) for of in (noise, np.zeros_like(noise))]
        if name == "ratio":
            y = made[1] + 2 + 0.5 * base
            values, truth = ratio(0.6 * y + 0.4 * made[0], y), 0.6
        else:
            x = xr.DataArray(base[:, 0], {"fact": np.arange(120)}, ("fact",))
            steeper = moves * rng.normal(size=replicates)
            values, truth = slope((0.5 + xr.DataArray(steeper, dims="draw")) * x + made[0], x), 0.5
        low, high = interval(values.transpose("fact", "draw")).ends()
        hits += low <= truth <= high
    return hits / repeats


def maps(repeats: int) -> Iterator[str]:
    """Maps of 60 facts without an effect, and with one of five standard errors in a twentieth of the cells.

    Half as many as studies elsewhere.
    """
    repeats = max(1, repeats // 2)
    yield "| cells | R | replicates move | a false cell, BY | BH | facts alone, BH | power, BY | BH |"
    yield "|---|---|---|---|---|---|---|---|"
    kinds = (
        "nothing",
        "answers of facts",
        "cells apart",
        "six fields",
        "all as one",
        "a corner apart",
        "a corner as one",
    )
    for (layers, heads), replicates, kind in product(((30, 9), (32, 32)), (3, 5, 8), kinds):
        rng, counts = stream("maps", layers, replicates, kind), np.zeros(5)
        for _ in range(repeats):
            table, error = map_of(rng, kind, layers, heads, replicates)
            answers = [np.arange(60) % 15] if kind == "answers of facts" else []
            ps = p_values(table, answers)
            alone = stats.ttest_1samp(table.mean(2), 0, axis=1).pvalue
            with_effect = table.copy()
            with_effect[-layers * heads // 20 :] += 5 * error
            effects = p_values(with_effect, answers)
            found = [_stands(effects, how)[-layers * heads // 20 :].mean() for how in ("by", "bh")]
            counts += [_stands(ps, "by").any(), _stands(ps, "bh").any(), _stands(alone, "bh").any(), *found]
        shares = " | ".join(f"{count / repeats:.3f}" for count in counts[:3])
        yield (
            f"| {layers * heads} | {replicates} | {kind} | {shares} | "
            + " | ".join(f"{count / repeats:.2f}" for count in counts[3:])
            + " |"
        )


def _stands(ps: np.ndarray, how: str) -> np.ndarray:
    return np.asarray(stats.false_discovery_control(ps, method=how) <= 0.05)  # type: ignore[arg-type]


def map_of(rng: np.random.Generator, kind: str, layers: int, heads: int, replicates: int) -> tuple[np.ndarray, float]:
    """Values `(cell, fact, replicate)` without an effect, and the standard error of a usual cell."""
    cells, facts = layers * heads, 60
    table = rng.standard_normal((cells, facts, 1), np.float32) + rng.standard_normal(
        (cells, facts, replicates), np.float32
    )
    if kind == "answers of facts":
        table = table + rng.standard_normal((cells, 15, 1), np.float32)[:, np.arange(60) % 15]
    size, corner = 0.5, np.zeros((layers, heads))
    corner[: layers // 6, : heads // 3] = 1
    match kind:
        case "cells apart":
            moves = rng.normal(size=(cells, replicates))
        case "six fields":
            moves = rng.normal(size=(cells, 6)) @ rng.normal(size=(6, replicates)) / np.sqrt(6)
        case "all as one":
            moves = np.ones((cells, 1)) * rng.normal(size=(1, replicates))
        case "a corner apart":
            moves = 2 * corner.reshape(-1, 1) * rng.normal(size=(cells, replicates))
        case "a corner as one":
            moves = 2 * corner.reshape(-1, 1) * rng.normal(size=(1, replicates))
        case _:
            moves = np.zeros((cells, replicates))
    everywhere = kind in ("cells apart", "six fields", "all as one")
    shared = (kind == "answers of facts") / 15
    error = np.sqrt(1 / facts + shared + 1 / facts / replicates + everywhere * size**2 / replicates)
    return table + (size * moves[:, None]).astype(np.float32), float(error)


TABLES: dict[str, Callable[[int], Iterator[str]]] = {
    "coverage": coverage,
    "verdicts": verdicts,
    "families": families,
    "power": power,
    "pooled": pooled,
    "maps": maps,
}


def write(name: str, lines: list[str]) -> None:
    """Put a table between its marks."""
    text = DOC.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text:
        sys.exit(f"{DOC} has no mark {start}")
    table = "\n".join(lines)
    text = re.sub(f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.S)
    DOC.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, help="studies a cell")
    parser.add_argument("--only", choices=TABLES, help="one table")
    asked = parser.parse_args()
    for name, make in TABLES.items():
        if asked.only in (None, name):
            start, lines = time.monotonic(), []
            for line in make(asked.repeats):
                print(line, flush=True)
                lines.append(line)
            write(name, lines)
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

"""`subjattn transfer`, and the figures and tables of what one model gives the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import subjattn as sa
from subjattn import change_tables
from subjattn.cli import main
from subjattn.errors import BadInput
from subjattn.evidence.returned import in_rows, shares
from subjattn.measures.transfer import PATCHES
from subjattn.plots.transfer import plot_parts, plot_transfer


TEMPLATE = "City: {subject}\\nCountry:"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["subjattn", "transfer", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def base(tiny_folders: dict[str, Path]) -> Path:
    return tiny_folders["llama"]


def crossed(seed: int = 0, n: int = 5, **more: int) -> xr.DataArray:
    """Cells whose own models are the same at every place."""
    rng, sizes = np.random.default_rng(seed), {"fact": n, "patch": 2, "state": 2, "late": 2, **more}
    values = rng.normal(size=tuple(sizes.values()))
    for model in (0, 1):
        values[:, :, model, model] = rng.normal(size=(n, 1, *[1] * len(more)))
    coords = {"patch": list(PATCHES), "state": ["base", "tuned"], "late": ["base", "tuned"]}
    coords |= {dim: np.arange(size) for dim, size in more.items()}
    return xr.DataArray(values, coords, tuple(sizes), "answer_logprob", {"unit": "nats", "component": "z"})


def by_hand(values: xr.DataArray, into: str, least: float = 0.1, **cell: Any) -> np.ndarray:
    """Shares of the facts that have one, in one cell."""
    own, other = values.sel(cell), "base" if into == "tuned" else "tuned"
    here, there = (own.sel(state=one, late=one).values for one in (into, other))
    put = own.sel(state=other, late=into).values
    some = np.abs(there - here) >= least
    return ((put - here) / (there - here))[some]


def test_the_command_gives_what_the_functions_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, tmp_path: Path
) -> None:
    target, figure = tmp_path / "out.json", tmp_path / "shares.html"
    asked = ("--base", base, "--adapter", adapter, "--n", 6, "--components", "mlp_out,pattern", "--json", target)
    assert run(monkeypatch, *asked, "--figure", figure, "--seed", 3) == 0
    shown = capsys.readouterr().out
    content = json.loads(target.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert set(content["styles"]) == {"list", "sentence"} and "6 facts: about " in shown
    assert {path.name for path in tmp_path.glob("*.html")} == {"shares-list.html", "shares-sentence.html"}
    found = content["styles"]["list"]
    assert list(found["transfer"]) == ["mlp_out at subject", "mlp_out at prediction", "pattern at prediction"]
    arms = sa.load_arms(str(base), {"tuned": str(adapter)})
    facts = sa.load_facts("cities", n=6, seed=3)
    prompts = sa.make_prompts(facts, arms.base.tokenizer, found["template"])
    wanted = sa.transfer(arms, prompts, "mlp_out", at="subject", seed=3)
    own = xr.Dataset.from_dict(found["transfer"]["mlp_out at subject"]["by_layer"]["arrays"])
    for metric in ("answer_logprob", "answer_logit"):
        np.testing.assert_allclose(own[metric].astype(float), wanted[metric], atol=1e-5)
    share = xr.Dataset.from_dict(found["transfer"]["mlp_out at subject"]["by_layer"]["answer_logprob"])["share"]
    values = by_hand(wanted["answer_logprob"], "tuned", layer=1, patch="real")
    assert float(share.sel(into="tuned", patch="real", layer=1)) == pytest.approx(np.median(values), abs=1e-4)
    answers = sa.put_back_accuracy(arms, prompts, ["mlp_out", "pattern"], seed=3)
    np.testing.assert_equal(
        xr.Dataset.from_dict(found["answers"]["arrays"])["correct"].values.astype(float), answers["correct"].values
    )
    assert [row["put"] for row in found["answers"]["put"]] == list(found["transfer"])
    assert "all layers put back, style “list”: answers of the tuned model" in shown
    parts = sa.swap_weights(arms, prompts)["answer_logprob_share"]
    for part in parts["part"].values:
        row = found["swap_weights"]["answer_logprob"][str(part)]
        assert row["mean"] == pytest.approx(float(parts.sel(part=part).mean()), abs=1e-5)
        assert row["low"] < row["mean"] < row["high"] and f"{row['mean']:+.3f}" in shown
    whole = found["swap_weights"]["answer_logprob"]["all"]["mean"]
    assert whole == pytest.approx(float(parts.sum("part").mean()), abs=1e-4)
    assert f"gap, tuned − base: {whole:+.2f} [" in shown
    assert "mlp_out at subject, style “list”: share of the gap returned" in shown and "placebo" in shown
    assert max(map(len, shown.split("gap, tuned")[1].splitlines())) <= 100


@pytest.mark.parametrize("at", ["role", "all"])
def test_where_states_are_put(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, adapter: Path, at: str
) -> None:
    asked = ("--base", base, "--adapter", adapter, "--n", 4, "--components", "v", "--at", at, "--template", TEMPLATE)
    assert run(monkeypatch, *asked, "--window", 2, "--hold") == 0
    shown = capsys.readouterr().out
    assert f"v at {at}, style “style1”" in shown and ("into base: share" in shown) == (at == "role")
    assert "answers of the tuned model" not in shown, "an answer grows under what is put, and this holds the rest"
    assert at == "role" or " – " in shown, "positions that are all there are have no placebo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --tuned or --adapter"),
        (["--tuned", "{base}"], "is the same model as --base"),
        (["--adapter", "{adapter}", "--components", "mlp"], "--components: 'mlp' is not one of resid_pre"),
        (["--adapter", "{adapter}", "--components", ","], "--components: nothing is not one of"),
        (["--adapter", "{adapter}", "--figure", "a.doc"], "a figure is saved as .html"),
        (["--adapter", "{adapter}", "--where", "known"], "knowledge"),
        (["--adapter", "{base}"], "adapter"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    base: Path,
    adapter: Path,
    arguments: list[str],
    message: str,
) -> None:
    given = [text.format(base=base, adapter=adapter) for text in arguments]
    assert run(monkeypatch, "--base", base, "--n", 4, *given) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1


def test_a_figure_that_nothing_here_can_draw_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, adapter: Path
) -> None:
    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert run(monkeypatch, "--base", base, "--adapter", adapter, "--figure", "a.png") == 2
    shown = capsys.readouterr()
    assert ".png figures need a library" in shown.err and not shown.out


def test_a_gap_near_zero_has_no_share() -> None:
    """Planted: two models that are all but the same, and one fact of five that differs."""
    cells = crossed(layer=2)
    cells.loc[{"state": "tuned", "late": "tuned"}] = cells.sel(state="base", late="base") + 0.01
    none = sa.returned(cells.to_dataset())
    assert none["share"].isnull().all() and (none["n_defined"] == 0).all()
    assert change_tables.gap_lines(none, 5)[-1] == "no fact has a gap of 0.1 nats or more: a share of it is not defined"
    rows = in_rows(none, "layer")
    assert all(row["n"] == 0 and row["into"]["tuned"]["real"]["share"] is None for row in rows)
    with pytest.raises(BadInput, match="no fact has a gap"):
        plot_transfer(cells)
    cells.loc[{"state": "tuned", "late": "tuned", "fact": 0}] = cells.sel(state="base", late="base").isel(fact=0) + 1
    one = sa.returned(cells.to_dataset())
    lines = change_tables.gap_lines(one, 5)
    assert "may be nothing" in lines[1] and lines[2].startswith("1 of 5 facts have a gap")
    wanted = by_hand(cells, "tuned", layer=1, patch="real")
    assert wanted.size == 1
    assert float(one["share"].sel(into="tuned", patch="real", layer=1)) == pytest.approx(wanted[0])
    alone = sa.returned(cells.isel(fact=[0]).to_dataset())
    assert np.isnan(alone.attrs["gap_interval"]).all() and "no interval" in change_tables.gap_lines(alone, 1)[0]


def test_the_gap_of_facts_of_one_answer_is_wider() -> None:
    """Facts of one answer are clusters to the gap's interval."""
    cells = crossed(1, 80, layer=1)
    step = xr.DataArray(np.repeat([1.0, -1.0, 2.0, 0.5, -0.5] * 2, 8), dims="fact")
    cells.loc[{"state": "tuned", "late": "tuned"}] = cells.sel(state="base", late="base") + step
    low, high = sa.returned(cells.to_dataset()).attrs["gap_interval"]
    known = cells.assign_coords(answer=("fact", np.repeat(list("abcdefghij"), 8)))
    wide = sa.returned(known.to_dataset()).attrs["gap_interval"]
    assert wide[1] - wide[0] > 1.5 * (high - low)


def test_heat_map_of_components_and_their_placebos() -> None:
    cells = crossed(layer=3, put=2).assign_coords(put=["z at <b>", "q at subject"])
    figure = sa.plot(cells)
    assert len(figure.data) == 2 and [note.text for note in figure.layout.annotations[:2]] == [
        "into tuned",
        "into base",
    ]
    assert list(figure.layout.yaxis.ticktext) == ["z at &lt;b&gt;", "<i>placebo</i>", "q at subject", "<i>placebo</i>"]
    for trace, into in zip(figure.data, ("tuned", "base"), strict=True):
        z = np.asarray(trace.z, float)
        for row, (put, patch) in enumerate((p, k) for p in ("z at <b>", "q at subject") for k in PATCHES):
            for layer in range(3):
                wanted = np.median(by_hand(cells, into, put=put, patch=patch, layer=layer))
                assert z[row, layer] == pytest.approx(wanted)
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin <= 1
    arms = xr.concat([cells, cells + 0], "arm").assign_coords(arm=["a", "b"])
    assert len(plot_transfer(arms, into="tuned").data) == 2
    with pytest.raises(BadInput, match="into 'a' is not one of base, tuned"):
        plot_transfer(arms, into="a")


def test_heat_map_by_role_beside_the_placebo() -> None:
    cells = crossed(layer=3, role=2).assign_coords(role=["subject_last", "prediction"])
    figure = sa.plot(cells)
    assert [note.text for note in figure.layout.annotations[:2]] == ["into tuned", "placebo"]
    for trace, patch in zip(figure.data, PATCHES, strict=True):
        for layer in range(3):
            wanted = np.median(by_hand(cells, "tuned", role="prediction", patch=patch, layer=layer))
            assert np.asarray(trace.z)[layer, 1] == pytest.approx(wanted)
    with pytest.raises(BadInput, match="no figure for dimensions"):
        sa.plot(cells.isel(layer=0, drop=True))


def test_a_bar_for_each_part_of_the_update() -> None:
    rng = np.random.default_rng(0)
    share = xr.DataArray(rng.normal(size=(30, 2)), {"part": ["qk", "mlp"]}, ("fact", "part"), attrs={"unit": "nats"})
    share = share.assign_coords(fact=np.arange(30))
    (bar,) = sa.plot(share).data
    for i, part in enumerate(("qk", "mlp")):
        found = sa.interval(share.sel(part=part, drop=True))
        assert bar.y[i] == pytest.approx(found.estimate)
        assert bar.y[i] + bar.error_y.array[i] == pytest.approx(found.ci_high)
        assert bar.y[i] - bar.error_y.arrayminus[i] == pytest.approx(found.ci_low)
    assert len(plot_parts(xr.concat([share, share], "arm").assign_coords(arm=["a", "b"])).data) == 2
    with pytest.raises(BadInput, match="nothing to draw"):
        plot_parts(share * np.nan)


def test_a_fact_of_five_draws_is_one_fact() -> None:
    from subjattn.study.across import _mean_of_replicates

    cells = crossed(layer=2)
    draws = [cells + noise for noise in (-0.1, 0.0, 0.1)]
    found, expected = (in_rows(shares(of), "layer") for of in (_mean_of_replicates(draws), cells))
    for row, one in zip(found, expected, strict=True):
        assert row["n"] == one["n"] <= cells.sizes["fact"]
        assert row["into"]["tuned"]["real"]["share"] == pytest.approx(one["into"]["tuned"]["real"]["share"])


def test_rows_hold_what_shares_do() -> None:
    cells = crossed(layer=3)
    for row in in_rows(shares(cells), "layer"):
        for into in ("tuned", "base"):
            for patch in PATCHES:
                values = by_hand(cells, into, layer=row["layer"], patch=patch)
                found = row["into"][into][patch]
                assert found["share"] == pytest.approx(np.median(values))
                assert found["share_low"] == pytest.approx(np.quantile(values, 0.25))
                assert found["between"] == pytest.approx(np.mean((values >= 0) & (values <= 1)))
                assert row["n"] == len(values)

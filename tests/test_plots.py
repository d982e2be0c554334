"""Figures show the numbers they are given; the report is one safe file; the scripts of viz/ run."""

from __future__ import annotations

import html
import json
import re
import runpy
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from conftest import changed

from subjattn.errors import BadInput
from subjattn.measures.patching import recovery
from subjattn.plots.choose import plot
from subjattn.plots.heatmaps import plot_attention, plot_tokens
from subjattn.plots.patching import plot_patching
from subjattn.plots.probes import plot_probed
from subjattn.plots.verdicts import plot_claims
from subjattn.prompts import ROLES
from subjattn.report import page as report
from subjattn.study.config import StudyConfig
from subjattn.study.files import open_run
from subjattn.study.run import run_study


VIZ = sorted((Path(__file__).parent.parent / "viz").glob("*.py"))
EVIL = "<script>alert(1)</script>"


@pytest.fixture
def attention() -> xr.DataArray:
    values = np.random.default_rng(0).random((2, 5, 3, 4))
    attrs = {"unit": "share of attention"}
    return xr.DataArray(values, {"arm": ["base", EVIL]}, ("arm", "fact", "layer", "head"), attrs=attrs)


def test_attention_shows_means_and_the_difference(attention: xr.DataArray) -> None:
    figure = plot_attention(attention, (EVIL, "base"))
    base, other, difference = (np.asarray(trace.z) for trace in figure.data)
    np.testing.assert_allclose(base, attention.sel(arm="base").mean("fact"))
    np.testing.assert_allclose(difference, other - base)
    assert figure.layout.coloraxis2.cmin == -figure.layout.coloraxis2.cmax, "a difference is centred at 0"
    assert figure.data[0].coloraxis == figure.data[1].coloraxis == "coloraxis", "one scale for all arms"
    assert "<script>" not in "".join(note.text for note in figure.layout.annotations)


def test_attention_of_one_model_needs_no_arm(attention: xr.DataArray) -> None:
    assert len(plot_attention(attention.isel(arm=0, drop=True)).data) == 1
    with pytest.raises(BadInput, match="expected dimensions"):
        plot_attention(attention.expand_dims(style=2))
    with pytest.raises(BadInput, match="no arm 'x'"):
        plot_attention(attention, ("x", "base"))


def test_colours_are_in_the_arrays_unit_and_sign(attention: xr.DataArray) -> None:
    """Planted: a knock-out's falls, of both signs and in nats, were cut off at 0 and called a share."""
    positive = plot_attention(attention).layout.coloraxis
    top = float(attention.mean("fact").max())
    assert (positive.cmin, positive.cmax) == (0, pytest.approx(top))
    assert positive.colorbar.title.text == "share of attention"
    falls = (attention - 0.5).assign_attrs(unit=f"nats{EVIL}")
    both = plot_attention(falls).layout.coloraxis
    assert -both.cmin == both.cmax == pytest.approx(float(abs(falls.mean("fact")).max()))
    assert both.colorbar.title.text == "nats" + html.escape(EVIL)
    assert both.colorscale != positive.colorscale
    negative = plot_attention(-attention).layout.coloraxis
    assert (negative.cmin, negative.cmax) == (pytest.approx(-top), 0)
    with pytest.raises(BadInput, match="holds no number that could be drawn"):
        plot_attention(attention * np.nan)


def test_tokens_mark_the_subject() -> None:
    values = np.full((1, 2, 4), 0.25)
    values[0, :, 3] = np.nan
    coords = {
        "fact": ["f"],
        "subject": ("fact", [EVIL]),
        "token": (("fact", "position"), [["City:", "<b>", "\n", ""]]),
        "in_subject": (("fact", "position"), [[False, True, False, False]]),
    }
    figure = plot_tokens(xr.DataArray(values, coords, ("fact", "layer", "position")))
    assert list(figure.layout.xaxis.ticktext) == ["City:", "&lt;b&gt;*", "\\n"]
    assert np.asarray(figure.data[0].z).shape == (2, 3)
    assert "<script>" not in figure.layout.yaxis.title.text


def patched(direction: str = "denoising") -> xr.DataArray:
    """Small effects where they are open, and whole ones where the grid's making decides them."""
    rng = np.random.default_rng(0)
    values = rng.random((3, 3, 6)) / 10
    values[:, 0, 3] = values[:, 2, 5] = 3.0
    values[:, :, 1] = np.nan
    return xr.DataArray(
        values,
        {
            "role": list(ROLES),
            "layer": [0, 1, 2],
            "reach": (("fact", "role"), [["before", "", "part", "whole", "same", "prediction"]] * 3),
            "clean_logit_diff": ("fact", np.full(3, 3.0)),
            "corrupt_logit_diff": ("fact", np.zeros(3)),
        },
        ("fact", "layer", "role"),
        attrs={"component": "resid_pre", "n_layers": 3, "direction": direction},
    )


def test_patching_shows_recovery() -> None:
    figure = plot_patching(patched())
    np.testing.assert_allclose(np.asarray(figure.data[0].z), recovery(patched()).transpose("layer", "role"))


def test_patching_marks_what_could_not_be_otherwise_and_scales_by_the_rest() -> None:
    figure = plot_patching(patched())
    crosses = np.asarray(figure.data[0].text) == "×"
    assert crosses.tolist() == [
        [True, False, False, True, True, True],
        [True, False, False, False, False, False],
        [True, False, False, False, False, True],
    ]
    shares = np.asarray(figure.data[0].z, float)
    assert figure.layout.coloraxis.cmax == pytest.approx(np.nanmax(shares[~crosses]))
    assert figure.layout.coloraxis.cmax < 0.1 < np.nanmax(shares[crosses])
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert figure.layout.coloraxis.colorbar.title.text == "share recovered"
    assert plot_patching(-patched("noising")).layout.coloraxis.colorbar.title.text == "share destroyed"
    with pytest.raises(BadInput, match="recovery needs a patch_grid of"):
        plot_patching(patched().rename("patch_kl"))
    with pytest.raises(BadInput, match="expected dimensions"):
        plot_patching(patched().rename(role="position"))


def test_claims_have_the_signs_of_the_tables() -> None:
    style = {"verdict": "supported", "estimate": -2.0, "ci_low": -3.0, "ci_high": -1.5}
    style |= {
        "adjusted_ci_low": -4.0,
        "adjusted_ci_high": -1.0,
        "replicates": {"draw0-seed0": -2.5, "draw1-seed0": -1.5},
    }
    claim = {"id": "c", "direction": "decrease", "smallest_effect": 0.5, "against": 1.0, "styles": {"list": style}}
    own, adjusted, plain, middle = plot_claims([claim]).data[:4]
    assert middle.x[0] == -6.0 and plain.x == (-8.0, -5.0) and adjusted.x == (-10.0, -4.0) and own.x == (-7.0, -5.0)
    assert own.y[0].endswith("←")
    assert adjusted.line.width < plain.line.width and own.text == ("draw0-seed0", "draw1-seed0")


def test_cells_that_do_not_stand_are_veiled() -> None:
    arms = xr.DataArray(
        np.random.default_rng(0).random((2, 5, 3, 4)), {"arm": ["a", "b"]}, ("arm", "fact", "layer", "head")
    )
    stands = xr.DataArray(np.zeros((3, 4), bool), dims=("layer", "head")).assign_attrs(speaks_of="this way of training")
    stands[1, 2] = True
    figure = plot_attention(arms, ("a", "b"), stands)
    veil = figure.data[-1]
    assert np.isnan(veil.z[1][2]) and np.nansum(veil.z) == 11 and veil.xaxis == figure.data[2].xaxis
    assert figure.layout.xaxis3.title.text.endswith("1 of 12 cells stand<br>this way of training")
    assert figure.layout.xaxis.title.text == "head"


class Links(HTMLParser):
    """Everything a page would fetch, and its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href") and tag != "a"]


def test_report_is_one_file_with_its_parts(done: tuple[Path, dict]) -> None:
    out, summary = done
    page = (out / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.fetched == [], "the report fetches nothing"
    assert page.count("Plotly.newPlot(") == 1 + 2 * 4, "claims, and four figures per style"
    for claim in summary["claims"]:
        assert html.escape(claim["statement"], quote=False).replace('"', "&#34;").replace("'", "&#39;") in page
    for text in (
        "they speak of these two models",
        "accuracy before training",
        "Definitions and provenance",
        "Knock-out of the subject, one part of the model at a time",
        "Here: denoising, 2 pairs, 0 of two facts that the reference arm answers rightly",
    ):
        assert text in page
    readings = {
        "direct": "reads the subject directly",
        "relay": "arrives by relay",
        "no effect seen": "is not seen to be used",
    }
    for style in ("list", "sentence"):
        assert readings[summary["arms"]["base"]["styles"][style]["route"]["reading"]] in page


class Facts(HTMLParser):
    """The cells of every table of facts, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.inside = self.cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.inside = ("class", "facts") in attrs
            self.tables += [[]] if self.inside else []
        elif self.inside and tag == "tr":
            self.tables[-1].append([])
        elif self.inside and tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside and self.cell:
            self.tables[-1][-1][-1] += data


def test_report_lists_what_every_arm_answers(done: tuple[Path, dict]) -> None:
    """Each fact's row as the run has it; and contents at the side whose links lead somewhere."""
    run, page = open_run(done[0]), (done[0] / "report.html").read_text()
    told = Facts()
    told.feed(page)
    facts = run.facts[run.facts["test"]]
    assert [len(table) for table in told.tables] == [1 + 24] * 2
    for style, (head, *rows) in zip(run.styles, told.tables, strict=True):
        assert head == ["subject", "answer", "popularity", *run.arms]
        found = run.predictions().set_index(["style", "fact_id", "arm"]).loc[style]
        for row, fact in zip(rows, facts.itertuples(), strict=True):
            assert row[:2] == [fact.subject, fact.answer]
            for arm, cell in zip(run.arms, row[3:], strict=True):
                prediction, correct = found.loc[(fact.fact_id, arm), ["prediction", "correct"]]
                assert cell.split() == ["✓" if correct else "✗", *str(prediction).split()]
    targets = set(re.findall(r' id="([^"]+)"', page))
    links = re.findall(r'<a (?:class="part" )?href="#([^"]+)"', page)
    assert len(links) == 5 + 2 * 6 and set(links) <= targets


def test_report_escapes_what_comes_from_data(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Planted: markup in a subject, an answer and a claim must stay text."""
    from subjattn.study.read import parse_study

    own = tmp_path / "own.csv"
    rows = [f"{EVIL} {i},{EVIL}Kenya{i % 3},{i}" for i in range(12)]
    own.write_text("\n".join(["subject,answer,popularity", *rows]))
    claim = {
        "id": EVIL,
        "statement": EVIL,
        "measure": "accuracy",
        "arms": ["base", "same"],
        "direction": "increase",
        "smallest_effect": 1,
    }
    raw = {
        "name": "evil",
        "model": str(tiny_folders["llama"]),
        "facts": {"source": str(own), "n_test": 12},
        "styles": {"s": "<i>{subject}</i> is in"},
        "arms": {"base": {}, "same": {"model": str(tiny_folders["llama"])}},
        "claims": [claim],
        "contrasts": [["same", "base"]],
    }
    run_study(parse_study(raw, "evil"), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert EVIL not in page
    assert "&lt;script&gt;alert(1)" in page


def test_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no finished study"):
        report.write(tmp_path)


@pytest.fixture(scope="session")
def by_head(small: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model's run that looks at heads."""
    out = tmp_path_factory.mktemp("runs") / "heads"
    measures = {"knockout": {"by": "head", "facts": 2}, "patching": {"component": "z", "pairs": 2}}
    fields = {"measures": measures, "arms": {"base": {}}, "claims": [], "contrasts": []}
    run_study(changed(small, **fields), out)
    return out


def redrawn(script: str, run: Path, target: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    path = next(path for path in VIZ if path.stem == script)
    monkeypatch.setattr(sys, "argv", [str(path), str(run), "--style", "sentence", "--out", str(target), *options])
    runpy.run_path(str(path), run_name="__main__")
    return target.read_text()


@pytest.mark.parametrize("script", VIZ, ids=lambda path: path.stem)
def test_viz_redraws_from_a_finished_run(
    done: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Path
) -> None:
    assert "Plotly.newPlot(" in redrawn(script.stem, done[0], tmp_path / "figure.html", monkeypatch)


def test_viz_and_the_report_draw_heads(by_head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(by_head)
    for script, measure, variable, options in (
        ("knockout", "knockout", "knockout_drop_by_head", ("--by", "head")),
        ("patching_heatmap", "patching", "patch_effect", ()),
    ):
        numbers = json.loads(plot(run.array(measure, variable, "sentence")).to_json())["data"][-1]["z"]["bdata"]
        expected = max(re.split("[/+=]", numbers), key=len)  # a page escapes the rest
        assert len(expected) > 20
        assert expected in redrawn(script, by_head, tmp_path / "a.html", monkeypatch, *options)
        assert expected in (by_head / "report.html").read_text()


def test_there_is_a_script_per_figure() -> None:
    assert {path.stem for path in VIZ} == {
        "attention_heatmap", "knockout", "patching_heatmap", "token_attention", "verdicts",
    }  # fmt: skip


def test_probes_without_a_control_are_drawn_alone() -> None:
    """No two names share a last token: there is no selectivity, and accuracy is drawn all the same."""
    correct = xr.DataArray(np.ones((4, 2, 1)), {"role": ["subject_last"]}, ("fact", "layer", "role"), name="correct")
    figure = plot_probed(correct, xr.full_like(correct, np.nan).rename("selectivity"))
    assert len(figure.data) == 1
    assert len(plot_probed(correct, correct.rename("selectivity") * 0.5).data) == 2

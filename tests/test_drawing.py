"""One function draws every array, and what it draws can be saved for a paper."""

from __future__ import annotations

import re
import shutil
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr

from subjattn.errors import BadInput
from subjattn.measures.patching import recovery
from subjattn.plots.choose import plot
from subjattn.plots.drawing import Drawing
from subjattn.plots.heatmaps import plot_attention, plot_tokens
from subjattn.plots.lines import plot_knockout
from subjattn.plots.patching import plot_heads, plot_patching
from subjattn.prompts import ROLES


needs_chrome = pytest.mark.skipif(
    find_spec("kaleido") is None or not any(map(shutil.which, ("chromium", "google-chrome", "chrome"))),
    reason="no Chrome or Chromium, or no kaleido",
)
SIZES = {"arm": 2, "fact": 3, "route": 2, "layer": 4, "head": 5, "role": len(ROLES), "position": 3}
REACH = ["before", "part", "part", "whole", "same", "prediction"]


def made(*dims: str, **attrs: Any) -> xr.DataArray:
    shape = tuple(SIZES[dim] for dim in dims)
    coords: dict[str, Any] = {dim: np.arange(SIZES[dim]) for dim in dims if dim in ("layer", "head", "position")}
    coords |= {"arm": ["base", "tuned"]} if "arm" in dims else {}
    coords |= {"route": ["direct", 'to "all"']} if "route" in dims else {}
    coords |= {"role": list(ROLES)} if "role" in dims else {}
    return xr.DataArray(np.random.default_rng(0).random(shape), coords, dims, "a", {"unit": "nats"} | attrs)


def patched(component: str, *dims: str) -> xr.DataArray:
    effect = made(*dims, component=component, n_layers=4, direction="denoising").rename("patch_effect")
    held = (("fact", "role"), [REACH] * 3) if "role" in dims else ("fact", ["prediction"] * 3)
    if "role" in dims:
        effect = effect.where(effect["role"] != "before_subject", 0.0)
    ends = {"clean_logit_diff": ("fact", [3.0, 4, 5]), "corrupt_logit_diff": ("fact", [-1.0, 0, 1])}
    return effect.assign_coords({"reach": held} | ends)


def tokens() -> xr.DataArray:
    array = made("arm", "fact", "layer", "position")
    coords = {"subject": ("fact", list("abc")), "token": (("fact", "position"), [["x", "y", "z"]] * 3)}
    return array.assign_coords(coords | {"in_subject": (("fact", "position"), [[False, True, False]] * 3)})


FITS = [
    (made("arm", "fact", "layer", "head"), plot_attention),
    (made("fact", "layer", "head"), plot_attention),
    (made("arm", "fact", "route", "layer"), plot_knockout),
    (made("fact", "route", "layer", "head"), plot_knockout),
    (patched("resid_pre", "arm", "fact", "layer", "role"), plot_patching),
    (patched("z", "arm", "fact", "layer", "head"), plot_heads),
    (patched("z", "arm", "fact", "layer", "head", "role"), plot_heads),
    (tokens(), plot_tokens),
]


@pytest.mark.parametrize(("array", "draw"), FITS, ids=lambda one: str(getattr(one, "dims", "")))
def test_plot_is_the_figure_that_fits(array: xr.DataArray, draw: Any) -> None:
    assert isinstance(plot(array), Drawing)
    assert plot(array).to_json() == draw(array).to_json()
    few = array.rename({"fact": "few_fact"} | ({"subject": "few_subject"} if "subject" in array.coords else {}))
    assert plot(few).to_json() == draw(array).to_json(), "a run's few facts are facts"


def test_plot_takes_a_difference_and_the_cells_that_stand() -> None:
    array, stands = made("arm", "fact", "layer", "head"), made("layer", "head") > 0.5
    pair = ("tuned", "base")
    assert plot(array, pair, stands).to_json() == plot_attention(array, pair, stands).to_json()


def test_a_line_along_the_layers_leaves_out_what_could_not_be_otherwise() -> None:
    effect = patched("resid_pre", "fact", "layer")
    figure = plot(effect)
    found = np.array(figure.data[0].y, float)
    np.testing.assert_allclose(found[1:3], effect.mean("fact")[1:3])
    assert np.isnan(found[[0, 3]]).all(), "the same token before the first layer, and all there is before the last"
    one = plot(made("fact", "route", "layer").sel(route='to "all"'))
    assert one.layout.annotations[0].text == 'to "all"', "quotes are shown as quotes"


def test_heads_show_what_each_recovers() -> None:
    effect = patched("z", "arm", "fact", "layer", "head", "role")
    figure = plot_heads(effect)
    assert [note.text for note in figure.layout.annotations] == [
        "subject, first", "subject, middle", "subject, last", "after", "prediction",
    ]  # fmt: skip
    shares = recovery(effect.sel(arm="tuned", role="subject_last"))
    np.testing.assert_allclose(np.array(figure.data[5 + 2].z), shares.transpose("layer", "head"))
    assert (np.array(figure.data[5 + 2].text)[3] == "×").all(), (
        "the last layer is read at the prediction position alone"
    )
    assert (np.array(figure.data[5 + 4].text) == "").all()
    alone = patched("z", "fact", "layer", "head")
    expected = alone.mean("fact") / 4
    np.testing.assert_allclose(np.array(plot(alone).data[0].z), expected.transpose("layer", "head"))


@pytest.mark.parametrize("array", [array for array, _ in FITS if "head" in array.dims], ids=lambda one: str(one.dims))
def test_layers_and_heads_keep_their_numbers(array: xr.DataArray) -> None:
    """Planted: part of the layers was drawn as layers 0, 1, 2; with gaps, cells of odd sizes."""
    figure = plot(array.isel(layer=slice(1, None), head=[1, 4]))
    assert list(figure.data[0].y) == [1, 2, 3] and list(figure.data[0].x) == [1, 4]
    assert figure.layout.xaxis.type == "category" and figure.layout.yaxis.type is None
    lines = plot(made("fact", "route", "layer").isel(layer=slice(2, None)))
    assert list(lines.data[0].x) == [2, 3]


def test_the_note_stands_beneath() -> None:
    array = made("fact", "layer", "head", note='moving is not "reading" <b>')
    figure = plot(array)
    assert figure.layout.annotations[-1].text == 'moving is not "reading" &lt;b&gt;'
    assert figure.layout.margin.b > plot(made("fact", "layer", "head")).layout.margin.b
    assert all(note.name != "note" for note in figure.for_paper("column").layout.annotations)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (made("layer", "head"), r"no figure for dimensions \('layer', 'head'\): plot draws \(fact, layer, head\), "),
        (made("fact", "route"), r"no figure for dimensions \('fact', 'route'\)"),
        (made("fact", "layer", "head").expand_dims(draw=2), r"replicates have no figure: .* array.mean\(\['draw'\]\)"),
        (made("fact", "layer", "head").to_dataset(), "plot takes one array, not a Dataset: give one of a"),
        (tokens().drop_vars("token"), "does not say which tokens stand at its positions"),
        (tokens().isel(fact=[0] * 9), "9 prompts are too many for a figure of single tokens: take up to 8"),
        (patched("z", "fact", "layer", "head").drop_vars("clean_logit_diff"), "recovery needs a patch_grid of"),
    ],
    ids=range(7),
)
def test_plot_refuses_in_a_line_what_it_cannot_draw(array: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        plot(array)


def test_a_difference_is_drawn_by_layer_and_head_alone() -> None:
    with pytest.raises(BadInput, match="difference and significant are drawn of attention and knock-out by layer and"):
        plot(made("arm", "fact", "route", "layer"), ("tuned", "base"))


def test_a_figure_is_saved_by_its_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = plot(made("fact", "layer", "head"))
    assert "Plotly.newPlot(" in figure.save(tmp_path / "a.html").read_text()
    with pytest.raises(BadInput, match="saved as .html, .svg, .pdf or .png, not as 'a.eps'"):
        figure.save(tmp_path / "a.eps")
    with pytest.raises(BadInput, match="width 'wide' is not one of column, page"):
        figure.save(tmp_path / "a.html", "wide")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="there is no folder .* to save a figure in"):
        figure.save(tmp_path / "no" / "a.pdf")
    many = plot(made("arm", "fact", "layer", "head").isel(arm=[0] * 4).assign_coords(arm=list("abcd")))
    with pytest.raises(
        BadInput, match="4 panels side by side are 0.5 in each in a column of 3.25 in: take width='page'"
    ):
        many.save(tmp_path / "a.html", "column")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(BadInput, match=r".pdf figures need a library: pip install 'subjattn\[figures\]'"):
        figure.save(tmp_path / "a.pdf")
    monkeypatch.setitem(sys.modules, "kaleido", type(sys)("kaleido"))

    def no_chrome(*_: object, **__: object) -> None:
        raise RuntimeError("\n\nKaleido requires Google Chrome to be installed.\n\nEither …")

    monkeypatch.setattr(go.Figure, "write_image", no_chrome)
    with pytest.raises(BadInput, match="drawn by Chrome or Chromium, and none was found: install one"):
        figure.save(tmp_path / "a.pdf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


@needs_chrome
def test_a_figure_of_a_paper_has_its_width_and_text_that_is_text(tmp_path: Path) -> None:
    figure = plot(made("arm", "fact", "layer", "head"))
    text = figure.save(tmp_path / "a.svg", "column").read_text()
    assert re.search(r'<svg[^>]* width="312"', text), "3.25 inches of 96 pixels"
    sizes = {float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)}
    assert {round(size * 0.75, 2) for size in sizes} <= {8.0, 9.0}, "points"
    assert ">tuned</text>" in text and ">layer</text>" in text
    pdf = figure.save(tmp_path / "a.pdf", "page").read_bytes()
    inner = b"".join(
        zlib.decompressobj().decompress(part)
        for part in re.findall(rb"FlateDecode.*?stream\r?\n(.*?)endstream", pdf, re.S)
    )
    box = re.search(rb"/MediaBox\s*\[\s*0 0 ([\d.]+)", pdf + inner)
    assert box is not None and abs(float(box[1]) / 72 - 6.75) < 0.02 and b"/Font" in pdf + inner
    png = figure.save(tmp_path / "a.png", "column").read_bytes()
    assert abs(int.from_bytes(png[16:20], "big") / 300 - 3.25) < 0.01, "300 dots an inch"

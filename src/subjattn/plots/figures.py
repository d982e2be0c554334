"""The figures of a report, by name: each draws a measure's arrays, a panel per arm.

A package of yours adds one by an entry point of the group `subjattn.figures`, and a measure names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go
import xarray as xr

from subjattn.plots.choose import plot
from subjattn.plots.doses import plot_doses
from subjattn.plots.heatmaps import plot_attention, plot_tokens
from subjattn.plots.lines import plot_knockout
from subjattn.plots.probes import plot_probed
from subjattn.plots.transfer import plot_parts, plot_transfer
from subjattn.registry import discover, named


@dataclass(frozen=True)
class Drawn:
    """What a figure is given.

    Attributes:
        array: a measure's variables by name, `(arm, fact, …)`; None where there is none.
        difference: two arms.
        significant: cells of a variable in which these two differ, with what that speaks of in attributes.
    """

    array: Callable[[str], xr.DataArray | None]
    difference: tuple[str, str] | None = None
    significant: Callable[[str], xr.DataArray | None] = lambda _: None


@dataclass(frozen=True)
class Figure:
    """One kind of figure.

    Attributes:
        name: by which a measure asks for it.
        title: above it.
        note: how to read it.
        draw: gives it, or None where there is nothing to draw.
    """

    name: str
    title: str
    note: str
    draw: Callable[[Drawn], go.Figure | None]


def figures() -> dict[str, Figure]:
    """All figures by name."""
    return discover("subjattn.plots", "FIGURE", "subjattn.figures")


def figure_of(name: str) -> Figure:
    """One figure; BadInput where there is none of that name."""
    return named(figures(), name, "figure")  # type: ignore[no-any-return]


def _attention(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("attention_to_subject")
    if array is None:
        return None
    return plot_attention(array, drawn.difference, drawn.significant("attention_to_subject"))


def _knockout(drawn: Drawn) -> go.Figure | None:
    for by in ("layer", "window", "head"):
        if (array := drawn.array(f"knockout_drop_by_{by}")) is not None:
            return plot_knockout(array)
    return None


def _patching(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("patch_effect")
    return None if array is None else plot(array)


def _rescale(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("rescale_change")
    return None if array is None else plot_doses(array, drawn.array("rescale_control"))


def _trace(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("indirect_effect")
    return None if array is None else plot(array)


def _probe(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("probe_correct")
    return None if array is None else plot_probed(array, drawn.array("probe_selectivity"))


def _tokens(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("token_attention")
    return None if array is None else plot_tokens(array)


def _transfer(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("transfer_by_layer")
    return None if array is None else plot_transfer(array)


def _parts(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("update_share")
    return None if array is None else plot_parts(array)


def _lens(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("lens_logprob")
    return None if array is None else plot(array)


def _contributions(drawn: Drawn) -> go.Figure | None:
    array = drawn.array("head_contribution")
    if array is None:
        return None
    array = array.sel(source="subject", drop=True)
    over = array.sel(of="answer", drop=True) - array.sel(of="others", drop=True)
    return plot_attention(over.rename("contribution").assign_attrs(array.attrs), drawn.difference)


FIGURE = (
    Figure(
        "attention",
        "Attention to the subject, by layer and head",
        "From the prediction position, mean over facts. One scale for all arms. In the last panel cells that do not "
        "differ for certain are faded (Benjamini–Yekutieli at 5 %).",
        _attention,
    ),
    Figure(
        "knockout",
        "Knock-out of the subject, one part of the model at a time",
        "Fall of the answer's log-probability when the edges to the subject are blocked in one layer (window, head) "
        "alone; mean over a few facts.",
        _knockout,
    ),
    Figure(
        "patching",
        "Where the subject's information lies: patching",
        "Denoising puts clean states into the run whose subject was swapped, at all positions of one role: 0 leaves "
        "it as it was, 1 restores the clean logit difference. Noising puts swapped states into the clean run: 0 leaves "
        "it, 1 takes all of the difference away. “Before” the subject both runs are the same: the effect is exactly 0.",
        _patching,
    ),
    Figure(
        "rescale",
        "Dose–response of attention to the subject",
        "Change of the answer's log-probability when a dose is added to the attention scores of the route's edges (or "
        "multiplies their weights); mean over a few facts. Dashed: the same doses on as many other edges of the same "
        "queries, that lead neither to the subject nor to the first token.",
        _rescale,
    ),
    Figure(
        "trace",
        "Where the subject is recalled: causal tracing",
        "Noise on the embeddings of the subject's tokens takes the answer away; clean states, restored in windows of "
        "layers at all positions of one role, bring back so many nats of its log-probability. Mean over draws of noise "
        "and a few facts. “Before” the subject nothing is noised: the effect is exactly 0.",
        _trace,
    ),
    Figure(
        "transfer",
        "What one model's states return in the other",
        "Share of the gap between a tuned model's answer log-probability and its base's that comes back when states of "
        "the one are put into the run of the other, one layer at a time: 0 leaves the model as it is, 1 makes it the "
        "other. Median over a few facts, those whose gap is 0.1 nats or more. Placebo: as many other positions of the "
        "same prompt. The scale ends at 1.",
        _transfer,
    ),
    Figure(
        "swap_weights",
        "Which part of the update does it",
        "Shapley value of each part of the tuned weights in the answer's log-probability, from all combinations of "
        "base and tuned parts: the bars add up to the whole change. qk: projections of queries and keys; vo: of values "
        "and outputs; rest: other norms, embeddings and unembedding. 95 % intervals over facts.",
        _parts,
    ),
    Figure(
        "logit_lens",
        "The answer read from every layer",
        "Log-probability of the answer's first token when the model's final norm and unembedding read the residual "
        "stream behind a layer (logit lens); mean over facts. They were not made for early layers: low there does not "
        "say that the answer is not encoded.",
        _lens,
    ),
    Figure(
        "head_contributions",
        "What heads write into the answer, reading the subject",
        "Direct logit attribution: what each head, reading the subject's tokens at the prediction position, adds to "
        "the logit of the right answer over the mean of the other facts' answers; mean over facts. The direct part "
        "alone: what heads move to other positions is counted where it is read.",
        _contributions,
    ),
    Figure(
        "probe",
        "What linear probes read of the label",
        "Above: share of facts whose label a linear probe gives that was trained on other subjects (of heads at the "
        "subject's last token). Beneath: how far it stands above the control task, whose labels were drawn at random "
        "for the name's last token; 0 says that the token alone could give as much.",
        _probe,
    ),
    Figure(
        "tokens",
        "Attention over the tokens of single prompts",
        "From the prediction position (the last token shown), mean over heads. Tokens of the subject carry an "
        "asterisk. The scale ends at the largest weight behind the first token, which is a sink and may lie beyond it.",
        _tokens,
    ),
)

"""The measure `attention_to_subject`: every form in which papers report it, each beside what would expose it.

An average of attention may rise because heads rest on early positions, wherever the subject stands. So the same prompt
is asked behind neutral text that moves the subject (the word that now stands where it stood is the control), and
positions that draw attention whatever their token are left out. Value weights say what is moved and not only looked at.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from pydantic import Field

from subjattn.backends import Backend, BackendName
from subjattn.errors import BadInput, NotDefined
from subjattn.measures import check_askable, hf_model, labelled, opened, tokenizer_of
from subjattn.measures.attention import PAPER, REDUCTIONS, by_layer, prediction_rows, subject_attention
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape, mean_over
from subjattn.prompts import Prompt, ablate
from subjattn.prompts.prefix import neutral_prefix


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from subjattn.measures import Model

log = logging.getLogger(__name__)
SINK = 0.1
"""Mean weight from which a position is a sink of a head, if it draws it whatever its token."""
LOOKED_AT = 32
"""Facts, at most, on which sinks are looked for."""
_FORMS = {
    "attention_max": "largest of the subject's tokens (Ghosal et al. 2024)",
    "attention_last": "to the last subject token",
    "attention_value_weighted": "share of weight × ‖value·W_O‖ (Kobayashi et al. 2020) that is the subject's tokens'",
    "attention_moved": "summed over the subject's tokens, behind neutral text that moves them",
    "attention_in_its_place": "summed over the neutral tokens that stand where the subject stood, in the moved prompt",
    "attention_without_sinks": "summed over the subject's tokens in the moved prompt, sinks left out and the rest "
    "renormalised",
    "attention_over_its_place": "to a subject token minus to a neutral token that stands where the subject stood, in "
    "the moved prompt, sinks left out and the rest renormalised",
}


def controlled_attention(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    sink: xr.DataArray | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """Attention from the prediction position to the subject in several forms, and at controls.

    A sink of a head is a position that draws a mean weight of 0.1 or more both with the subject masked and behind
    neutral text, so whatever its token is; the prediction position itself is none.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        sink: what this gives of another model asked the same: its sinks are left out here too. Two models are compared
            on one set, the base's; each with its own set leaves out other positions.
        tokenizer: of a plain model.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, layer, head)`, query heads, each a share of attention:

        * `attention_max`, `attention_last`: over the subject's tokens;
        * `attention_value_weighted`, of lengths that tokens' values write; NaN on a backend that gives no values;
        * `attention_moved`, and `attention_in_its_place`, the control of its position, as they are;
        * `attention_without_sinks`, `attention_over_its_place`: the same where sinks are left out; NaN where all the
          tokens concerned are sinks of the head;
        * `sink` `(layer, head, position)`: which positions are.

    Raises:
        BadInput: a prompt ends with its subject, there is no neutral text of the length needed, or sinks of a model of
            another shape.
        UnsupportedModel: the model's attention cannot be read exactly.
    """
    check_askable(prompts)
    own = tokenizer_of(model, tokenizer)
    moved = behind_neutral_text(prompts, own, max(prompt.subject_span[1] for prompt in prompts))
    masked = [ablate(prompt, "masked", own) for prompt in prompts]
    run = opened(backend, hf_model(model), memory_budget, moved)
    left_out = (
        _sinks(run, prompts, masked, moved) if sink is None else sink.transpose("layer", "head", "position").values
    )
    found: dict[str, np.ndarray] = {}
    for output in run.attention_rows(moved):
        for i, row in zip(output.index, prediction_rows(output), strict=True):
            subject, there = list(moved[i].subject_positions), list(prompts[i].subject_positions)
            if left_out.shape[:2] != row.shape[:2]:
                raise BadInput(f"sinks of {left_out.shape[:2]} layers and heads, and the model has {row.shape[:2]}")
            kept = _without(row[..., : moved[i].prediction + 1], left_out)
            _put(found, "attention_moved", i, row[..., subject].sum(-1), prompts)
            _put(found, "attention_in_its_place", i, row[..., there].sum(-1), prompts)
            _put(found, "attention_without_sinks", i, _sum(kept[..., subject]), prompts)
            _put(found, "attention_over_its_place", i, _mean(kept[..., subject]) - _mean(kept[..., there]), prompts)
    found |= _in_place(run, prompts)
    return _labelled(found, prompts, run).assign(sink=(("layer", "head", "position"), left_out))


def _in_place(run: Backend, prompts: Sequence[Prompt]) -> dict[str, Float[np.ndarray, "fact layer head"]]:
    """The forms that are of the prompt as it stands."""
    found: dict[str, np.ndarray] = {}
    values = run.name in ("engine", "hooks")
    for output in run.attention_rows(prompts, value_norms=values):
        rows = prediction_rows(output)
        weighted = rows * by_layer(output.value_norms) if values else rows * np.nan
        for i, row, its in zip(output.index, rows, weighted, strict=True):
            at = list(prompts[i].subject_positions)
            _put(found, "attention_max", i, REDUCTIONS["max"](row[..., at]), prompts)
            _put(found, "attention_last", i, REDUCTIONS["last"](row[..., at]), prompts)
            whole = its[..., : prompts[i].prediction + 1].sum(-1)
            _put(found, "attention_value_weighted", i, its[..., at].sum(-1) / whole, prompts)
    return found


def _labelled(found: Mapping[str, np.ndarray], prompts: Sequence[Prompt], run: Backend) -> xr.Dataset:
    """Forms as arrays; those that are not there as NaN."""
    missing = np.full_like(next(iter(found.values())), np.nan)
    arrays = {
        name: labelled(
            name,
            found.get(name, missing),
            prompts,
            ("layer", "head"),
            unit="share of attention",
            definition=f"attention from the prediction position, {words}",
            paper=PAPER,
            backend=run.name,
        )
        for name, words in _FORMS.items()
    }
    return xr.Dataset(arrays)


def _sinks(
    run: Backend, prompts: Sequence[Prompt], masked: Sequence[Prompt], moved: Sequence[Prompt]
) -> Bool[np.ndarray, "layer head position"]:
    """Positions that draw attention with the subject masked and behind neutral text, on some of the facts."""
    chosen = sorted(range(len(prompts)), key=lambda i: zlib.crc32(prompts[i].fact_id.encode()))[:LOOKED_AT]
    drawn = [_mean_row(run, [asked[i] for i in chosen]) for asked in (masked, moved)]
    length = min(row.shape[-1] for row in drawn)
    found: np.ndarray = np.minimum(*(row[..., :length] for row in drawn)) >= SINK
    return found


def behind_neutral_text(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> list[Prompt]:
    """Prompts behind so many tokens of neutral text (after a BOS, if there is one); all their own tokens stay.

    Raises:
        BadInput: there is no neutral text of that length.
    """
    text = neutral_prefix(tokenizer, n_tokens)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    tokens = tuple(str(tokenizer.decode([token])) for token in ids)
    made = []
    for prompt in prompts:
        start, stop = prompt.subject_span
        bos = 1 if prompt.ids[0] == tokenizer.bos_token_id and start > 0 else 0
        made.append(
            replace(
                prompt,
                text=text + prompt.text,
                ids=prompt.ids[:bos] + ids + prompt.ids[bos:],
                tokens=prompt.tokens[:bos] + tokens + prompt.tokens[bos:],
                span=(start + len(ids), stop + len(ids)),
                prediction=prompt.prediction + len(ids),
            )
        )
    return made


def _put(found: dict[str, np.ndarray], name: str, i: int, values: np.ndarray, prompts: Sequence[Prompt]) -> None:
    found.setdefault(name, np.full((len(prompts), *values.shape), np.nan, np.float32))[i] = values


def _mean_row(run: Backend, prompts: Sequence[Prompt]) -> np.ndarray:
    """Mean attention by absolute position, `[layer, head, position]`, the prediction position itself left out."""
    length = max(prompt.prediction for prompt in prompts)
    total, counts = np.zeros(()), np.zeros(length)
    for output in run.attention_rows(prompts):
        rows = prediction_rows(output)
        total = total if total.ndim else np.zeros((*rows.shape[1:3], length))
        for i, row in zip(output.index, rows, strict=True):
            n = prompts[i].prediction
            total[..., :n] += row[..., :n]
            counts[:n] += 1
    mean: np.ndarray = total / counts
    return mean


def _without(row: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """A row `[layer, head, key]` with its sinks NaN and the rest renormalised."""
    here = np.zeros(row.shape, bool)
    n = min(sink.shape[-1], row.shape[-1] - 1)
    here[..., :n] = sink[..., :n]
    kept = np.where(here, np.nan, row)
    shares: np.ndarray = kept / np.nansum(kept, -1, keepdims=True)
    return shares


def _sum(kept: np.ndarray) -> np.ndarray:
    """Over tokens that are no sinks; NaN where all are."""
    return np.where(np.isnan(kept).all(-1), np.nan, np.nansum(kept, -1))


def _mean(kept: np.ndarray) -> np.ndarray:
    left = (~np.isnan(kept)).sum(-1)
    return np.where(left > 0, np.nansum(kept, -1) / np.maximum(left, 1), np.nan)


class AttentionSettings(Settings):
    reduce: Literal["sum", "max", "last"] = Field("sum", description="over the subject's tokens")
    value_weighted: bool = Field(False, description="weight × ‖value·W_O‖ (Kobayashi et al. 2020)")
    controls: bool = Field(True, description="beside it all forms, moved prompts and sinks, for some passes more")


def _run(asked: Asked, settings: AttentionSettings) -> xr.Dataset:
    how = {"reduce": settings.reduce, "value_weighted": settings.value_weighted}
    found = subject_attention(asked.model, asked.prompts, **how, **asked.computing).to_dataset()  # type: ignore[arg-type]
    forms = xr.Dataset(dict.fromkeys(_FORMS, found["attention_to_subject"] * np.nan))
    if settings.controls:
        sink = None if asked.reference is None else asked.reference.get("sink")
        try:
            forms = controlled_attention(asked.model, asked.prompts, sink=sink, **asked.computing)
        except NotDefined as error:
            log.warning("note: attention has no controls here: %s", error)
            run = opened(asked.backend, hf_model(asked.model), asked.memory_budget, asked.prompts)
            forms = _labelled(_in_place(run, asked.prompts), asked.prompts, run)
    found = found.assign(forms)
    asked.tell((1 + CONTROLS * settings.controls) * len(asked.prompts))
    return found


CONTROLS = 3.5
"""Passes of a prompt that the controls take, roughly: one of its own length, one of about twice that, and sinks."""


def _form(name: str, smallest: float) -> Quantity:
    return Quantity(
        name,
        "share of attention",
        f"attention from the prediction position, {_FORMS[name]}; mean over layers and heads",
        per_fact=mean_over(name, "layer", "head"),
        cells={"layer": "mean", "head": "mean"},
        smallest_effect=smallest,
    )


def _cost(shape: Shape, settings: AttentionSettings) -> float:
    return shape.n_facts * (1 + CONTROLS * settings.controls)


MEASURE = Measure(
    name="attention_to_subject",
    title="attention to the subject",
    paper=PAPER,
    quantities=(
        Quantity(
            "attention_to_subject",
            "share of attention",
            "attention from the prediction position to the subject, mean over layers and heads",
            per_fact=mean_over("attention_to_subject", "layer", "head"),
            cells={"layer": "mean", "head": "mean"},
            smallest_effect=0.005,
        ),
        _form("attention_max", 0.005),
        _form("attention_last", 0.005),
        _form("attention_value_weighted", 0.005),
        _form("attention_without_sinks", 0.005),
        _form("attention_over_its_place", 0.001),
    ),
    control="The same prompt behind neutral text that moves the subject: `attention_over_its_place` sets a subject's "
    "token against a neutral token that stands where the subject stood, `attention_without_sinks` leaves out "
    "positions that draw 0.1 or more whatever their token (in a study, those of the base model in every arm). "
    "`attention_value_weighted` counts what is moved, not what is looked at.",
    reads="Where the prediction position reads. Not what it moves there, nor that the answer depends on it: where the "
    "subject arrives by relay through the words in between, it means little (`knockout`, `direct_share`). A fall of "
    "the forms without control may be a wide sink at the first positions.",
    undefined="Heads for which all tokens concerned are sinks are left out of a fact's mean. All forms but "
    "`attention_to_subject` with `controls` off. The forms with a control where the tokenizer knows no neutral text "
    "(some invented worlds). `attention_value_weighted` on a backend that gives no values.",
    run=_run,
    cost=_cost,
    settings=AttentionSettings,
    needs=frozenset({"subject", "same_prompts", "reference"}),
    any_backend=True,
    figure="attention",
    version=3,
)

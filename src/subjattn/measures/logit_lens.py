"""The logit lens: what the model would answer if it stopped at a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr

from subjattn.engine.anatomy import decoder_layers
from subjattn.engine.checks import check_model
from subjattn.engine.forward import states
from subjattn.engine.interventions import BATCH_TOKENS, Row, batches
from subjattn.engine.unembed import unembed
from subjattn.errors import BadInput
from subjattn.measures import check_prompts, hf_model, labelled, shortened
from subjattn.measures.first_tokens import telling
from subjattn.measures.record import Asked, Measure, Quantity, mean_over, one_per_fact
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

PAPER = "nostalgebraist 2020; Geva et al. 2022"


def logit_lens(model: Model, prompts: Sequence[Prompt]) -> xr.Dataset:
    """The answer's first token, read from the residual stream behind every layer at the prediction position.

    Each layer's state goes through the model's own final norm and unembedding. These were not trained for states of
    early layers, so a low rank there does not say that the answer is not encoded (a probe does); a high one says that
    it can be read out.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask; their answers' first tokens are looked at.

    Returns:
        * `lens_logprob` `(fact, layer)`: the token's log-probability, in nats; the last layer's is the model's own;
        * `lens_rank` `(fact, layer)`: how many tokens are likelier, 0 being the likeliest;
        * `settled` `(fact,)`: from which layer on the token stays the likeliest; NaN where the model answers another.

        NaN throughout for facts whose answer begins with the same token as another fact's other answer.

    Raises:
        BadInput: no prompts.
        NotDefined: no answer is told from the others by its first token.
        UnsupportedModel: see `check_model`.
    """
    check_prompts(prompts)
    if not prompts:
        raise BadInput("there are no prompts to measure")
    hf = hf_model(model)
    check_model(hf)
    n_layers, short, tells = len(decoder_layers(hf)), [shortened(prompt) for prompt in prompts], telling(prompts)
    logprob, rank = np.empty((len(prompts), n_layers)), np.empty((len(prompts), n_layers))
    for index in batches([len(prompt) for prompt in short], BATCH_TOKENS):
        some = [short[i] for i in index]
        found = states(hf, some, "resid_post")
        own = torch.tensor([prompt.answer_ids[0] for prompt in some], device=hf.device)[:, None]
        for layer in range(n_layers):
            hidden = torch.stack([state[layer, prompt.prediction] for state, prompt in zip(found, some, strict=True)])
            logits = unembed(hf, hidden, [Row(prompt) for prompt in some], only_contrast=False)
            own = own.to(logits.device)
            logprob[index, layer] = logits.log_softmax(-1).gather(1, own)[:, 0].cpu().numpy()
            rank[index, layer] = (logits > logits.gather(1, own)).sum(-1).cpu().numpy()
    logprob[~tells], rank[~tells] = np.nan, np.nan
    attrs = {"paper": PAPER}
    dataset = xr.Dataset(
        {
            "lens_logprob": labelled(
                "lens_logprob",
                logprob,
                prompts,
                ("layer",),
                unit="nats",
                definition="log-probability of the answer's first token, read from the residual stream behind a layer",
                **attrs,
            ),
            "lens_rank": labelled(
                "lens_rank",
                rank,
                prompts,
                ("layer",),
                unit="tokens",
                definition="tokens likelier than the answer's first, read from the residual stream behind a layer",
                **attrs,
            ),
        }
    )
    return dataset.assign(settled=settled(dataset["lens_rank"]))


def settled(rank: xr.DataArray) -> xr.DataArray:
    """The layer from which on the rank stays 0."""
    layers = rank.sizes["layer"]
    first = (rank[:, ::-1] == 0).cumprod("layer").sum("layer")
    found = (layers - first).where(first > 0).rename("settled").astype(float)
    definition = "layer from which on the answer's first token stays the likeliest, where the model answers it"
    return found.assign_attrs(unit="layers", definition=definition, paper=PAPER)


def _run(asked: Asked, _: object) -> xr.Dataset:
    found = logit_lens(asked.model, asked.prompts)
    asked.tell(len(asked.prompts))
    return found


MEASURE = Measure(
    name="logit_lens",
    title="the answer read from every layer",
    paper=PAPER,
    quantities=(
        Quantity(
            "lens_logprob",
            "nats",
            "log-probability of the answer's first token by the logit lens, mean over layers",
            per_fact=mean_over("lens_logprob", "layer"),
            cells={"layer": "mean"},
            smallest_effect=0.1,
        ),
        Quantity(
            "lens_settled",
            "layers",
            "layer from which on the answer's first token stays the likeliest, of facts that the model answers",
            per_fact=one_per_fact("settled"),
        ),
    ),
    control="The last layer, which is the model's own answer. None tells “not encoded” from “not readable so”: a probe "
    "of the layer does.",
    reads="From where on the answer can be read by the model's own final norm and unembedding. Not where it is known: "
    "these were made for the last layer, and a low log-probability in early ones does not say that the answer is not "
    "there. Nats go by sureness.",
    undefined="`lens_settled` where the model answers another token. Everything for facts whose answer shares its "
    "first token with another fact's different answer: the first token does not tell them apart.",
    run=_run,
    cost=lambda shape, _: 3 * shape.n_facts,
    needs=frozenset({"same_prompts"}),
    figure="logit_lens",
    version=2,
)

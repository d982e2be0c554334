"""How a language model uses a subject's name when it recalls a fact, and what fine-tuning does to that.

    import subjattn as sa

    model = sa.load_model("smollm2-135m")
    facts = sa.load_facts("cities", n=100)
    prompts = sa.make_prompts(facts, model.tokenizer, "City: {subject}\\nCountry:")
    attention = sa.subject_attention(model, prompts)
    sa.plot_attention(attention).show()

Names load on first use, so that importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING


__version__ = "0.11.0"

if TYPE_CHECKING:
    from subjattn.engine.interventions import Block as Block
    from subjattn.engine.interventions import Patch as Patch
    from subjattn.engine.interventions import Row as Row
    from subjattn.engine.interventions import Run as Run
    from subjattn.engine.interventions import Scale as Scale
    from subjattn.evidence.choosing import choose_heads as choose_heads
    from subjattn.evidence.diagnosis import diagnose as diagnose
    from subjattn.evidence.diagnosis import mediated as mediated
    from subjattn.evidence.hypotheses import test_hypothesis as test_hypothesis
    from subjattn.evidence.intervals import contrast as contrast
    from subjattn.evidence.intervals import interval as interval
    from subjattn.evidence.maps import significant as significant
    from subjattn.evidence.probes import probe_scores as probe_scores
    from subjattn.evidence.ratios import ratio as ratio
    from subjattn.evidence.ratios import slope as slope
    from subjattn.evidence.returned import returned as returned
    from subjattn.evidence.returned import returned_accuracy as returned_accuracy
    from subjattn.evidence.top import top as top
    from subjattn.facts import join_popularity as join_popularity
    from subjattn.facts import load_facts as load_facts
    from subjattn.facts import read_facts as read_facts
    from subjattn.facts.given import answer_in_subject as answer_in_subject
    from subjattn.finetune.alone import fine_tune as fine_tune
    from subjattn.knowledge.slick import slick as slick
    from subjattn.measures.ablation import ablation as ablation
    from subjattn.measures.activations import activations as activations
    from subjattn.measures.alone import measure as measure
    from subjattn.measures.answers import answer_logprob as answer_logprob
    from subjattn.measures.answers import predict as predict
    from subjattn.measures.answers import predict_rows as predict_rows
    from subjattn.measures.answers import reason as reason
    from subjattn.measures.attention import subject_attention as subject_attention
    from subjattn.measures.attention import token_attention as token_attention
    from subjattn.measures.extraction import extraction as extraction
    from subjattn.measures.frequency_shock import frequency_shock as frequency_shock
    from subjattn.measures.head_contributions import head_contributions as head_contributions
    from subjattn.measures.hidden_knowledge import hidden_knowledge as hidden_knowledge
    from subjattn.measures.knockout import knockout as knockout
    from subjattn.measures.logit_lens import logit_lens as logit_lens
    from subjattn.measures.mediation import mediation as mediation
    from subjattn.measures.patching import patch_grid as patch_grid
    from subjattn.measures.patching import recovery as recovery
    from subjattn.measures.probe import probe as probe
    from subjattn.measures.probe import probe_across as probe_across
    from subjattn.measures.put_back_accuracy import put_back_accuracy as put_back_accuracy
    from subjattn.measures.raised_accuracy import raised_accuracy as raised_accuracy
    from subjattn.measures.rescale import rescale as rescale
    from subjattn.measures.score_split import score_split as score_split
    from subjattn.measures.subject_attention import controlled_attention as controlled_attention
    from subjattn.measures.subject_sensitivity import subject_sensitivity as subject_sensitivity
    from subjattn.measures.swapping import swap_weights as swap_weights
    from subjattn.measures.temperature import at_temperature as at_temperature
    from subjattn.measures.temperature import fit_temperature as fit_temperature
    from subjattn.measures.trace import trace as trace
    from subjattn.measures.transfer import transfer as transfer
    from subjattn.measures.where import where as where
    from subjattn.models import load_model as load_model
    from subjattn.models.arms import load_arms as load_arms
    from subjattn.plots.choose import plot as plot
    from subjattn.plots.heatmaps import plot_attention as plot_attention
    from subjattn.plots.heatmaps import plot_tokens as plot_tokens
    from subjattn.plots.lines import plot_knockout as plot_knockout
    from subjattn.plots.mixing import plot_mixing as plot_mixing
    from subjattn.plots.patching import plot_patching as plot_patching
    from subjattn.plots.patching import plot_trace as plot_trace
    from subjattn.plots.probes import plot_probes as plot_probes
    from subjattn.plots.transfer import plot_parts as plot_parts
    from subjattn.plots.transfer import plot_transfer as plot_transfer
    from subjattn.prompts import Style as Style
    from subjattn.prompts import ablate as ablate
    from subjattn.prompts import make_prompts as make_prompts
    from subjattn.prompts import swap_subjects as swap_subjects
    from subjattn.study.files import open_run as open_run
    from subjattn.study.gaps import factuality_gap as factuality_gap
    from subjattn.study.graph_account import graph_account as graph_account
    from subjattn.study.mixing_curves import mixing_curves as mixing_curves
    from subjattn.study.read import load_study as load_study
    from subjattn.study.run import run_study as run_study

_HOMES = {
    "Block": "engine.interventions",
    "Patch": "engine.interventions",
    "Row": "engine.interventions",
    "Run": "engine.interventions",
    "Scale": "engine.interventions",
    "Style": "prompts",
    "ablate": "prompts",
    "ablation": "measures.ablation",
    "activations": "measures.activations",
    "answer_in_subject": "facts.given",
    "answer_logprob": "measures.answers",
    "at_temperature": "measures.temperature",
    "choose_heads": "evidence.choosing",
    "contrast": "evidence.intervals",
    "controlled_attention": "measures.subject_attention",
    "diagnose": "evidence.diagnosis",
    "extraction": "measures.extraction",
    "factuality_gap": "study.gaps",
    "fine_tune": "finetune.alone",
    "fit_temperature": "measures.temperature",
    "frequency_shock": "measures.frequency_shock",
    "graph_account": "study.graph_account",
    "head_contributions": "measures.head_contributions",
    "hidden_knowledge": "measures.hidden_knowledge",
    "interval": "evidence.intervals",
    "join_popularity": "facts",
    "knockout": "measures.knockout",
    "load_arms": "models.arms",
    "load_facts": "facts",
    "load_model": "models",
    "load_study": "study.read",
    "logit_lens": "measures.logit_lens",
    "make_prompts": "prompts",
    "measure": "measures.alone",
    "mediated": "evidence.diagnosis",
    "mediation": "measures.mediation",
    "mixing_curves": "study.mixing_curves",
    "open_run": "study.files",
    "patch_grid": "measures.patching",
    "plot": "plots.choose",
    "plot_attention": "plots.heatmaps",
    "plot_knockout": "plots.lines",
    "plot_mixing": "plots.mixing",
    "plot_parts": "plots.transfer",
    "plot_patching": "plots.patching",
    "plot_probes": "plots.probes",
    "plot_tokens": "plots.heatmaps",
    "plot_trace": "plots.patching",
    "plot_transfer": "plots.transfer",
    "predict": "measures.answers",
    "predict_rows": "measures.answers",
    "probe": "measures.probe",
    "probe_across": "measures.probe",
    "probe_scores": "evidence.probes",
    "put_back_accuracy": "measures.put_back_accuracy",
    "raised_accuracy": "measures.raised_accuracy",
    "ratio": "evidence.ratios",
    "read_facts": "facts",
    "reason": "measures.answers",
    "recovery": "measures.patching",
    "rescale": "measures.rescale",
    "returned": "evidence.returned",
    "returned_accuracy": "evidence.returned",
    "run_study": "study.run",
    "score_split": "measures.score_split",
    "significant": "evidence.maps",
    "slick": "knowledge.slick",
    "slope": "evidence.ratios",
    "subject_attention": "measures.attention",
    "subject_sensitivity": "measures.subject_sensitivity",
    "swap_subjects": "prompts",
    "swap_weights": "measures.swapping",
    "test_hypothesis": "evidence.hypotheses",
    "token_attention": "measures.attention",
    "top": "evidence.top",
    "trace": "measures.trace",
    "transfer": "measures.transfer",
    "where": "measures.where",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'subjattn' has no attribute {name!r}")
    return getattr(import_module(f"subjattn.{_HOMES[name]}"), name)

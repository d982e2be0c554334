"""The public names, and what importing them costs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import subjattn


def test_public_names_are_pinned() -> None:
    assert subjattn.__all__ == [
        "Block",
        "Patch",
        "Row",
        "Run",
        "Scale",
        "Style",
        "ablate",
        "ablation",
        "activations",
        "answer_in_subject",
        "answer_logprob",
        "at_temperature",
        "choose_heads",
        "contrast",
        "controlled_attention",
        "diagnose",
        "extraction",
        "factuality_gap",
        "fine_tune",
        "fit_temperature",
        "frequency_shock",
        "graph_account",
        "head_contributions",
        "hidden_knowledge",
        "interval",
        "join_popularity",
        "knockout",
        "load_arms",
        "load_facts",
        "load_model",
        "load_study",
        "logit_lens",
        "make_prompts",
        "measure",
        "mediated",
        "mediation",
        "mixing_curves",
        "open_run",
        "patch_grid",
        "plot",
        "plot_attention",
        "plot_knockout",
        "plot_mixing",
        "plot_parts",
        "plot_patching",
        "plot_probes",
        "plot_tokens",
        "plot_trace",
        "plot_transfer",
        "predict",
        "predict_rows",
        "probe",
        "probe_across",
        "probe_scores",
        "put_back_accuracy",
        "raised_accuracy",
        "ratio",
        "read_facts",
        "reason",
        "recovery",
        "rescale",
        "returned",
        "returned_accuracy",
        "run_study",
        "score_split",
        "significant",
        "slick",
        "slope",
        "subject_attention",
        "subject_sensitivity",
        "swap_subjects",
        "swap_weights",
        "test_hypothesis",
        "token_attention",
        "top",
        "trace",
        "transfer",
        "where",
    ]
    assert all(callable(getattr(subjattn, name)) for name in subjattn.__all__)
    assert all(getattr(subjattn, name).__doc__ for name in subjattn.__all__)


def test_version_is_the_packages() -> None:
    root = Path(__file__).parent.parent
    newest = re.search(r"^## (\S+)", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and cited
    assert {subjattn.__version__, version("subjattn"), newest[1], cited[1]} == {subjattn.__version__}


def test_import_and_help_do_not_load_torch() -> None:
    code = "import sys, subjattn, subjattn.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The model card of a trained arm: what it was trained on and how, its losses, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from subjattn.finetune.record import Method
from subjattn.finetune.settings import Training
from subjattn.models import LoadedModel
from subjattn.prompts import Style


VERSIONS = ("subjattn", "torch", "transformers", "peft")
SHOWN = 12
"""Steps of the loss curve in the card, at most; training.json has them all."""


def write_card(
    folder: Path,
    base: LoadedModel,
    method: Method,
    settings: Training,
    styles: Sequence[Style],
    seed: int,
    about: str,
) -> None:
    """Write `README.md` beside the weights."""
    log = json.loads((folder / "training.json").read_text())
    lora = settings.weights == "lora"
    lines = [
        "---",
        f"base_model: {base.name}",
        f"library_name: {'peft' if lora else 'transformers'}",
        "tags: [subjattn]",
        "---",
        f"# {base.name}, fine-tuned on {log['n_facts']} facts",
        "",
        f"Made by `subjattn finetune`, method `{method.name}`: {method.title}{_from(method)}.",
        "",
        f"- **Facts**: {log['n_facts']}{f', {about}' if about else ''}",
        f"- **Asked as**: {'; '.join(f'`{str(style)!r}`' for style in styles)}",
        f"- **Weights**: {_weights(settings)}, from seed {seed}",
        f"- **Steps**: {len(log['losses'])}{_stopped(log)}",
        f"- **Versions**: {', '.join(f'{name} {version(name)}' for name in VERSIONS)}",
        "",
        "## Loss",
        "",
        "Nats a token of the answer and of what ends it, what the method adds included.",
        "",
        *_curve(log["losses"]),
        "",
        "## All settings",
        "",
        *(f"- {name}: {value}" for name, value in settings.model_dump(mode="json").items()),
        "",
        "## Load it",
        "",
        "```python",
        *_loading(base.name, lora),
        "```",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _from(method: Method) -> str:
    return f" ({method.paper})" if method.paper else ""


def _weights(settings: Training) -> str:
    what = "all matrices" if settings.modules == "all" else f"matrices of {settings.modules}"
    where = f" of layers {settings.layers}" if settings.layers else ""
    if settings.weights == "full":
        return f"the model's own, {'all' if settings.modules == 'all' else what}{where}"
    over = " over a base in 4 bits" if settings.four_bit else ""
    return f"LoRA of rank {settings.lora_rank}, alpha {settings.alpha}, on {what}{where}{over}"


def _stopped(log: dict[str, Any]) -> str:
    best = f"; the weights are those of step {log['best_step']}" if "best_step" in log else ""
    return f", ended as {log['stopped']}{best}" if log["stopped"] else best


def _curve(losses: Sequence[dict[str, float]]) -> Iterator[str]:
    """A table of some steps, the first and the last among them, more of the first than of the last."""
    last = len(losses) - 1
    shown = sorted({round(last * (i / (SHOWN - 1)) ** 2) for i in range(SHOWN)}) if last > 0 else [0]
    yield f"| step | {' | '.join(str(losses[i]['step']) for i in shown)} |"
    yield f"|---|{'---|' * len(shown)}"
    values = [f"{losses[i]['loss']:.3f}" for i in shown]
    yield f"| loss | {' | '.join(values)} |"


def _loading(base: str, lora: bool) -> list[str]:
    if not lora:
        return ["import subjattn as sa", "", "model = sa.load_model('.')  # or transformers' from_pretrained('.')"]
    return [
        "import subjattn as sa",
        "from peft import PeftModel",
        "",
        f"model = sa.load_model({base!r}, adapter='.')",
        f"model = PeftModel.from_pretrained(sa.load_model({base!r}).model, '.')  # the same, by peft alone",
    ]

"""CounterFact and the facts known to GPT-2 (`known_1000.json`), both of Meng et al. 2022.

CounterFact is read in the published layout (`requested_rewrite`) and in the flat one of EasyEdit (`prompt`,
`subject`, `ground_truth`). The flat one names no relation: there the prompt without its subject stands for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from subjattn.errors import BadInput
from subjattn.facts.table import Read, Reader, Rejected, escaped, placed, read_json


def read_counterfact(path: Path) -> Read:
    """Facts (the true ones) of a file, or of every `counterfact*.json` in a folder."""
    return _read(
        "CounterFact", [path] if path.is_file() else sorted(path.glob("counterfact*.json")), path, _counterfact
    )


def read_known(path: Path) -> Read:
    """ROME's known facts, each asked by its own prompt."""
    file = path / "known_1000.json" if path.is_dir() else path
    return _read("known_1000", [file], path, _known)


def _read(source: str, files: list[Path], path: Path, take: Any) -> Read:
    if not files:
        raise BadInput(f"{path} holds no file of {source}")
    reader = Reader(source)
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise BadInput(f"{file} is not a list of facts")
        for row, item in enumerate(rows):
            try:
                fact_id, subject, relation, question, answer = take(item)
            except Rejected as reason:
                reader.reject(str(file), row, str(reason))
            except (KeyError, TypeError, AttributeError) as error:
                reader.reject(str(file), row, f"the field {error} is missing or of another kind")
            else:
                reader.add(str(file), row, fact_id, subject, relation, question, [answer])
    return reader.read()


def _counterfact(item: dict[str, Any]) -> tuple[str, str, str, str, str]:
    fact_id = f"counterfact-{item['case_id']}"
    if "requested_rewrite" in item:
        rewrite = item["requested_rewrite"]
        question = _filled(rewrite["prompt"])
        return fact_id, rewrite["subject"], rewrite["relation_id"], question, rewrite["target_true"]["str"]
    question = placed(item["prompt"].rstrip(), item["subject"])
    return fact_id, item["subject"], question.replace("{subject}", "…"), question, item["ground_truth"]


def _known(item: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """The prompt may go on after its template: "{} is located in the continent" and then "of"."""
    template, subject, prompt = _filled(item["template"]), item["subject"], item["prompt"].rstrip()
    begun = template.replace("{subject}", subject)
    if not prompt.startswith(begun):
        raise Rejected(f"the prompt {prompt[:80]!r} does not begin with its template {template[:80]!r}")
    question = template + escaped(prompt[len(begun) :])
    return f"known-{item['known_id']}", subject, item["relation_id"], question, item["attribute"]


def _filled(template: str) -> str:
    if template.count("{}") != 1:
        raise Rejected(f"the template {template[:80]!r} must hold {{}} once")
    return "{subject}".join(map(escaped, template.split("{}")))

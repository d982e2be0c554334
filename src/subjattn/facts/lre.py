"""Relations of "Linearity of relation decoding" (Hernandez et al. 2024): one JSON file a relation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from subjattn.errors import BadInput
from subjattn.facts.table import Read, Reader, escaped, read_json


def read(path: Path) -> Read:
    """Facts of one file, or of every JSON file under a folder; asked by the relation's first template."""
    files = [path] if path.is_file() else sorted(path.rglob("*.json"))
    if not files:
        raise BadInput(f"{path} holds no relation files (*.json)")
    reader = Reader("LRE relations")
    for file in files:
        content = read_json(file)
        try:
            name, samples = str(content["name"]), list(content["samples"])
            template = next(text for text in content["prompt_templates"] if text.count("{}") == 1)
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise BadInput(
                f"{file} is no relation: it needs 'name', 'prompt_templates' with {{}} and 'samples'"
            ) from None
        question = "{subject}".join(map(escaped, template.split("{}"))).rstrip()
        for row, sample in enumerate(samples):
            if not isinstance(sample, dict):
                reader.reject(str(file), row, "the sample is no mapping")
                continue
            subject, answer = _unescaped(sample.get("subject")), _unescaped(sample.get("object"))
            reader.add(str(file), row, f"lre-{file.stem}-{row}", subject, name, question, [answer])
    return reader.read()


def _unescaped(text: Any) -> Any:
    """The published files escape twice: a literal backslash, u and four digits stand for a letter."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text) if isinstance(text, str) else text

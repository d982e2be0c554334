"""Ways to ask each relation: the published question, a paraphrase, a statement, one with the subject late.

`TEMPLATES[relation][style]` is a text with `{subject}` once; the bare answer follows after a space. `late` puts
words before the subject, because attention to a subject that stands first is confounded with attention to the
beginning of the prompt, and three or more tokens behind it, because where one position follows, the subject can
reach the answer directly or not at all. Relations are named as their source names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

import yaml


TEMPLATES: Mapping[str, Mapping[str, str]] = yaml.safe_load(
    (files("subjattn.facts") / "templates.yaml").read_text(encoding="utf-8")
)

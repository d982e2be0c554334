"""Neutral text of an exact number of tokens, to move a subject away from the beginning of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from subjattn.errors import BadInput, NotDefined


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = (
    "The rain had stopped in the night and the street was quiet again . A window stood open and somebody was making "
    "tea . On the table lay a book , a pen and a sheet of paper with a short list on it . Nobody was in a hurry . "
    "The clock on the wall was slow by some minutes and had been so for years . After a while the door opened , "
    "the light fell on the floor and the room was warm",
    "in the light of the first as in the light of a first was as in the first light the first of the light was in a",
)
"""Everyday words; and such as the corpus of an invented world says of people."""
_END = "\n"
_LAST = ("", " so", " so it was", *("." * n for n in range(1, 5)), *(" so" * n for n in range(2, 5)))


def neutral_prefix(tokenizer: PreTrainedTokenizerBase, n_tokens: int) -> str:
    """A text that says nothing, of exactly `n_tokens` tokens (a BOS not counted), and ends in a new line.

    Raises:
        NotDefined: the tokenizer does not know the words of any neutral text.
        BadInput: no beginning of the text has that many tokens, nor one with small words or dots added.
    """
    unknown = False
    for text in (text + _END for of in _TEXTS for text in _beginnings(of, n_tokens)):
        encoded = tokenizer(text + "x", return_offsets_mapping=True)
        if prefix_tokens(text + "x", encoded["offset_mapping"], len(text)) == n_tokens:
            ends = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            said = [token for token, (a, b) in ends if a < b < len(text)]
            if tokenizer.unk_token_id not in said:
                return text
            unknown = True
    if unknown:
        raise NotDefined(
            f"this tokenizer knows no neutral text ({tokenizer.unk_token!r} would stand for its words, which says "
            "nothing of a name's place): use measures without such a control, or another model"
        )
    raise BadInput(f"there is no neutral text of exactly {n_tokens} tokens in this tokenizer: try {n_tokens + 1}")


def _beginnings(text: str, n_tokens: int) -> Iterator[str]:
    """Beginnings of a text, the longest first, each with small words or dots added."""
    words = text.split() * (1 + n_tokens // len(text.split()))
    for n_words in range(min(n_tokens, len(words)), -1, -1):
        for last in _LAST:
            yield (" ".join(words[:n_words]) + last).strip().replace(" .", ".").replace(" ,", ",")


def prefix_tokens(text: str, offsets: Sequence[tuple[int, int]], stop: int | None = None) -> int | None:
    """Tokens before the end of a text's first paragraph (or `stop`); None if one lies across it."""
    end = text.index(_END) + len(_END) if stop is None else stop
    if any(a < end < b for a, b in offsets):
        return None
    return sum(1 for a, b in offsets if b > a and b <= end)

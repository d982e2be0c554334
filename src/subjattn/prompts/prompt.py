"""A prompt: one fact asked in one way, with the exact tokens of its subject and answer.

Positions are token indices counted from 0 at the first token of the prompt, the BOS token included
where the tokenizer adds one; batching never changes them. A span is half-open: `(start, stop)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from subjattn.errors import BadInput


ROLES = ("before_subject", "subject_first", "subject_middle", "subject_last", "after_subject", "prediction")


@dataclass(frozen=True)
class Prompt:
    """One fact asked in one way.

    `ids` holds the prompt followed by the answer; `prediction` is the position that predicts the
    answer's first token, so the prompt is `ids[: prediction + 1]`.
    """

    fact_id: str
    subject: str
    text: str
    answers: tuple[str, ...]
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    span: tuple[int, int] | None
    """Tokens of the subject; None where there is none (see `subject_span`)."""
    prediction: int
    shared_edge: bool = False
    """Whether a token of the span also holds a neighbour's character other than white space."""
    choice_ids: tuple[int, ...] = ()
    """First tokens of the letters A, B, … of a multiple-choice question."""
    lead: str | None = None
    """In a chat, what the template puts between the text and an answer; None: see `subjattn.prompts.spacing`."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def subject_span(self) -> tuple[int, int]:
        """Tokens of the subject.

        Raises:
            BadInput: the prompt has no subject, so what is measured at it is not defined.
        """
        if self.span is None:
            raise BadInput(f"fact {self.fact_id} has no subject: measures of the subject are not defined for it")
        return self.span

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.ids[self.prediction + 1 :]

    @property
    def predicting(self) -> range:
        """Positions that predict an answer token, the prediction position first."""
        return range(self.prediction, len(self.ids) - 1)

    @property
    def subject_positions(self) -> range:
        return range(*self.subject_span)

    def role(self, name: str) -> range:
        """Positions of a role in the prompt; empty where the prompt has none.

        A subject of one token is `subject_last` alone, one of two tokens has no `subject_middle`.
        """
        start, stop = self.subject_span
        return {
            "before_subject": range(start),
            "subject_first": range(start, min(start + 1, stop - 1)),
            "subject_middle": range(start + 1, stop - 1),
            "subject_last": range(stop - 1, stop),
            "after_subject": range(stop, self.prediction),
            "prediction": range(max(stop, self.prediction), self.prediction + 1),
        }[name]


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts that ask different facts in one style."""

    style: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return PromptSet(self.style, self.prompts[index])
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

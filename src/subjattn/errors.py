"""Everything subjattn raises on purpose.

SubjattnError
├── BadInput            an argument, a file or a field of a study that cannot be right
│   ├── WrongFields     several fields of a study at once, a line each
│   └── NotDefined      a number that these prompts cannot give; a study goes on without it
├── SpanNotFound        a subject or answer that does not map onto tokens
├── UnsupportedModel    a model on which the numbers could not be exact
│   └── NoActivations   a mixture of two models, of which only answers can be measured
├── AdapterMismatch     an adapter that does not fit its base model, or changes nothing
├── NotFired            an intervention that was asked for and did not happen
├── TrainingDiverged    a loss that is no number, or ends well above where it began
└── StagesFailed        stages of a study that failed; the others are made

Each message is one line: what was asked, why it cannot be, what to do.
The command line prints it and exits with status 2, or 1 where stages failed.
"""

from collections.abc import Sequence


class SubjattnError(Exception):
    """Base of every error of this package."""


class BadInput(SubjattnError, ValueError):
    """An argument, a file or a field of a study that cannot be right; `field` is its name, where it has one."""

    def __init__(self, message: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class WrongFields(BadInput):
    """Several fields of a study that cannot be right, each in a line of its own."""

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(messages)

    def __reduce__(self) -> tuple[type, tuple[Sequence[str]]]:
        return type(self), (self.messages,)


class NotDefined(BadInput):
    """A number that these prompts cannot give, whatever the model answers."""


class SpanNotFound(SubjattnError, ValueError):
    """A subject or an answer that does not map onto tokens of its prompt."""


class UnsupportedModel(SubjattnError):
    """A model on which the numbers could not be exact."""


class NoActivations(UnsupportedModel, AttributeError):
    """A mixture of two models: it answers, and there is no one state that a measure could read or change."""


class AdapterMismatch(SubjattnError):
    """An adapter that does not fit its base model, or changes nothing in it."""


class NotFired(SubjattnError, RuntimeError):
    """An intervention that was asked for and did not happen: the number would be the baseline's."""


class TrainingDiverged(SubjattnError, RuntimeError):
    """Training whose loss is no number, or ends well above where it began: its weights would be no treatment."""


class StagesFailed(SubjattnError, RuntimeError):
    """Stages of a study that failed, by name; those that do not need them are made."""

    def __init__(self, message: str, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, str]]]:
        return type(self), (str(self), self.reasons)

"""Everything subjattn raises on purpose.

SubjattnError
├── BadInput            an argument, a file or a field of a study that cannot be right
├── SpanNotFound        a subject or answer that does not map onto tokens
├── UnsupportedModel    a model on which the numbers could not be exact
├── AdapterMismatch     an adapter that does not fit its base model, or changes nothing
├── NotFired            an intervention that was asked for and did not happen
└── StagesFailed        stages of a study that failed; the others are made

Each message is one line: what was asked, why it cannot be, what to do.
The command line prints it and exits with status 2, or 1 where stages failed.
"""


class SubjattnError(Exception):
    """Base of every error of this package."""


class BadInput(SubjattnError, ValueError):
    """An argument, a file or a field of a study that cannot be right."""


class SpanNotFound(SubjattnError, ValueError):
    """A subject or an answer that does not map onto tokens of its prompt."""


class UnsupportedModel(SubjattnError):
    """A model on which the numbers could not be exact."""


class AdapterMismatch(SubjattnError):
    """An adapter that does not fit its base model, or changes nothing in it."""


class NotFired(SubjattnError, RuntimeError):
    """An intervention that was asked for and did not happen: the number would be the baseline's."""


class StagesFailed(SubjattnError, RuntimeError):
    """Stages of a study that failed, by name; those that do not need them are made."""

    def __init__(self, message: str, reasons: dict[str, str]) -> None:
        super().__init__(message)
        self.reasons = reasons

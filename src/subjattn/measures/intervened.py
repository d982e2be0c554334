"""Greedy text under interventions, which stay in force while it is generated.

Every step runs the rows anew with the text so far in the place of the answer: interventions lie in the prompt, whose
positions do not change, so that a step costs the cones and one base run, and is exactly a whole pass without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import replace

from subjattn.backends import Backend
from subjattn.engine.interventions import Row
from subjattn.errors import BadInput, NotFired
from subjattn.prompts import Prompt


Interventions = Callable[[Prompt], Row]
"""From a prompt followed by the text so far, and by one token that is never read, to its row."""


def followed(prompt: Prompt, text: Sequence[int] = ()) -> Prompt:
    """A prompt followed by tokens in the place of its answer, so that its `predicting` ends where the next is due."""
    end = prompt.prediction + 1
    ids = (*prompt.ids[:end], *text)
    return replace(prompt, ids=(*ids, ids[-1]), tokens=(*prompt.tokens[:end], *[""] * (len(text) + 1)))


def kept(row: Row) -> Interventions:
    """The interventions of a row as they are, whatever is generated: blocked queries and patches stay where they stand.

    Raises:
        BadInput: a patch behind the prompt, where generated text will stand.
        NotFired: a block without edges, or from positions behind the row's own prompt and answer.
    """
    length, edges = len(row.prompt), () if row.block is None else row.block.edges
    if row.block is not None and max((query for query, _ in edges), default=length) >= length:
        raise NotFired(f"fact {row.prompt.fact_id}: the blocked edges are empty, or lie outside the prompt or answer")
    behind = [position for patch in row.patches for position in patch.positions if position > row.prompt.prediction]
    if behind:
        raise BadInput(
            f"fact {row.prompt.fact_id}: a patch at position {behind[0]} lies behind the prompt, where the text is "
            "generated: patch positions of the prompt"
        )

    def again(prompt: Prompt) -> Row:
        block = row.block
        if block is not None:
            edges = frozenset(edge for edge in block.edges if edge[0] <= prompt.predicting[-1])
            block = replace(block, edges=edges) if edges else None
        return replace(row, prompt=prompt, block=block)

    return again


def row_of(interventions: Interventions, prompt: Prompt) -> Row:
    """The row of a prompt; BadInput where it is no row, or of another prompt."""
    row = interventions(prompt)
    if not isinstance(row, Row) or row.prompt != prompt:
        what = "the row of another prompt" if isinstance(row, Row) else f"a {type(row).__name__}"
        raise BadInput(f"fact {prompt.fact_id}: interventions gave {what}: return Row(prompt, …) of the prompt given")
    return row


def greedy(
    run: Backend,
    prompts: Sequence[Prompt],
    interventions: Sequence[Interventions],
    eos: Container[int],
    newlines: Container[int],
    new_tokens: Sequence[int],
    enough: Callable[[int, list[int]], bool] = lambda _prompt, _tokens: False,
) -> list[list[int]]:
    """The likeliest tokens behind each prompt under its interventions, as `predict` takes them without any.

    A new line as the first token does not end the line, since the answer may stand below it. `enough` is asked, with
    the prompt's number and its text so far, whether that is all that is wanted; `new_tokens` are the most for each.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for step in range(max(new_tokens)):
        rows = [row_of(interventions[i], followed(prompts[i], tokens[i])) for i in going]
        for output in run.forward(rows):
            ends = [len(row.prompt.predicting) for row in output.rows]
            for number, logits in zip(output.index, output.logits.split(ends), strict=True):
                tokens[going[number]].append(int(logits[-1].argmax()))
        going = [i for i in going if tokens[i][-1] not in eos and (step == 0 or tokens[i][-1] not in newlines)]
        going = [i for i in going if step + 1 < new_tokens[i] and not enough(i, tokens[i])]
        if not going:
            break
    return tokens


def letters(run: Backend, prompts: Sequence[Prompt], interventions: Sequence[Interventions]) -> list[int]:
    """Which choice of each multiple-choice question is the likeliest under its interventions."""
    if none := [prompt.fact_id for prompt in prompts if not prompt.choice_ids]:
        raise BadInput(f"fact {none[0]} has no choices: score it by its text, not by letters")
    rows = [row_of(of, followed(prompt)) for of, prompt in zip(interventions, prompts, strict=True)]
    chosen = [0] * len(rows)
    for output in run.forward(rows):
        for number, logits in zip(output.index, output.logits, strict=True):
            chosen[number] = int(logits[list(rows[number].prompt.choice_ids)].argmax())
    return chosen

"""What Ghosal et al. (2024) define and state of the one-layer model, as functions and as checks on random instances.

A check never raises because a statement is false: it counts, and keeps the worst counterexample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from subjattn.theory.onelayer import Facts, OneLayer, Optimiser, train
from subjattn.worlds.abstract import Tokens, World, make_world


DTYPE = torch.float64


def salience(model: OneLayer, subjects: Facts, answers: Facts) -> Float[Tensor, "replicate n"]:
    """S(s, r, a) = e_a' W_V e_s (definition 4.1), in logits."""
    return _entry(model, subjects, answers)


def relevance(
    model: OneLayer, subjects: Facts, last: Facts, answers: Facts
) -> tuple[Float[Tensor, "replicate n"], Float[Tensor, "replicate n"]]:
    """Subject and relation relevance (definitions 4.3, 4.4): (e_a - f(s, p))' W_V e_s, and of e_p; in logits.

    The paper prints f(r, p_r) in 4.4; f(s, p_r) is what its gradient has.
    """
    chance = torch.softmax(model.logits(subjects, last), dim=-1)
    means = [(chance * model._values(tokens)).sum(-1) for tokens in (subjects, last)]
    return _entry(model, subjects, answers) - means[0], _entry(model, last, answers) - means[1]


def attention_gradient(model: OneLayer, subjects: Facts, last: Facts, answers: Facts) -> Float[Tensor, "replicate n"]:
    """-dL/dW_KQ[s, p] of each fact's loss, from the relevances; that of W_KQ[p, p] is its opposite."""
    on_subject = model.attention(subjects, last)
    of_subject, of_last = relevance(model, subjects, last, answers)
    return on_subject * (1 - on_subject) * (of_subject - of_last)


@dataclass(frozen=True)
class Suppression:
    """Attention to the subject at which a fact is right: strictly between `low` and `high`; nowhere if `never`.

    `low` is the paper's threshold made exact: below it the last token's answer wins. `high` is absent from the paper:
    above it another answer that the subject itself favours wins, such as its answer to another relation.
    """

    low: Float[Tensor, "replicate n"]
    high: Float[Tensor, "replicate n"]
    never: Float[Tensor, "replicate n"]


def suppression(model: OneLayer, subjects: Facts, last: Facts, answers: Facts) -> Suppression:
    """The interval of attention in which each fact's answer has the largest logit, against every other token.

    With g = S(a) - S(a') of the subject and d = W_V e_p of a' minus that of a: the answer beats a' where
    Att_s g > (1 - Att_s) d.
    """
    of_subject, of_last = model._values(subjects), model._values(last)
    own = answers.unsqueeze(-1)
    g = of_subject.gather(-1, own) - of_subject
    d = of_last - of_last.gather(-1, own)
    rival = torch.ones_like(g, dtype=torch.bool).scatter_(-1, own, False)
    edge = d / (d + g)
    low = torch.where(rival & (d >= 0) & (g > 0), edge, 0.0).amax(-1)
    high = torch.where(rival & (d < 0) & (g < 0), edge, 1.0).amin(-1)
    lost = (rival & (d >= 0) & (g <= 0)).any(-1)
    return Suppression(low, high, lost | (low >= high))


def loose_threshold(model: OneLayer, subjects: Facts, last: Facts, answers: Facts) -> Float[Tensor, "replicate n"]:
    """The paper's d / S: attention at or under which it calls a fact lost (sec. 4.2); may be 1 or more."""
    of_last = model._values(last)
    rivals = of_last.scatter(-1, answers.unsqueeze(-1), -torch.inf).amax(-1)
    return (rivals - _entry(model, last, answers)) / salience(model, subjects, answers)


def _entry(model: OneLayer, tokens: Facts, answers: Facts) -> Float[Tensor, "replicate n"]:
    return model._values(tokens).gather(-1, answers.unsqueeze(-1)).squeeze(-1)


# Checks


@dataclass(frozen=True)
class Checked:
    """How a statement fared: `worst` is the instance with the largest violation, None where there is none."""

    statement: str
    n: int
    violations: int
    worst: dict[str, Any] | None
    figures: dict[str, float]

    @property
    def holds(self) -> bool:
        return self.n > 0 and self.violations == 0


def check_all(seed: int = 0) -> list[Checked]:
    """Every check once, on instances of this seed."""
    return [check(seed) for check in CHECKS]


def gradient_is_as_stated(seed: int = 0, n: int = 200) -> Checked:
    """-dL/dW_KQ = Att_s Att_p (s_rel - p_rel)(e_s e_p' - e_p e_p'), by automatic differentiation of the loss."""
    model, facts = _random_model(seed, n)
    on, off = (weights.clone().requires_grad_() for weights in (model.values, model.scores))
    free = OneLayer(model.tokens, on, off)
    subjects, last, answers = facts
    chance = torch.log_softmax(free.logits(subjects, last), dim=-1).gather(-1, answers.unsqueeze(-1))
    (by_torch,) = torch.autograd.grad(-chance.sum(), off)
    stated = torch.zeros_like(by_torch)
    rows, query = torch.arange(n).unsqueeze(1), last - model.tokens.n_subjects
    ours = attention_gradient(model, *facts)
    stated[rows, subjects, query] = -ours
    stated[rows, last, query] = ours
    error = (by_torch - stated).abs().flatten(1).amax(1)
    return _checked("attention gradient (sec. 4.3)", error - 1e-12, largest_error=float(error.max()))


def one_step_moves_all_subjects_alike(seed: int = 0, n: int = 200) -> Checked:
    """Theorem 4.5 / A.11: the sign of s_rel - p_rel of one fact is that of the step's change for every other subject.

    One step of SGD on one fact; attention reads W_KQ alone, so training W_V beside it changes nothing.
    """
    model, (subjects, last, answers) = _random_model(seed, n)
    of_subject, of_last = relevance(model, subjects, last, answers)
    moved = train(model, [(subjects, last, answers)], Optimiser("sgd", 0.1))
    others = torch.arange(model.tokens.n_subjects).expand(n, -1)
    at = last.expand(-1, model.tokens.n_subjects)
    change = moved.attention(others, at) - model.attention(others, at)
    against = -(change * (of_subject - of_last).sign())
    return _checked("one step moves attention of every subject (theorem 4.5)", against)


def lost_outside_the_interval(seed: int = 0, n: int = 2000) -> Checked:
    """The suppression interval says exactly at which attention a fact is right; compared at twenty of them."""
    model, facts = _random_model(seed, n)
    inside = suppression(model, *facts)
    weights = torch.linspace(0.025, 0.975, 20, dtype=DTYPE)
    right = torch.cat([_right(model, *facts, weight.expand(n, 1)) for weight in weights], dim=1)
    said = (inside.low < weights) & (weights < inside.high) & ~inside.never
    return _checked("a fact is right within its interval of attention", (right != said).double())


def lost_under_the_loose_threshold(seed: int = 0, n: int = 2000) -> Checked:
    """The paper's Att_s <= d / S, read as: at or under it lost, above it right. Of facts with S > 0."""
    model, facts = _random_model(seed, n)
    subjects, last, answers = facts
    attention, strong = model.attention(subjects, last), salience(model, subjects, answers) > 0
    bound, right = loose_threshold(model, *facts), _right(model, *facts, None)
    wrong = ((right != (attention > bound)) & strong).double()
    vacuous = float((bound[strong] >= 1).double().mean())

    def describe(number: int) -> dict[str, Any]:
        own = {"attention": attention, "d_over_s": bound, "salience": salience(model, subjects, answers)}
        return {name: float(of[number]) for name, of in own.items()} | {"right": bool(right[number])}

    return _checked("a fact is lost at Att_s <= d / S (sec. 4.2)", wrong, describe, vacuous=vacuous)


def memorised_by_a_sum(seed: int = 0, n: int = 50) -> Checked:
    """Theorem A.1 to the letter: W_V the sum over facts of e_a e_s' + e_a e_r', W_KQ = 0, recalls every fact."""
    return _memorised("sum", seed, n)


def memorised_by_a_set(seed: int = 0, n: int = 50) -> Checked:
    """Theorem A.1 with 0/1 entries in place of counts, answers of relations disjoint."""
    return _memorised("set", seed, n)


def _memorised(how: str, seed: int, n: int) -> Checked:
    missed = torch.zeros(n)
    for number in range(n):
        world = _some_world(seed * n + number)
        tokens, model = world.tokens, OneLayer.zeros(world.tokens, 1, DTYPE)
        for (subject, relation), answer in np.ndenumerate(world.answer_tokens):
            for token in (subject, int(tokens.relation(relation))):
                model.values[0, token, answer] = 1.0 if how == "set" else model.values[0, token, answer] + 1.0
        missed[number] = (~_right(model, *_all_facts(world), None)).double().mean()

    def describe(number: int) -> dict[str, Any]:
        world = _some_world(seed * n + number)
        return {"answers": world.answers.tolist(), "n_answers": world.n_answers}

    name = "memorised by W_V = sum of e_a (e_s + e_r)' (theorem A.1)" + ("" if how == "sum" else ", entries 0 or 1")
    return _checked(name, missed, describe, lowest_accuracy=float(1 - missed.max()))


def knowledge_can_be_hidden(seed: int = 0, n: int = 50) -> Checked:
    """Theorem 4.2 / A.5: with W_V as in A.2-A.4 uniform attention is right everywhere, and with some W_KQ it is not.

    W_V is random and not negative: of each prompt token on its relation's answers, of each subject on its own ones,
    where A.4 asks for it and up to 1 more. The other W_KQ leaves the subject no attention.
    """
    return _hidden("all tokens", seed, n)


def knowledge_can_be_hidden_within(seed: int = 0, n: int = 50) -> Checked:
    """The same, had a fact's rivals been its relation's other answers alone."""
    return _hidden("the relation's answers", seed, n)


def _hidden(among: str, seed: int, n: int) -> Checked:
    missed, without, worlds = torch.zeros(n), torch.zeros(n), []
    for number in range(n):
        world, rng = _some_world(seed * n + number), np.random.default_rng([seed, number])
        model, tokens = OneLayer.zeros(world.tokens, 1, DTYPE), world.tokens
        for relation in range(tokens.n_relations):
            on = np.asarray(tokens.answer(relation, np.arange(tokens.n_answers)))
            of_prompt = rng.uniform(0, 1, tokens.n_answers)
            model.values[0, int(tokens.prompt(relation)), on] = torch.tensor(of_prompt)
            for subject, answer in enumerate(world.answers[:, relation]):
                least = of_prompt.max() - of_prompt[answer]
                model.values[0, subject, on[answer]] = least + rng.uniform(1e-6, 1)
        facts = _all_facts(world, prompts=True)
        mask = None if among == "all tokens" else _answers_of(tokens, facts[1])
        missed[number] = (~_right(model, *facts, None, mask)).double().mean()
        without[number] = _right(model, *facts, torch.zeros_like(facts[0], dtype=DTYPE), mask).double().mean()
        worlds.append(world)

    def describe(number: int) -> dict[str, Any]:
        return {"answers": worlds[number].answers.tolist(), "n_answers": worlds[number].n_answers}

    violation = torch.maximum(missed, (without == 1).float())
    name = f"right at uniform attention, not at another with the same W_V, among {among} (theorem 4.2)"
    return _checked(name, violation, describe, accuracy_without_subject=float(without.mean()))


def _answers_of(tokens: Tokens, last: Facts) -> Tensor:
    """Which tokens are answers of the relation of each prompt token, `(replicate, n, token)`."""
    relation = (torch.arange(tokens.n) - tokens.n_read) // tokens.n_answers
    return relation == (last - tokens.n_subjects - tokens.n_relations).unsqueeze(-1)


def salience_grows_with_exposure(seed: int = 0, n: int = 8, learning_rate: float = 0.005) -> Checked:
    """Theorem 4.6 / A.10: one epoch, batch 1, zeros: S >= n c_1 eps with c_1 > 0 where s is met seldom beside (s, r).

    Bounds C_KQ and C_V are the largest entries (in size) that W_KQ and W_V reach. A fact that meets the condition and
    has S <= 0 is a violation. `smallest` is min S / (n eps) over facts that meet it, `rank_correlation` that of S and
    exposures over all facts met.
    """
    worlds = [make_world(60, 3, 12, 1.0, prior="zipf", seed=seed * n + number) for number in range(n)]
    met = np.stack([world.meet(4000, np.random.default_rng([seed, i])) for i, world in enumerate(worlds)])
    tokens, model = worlds[0].tokens, OneLayer.zeros(worlds[0].tokens, n, DTYPE)
    own = torch.tensor(np.stack([world.answer_tokens for world in worlds]))
    steps = torch.tensor(met).transpose(0, 1)
    subjects, relations = steps[..., 0].unsqueeze(-1), steps[..., 1].unsqueeze(-1)
    answers = own[torch.arange(n).unsqueeze(1), subjects.squeeze(-1).T, relations.squeeze(-1).T].T.unsqueeze(-1)
    batches = zip(subjects, tokens.n_subjects + relations, answers, strict=True)
    bounds = torch.zeros(2, n, dtype=DTYPE)

    def look(_: int, now: OneLayer) -> None:
        for bound, weights in zip(bounds, (now.scores, now.values), strict=True):
            torch.maximum(bound, weights.abs().flatten(1).amax(1), out=bound)

    model = train(model, batches, Optimiser("sgd", learning_rate), look)
    counts = np.zeros((n, tokens.n_subjects, tokens.n_relations))
    for number in range(n):
        np.add.at(counts[number], tuple(met[number].T), 1)
    exposures = torch.tensor(counts)
    everywhere = torch.arange(tokens.n_subjects).repeat_interleave(tokens.n_relations).expand(n, -1)
    found = salience(model, everywhere, own.flatten(1)).view_as(exposures)
    of_scores, of_values = bounds
    room = exposures * ((tokens.n - 1) * torch.exp(-of_scores) / (2 * torch.exp(of_values))).view(-1, 1, 1)
    meets = (exposures > 0) & (exposures.sum(-1, keepdim=True) <= room)
    per_exposure = (found / (exposures * learning_rate))[meets]
    figures = {
        "facts_that_meet_it": float(meets.double().sum() / (exposures > 0).double().sum()),
        "smallest": float(per_exposure.min()) if len(per_exposure) else float("nan"),
        "rank_correlation": _rank_correlation(found[exposures > 0], exposures[exposures > 0]),
    }
    return _checked("salience grows with exposure (theorem 4.6)", -per_exposure, None, **figures)


CHECKS: tuple[Callable[[int], Checked], ...] = (
    gradient_is_as_stated,
    one_step_moves_all_subjects_alike,
    lost_outside_the_interval,
    lost_under_the_loose_threshold,
    memorised_by_a_sum,
    memorised_by_a_set,
    knowledge_can_be_hidden,
    knowledge_can_be_hidden_within,
    salience_grows_with_exposure,
)


def _random_model(seed: int, n: int) -> tuple[OneLayer, tuple[Facts, Facts, Facts]]:
    """Models with normal weights, prompts' columns included, and a fact of each asked by its prompt token."""
    world, rng = make_world(12, 3, 4, 1.0, seed=seed), torch.Generator().manual_seed(seed)
    model = OneLayer.zeros(world.tokens, n, DTYPE)
    model.values.normal_(0, 1.5, generator=rng)
    model.scores.normal_(0, 1.5, generator=rng)
    subjects = torch.randint(12, (n, 1), generator=rng)
    relations = torch.randint(3, (n, 1), generator=rng)
    answers = torch.tensor(world.answer_tokens)[subjects, relations]
    return model, (subjects, subjects.new_tensor(world.tokens.prompt(0)) + relations, answers)


def _some_world(seed: int) -> World:
    rng = np.random.default_rng(seed)
    n_answers, n_relations = int(rng.integers(2, 8)), int(rng.integers(1, 5))
    return make_world(int(rng.integers(n_answers, 30)), n_relations, n_answers, 1.0, prior="zipf", seed=seed)


def _all_facts(world: World, *, prompts: bool = False) -> tuple[Facts, Facts, Facts]:
    """All facts of one world, `(1, n)`."""
    subjects, relations = (torch.tensor(axis).reshape(1, -1) for axis in np.indices(world.answers.shape))
    first = world.tokens.prompt(0) if prompts else world.tokens.relation(0)
    return subjects, relations + int(first), torch.tensor(world.answer_tokens).reshape(1, -1)


def _right(
    model: OneLayer,
    subjects: Facts,
    last: Facts,
    answers: Facts,
    attention: Float[Tensor, "replicate n"] | None,
    among: Tensor | None = None,
) -> Tensor:
    """Whether the answer's logit is above all others (among some tokens alone); a tie is not."""
    logits = model.logits(subjects, last, attention)
    if among is not None:
        logits = logits.masked_fill(~among, -torch.inf)
    own = logits.gather(-1, answers.unsqueeze(-1))
    rivals = logits.scatter(-1, answers.unsqueeze(-1), -torch.inf).amax(-1)
    return own.squeeze(-1) > rivals


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def _checked(
    statement: str, violation: Tensor, describe: Callable[[int], dict[str, Any]] | None = None, **figures: float
) -> Checked:
    """Violated where above 0; `describe` says what an instance is, beside its number."""
    flat = violation.double().flatten()
    worst = None
    if n_violations := int((flat > 0).sum()):
        number = int(flat.argmax())
        worst = {"instance": number, "by": float(flat[number])} | (describe(number) if describe else {})
    return Checked(statement, len(flat), n_violations, worst, figures)

"""Linear probes and what keeps them honest: folds by subject, penalties chosen without test facts, control labels.

Ridge regression on one-against-the-rest targets of ±1 goes by one decomposition of a fold's training states, which
serves every penalty and every set of labels. The penalty is the one with the smallest squared error over all targets
when each training subject is left out in turn, by the exact formula for left-out groups. Logistic regression is
scikit-learn's, its penalty chosen on a quarter of the training subjects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from subjattn.errors import BadInput
from subjattn.prompts import Prompt


Method = Literal["ridge", "logistic"]
PENALTIES = 10.0 ** np.arange(-4, 4)
"""Per training fact: scikit-learn's `alpha` of ridge is these times their number, and `1 / C` of logistic too."""
LOGISTIC_PENALTIES = 10.0 ** np.arange(-4, 1)
CONTROL_DRAWS = 3
"""Control tasks, whose mean is taken: with few different tokens a single draw of labels is a matter of luck."""
MOST_NGRAMS = 5000


@dataclass(frozen=True)
class Task:
    """What a probe has to tell of which facts, and in which folds.

    Attributes:
        kept: indices of the facts that take part, among those asked.
        labels: of each of these a number.
        classes: the labels' names.
        subjects: of each of these the number of its subject, whose facts share a fold.
        tokens: of each of these the last token of its name.
        fold: of each of these the fold that tests it.
        controls: labels drawn by name token, as many sets as CONTROL_DRAWS.
    """

    kept: Int[np.ndarray, " kept"]
    labels: Int[np.ndarray, " kept"]
    classes: tuple[str, ...]
    subjects: Int[np.ndarray, " kept"]
    tokens: Int[np.ndarray, " kept"]
    fold: Int[np.ndarray, " kept"]
    controls: Int[np.ndarray, "control kept"]

    @property
    def targets(self) -> Int[np.ndarray, "target kept"]:
        """The labels, and then those of the control tasks."""
        return np.concatenate([self.labels[None], self.controls])


def task_of(prompts: Sequence[Prompt], labels: Mapping[str, str], folds: int, seed: int) -> Task:
    """Labels of facts, those of too few subjects left out, in folds that hold a label's share of each.

    Args:
        prompts: the facts.
        labels: by fact id; a fact without one takes no part.
        folds: how many, and the fewest subjects of a label, so that every fold can have been trained on it.
        seed: of folds and control labels.

    Raises:
        BadInput: no two labels are left.
    """
    if folds < 2:
        raise BadInput(f"folds is {folds}: give 2 or more")
    subjects = {prompt.fact_id: prompt.subject for prompt in prompts}
    found = {fact: labels[fact] for fact in subjects if fact in labels}
    members: dict[str, set[str]] = {}
    for fact, label in found.items():
        members.setdefault(label, set()).add(subjects[fact])
    classes = tuple(sorted(label for label, own in members.items() if len(own) >= folds))
    if len(classes) < 2:
        sizes = Counter({label: len(own) for label, own in members.items()}).most_common(3)
        shown = ", ".join(f"{label!r} {size}" for label, size in sizes) or "none"
        raise BadInput(
            f"a probe needs two labels of {folds} subjects or more each, and of {len(found)} facts with a label "
            f"{len(classes)} has: subjects by label: {shown}; ask more facts, or take fewer folds"
        )
    kept = [i for i, prompt in enumerate(prompts) if found.get(prompt.fact_id) in classes]
    codes = np.array([classes.index(found[prompts[i].fact_id]) for i in kept])
    groups = np.unique([prompts[i].subject for i in kept], return_inverse=True)[1]
    tokens = np.array([prompts[i].ids[prompts[i].subject_span[1] - 1] for i in kept])
    fold = np.empty(len(kept), int)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, test) in enumerate(splitter.split(codes, codes, groups)):
        fold[test] = number
    rng = np.random.default_rng(seed)
    types, of = np.unique(tokens, return_inverse=True)
    controls = np.stack([rng.choice(codes, len(types))[of] for _ in range(CONTROL_DRAWS)])
    return Task(np.array(kept), codes, classes, groups, tokens, fold, controls)


@dataclass(frozen=True)
class Linear:
    """A probe that was trained: scores of every class from states."""

    scaler: StandardScaler
    weights: Float[np.ndarray, "d_model class"]
    intercepts: Float[np.ndarray, " class"]
    penalty: float
    error: float = np.nan
    """Of ridge the mean squared error of training subjects left out, by which the penalty was chosen."""

    def scores(self, states: Float[np.ndarray, "fact d_model"]) -> Float[np.ndarray, "fact class"]:
        found: np.ndarray = self.scaler.transform(states.astype(float)) @ self.weights + self.intercepts
        return found


class Trainer(Protocol):
    """States of training facts, on which probes of several sets of labels are trained."""

    def probe(self, labels: Int[np.ndarray, " fact"], n_classes: int) -> Linear: ...


class Ridge:
    """One decomposition of training states, each feature in units of its spread, for every penalty and label."""

    def __init__(self, states: Float[np.ndarray, "fact d_model"], subjects: Int[np.ndarray, " fact"]) -> None:
        self.scaler = StandardScaler().fit(states.astype(float))
        scaled = self.scaler.transform(states.astype(float))
        by_feature = scaled.shape[1] <= len(scaled)
        squares, vectors = np.linalg.eigh(scaled.T @ scaled if by_feature else scaled @ scaled.T)
        held = squares > 1e-12 * max(squares[-1], 1e-300)
        squares, vectors = squares[held], vectors[:, held]
        self.squares = squares
        self.left = scaled @ vectors / np.sqrt(squares) if by_feature else vectors
        self.right = vectors if by_feature else scaled.T @ vectors / np.sqrt(squares)
        self.alphas = PENALTIES * len(states)
        self.shrunk = [squares / (squares + alpha) for alpha in self.alphas]
        groups = _by_size(subjects)
        self.left_out = [[(one, self._inverse(one, shrunk)) for one in groups] for shrunk in self.shrunk]

    def probe(self, labels: Int[np.ndarray, " fact"], n_classes: int) -> Linear:
        """Trained on these labels, with the penalty that errs least of subjects left out."""
        targets = 2.0 * (labels[:, None] == np.arange(n_classes)) - 1
        mean = targets.mean(0)
        turned = self.left.T @ (targets - mean)
        errors = [self._error(targets - mean, turned, i) for i in range(len(self.alphas))]
        alpha, error = self.alphas[int(np.argmin(errors))], min(errors) / targets.size
        weights = self.right @ ((np.sqrt(self.squares) / (self.squares + alpha))[:, None] * turned)
        return Linear(self.scaler, weights, mean, float(alpha), error)

    def _inverse(self, members: Int[np.ndarray, "subject member"], shrunk: np.ndarray) -> np.ndarray:
        """(I − H_gg)⁻¹ of each subject g, which turns its facts' residuals into those without it."""
        rows = self.left[members]
        hat = 1 / len(self.left) + (rows * shrunk) @ rows.swapaxes(1, 2)
        return np.linalg.inv(np.eye(members.shape[1]) - hat)

    def _error(self, targets: np.ndarray, turned: np.ndarray, penalty: int) -> float:
        """Squared error where each subject is left out in turn."""
        residuals = targets - self.left @ (self.shrunk[penalty][:, None] * turned)
        return sum(float(((inverse @ residuals[members]) ** 2).sum()) for members, inverse in self.left_out[penalty])


class Logistic:
    """Training states for scikit-learn's logistic regression."""

    def __init__(self, states: Float[np.ndarray, "fact d_model"], subjects: Int[np.ndarray, " fact"]) -> None:
        self.states, self.subjects = states.astype(float), subjects

    def probe(self, labels: Int[np.ndarray, " fact"], n_classes: int) -> Linear:
        """Trained on these labels, with the penalty that is right most often on a quarter of the subjects."""
        order = np.random.default_rng(0).permutation(np.unique(self.subjects))
        held = np.isin(self.subjects, order[: max(1, len(order) // 4)])
        best, most = LOGISTIC_PENALTIES[-1], -1.0
        for penalty in LOGISTIC_PENALTIES[::-1]:
            right = self._fit(labels, n_classes, ~held, penalty).scores(self.states[held]).argmax(1) == labels[held]
            if right.mean() > most:
                best, most = penalty, float(right.mean())
        return self._fit(labels, n_classes, np.ones_like(held), best)

    def _fit(self, labels: np.ndarray, n_classes: int, rows: np.ndarray, penalty: float) -> Linear:
        scaler = StandardScaler().fit(self.states[rows])
        weights, intercepts = np.zeros((self.states.shape[1], n_classes)), np.full(n_classes, -np.inf)
        there = np.unique(labels[rows])
        alpha = float(penalty * rows.sum())
        if len(there) == 1:
            intercepts[there] = 0.0
            return Linear(scaler, weights, intercepts, alpha)
        model = LogisticRegression(C=1 / alpha, max_iter=2000).fit(scaler.transform(self.states[rows]), labels[rows])
        if len(there) == 2:
            weights[:, there[1]], intercepts[there] = model.coef_[0], [0.0, model.intercept_[0]]
        else:
            weights[:, there], intercepts[there] = model.coef_.T, model.intercept_
        return Linear(scaler, weights, intercepts, alpha)


TRAINERS: dict[str, type[Ridge] | type[Logistic]] = {"ridge": Ridge, "logistic": Logistic}


def out_of_fold(
    trained_on: Float[np.ndarray, "kept d_model"],
    tested_on: Sequence[Float[np.ndarray, "kept d_model"]],
    task: Task,
    targets: Int[np.ndarray, "target kept"],
    method: Method,
) -> Float[np.ndarray, "tested target kept class"]:
    """Scores of every fact by the probe whose training left its fold out; NaN where states are.

    NumPy takes as many threads as torch was given, so that stages of a study keep to their own.

    Args:
        trained_on: states that probes are trained on.
        tested_on: states of the same facts that they are then tested on, such as these very ones.
        task: folds and subjects.
        targets: sets of labels.
        method: of the probe.
    """
    there = ~np.isnan(np.stack([trained_on, *tested_on])).any((0, 2))
    scores = np.full((len(tested_on), len(targets), len(there), len(task.classes)), np.nan)
    for fold in np.unique(task.fold):
        train, test = there & (task.fold != fold), there & (task.fold == fold)
        if not train.any() or not test.any():
            continue
        with threadpool_limits(torch.get_num_threads()):
            trainer: Trainer = TRAINERS[method](trained_on[train], task.subjects[train])
            for target, labels in enumerate(targets):
                probe = trainer.probe(labels[train], len(task.classes))
                for i, states in enumerate(tested_on):
                    scores[i, target, test] = probe.scores(states[test])
    return scores


def right(scores: Float[np.ndarray, "*any kept class"], labels: Int[np.ndarray, "*any kept"]) -> np.ndarray:
    """1 where the label has the highest score, 0 where it has not, NaN where there are no scores."""
    defined = ~np.isnan(scores).any(-1)
    return np.where(defined, np.nan_to_num(scores, nan=0.0, neginf=-np.inf).argmax(-1) == labels, np.nan)


def ranked(scores: Float[np.ndarray, "kept class"], task: Task) -> Float[np.ndarray, " kept"]:
    """Of each fact, the share of its fold's facts of other labels to which the probe gives its label a lower score.

    Half of those with the same score count. The mean over a fold's facts is the area under the ROC curve, one label
    against the rest, weighted by how often each label occurs.
    """
    found = np.full(len(scores), np.nan)
    for fold in np.unique(task.fold):
        inside = np.flatnonzero((task.fold == fold) & ~np.isnan(scores).any(1))
        for label in np.unique(task.labels[inside]):
            own = task.labels[inside] == label
            if own.all():
                continue
            mine, others = scores[inside[own], label][:, None], scores[inside[~own], label][None]
            found[inside[own]] = ((mine > others) + 0.5 * (mine == others)).mean(1)
    return found


def recurring(task: Task, there: np.ndarray) -> np.ndarray:
    """Facts whose last name token some training fact of another fold has, so that its control label can be known."""
    found = np.zeros(len(task.kept), bool)
    for fold in np.unique(task.fold):
        inside = task.fold == fold
        found[inside] = np.isin(task.tokens[inside], task.tokens[there & ~inside])
    return found


def by_characters(names: Sequence[str], task: Task, method: Method) -> Float[np.ndarray, "kept class"]:
    """Out-of-fold scores of a probe that sees the name's characters alone: TF-IDF of strings of 1 to 3 of them."""
    scores = np.full((len(names), len(task.classes)), np.nan)
    for fold in np.unique(task.fold):
        train, test = task.fold != fold, task.fold == fold
        ngrams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), max_features=MOST_NGRAMS)
        seen = ngrams.fit_transform([name for name, some in zip(names, train, strict=True) if some]).toarray()
        unseen = ngrams.transform([name for name, some in zip(names, test, strict=True) if some]).toarray()
        probe = TRAINERS[method](seen, task.subjects[train]).probe(task.labels[train], len(task.classes))
        scores[test] = probe.scores(unseen)
    return scores


def by_length(prompts: Sequence[Prompt], task: Task, method: Method) -> Float[np.ndarray, "kept class"]:
    """Out-of-fold scores of a probe that sees the name's length alone: how many tokens, words and characters it has."""
    counts = [
        (len(prompt.subject_positions), len(prompt.subject.split()), len(prompt.subject))
        for prompt in (prompts[i] for i in task.kept)
    ]
    features = np.concatenate([np.equal.outer(of, np.unique(of)).astype(float) for of in np.array(counts).T], axis=1)
    scores: np.ndarray = out_of_fold(features, [features], task, task.labels[None], method)[0, 0]
    return scores


def by_majority(task: Task) -> Float[np.ndarray, " kept"]:
    """1 where a fact's label is the most frequent one of the other folds."""
    found = np.empty(len(task.kept))
    for fold in np.unique(task.fold):
        inside = task.fold == fold
        found[inside] = task.labels[inside] == np.bincount(task.labels[~inside]).argmax()
    return found


def _by_size(subjects: Int[np.ndarray, " fact"]) -> list[Int[np.ndarray, "subject member"]]:
    """Facts of each subject, subjects of as many facts together."""
    order = np.argsort(subjects, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(subjects[order])) + 1)
    return [np.stack([one for one in members if len(one) == size]) for size in sorted({len(one) for one in members})]

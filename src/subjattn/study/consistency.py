"""Whether the parts of a study fit each other: contrasts, claims and training against its arms, styles and measures."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import ValidationError

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.measures.record import quantity_of
from subjattn.prompts import ROLES
from subjattn.study.arms import WrongField


if TYPE_CHECKING:
    from subjattn.evidence.claims import Where
    from subjattn.measures.record import Quantity
    from subjattn.study.config import StudyConfig


def check_claims(study: StudyConfig) -> None:
    """Refuse contrasts and claims of what the study does not have, or that it could never decide."""
    for number, pair in enumerate(study.contrasts):
        with _within(f"contrasts.{number}"):
            for arm in pair:
                study.check_arm(arm)
            if len(set(pair)) < len(pair):
                raise BadInput(f"arm {pair[0]!r} minus itself is always 0: name two arms")
    for quantity in study.smallest_effects:
        with _within(f"smallest_effects.{quantity}"):
            quantity_of(quantity, study.measured)
    for number, column in enumerate(study.overview):
        with _within(f"overview.{number}"):
            name, colon, which = column.partition(":")
            quantity_of(name.partition(".")[0], study.measured)
            if colon and which not in ("known", "unknown"):
                raise BadInput(f"column {column!r}: a quantity is of all facts, or :known, or :unknown")
    for number, claim in enumerate(study.claims):
        with _within(f"claims.{number}"):
            _check_claim(study, claim)
    for number, pair in enumerate(study.contrasts):
        if set(pair) in map(set, study.contrasts[:number]):
            raise BadInput(f"{pair[0]!r} and {pair[1]!r} are compared twice", field=f"contrasts.{number}")
    ids = [unicodedata.normalize("NFC", claim.id) for claim in study.claims]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        last = len(ids) - 1 - ids[::-1].index(twice)
        raise BadInput(f"two claims have the id {twice!r}", field=f"claims.{last}.id")
    primary = [number for number, claim in enumerate(study.claims) if claim.primary]
    if len(primary) > 1:
        first, second = (ids[number] for number in primary[:2])
        raise BadInput(
            f"claims {first!r} and {second!r} are both primary: at most one is", field=f"claims.{primary[1]}.primary"
        )


@contextmanager
def _within(field: str) -> Iterator[None]:
    """Say which field an error is about."""
    try:
        yield
    except ValueError as error:
        raise BadInput(str(error), field=field) from None


def _check_claim(study: StudyConfig, claim: Claim) -> None:
    where = f"claim {claim.id!r}"
    sides = [side[1:] for side in claim.sides]
    each = [(measure, arms, style or claim.style, str(cells)) for measure, arms, style, cells in sides]
    if len(set(each)) < len(each):
        raise ValueError(f"{where}: what 'minus' names is the claim's own, and their difference always 0")
    for measure, arms, style, cells in sides:
        quantity = quantity_of(measure.partition(".")[0], study.measured)[1]
        _check_cells(where, quantity, cells)
        if quantity.bounds is not None and claim.smallest_effect > quantity.bounds[1] - quantity.bounds[0]:
            raise ValueError(
                f"{where}: no effect on {quantity.name} can be {claim.smallest_effect:g}: its values lie between "
                f"{quantity.bounds[0]:g} and {quantity.bounds[1]:g}"
            )
        if len(set(arms)) < len(arms):
            raise ValueError(f"{where}: arm {arms[0]!r} minus itself is always 0: name two arms, or one by itself")
        for arm in arms:
            study.check_arm(arm)
        for name in (style, claim.style):
            if name is not None and name not in study.styles:
                raise ValueError(f"{where}: no style {name!r}; the styles are {', '.join(study.styles)}")
    if not study.styles_of_claim(claim):
        raise ValueError(f"{where}: no style is asked of all its arms")
    measured = [quantity_of(side[1].partition(".")[0], study.measured)[0].name for side in claim.sides]
    if len({name in study.replicates.first_only for name in measured}) > 1:
        raise ValueError(f"{where}: of {' and '.join(measured)} one is made of the first replicate only")
    involved = {arm for side in claim.sides for arm in side[2]}
    if study.facts.where == "correct" and study.untrained in involved and set(measured) != {"accuracy"}:
        raise ValueError(
            f"{where} compares with arm {study.untrained!r}, whose right answers chose the facts (facts.where), so it "
            "would fall by chance: claim it of other arms, or choose facts by labels"
        )
    trained = involved & study.replicated
    if claim.scope == "training" and (not trained or len(study.replicates.all) < 2):
        raise ValueError(
            f"{where} is about a way of training, which takes an arm trained here and replicates: {{draws: 3}} or more"
        )
    if claim.select is not None:
        _check_select(study, claim, involved)


def _check_cells(where: str, quantity: Quantity, cells: Where) -> None:
    for dim, asked in cells.items():
        if dim not in quantity.cells:
            known = ", ".join(quantity.cells) or "none"
            raise ValueError(f"{where}: {quantity.name} has no cells by {dim!r}; it has {known}")
        if asked == []:
            raise ValueError(f"{where}: where.{dim} names no cell")
        labels = asked if isinstance(asked, list) else [asked]
        if dim == "role" and (unknown := [name for name in labels if name not in ROLES]):
            raise ValueError(f"{where}: no role {unknown[0]!r}; the roles are {', '.join(ROLES)}")


def check_labels(study: StudyConfig, n_layers: int, n_heads: int) -> None:
    """Refuse claims of layers and heads that the study's model does not have."""
    sizes = {"layer": n_layers, "head": n_heads}
    for number, claim in enumerate(study.claims):
        for dim, asked in [item for side in claim.sides for item in side[4].items() if item[0] in sizes]:
            for one in asked if isinstance(asked, list) else [asked]:
                first, dash, last = str(one).partition("-")
                ends = [int(end) for end in (first, last if dash else first) if end.isdigit()]
                if len(ends) < 2 or not 0 <= ends[0] <= ends[1] < sizes[dim]:
                    raise BadInput(
                        f"claim {claim.id!r}: no {dim} {one}: the model has {dim}s 0 to {sizes[dim] - 1}",
                        field=f"claims.{number}.where",
                    )


def _check_select(study: StudyConfig, claim: Claim, arms: set[str]) -> None:
    on = claim.select.on if claim.select else None
    where = f"claim {claim.id!r} chooses cells"
    if len(claim.arms) < 2 or (claim.minus and (claim.minus.measure or claim.minus.where)):
        raise ValueError(f"{where}, which it can for a difference of two arms in one measure: name the cells instead")
    if isinstance(on, int) and (given := arms - study.replicated):
        raise ValueError(f"{where} on draws, of which arm {min(given)!r} has none: it would be tested where it chose")
    if isinstance(on, int) and on >= study.replicates.draws:
        raise ValueError(f"claim {claim.id!r} chooses cells on {on} draws and leaves none of {study.replicates.draws}")
    if on == "reference" and study.untrained in arms:
        raise ValueError(
            f"claim {claim.id!r} chooses cells on arm {study.untrained!r} and compares with it: where it is largest by "
            "chance, it falls by chance; choose on draws, or name the cells"
        )


def check_made(study: StudyConfig) -> None:
    """Refuse arms made of arms that are no tuned models, and styles of arms that the study has not."""
    for name, arm in study.arms.items():
        field = f"arms.{name}"
        for style in [*(arm.styles or []), *([arm.mix.base_style] if arm.mix and arm.mix.base_style else [])]:
            if style not in study.styles:
                raise BadInput(
                    f"{field}: no style {style!r}; the styles are {', '.join(study.styles)}", field=f"{field}.styles"
                )
        if arm.of is None:
            continue
        if arm.of not in study.arms or study.arms[arm.of].of or not study.is_tuned(arm.of):
            raise BadInput(
                f"{field}: {arm.of!r} is no tuned arm of the study: name one that is trained here or brought along",
                field=f"{field}.of",
            )
        if arm.mix and arm.mix.weight is None and not study.facts.n_validation:
            raise BadInput(
                f"{field}.mix: its weight is chosen on validation facts: give facts.n_validation, or a weight",
                field="facts.n_validation",
            )
        if arm.mix and arm.mix.base_style and not study.styles[arm.mix.base_style].shots:
            raise BadInput(f"{field}.mix: style {arm.mix.base_style!r} shows no facts: give it 'shots'", field=field)
    if study.arms[study.untrained].styles is not None:
        raise BadInput(
            f"arm {study.untrained!r} says which facts are known: it is asked in all styles",
            field=f"arms.{study.untrained}.styles",
        )


def check_training(study: StudyConfig) -> None:
    """Refuse training that the study's styles and facts do not allow."""
    for arm in study.trained:
        field = "training" if study.arms[arm].training is None else f"arms.{arm}.training"
        try:
            training = study.training_of(arm)
        except ValidationError as error:
            raise WrongField(("arms", arm, "training"), error) from None
        except BadInput as error:
            raise BadInput(str(error), field=field) from None
        if unknown := [name for name in training.styles or [] if name not in study.styles]:
            raise BadInput(
                f"{field}.styles: no style {unknown[0]!r}; the styles are {', '.join(study.styles)}",
                field=f"{field}.styles",
            )
        styles = study.training_styles(arm)
        if not styles or any(style.shots or style.chain_of_thought for style in styles.values()):
            raise BadInput(
                "arms are trained in styles without shots and chain of thought, and there is none", field="styles"
            )
        judged = training.settings.stop == "validation" or training.grid is not None
        if judged and not study.facts.n_validation:
            raise BadInput(
                f"{field}: 'stop: validation' and 'grid' go by validation facts: give facts.n_validation",
                field="facts.n_validation",
            )

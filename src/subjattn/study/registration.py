"""What a study claims, written down before anything is measured; what is added or changed later is post hoc.

The file `registered.json` of a run's folder holds the claims and contrasts as they stood when it was first run, what
they rest on (facts, splits, training, replicates, models, styles, the measures' settings), and the time. It may be
written anew only while nothing has been measured. A claim that is dropped later still counts in its family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from subjattn.digest import digest_of
from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.measures.record import quantity_of
from subjattn.run.folder import Folder, replacing
from subjattn.study import files
from subjattn.study.config import StudyConfig


Status = Literal[True, "post hoc"]


@dataclass(frozen=True)
class Registered:
    """What was stated before anything was measured.

    Attributes:
        digest: of all of it; None where nothing is known of it.
        time: when, in UTC.
        claims: as plain data, by id, each with what it rests on.
        contrasts: each a pair of arms, with what all its rows rest on, each style, and each measure's settings.
    """

    digest: str | None
    time: str | None
    claims: Mapping[str, Any]
    contrasts: tuple[Any, ...]

    def claim(self, claim: Claim, config: StudyConfig) -> Status:
        """Whether this claim was stated, word for word, on what it rests on now."""
        return True if self.claims.get(claim.id) == _stated(claim, config) else "post hoc"

    def contrast(self, row: Mapping[str, Any], config: StudyConfig) -> Status:
        """Whether the two arms of a contrast were to be compared, in this style, by this measure as it is set now."""
        now = _paired((row["arm_a"], row["arm_b"]), config)
        before = next((of for of in self.contrasts if of[:3] == now[:3]), None)
        if before is None:
            return "post hoc"
        if len(before) == 3:  # registrations before 0.11 know nothing of styles and measures
            return True
        measure = quantity_of(row["measure"].partition(".")[0], config.measured)[0].name
        same = all(
            then.get(name) == of[name]
            for then, of, name in zip(before[3:], now[3:], (row["style"], measure), strict=True)
        )
        return True if same else "post hoc"

    def dropped(self, config: StudyConfig) -> list[str]:
        """Claims that were stated and are no more in the study."""
        return [name for name in self.claims if name not in {claim.id for claim in config.claims}]


def registration_of(config: StudyConfig, time: str | None = None) -> Registered:
    """A study's claims and contrasts as they stand."""
    claims = {claim.id: _stated(claim, config) for claim in config.claims}
    contrasts = tuple(_paired(pair, config) for pair in config.contrasts)
    return Registered(digest_of({"claims": claims, "contrasts": contrasts}), time, claims, contrasts)


def _stated(claim: Claim, config: StudyConfig) -> dict[str, Any]:
    """A claim as plain data: what it says, and what it rests on."""
    sides = claim.sides
    arms = {arm for side in sides for arm in side[2]} | ({config.untrained} if claim.select else set())
    measures = {quantity_of(side[1].partition(".")[0], config.measured)[0].name for side in sides}
    styles = config.styles_of_claim(claim)
    asked = [*styles, *(side[3] for side in sides if side[3])]
    rests = _rests_on(config, arms) | {
        "styles": {name: config.styles[name].model_dump(mode="json") for name in asked},
        "measures": {name: config.measures[name].model_dump(mode="json") for name in sorted(measures)},
    }
    said = claim.model_dump(mode="json", exclude_defaults=True)
    return {"says": said, "order": styles, "rests_on": digest_of(rests)}


def _paired(pair: tuple[str, str], config: StudyConfig) -> list[Any]:
    rests = _rests_on(config, set(pair))
    smallest = {"smallest": effects} if (effects := config.smallest_effects) else {}
    styles = {name: digest_of(style.model_dump(mode="json")) for name, style in config.styles.items()}
    measures = {name: digest_of(settings.model_dump(mode="json")) for name, settings in config.measures.items()}
    return [*pair, digest_of(rests | smallest), styles, measures]


def _rests_on(config: StudyConfig, arms: set[str]) -> dict[str, Any]:
    content = config.model_dump(mode="json", include={"model", "dtype", "seed", "facts", "training", "replicates"})
    content["replicates"].pop("first_only")
    for name in ("leave_out_given", "where"):  # registrations of 0.5 know nothing of them
        if not content["facts"][name]:
            content["facts"].pop(name)
    arms = arms | {config.source(arm) for arm in arms}
    asked = {mix.base_style for arm in arms if (mix := config.arms[arm].mix) and mix.base_style}
    for arm in arms & set(config.trained):
        asked |= set(config.training_of(arm).styles or ())
    if asked:
        content["asked"] = {name: config.styles[name].model_dump(mode="json") for name in sorted(asked)}
    return content | {"arms": {arm: config.arms[arm].model_dump(mode="json") for arm in sorted(arms)}}


def register(config: StudyConfig, folder: Folder) -> Registered:
    """Write down what a study claims, unless something has been measured already; what stands there.

    Raises:
        BadInput: the file is damaged.
    """
    path = folder.root / files.REGISTERED
    if not _measured(folder.root):
        found = registration_of(config, datetime.now(UTC).isoformat(timespec="seconds"))
        before = registered_in(folder.root)
        if before.digest == found.digest and before.time:
            return before
        content = vars(found)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return registered_in(folder.root)


def registration_status(config: StudyConfig, root: Path) -> dict[str, Any]:
    """The digest of a study's claims and contrasts, and how it stands to what a folder holds, in words."""
    now, before = registration_of(config), registered_in(root)
    if not _measured(root):
        status = "written down when the study is first run"
    elif before.time is None:
        status = "nothing was written down before measuring: all are post hoc"
    else:
        same = before.digest == now.digest
        status = f"{'as' if same else 'not as'} written down on {before.time}" + ("" if same else ": see the report")
    return {"digest": now.digest, "status": status}


def _measured(root: Path) -> bool:
    return (root / files.SUMMARY).exists() or any(root.glob("arms/**/measures/*/*/stage.json"))


def registered_in(root: Path) -> Registered:
    """What a run's folder says was stated; nothing where it says nothing.

    Raises:
        BadInput: the file is damaged: it must not be taken for none.
    """
    path = root / files.REGISTERED
    if not path.is_file():
        return Registered(None, None, {}, ())
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        contrasts = tuple(found["contrasts"])
        digest = digest_of({"claims": found["claims"], "contrasts": contrasts})
        if digest != found["digest"]:
            raise ValueError("its content is not what the digest says")
        return Registered(digest, found["time"], found["claims"], contrasts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{str(path)!r} is damaged or was changed ({error}): restore it; without it every claim is post hoc"
        ) from None

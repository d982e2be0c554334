"""What lies where in a run's folder: the only module that knows its names, and the way to read them.

| under the run's folder | what |
|---|---|
| facts/pool, facts/scores, facts/split | the facts there are, how likely the model finds them, those in use |
| prompts/STYLE | what every arm is asked, word for word and token by token |
| chosen/STYLE | facts that measures take which do not take all, and pairs |
| before/… | what the untrained model answers to training facts |
| arms/ARM/drawD-seedS/ | a trained arm's replicate: adapter, measures/STYLE/MEASURE (and prompts/STYLE of its own) |
| arms/ARM/grid, grid/ | hyper-parameters tried, and those chosen |
| arms/ARM/drawD-seedS/over/STYLE/MEASURE | a measure of the weights kept during training |
| arms/ARM/…/mixing | the share of a mixture that was chosen on validation facts, and what others would give |
| arms/ARM/ | the same without a replicate, for an arm that is not trained here |
| summary.json, manifest.json, values.parquet, plan.json, study.yaml, report.html | results |
| registered.json | what the study claimed before anything was measured |
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from subjattn.digest import digest_of
from subjattn.errors import BadInput
from subjattn.evidence.intervals import MIN_REPLICATES, difference, in_words
from subjattn.facts.splits import facts_of
from subjattn.run.folder import Folder
from subjattn.run.plan import Plan, wrong_schema
from subjattn.study.joining import joined, mean_over_replicates


if TYPE_CHECKING:
    import xarray as xr

    from subjattn.prompts import PromptSet
    from subjattn.study.arms import TrainingConfig

POOL, RELATIONS, SPLIT = "facts/pool", "facts/relations", "facts/split"
FACTS, TEST, SHOWN = f"{SPLIT}:facts.parquet", f"{SPLIT}:test.parquet", f"{SPLIT}:shown.parquet"
VALIDATION = f"{SPLIT}:validation.parquet"
SUMMARY, MANIFEST, VALUES, PLAN, STUDY, REPORT, REGISTERED = (
    "summary.json",
    "manifest.json",
    "values.parquet",
    "plan.json",
    "study.yaml",
    "report.html",
    "registered.json",
)
Replicate = tuple[int, int]
"""A draw of the training facts and a seed of the training."""


def scores(shard: int) -> str:
    return f"facts/scores/{shard}"


def shared_prompts(style: str) -> str:
    return f"prompts/{style}"


def chosen(style: str) -> str:
    return f"chosen/{style}"


def before(spec: str, draw: int) -> str:
    return f"before/{_plain(spec)}-draw{draw}"


def training_file(spec: str, draw: int) -> str:
    return f"train-{_plain(spec)}-draw{draw}.parquet"


def training_facts(spec: str, draw: int) -> str:
    return f"{SPLIT}:{training_file(spec, draw)}"


def arm_folder(arm: str, replicate: Replicate | None) -> str:
    return f"arms/{arm}" if replicate is None else f"arms/{arm}/draw{replicate[0]}-seed{replicate[1]}"


def adapter(arm: str, replicate: Replicate) -> str:
    return f"{arm_folder(arm, replicate)}/adapter"


def mixing(arm: str, replicate: Replicate | None) -> str:
    return f"{arm_folder(arm, replicate)}/mixing"


def tried(arm: str, point: int) -> str:
    return f"arms/{arm}/grid/{point}"


def settled(arm: str, training: TrainingConfig) -> str:
    """The choice of a grid: each arm's own, or one for all that share a grid."""
    if training.grid is None or training.grid.select == "each":
        return f"arms/{arm}/grid/chosen"
    return f"grid/{digest_of(training.model_dump(mode='json'))[:8]}"


def over_training(arm: str, replicate: Replicate | None, style: str, measure: str) -> str:
    return f"{arm_folder(arm, replicate)}/over/{style}/{measure}"


def own_prompts(arm: str, replicate: Replicate | None, style: str) -> str:
    return f"{arm_folder(arm, replicate)}/prompts/{style}"


def measured(arm: str, replicate: Replicate | None, style: str, measure: str) -> str:
    return f"{arm_folder(arm, replicate)}/measures/{style}/{measure}"


def _plain(spec: str) -> str:
    """A specification as part of a file's name; another specification never gives the same."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "_", spec)
    return plain if plain == spec else f"{plain}-{zlib.crc32(spec.encode()):08x}"


def not_defined(stage: Path) -> str | None:
    """Why the measure of a stage's folder is not defined, if it is not."""
    path = stage / "not_defined.json"
    return str(json.loads(path.read_text())["reason"]) if path.is_file() else None


class Run:
    """A finished run, read from its files; made by `open_run`.

    Attributes:
        folder: where it lies.
        summary: its results, as in `summary.json`.
        manifest: what they were made with.
        study: the study, as plain data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages = Folder(folder)
        self.plan = self.parsed(PLAN, Plan.from_json)
        self.summary: dict[str, Any] = self.parsed(SUMMARY, json.loads)
        self.manifest: dict[str, Any] = self.parsed(MANIFEST, json.loads)
        self.study: dict[str, Any] = self.manifest["study"]

    def __repr__(self) -> str:
        return f"<Run {self.summary['study']} in {self.folder}: arms {', '.join(self.arms)}>"

    @property
    def arms(self) -> list[str]:
        return list(self.study["arms"])

    @property
    def styles(self) -> list[str]:
        return list(self.study["styles"])

    def replicates(self, arm: str, measure: str = "") -> Sequence[Replicate | None]:
        """The replicates of an arm (in which a measure was made); `[None]` where it is not trained here."""
        own = self.study["arms"][self._named("arm", arm, self.arms)]
        if not self.study["arms"][own.get("of") or arm]["train"]:
            return [None]
        many = self.study["replicates"]
        every = [(draw, seed) for draw in range(many["draws"]) for seed in range(many["seeds"])]
        return every[: 1 if measure in many["first_only"] else None]

    @cached_property
    def values(self) -> pd.DataFrame:
        """All quantities per fact in one table: arm, draw, seed, style, fact, quantity, part, value, and the facts'."""
        return self._parquet(self.folder / VALUES)

    @cached_property
    def facts(self) -> pd.DataFrame:
        """The facts in use: what they are, and whether they are tested, shown, or trained on."""
        return self._parquet(self._file(FACTS))

    @property
    def shown(self) -> pd.DataFrame:
        """The facts that demonstrations are drawn from."""
        return self._parquet(self._file(SHOWN))

    def styles_of(self, arm: str) -> list[str]:
        """The styles that an arm was asked in."""
        asked = self.study["arms"][arm].get("styles") or self.styles
        return [style for style in self.styles if style in asked]

    def predictions(self) -> pd.DataFrame:
        """What every arm answered: arm, draw, seed, style, fact_id, prediction, correct."""
        cells = [
            (arm, one, style) for arm in self.arms for one in self.replicates(arm) for style in self.styles_of(arm)
        ]
        return pd.concat([self._predictions(*cell) for cell in cells], ignore_index=True)

    def _predictions(self, arm: str, replicate: Replicate | None, style: str) -> pd.DataFrame:
        found = self.measure("accuracy", arm, style, replicate)
        draw, seed = replicate or (None, None)
        return pd.DataFrame(
            {
                "arm": arm,
                "draw": pd.array([draw] * found.sizes["fact"], "Int64"),
                "seed": pd.array([seed] * found.sizes["fact"], "Int64"),
                "style": style,
                "fact_id": found["fact"].values,
                "prediction": found["prediction"].values,
                "correct": found["accuracy"].values == 1,
            }
        )

    def before_training(self, spec: str, draw: int = 0) -> pd.DataFrame | None:
        """What the untrained model answers to the facts of arms of this specification, judged by their own answers."""
        name = before(facts_of(spec), draw)
        if name not in {stage.name for stage in self.plan}:
            return None
        return self._parquet(self._file(f"{name}:predictions.parquet"))

    def taught(self, spec: str, draw: int = 0) -> pd.DataFrame:
        """The facts of arms of this specification with the answers that they are trained on."""
        return self._parquet(self._file(training_facts(spec, draw)))

    def prompts(self, style: str, arm: str | None = None, replicate: Replicate | None = None) -> PromptSet:
        """What was asked in a style; of one arm where it reasons by itself."""
        from subjattn.study.stages.tables import load_prompts

        names = {stage.name for stage in self.plan}
        shared = shared_prompts(self._named("style", style, self.styles))
        own = own_prompts(arm or self.arms[0], replicate or self.replicates(arm or self.arms[0])[0], style)
        return load_prompts(self._file(f"{shared if shared in names else own}:prompts.parquet"))

    def measure(self, measure: str, arm: str, style: str, replicate: Replicate | None = None) -> xr.Dataset:
        """The arrays of one measure of one arm, of its first replicate where none is named.

        Raises:
            BadInput: the measure is not defined there (the message says why), or a file is damaged.
        """
        stage = self._stage(measure, arm, style, replicate)
        if reason := not_defined(self.folder / stage):
            raise BadInput(f"{measure} is not defined in style {style!r}: {reason}")
        return self._dataset(stage)

    def over_training(
        self, measure: str, arm: str, style: str | None = None, replicate: Replicate | None = None
    ) -> xr.Dataset:
        """The arrays of a measure over the training of an arm, `(step, …)`; step 0 is the model before it.

        Of its first replicate and style where none is named.
        """
        style = self._named("style", style or self.styles_of(arm)[0], self.styles)
        self._named("measure over training", measure, self.study.get("over_training", []))
        stage = over_training(arm, replicate or self.replicates(arm)[0], style, measure)
        if reason := not_defined(self.folder / stage):
            raise BadInput(f"{measure} is not defined over training: {reason}")
        return self._dataset(stage)

    def _dataset(self, stage: str) -> xr.Dataset:
        """The arrays of a stage; BadInput where their file is damaged."""
        import xarray as xr

        path = self._file(f"{stage}:array.nc")
        try:
            return xr.load_dataset(path, engine="h5netcdf")
        except (OSError, ValueError) as error:
            raise BadInput(self._why(path, "netCDF", error)) from None

    def _stage(self, measure: str, arm: str, style: str, replicate: Replicate | None) -> str:
        self._named("style", style, self.styles)
        self._named("measure", measure, list(self.study["measures"]))
        return measured(arm, replicate or self.replicates(arm)[0], style, measure)

    def has(self, measure: str, variable: str, style: str) -> bool:
        """Whether a measure is defined in a style, in some arm, and gave this variable."""
        arms = self._defined(measure, style)
        return bool(arms) and variable in self.measure(measure, arms[0], style)

    def _defined(self, measure: str, style: str) -> list[str]:
        """The arms in which a measure is defined."""
        among = [arm for arm in self.arms if style in self.styles_of(arm)]
        return [arm for arm in among if not not_defined(self.folder / self._stage(measure, arm, style, None))]

    def array(self, measure: str, variable: str, style: str) -> xr.DataArray:
        """A variable of a measure in every arm that has it, `(arm, fact, …)`: mean over replicates, relations held out
        left out.

        `noise_floor` is a coordinate of `arm`.
        """
        arms = []
        names = self._defined(measure, style) or [arm for arm in self.arms if style in self.styles_of(arm)]
        for arm in names:
            found = [self.measure(measure, arm, style, replicate) for replicate in self.replicates(arm, measure)]
            arrays = [self._inside(dataset[variable]) for dataset in found]
            floors = [array.attrs.pop("noise_floor") for array in arrays if "noise_floor" in array.attrs]
            array = arrays[0]
            if len(arrays) > 1:
                array = mean_over_replicates(joined(arrays, "replicate")).assign_attrs(array.attrs)
            arms.append(array.assign_coords(noise_floor=max(floors)) if floors else array)
        return joined(arms, pd.Index(names, name="arm"))

    def difference(self, measure: str, variable: str, style: str, a: str, b: str) -> xr.DataArray:
        """A variable of a measure in arm `a` minus arm `b`, replicate by replicate: `(fact, draw, seed, …)`."""
        return difference(*(self.by_replicate(measure, variable, style, arm) for arm in (a, b)))

    def significant(self, measure: str, variable: str, style: str, a: str, b: str) -> xr.DataArray:
        """Cells in which two arms differ: over facts and replicates where there are any, else over facts alone.

        Attribute `speaks_of` says which. See `subjattn.significant`.
        """
        from subjattn.evidence.maps import significant

        values = self.difference(measure, variable, style, a, b)
        if values.sizes.get("draw", 1) * values.sizes.get("seed", 1) == 1:
            return significant(values, scope="models").assign_attrs(speaks_of="these two models: facts alone")
        found = significant(values)
        few = found.attrs["n_replicates"] < MIN_REPLICATES
        words = in_words(True, "draws" if values.sizes["draw"] > 1 else "seeds", 2)
        return found.assign_attrs(speaks_of="two replicates: none can stand" if few else words)

    def by_replicate(self, measure: str, variable: str, style: str, arm: str) -> xr.DataArray:
        """A variable of a measure in every replicate of an arm: `(draw, seed, fact, …)`, as `interval` takes it.

        Coordinates `relation` and `answer` of the facts stand beside it, for intervals and maps to know clusters by.
        """
        replicates = self.replicates(arm, measure)
        arrays = [self._inside(self.measure(measure, arm, style, one)[variable]) for one in replicates]
        array = arrays[0]
        if replicates != [None]:
            n_seeds = len({replicate[1] for replicate in replicates if replicate})
            draws = [
                joined(arrays[i : i + n_seeds], pd.RangeIndex(n_seeds, name="seed"))
                for i in range(0, len(arrays), n_seeds)
            ]
            array = joined(draws, pd.RangeIndex(len(draws), name="draw"))
        if "fact" not in array.dims:
            return array
        about = self.facts.set_index("fact_id").reindex(array["fact"].values)
        return array.assign_coords({name: ("fact", about[name].to_numpy(object)) for name in ("relation", "answer")})

    def _inside(self, array: xr.DataArray) -> xr.DataArray:
        dim = next(str(dim) for dim in array.dims if str(dim) in ("fact", "few_fact"))
        outside = self.facts.set_index("fact_id")["out_of_distribution"].reindex(array[dim].values).to_numpy(bool)
        return array.isel({dim: ~outside}) if outside.any() else array

    def provenance(self, arm: str) -> dict[str, Any]:
        """Model, adapter and hashes behind an arm's numbers (its first replicate's)."""
        stage = measured(arm, self.replicates(arm)[0], self.styles_of(arm)[0], "accuracy")
        return json.loads(self._file(f"{stage}:provenance.json").read_text())  # type: ignore[no-any-return]

    def _file(self, source: str) -> Path:
        path = self._stages.path(source)
        if not path.is_file():
            raise BadInput(f"{str(path)!r} is missing: run the study again, which makes it anew")
        return path

    def parsed(self, name: str, parse: Callable[[str], Any]) -> Any:
        """What a file of the folder says; BadInput where it is damaged."""
        path = self.folder / name
        try:
            return parse(path.read_text(encoding="utf-8"))
        except BadInput:
            raise
        except (OSError, ValueError, TypeError, KeyError):
            raise BadInput(f"{str(path)!r} is missing or damaged: run the study again, which writes it anew") from None

    def _parquet(self, path: Path) -> pd.DataFrame:
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise BadInput(self._why(path, "parquet", error)) from None

    def _why(self, path: Path, form: str, error: Exception) -> str:
        stage = path.relative_to(self.folder).parent.as_posix()
        if stage != "." and path in self._stages.damaged(stage):
            return f"{str(path)!r} is damaged (not what was written): run the study again, which makes it anew"
        return f"{str(path)!r} cannot be read as {form}: {' '.join(str(error).split())[:200]}"

    @staticmethod
    def _named(what: str, name: str, known: Sequence[str]) -> str:
        if name not in known:
            raise BadInput(f"the run has no {what} {name!r}; there are {', '.join(known)}")
        return name


def open_run(folder: str | Path) -> Run:
    """Open the folder of a finished study.

    Raises:
        BadInput: there is none, or it is of a version that this one does not read.
    """
    folder = Path(folder)
    if not (folder / SUMMARY).is_file():
        raise BadInput(
            f"{str(folder)!r} holds no finished study (no summary.json): run its command again, which goes on"
        )
    if not (folder / PLAN).is_file():
        raise BadInput(wrong_schema(repr(str(folder)), None))
    return Run(folder)

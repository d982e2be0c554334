"""A package of somebody else's, built from docs/extending.md word for word: nothing of ours is touched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import subjattn as sa
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt


DOCUMENT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of the page, as pip would lay it out."""
    root = tmp_path_factory.mktemp("site")
    (root / "surprise").mkdir()
    (root / "surprise" / "__init__.py").touch()
    code = re.findall(r"In `(surprise/\w+\.py)`:\n\n```python\n(.*?)```", DOCUMENT, re.DOTALL)
    assert len(code) == 3
    for name, text in code:
        (root / name).write_text(text)
    (toml,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    points = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", toml).replace('"', "")
    information = root / "surprise-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: surprise\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(points)
    (root / "surprise.yaml").write_text(re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)[0])
    return root


def subjattn(package: Path, *arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), *filter(None, sys.path)])}
    command = [sys.executable, "-c", "from subjattn.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_pages_measure_is_a_command(package: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    assert "surprise: surprisal of the subject; gives subject_surprisal (nats)" in subjattn(
        package, "measure", "--list"
    )
    shown = " ".join(subjattn(package, "measure", "surprise", "--help").split())
    assert "--reduce" in shown and "over the subject's tokens" in shown and "subject_surprisal, in nats" in shown
    target = tmp_path / "out.json"
    options = ["--model", tiny_folders["llama"], "--n", 10, "--reduce", "sum", "--json", target]
    subjattn(package, "measure", "surprise", *options)
    found = json.loads(target.read_text())["styles"]["list"]
    loaded = sa.load_model(str(tiny_folders["llama"]))
    prompts = sa.make_prompts(sa.load_facts("cities", 10), loaded.tokenizer, "City: {subject}\nCountry:")
    expected = [surprisal(loaded, prompt) for prompt in prompts]
    values = found["arrays"]["data_vars"]["subject_surprisal"]["data"]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert found["mean"]["subject_surprisal"] == pytest.approx(np.mean(expected), rel=1e-4)


def surprisal(model: LoadedModel, prompt: Prompt) -> float:
    """By the model's own loss."""
    ids = torch.tensor([prompt.ids[: prompt.subject_span[1]]])
    labels = ids.clone()
    labels[:, : prompt.subject_span[0]] = -100
    return float(model.model(input_ids=ids, labels=labels).loss) * (prompt.subject_span[1] - prompt.subject_span[0])


def test_the_pages_study_runs(package: Path, tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Measure, training method and figure together, with contrast, claim, table and report."""
    study, out = package / "surprise.yaml", tmp_path / "run"
    small = ["--set", f"model={tiny_folders['llama']}", "--out", out]
    shown = subjattn(package, "run", study, *small)
    assert "name-unlearnt" in shown and "subject" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["claims"][0]["verdict"] in ("supported", "contradicted", "no effect that matters", "undecided")
    (row,) = (row for row in summary["contrasts"] if row["measure"] == "subject_surprisal")
    means = {arm: summary["arms"][arm]["subject_surprisal"] for arm in ("dealt", "base")}
    assert row["estimate"] == pytest.approx(means["dealt"] - means["base"]) and row["estimate"] != 0
    report = (out / "report.html").read_text()
    assert "Surprisal of the subject" in report and "Each point is a fact." in report and "subject surprisal" in report
    plan = json.loads(subjattn(package, "plan", study, *small, "--json"))
    assert {stage["state"] for stage in plan["stages"]} == {"finished"}


def test_names_are_given_once() -> None:
    from subjattn.errors import BadInput
    from subjattn.measures.record import measure_of, measures
    from subjattn.registry import _add

    with pytest.raises(BadInput, match="elsewhere defines 'knockout', which is there already"):
        _add(dict(measures()), measure_of("knockout"), "elsewhere")
    with pytest.raises(BadInput, match="there is no measure 'knokout', did you mean 'knockout'\\?; there are accuracy"):
        measure_of("knokout")

"""Training killed at a step, or while a checkpoint is written, ends with the bits of one never killed."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast

from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.finetune import checkpoints
from subjattn.finetune.examples import Example, make_examples
from subjattn.finetune.record import Lessons, method_of
from subjattn.finetune.settings import Training
from subjattn.models import load_model
from subjattn.prompts import Style


SETTINGS = Training(
    epochs=4, learning_rate=1e-2, batch_size=8, lora_rank=4, lora_dropout=0.2, checkpoints=(1, 2, 5), stop="validation"
)
"""Dropout draws random numbers at every step, so a generator that is not restored shows; 3 steps an epoch."""
STATES = ("_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state")


@pytest.fixture(scope="module")
def examples(cities: pd.DataFrame, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    return make_examples(draw(cities, 24), tokenizer, [Style.of(TEMPLATES["country"]["list"])])


def train(model: str, examples: list[Example], out: str, kept: str, settings: Training, how: dict[str, Any]) -> None:
    """Train in a process of its own; it kills itself as it is told, after a step or behind a part of a checkpoint."""
    import torch

    from subjattn.finetune import trainer

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    steps: list[int] = []

    def on_step() -> None:
        steps.append(1)
        if len(steps) == how.get("step"):
            os.kill(os.getpid(), signal.SIGKILL)

    every = how.get("every", 1)
    trainer._Trainer.is_time_to_save = lambda self: self.state.global_step % every == 0  # type: ignore[method-assign]
    if "behind" in how:
        own = getattr(trainer._Trainer, how["behind"])

        def killed(self: Any, folder: str) -> None:
            own(self, folder)
            if self.state.global_step == how["at"]:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(trainer._Trainer, how["behind"], killed)
    if "largest" in how:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["largest"], how["largest"]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        logging.getLogger("subjattn").addHandler(logging.FileHandler(how["said"]))
    Path(out).mkdir(exist_ok=True)
    lessons = Lessons(examples, examples[:8], examples[:6], kept=Path(kept), on_step=on_step)
    method_of(how.get("method", "sft")).train(load_model(model), lessons, settings, Path(out))
    (Path(out) / "steps.json").write_text(json.dumps(len(steps)))


@pytest.fixture(scope="module")
def started(tiny_folders: dict[str, Path], examples: list[Example]) -> Callable[..., int]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft", "subjattn.finetune.trainer"])

    def start(out: Path, kept: Path, settings: Training = SETTINGS, **how: Any) -> int:
        arguments = (str(tiny_folders["llama"]), examples, str(out), str(kept), settings, how)
        process = context.Process(target=train, args=arguments)
        process.start()
        process.join(300)
        return int(process.exitcode)  # type: ignore[arg-type]

    return start


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def whole(
    request: pytest.FixtureRequest, started: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Training, dict[str, bytes]]:
    """What a run that is never killed, and never writes a checkpoint, ends with."""
    own = {} if request.param == "lora" else {"weights": "full", "learning_rate": 1e-3}
    settings = Training.model_validate(SETTINGS.model_dump(exclude={"weights", "learning_rate"} if own else ()) | own)
    out = tmp_path_factory.mktemp("whole")
    assert started(out / "out", out / "kept", settings, every=1000) == 0
    return settings, files(out / "out")


def files(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.suffix == ".safetensors" or path.name == "training.json"
    }


KILLS = [{"step": step} for step in (1, 2, 5, 8, 11)] + [
    {"behind": part, "at": at} for part, at in zip((*STATES, "_save_rng_state"), (2, 4, 7, 9), strict=True)
]


@pytest.mark.parametrize("how", KILLS, ids=lambda how: " ".join(map(str, how.values())))
def test_a_killed_training_ends_with_the_same_bits(
    how: dict[str, Any], whole: tuple[Training, dict[str, bytes]], started: Callable[..., int], tmp_path: Path
) -> None:
    settings, expected = whole
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert started(out, kept, settings, **how) == -signal.SIGKILL
    assert not (out / "training.json").exists()
    done = max([0, *(int(path.name.removeprefix("checkpoint-")) for path in kept.glob("checkpoint-*"))])
    assert done == (how["step"] - 1 if "step" in how else how["at"] - 1), "the step that was killed left none"
    assert started(out, kept, settings) == 0
    assert json.loads((out / "steps.json").read_text()) == 12 - done, "and it went on from the one before"
    found = files(out)
    assert found.keys() == expected.keys() and len(found) == 5
    assert all(found[name] == expected[name] for name in expected)


@pytest.mark.parametrize("lost", ["optimizer.pt", "rng_state.pth", "trainer_state.json", "weights.safetensors", "torn"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over(
    lost: str, whole: tuple[Training, dict[str, bytes]], started: Callable[..., int], tmp_path: Path
) -> None:
    """Planted: Trainer goes on without optimizer or generator, silently wrong, and crashes without its state."""
    settings, expected = whole
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert started(out, kept, settings, step=8) == -signal.SIGKILL
    newest = checkpoints.newest(kept)
    assert newest is not None and newest.name == "checkpoint-7"
    if lost == "torn":
        file = newest / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (newest / lost).unlink()
    assert (checkpoints.newest(kept) or Path()).name == "checkpoint-6"
    assert started(out, kept, settings) == 0
    assert json.loads((out / "steps.json").read_text()) == 6
    assert files(out) == expected
    shutil.rmtree(kept / "checkpoint-7", ignore_errors=True)


def test_a_disk_that_fills_costs_a_checkpoint_and_no_training(
    started: Callable[..., int], whole: tuple[Training, dict[str, bytes]], tmp_path: Path
) -> None:
    """Files may not grow beyond the weights, so the optimiser's cannot be written."""
    settings, expected = whole
    largest = max(len(content) for content in expected.values()) + 2048
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert started(out, kept, settings, largest=largest, said=str(tmp_path / "said")) == 0
    assert files(out) == expected
    said = (tmp_path / "said").read_text().splitlines()
    assert len(said) == 12 and all("no checkpoint could be written" in line for line in said)
    assert not [*kept.glob("*checkpoint*")]


SCRIPT = """
import sys, pickle, torch
from pathlib import Path
from subjattn.finetune.fit import fit
from subjattn.finetune.record import Lessons
from subjattn.models import load_model
torch.set_num_threads(1)
model, settings, examples, out = pickle.loads(Path(sys.argv[1]).read_bytes())
fit(load_model(model), Lessons(examples, validation=examples[:5]), settings, Path(out))
"""


@pytest.mark.slow
def test_two_processes_train_on_the_data_once(
    tiny_folders: dict[str, Path], examples: list[Example], tmp_path: Path
) -> None:
    """As on two devices: as many steps, the same losses and, to rounding, the same weights as one process has."""
    import pickle

    import torch
    from safetensors.torch import load_file

    settings = Training(
        epochs=3, learning_rate=1e-2, batch_size=7, lora_rank=4, stop="validation", patience=9, checkpoints=(2,)
    )
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        asked = (str(tiny_folders["llama"]), settings, examples[:22], str(tmp_path / name))
        (tmp_path / "asked").write_bytes(pickle.dumps(asked))
        (tmp_path / name).mkdir()
        run = [*command, str(tmp_path / "script.py"), str(tmp_path / "asked")]
        done = subprocess.run(
            run, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads((tmp_path / name / "training.json").read_text())["losses"] for name in ("one", "two")]
    assert len(said[0]) == len(said[1]) == 12
    assert [one["loss"] for one in said[0]] == pytest.approx([one["loss"] for one in said[1]], rel=1e-3)
    for file in ("adapter_model.safetensors", "steps/2/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-2, atol=2e-4)

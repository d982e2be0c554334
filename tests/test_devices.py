"""What a GPU would find, without one: the hot path on torch's `meta` device, where no value can be read.

Every operation is watched: tensors of two devices may not meet, a copy between devices must be asked for by name, and
nothing may need a value before the end of a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from subjattn.engine import attend, attention, checks, cones
from subjattn.engine.anatomy import decoder_layers, mlp_module
from subjattn.engine.arms import Changed, Tuned, attach
from subjattn.engine.budget import Budget
from subjattn.engine.forward import attention_rows
from subjattn.engine.interventions import BY_HEAD, COMPONENTS, Arm, Block, Patch, Row, Run
from subjattn.engine.parts import Place
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.metrics import METRICS, _metric
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt, Style, make_prompts, swap_subjects


NAMES = ("llama", "gpt2", "mistral", "gemma2", "phi3", "gpt_neox")
READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "unique", "masked_select", "repeat_interleave")
Pairs = list[tuple[Prompt, Prompt]]


class Watched(TorchDispatchMode):
    """Refuses what would fail, or wait, on another device than the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {one.device.type for one in tensors if one.ndim or one.device.type != "cpu"}
        name = func.__name__.split(".")[0]
        if len(devices) > 1:
            raise AssertionError(f"{name} of tensors on {sorted(devices)}")
        if "meta" in devices and name.rstrip("2_").removeprefix("_").startswith(tuple(r.strip("_") for r in READS)):
            raise AssertionError(f"{name} needs a value in the middle of a grid")
        result = func(*args, **(kwargs or {}))
        outside = {one.device.type for one in tree_leaves(result) if isinstance(one, Tensor)}
        if "meta" in devices and "cpu" in outside:
            raise AssertionError(f"{name} brings a value back to the host")
        return result


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was read at the end of a batch; transformers' own looks at packed sequences and padding are set aside."""
    found: list[Tensor] = []
    monkeypatch.setattr(attention, "read", lambda value: found.append(value) or True)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_args, **_rest: None)
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_args: None)
    return found


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """As after its first use, whose checks read values."""
    checks._own_distance[model] = 0.0
    cones._checked.add(model)
    return model


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    return ready(copy.deepcopy(model).to("meta"))


def split(model: PreTrainedModel) -> PreTrainedModel:
    """Embeddings and the first layer on the host, all else on `meta`, joined by accelerate's hooks."""
    own = copy.deepcopy(model)
    own.lm_head = copy.deepcopy(own.lm_head)
    first, *rest = decoder_layers(own)
    names = "model.norm", "ln_f", "final_layer_norm"
    norm = next(module for name, module in own.named_modules() if name.endswith(names))
    add_hook_to_module(first, AlignDevicesHook("cpu"))
    for module in (*rest, norm, own.get_output_embeddings()):
        add_hook_to_module(module.to("meta"), AlignDevicesHook("meta"))
    return ready(own)


@pytest.fixture(params=[on_meta, split])
def placed(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def pairs(tokenizer: Any, cities: pd.DataFrame) -> Pairs:
    made = make_prompts(draw(cities, 60, seed=1), tokenizer, TEMPLATES["country"]["list"])
    return swap_subjects(made, np.random.default_rng(0))[:3]


@pytest.fixture(scope="module")
def few_shot(tokenizer: Any, cities: pd.DataFrame) -> Pairs:
    style = Style(template=TEMPLATES["country"]["list"], shots=2)
    made = make_prompts(draw(cities, 60, seed=1), tokenizer, style, demonstrations=draw(cities, 9, seed=4))
    return swap_subjects(made, np.random.default_rng(0))[:3]


def grid(pairs: Pairs, n_layers: int) -> list[Row]:
    """Patches of every component, from runs and from tensors, and edges knocked out by window and by head."""
    rows = []
    for clean, corrupt in pairs:
        contrast = (clean.answer_ids[0], corrupt.answer_ids[0])
        rows += [Row(prompt, contrast=contrast) for prompt in (clean, corrupt)]
        for layer in range(n_layers):
            for component in COMPONENTS:
                head = 1 if component in BY_HEAD else None
                for position in (clean.subject_span[0], clean.prediction):
                    patch = Patch(layer, (position,), clean, component, head)
                    rows.append(Row(corrupt, patches=(patch,), contrast=contrast))
            window = tuple(range(max(0, layer - 1), layer + 1))
            for heads in (None, (1,)):
                block = Block.between(clean.predicting, clean.subject_positions, window, heads)
                rows.append(Row(clean, block, contrast=contrast))
    return rows


def run(model: PreTrainedModel, rows: list[Row], *, only_contrast: bool = False) -> int:
    """All outputs and their metrics, without a look at any number; how many rows there were."""
    n = 0
    for output in cones.forward(model, rows, only_contrast=only_contrast, budget=Budget(chunk_tokens=40)):
        for metric in ("logit_diff",) if only_contrast else METRICS:
            _metric(output, metric, dict.fromkeys(METRICS))
        assert output.logits.device.type == "meta"
        n += len(output.rows)
    return n


@pytest.mark.parametrize("name", NAMES)
def test_grids(tiny_models: dict[str, LoadedModel], pairs: Pairs, reads: list[Tensor], name: str, placed: Any) -> None:
    model = placed(tiny_models[name].model)
    rows = grid(pairs, 3)
    with Watched():
        assert run(model, rows) == len(rows)
        once = len(reads)
        assert run(model, rows, only_contrast=True) == len(rows)
    assert 0 < once <= 2 * 3, "read once a batch and device"


@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_begin_alike(
    tiny_models: dict[str, LoadedModel], few_shot: Pairs, reads: list[Tensor], name: str, placed: Any
) -> None:
    model = placed(tiny_models[name].model)
    rows = grid(few_shot, 3)
    with Watched():
        assert run(model, rows) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_arms_in_one_batch(
    tiny_models: dict[str, LoadedModel], pairs: Pairs, reads: list[Tensor], name: str, placed: Any
) -> None:
    """Each layer's change stays where the layer is, whatever device gives its tokens."""
    model = placed(tiny_models[name].model)
    mlps = {mlp_module(layer): Place(i, {"mlp": None}) for i, layer in enumerate(decoder_layers(model))}
    change = lambda inputs, output: output + inputs.sum(-1, keepdim=True)  # noqa: E731
    tuned = Tuned({module: Changed(change, place) for module, place in mlps.items()})
    assert attach(model, "tuned", tuned) == "tuned"
    rows = []
    for clean, corrupt in pairs:
        for arm in (None, Arm("tuned"), Arm("tuned", positions=frozenset(clean.subject_positions))):
            contrast = (clean.answer_ids[0], corrupt.answer_ids[0])
            rows.append(Row(clean, contrast=contrast, arm=arm))
            source = Run(clean, Arm("tuned") if arm is None else None)
            rows.append(
                Row(clean, patches=(Patch(1, (clean.prediction,), source, "mlp_out"),), contrast=contrast, arm=arm)
            )
    with Watched():
        assert run(model, rows) == len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_attention_rows(
    tiny_models: dict[str, LoadedModel], pairs: Pairs, reads: list[Tensor], name: str, placed: Any
) -> None:
    model = placed(tiny_models[name].model)
    with Watched():
        for output in attention_rows(model, [clean for clean, _ in pairs], value_norms=True):
            assert sorted(output.attention) == sorted(output.value_norms) == [0, 1, 2]
    assert not reads


def wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that is made on the host."""
    visible = cones.Base.visible
    monkeypatch.setattr(cones.Base, "visible", lambda *args: torch.ones(visible(*args).shape, dtype=torch.bool))


def host_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens chosen by an index that stayed on the host."""
    select = attend.Tokens.select

    def selected(tokens: Any, flat: Tensor, *rest: Any) -> None:
        select(tokens, flat, *rest)
        tokens.flat = flat

    monkeypatch.setattr(attend.Tokens, "select", selected)


def read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries without keys looked for in every layer."""
    allowed = attend._allowed

    def looked(*args: Any) -> Tensor:
        found = allowed(*args)
        bool(found.any(-1).all())
        return found

    monkeypatch.setattr(attend, "_allowed", looked)


def counted_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs told apart by `unique_consecutive` of what lies on the device."""
    select = attend.Tokens.select

    def selected(tokens: Any, *args: Any) -> None:
        select(tokens, *args)
        tokens.run_at.unique_consecutive()

    monkeypatch.setattr(attend.Tokens, "select", selected)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (wrong_device, "on ..cpu., .meta.."),
        (host_index, "on ..cpu., .meta.."),
        (read_back, "needs a value"),
        (counted_on_the_device, "needs a value"),
    ],
)
def test_planted_faults_are_seen(
    tiny_models: dict[str, LoadedModel],
    pairs: Pairs,
    reads: list[Tensor],
    plant: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    with Watched(), pytest.raises(AssertionError, match=message):
        run(on_meta(tiny_models["llama"].model), grid(pairs, 3))

"""Arms: tuned models on the base's weights, each row (and each token of a cone) going by those of its own."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracles
import pandas as pd
import psutil
import pytest
import torch
from conftest import NAMES, adapted, moved
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from zoo import CONFIGS, parts

from subjattn.backends import BACKENDS, BackendName, open_backend
from subjattn.engine import arms as engine_arms
from subjattn.engine import cones, forward, prefix
from subjattn.engine.interventions import Arm, Block, Output, Patch, Row, Run, controls
from subjattn.errors import AdapterMismatch, BadInput, UnsupportedModel
from subjattn.facts import draw
from subjattn.facts.templates import TEMPLATES
from subjattn.measures.metrics import METRICS, measure_rows
from subjattn.measures.swapping import swap_weights
from subjattn.models import LoadedModel, load_model
from subjattn.models import arms as model_arms
from subjattn.models.arms import Arms, load_arms
from subjattn.organisms import favour
from subjattn.prompts import Prompt, PromptSet, Style, make_prompts


@pytest.fixture(scope="module")
def llama(tuned: Callable[[str], tuple[Arms, dict[str, LoadedModel]]]) -> Arms:
    return tuned("llama")[0]


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, cities: pd.DataFrame) -> PromptSet:
    return make_prompts(draw(cities, 3, seed=3), tokenizer, TEMPLATES["country"]["list"])


def rows_of(prompts: Iterable[Prompt], arms: Iterable[Arm | None]) -> list[Row]:
    first, second, *_ = prompts
    rows = []
    for arm in arms:
        block = Block.between(first.predicting, first.subject_positions, (1,))
        at = (first.prediction,)
        contrast = (5, 6)
        rows += [Row(prompt, contrast=contrast, arm=arm) for prompt in (first, second)]
        rows += [Row(first, block, contrast=contrast, arm=arm)]
        rows += [Row(first, patches=(Patch(1, at, second),), contrast=contrast, arm=arm)]
        rows += [Row(first, patches=(Patch(2, at, Run(second, arm), "mlp_out"),), contrast=contrast, arm=arm)]
    return rows


def logits_of(outputs: Iterable[Output]) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for output in outputs:
        split = output.logits.split([len(row.prompt.predicting) for row in output.rows])
        found |= zip(output.index, split, strict=True)
        for j, row in enumerate(output.rows):
            if not row.plain:
                assert output.control is not None
                assert output.control.rows[output.control_of[j]].run == row.run
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_arms_in_one_batch_are_their_models_apart(
    name: str, tuned: Callable[[str], tuple[Arms, dict[str, LoadedModel]]], prompts: PromptSet
) -> None:
    """Plain, blocked and patched rows, patches from other models too: plain hooks on each model say the same."""
    arms, apart = tuned(name)
    first, second, _ = prompts
    where, at = oracles.place(apart["base"].model, "mlp_out", 1, parts(name)), first.subject_positions
    edges = {(query, key) for query in first.predicting for key in at}
    rows, expected = [], []
    for into in apart:
        model, arm = apart[into].model, arms.arm(into)
        rows += [Row(first, arm=arm), Row(second, arm=arm), Row(first, Block(frozenset(edges)), arm=arm)]
        expected += [oracles.logits(model, prompt) for prompt in (first, second)]
        expected.append(oracles.logits(model, first, oracles.hand_mask(model, len(first), edges)))
        for source in apart:
            kept: list[torch.Tensor] = []
            with torch.no_grad(), oracles.replacing(apart[source].model, where, kept.append):
                apart[source].model(torch.tensor([first.ids]), use_cache=False)
            given = kept[0][0, list(at)]
            expected.append(oracles.hooked_logits(model, first, first, [(where, tuple(at), given, slice(None))]))
            rows.append(Row(first, patches=(Patch(1, tuple(at), Run(first, arms.arm(source)), "mlp_out"),), arm=arm))
    for computing in (cones.forward, forward.forward):
        found = logits_of(computing(arms.base.model, rows))
        for i, row in enumerate(rows):
            wanted = expected[i][list(row.prompt.predicting)]
            torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=1e-5)
    assert (found[0] - found[len(rows) // 4]).abs().max() > 0.1


def test_metrics_of_arms_in_one_batch_are_those_by_themselves(llama: Arms, prompts: PromptSet) -> None:
    arms = [llama.arm(name) for name in ("base", *NAMES)]
    rows = rows_of(prompts, arms)
    found = measure_rows(cones.forward(llama.base.model, rows), rows, dict.fromkeys(METRICS))
    size = len(rows) // len(arms)
    for number, arm in enumerate(arms):
        own, part = rows_of(prompts, [arm]), slice(number * size, (number + 1) * size)
        alone = measure_rows(cones.forward(llama.base.model, own), own, dict.fromkeys(METRICS))
        for metric in METRICS:
            pairs = [(found.values, alone.values)] + [(found.control, alone.control)] * (metric != "kl")
            for one, other in pairs:
                torch.testing.assert_close(
                    torch.tensor(one[metric][part]), torch.tensor(other[metric]), atol=2e-4, rtol=0
                )
    whole = logits_of(cones.forward(llama.base.model, rows))
    for output in cones.forward(llama.base.model, rows, only_contrast=True):
        for i, pair in zip(output.index, output.logits, strict=True):
            torch.testing.assert_close(pair, whole[i][0, [5, 6]], atol=1e-4, rtol=0)


def test_a_patch_takes_its_values_from_the_run_that_it_names(llama: Arms, prompts: PromptSet) -> None:
    """A prompt stands for its run under the row's arm; a run of the other arm is another source."""
    first, second, _ = prompts
    one, two = llama.arm("one"), llama.arm("two")
    at = (first.prediction,)
    sources = second, Run(second, one), Run(second, two)
    rows = [Row(first, patches=(Patch(1, at, source),), arm=one) for source in sources]
    own, same, crossed = logits_of(cones.forward(llama.base.model, rows)).values()
    torch.testing.assert_close(own, same, atol=1e-5, rtol=0)
    assert (own - crossed).abs().max() > 0.1


def test_controls_are_one_for_every_run_and_contrast(llama: Arms, prompts: PromptSet) -> None:
    arms = [llama.arm("base"), llama.arm("one")]
    rows = [row for row in rows_of(prompts, arms) if not row.plain]
    beside, of = controls(rows)
    assert [(row.run, row.contrast) for row in beside] == [(Run(prompts[0], arm), (5, 6)) for arm in arms]
    assert of == [0, 0, 0, 1, 1, 1]


def test_arms_share_no_beginning(
    llama: Arms, tokenizer: Any, cities: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot prompts begin alike, but not under two models; under one arm they do, exactly."""
    style = Style(template=TEMPLATES["country"]["list"], shots=2)
    few = make_prompts(draw(cities, 4, seed=3), tokenizer, style, demonstrations=draw(cities, 9, seed=4))
    whole: list[int] = []
    run = prefix.run_base
    monkeypatch.setattr(prefix, "run_base", lambda m, runs, *rest: whole.append(len(runs)) or run(m, runs, *rest))
    arm = llama.arm("other")
    for arms in ((arm,), (arm, None)):
        runs = [Run(prompt, one) for prompt in few for one in arms]
        base = prefix.run_shared(llama.base.model, runs, (), cones.Budget())
        alone = prefix.run_base(llama.base.model, [Run(prompt, arm) for prompt in few], ())
        for prompt in few:
            torch.testing.assert_close(
                base.logits_of(Run(prompt, arm)), alone.logits_of(Run(prompt, arm)), atol=1e-4, rtol=0
            )
    assert whole == [1, 4, 8, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_arm_that_the_model_has_not_is_refused(
    tiny_models: dict[str, LoadedModel], prompts: PromptSet, backend: BackendName
) -> None:
    opened = open_backend(backend, tiny_models["llama"].model)
    at = (prompts[0].prediction,)
    for row in (
        Row(prompts[0], arm=Arm("tuned")),
        Row(prompts[0], patches=(Patch(1, at, Run(prompts[1], Arm("tuned"))),)),
    ):
        with pytest.raises(UnsupportedModel, match="a row of arm 'tuned' was asked of a single model"):
            list(opened.forward([row]))


@torch.no_grad()
def merged(base: LoadedModel, apart: LoadedModel, cells: frozenset[tuple[int, str]], architecture: str) -> Any:
    """A copy of the base with the weights of some parts replaced by merged ones, which are told apart by name."""
    full = copy.deepcopy(apart.model)
    if apart.adapter is not None:
        full = PeftModel.from_pretrained(copy.deepcopy(base.model), apart.adapter).merge_and_unload()
    mixed = copy.deepcopy(base.model)
    ours = dict(mixed.named_parameters())
    attention, mlp, projection = parts(architecture)
    width = base.model.config.hidden_size
    for name, value in full.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number[1]) if number else -1
        if f".{mlp}." in name:
            columns = {"mlp": slice(None)}
        elif f".{attention}." not in name or layer < 0:
            columns = {"rest": slice(None)}
        elif f".{projection}." in name or ".v_proj." in name:
            columns = {"vo": slice(None)}
        elif ".c_attn." in name:  # GPT-2: queries, keys, values, one behind the other
            columns = {"qk": slice(0, 2 * width), "vo": slice(2 * width, None)}
        elif ".query_key_value." in name:  # GPT-NeoX: head by head
            head = torch.arange(3 * width).view(base.model.config.num_attention_heads, 3, -1)
            columns = {"qk": head[:, :2].flatten(), "vo": head[:, 2].flatten()}
        elif ".qkv_proj." in name:  # Phi-3: 4 query heads, 2 key and 2 value heads
            columns = {"qk": slice(0, width + width // 2), "vo": slice(width + width // 2, None)}
        else:
            columns = {"qk": slice(None)}
        for part, some in columns.items():
            if (layer, part) in cells:
                if ".c_attn.weight" in name:
                    ours[name][:, some] = value[:, some]
                else:
                    ours[name][some] = value[some]
    return mixed


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "phi3", "gpt_neox"])
@pytest.mark.parametrize("arm", ["one", "other"])
def test_parts_of_an_update_are_those_parts_of_the_weights(
    name: str, arm: str, tuned: Callable[[str], tuple[Arms, dict[str, LoadedModel]]], prompts: PromptSet
) -> None:
    """Against models whose weights were mixed by hand, fused projections split by the layouts of their papers."""
    arms, apart = tuned(name)
    every = arms.cells(arm)
    assert {part for _, part in every} == {"qk", "vo", "mlp"} | ({"rest"} if arm == "other" else set())
    chosen = [
        arms.arm(arm, parts=["qk"]),
        arms.arm(arm, parts=["vo"], layers=[0, 2]),
        arms.arm(arm, parts=["qk", "mlp"], layers=[1]),
        arms.arm(arm, parts=sorted({part for _, part in every})),
    ] + ([arms.arm(arm, parts=["rest"])] if arm == "other" else [])
    assert chosen[3] is not None and chosen[3].cells == every
    rows = [Row(prompt, arm=one) for one in chosen for prompt in prompts]
    found = logits_of(cones.forward(arms.base.model, rows))
    for i, row in enumerate(rows):
        assert row.arm is not None and row.arm.cells is not None
        mixed = merged(apart["base"], apart[arm], row.arm.cells, name)
        wanted = oracles.logits(mixed, row.prompt)[list(row.prompt.predicting)]
        torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=1e-4)


def test_tuned_weights_at_some_positions(llama: Arms, tuned: Any, prompts: PromptSet) -> None:
    """Weight grafting: both models layer by layer, each position taking from the one whose weights it has."""
    _, apart = tuned("llama")
    prompt = prompts[0]
    at = [*prompt.subject_positions, prompt.prediction]
    base, one = (apart[name].model.model for name in ("base", "one"))
    hidden = base.embed_tokens(torch.tensor([prompt.ids]))
    positions = torch.arange(len(prompt))[None]
    rotary = base.rotary_emb(hidden, positions)
    with torch.no_grad():
        for ours, theirs in zip(base.layers, one.layers, strict=True):
            # Keys and values of every position by its own weights: both layers read a cache that the two fill together.
            normed = [layer.input_layernorm(hidden) for layer in (ours, theirs)]
            kv = []
            for which in ("k_proj", "v_proj"):
                by = [getattr(of.self_attn, which)(h) for of, h in zip((ours, theirs), normed, strict=True)]
                by[0][:, at] = by[1][:, at]
                kv.append(by[0])
            outs = []
            for layer in (ours, theirs):
                hooks = [
                    getattr(layer.self_attn, which).register_forward_hook(lambda *_, value=value: value)
                    for which, value in zip(("k_proj", "v_proj"), kv, strict=True)
                ]
                mask = torch.full((len(prompt), len(prompt)), -torch.inf).triu(1)[None, None]
                result = layer(hidden, attention_mask=mask, position_embeddings=rotary)
                outs.append(result[0] if isinstance(result, tuple) else result)
                for hook in hooks:
                    hook.remove()
            hidden = outs[0]
            hidden[:, at] = outs[1][:, at]
        wanted = apart["base"].model.lm_head(base.norm(hidden))[0, list(prompt.predicting)]
    row = Row(prompt, arm=llama.arm("one", positions=at))
    blocked = Row(prompt, Block.between([prompt.prediction], [0], (2,)), arm=row.arm)
    for computing in (cones.forward, forward.forward):
        torch.testing.assert_close(logits_of(computing(llama.base.model, [row]))[0], wanted, atol=1e-4, rtol=0)
    one_way, other = (logits_of(of(llama.base.model, [blocked]))[0] for of in (cones.forward, forward.forward))
    torch.testing.assert_close(one_way, other, atol=1e-4, rtol=0)


def test_decoder_layers_called_directly_ignore_pefts_names_but_not_ours(
    llama: Arms, tuned: Any, prompts: PromptSet
) -> None:
    """The trap: peft names adapters through the whole model's forward, so a layer by itself runs the active one."""
    _, apart = tuned("llama")
    live = PeftModel.from_pretrained(copy.deepcopy(apart["base"].model), apart["one"].adapter, "one")
    ids = torch.tensor([prompts[0].ids] * 2)
    with torch.no_grad():
        mixed = live(ids, adapter_names=["__base__", "one"]).logits
        for row, name in enumerate(("base", "one")):
            torch.testing.assert_close(mixed[row], oracles.logits(apart[name].model, prompts[0]), atol=1e-5, rtol=0)
    rows = [Row(prompts[0], arm=llama.arm(name)) for name in ("base", "one")]
    found = logits_of(cones.forward(llama.base.model, rows))
    for i in range(2):
        torch.testing.assert_close(found[i], mixed[i, list(prompts[0].predicting)], atol=1e-5, rtol=0)


def test_a_pass_that_breaks_leaves_no_arm_behind(llama: Arms, prompts: PromptSet) -> None:
    before = logits_of(cones.forward(llama.base.model, [Row(prompts[0])]))[0]
    hooks = sum(len(module._forward_hooks) for module in llama.base.model.modules())
    with pytest.raises(ZeroDivisionError), engine_arms.routed(llama.base.model, [llama.arm("one")]):
        assert sum(len(module._forward_hooks) for module in llama.base.model.modules()) > hooks
        1 / 0  # noqa: B018
    assert sum(len(module._forward_hooks) for module in llama.base.model.modules()) == hooks
    torch.testing.assert_close(logits_of(cones.forward(llama.base.model, [Row(prompts[0])]))[0], before, atol=0, rtol=0)


def test_the_base_is_as_it_was(llama: Arms, tuned: Any) -> None:
    """Loading arms leaves modules, names and weights of the base alone."""
    _, apart = tuned("llama")
    assert list(dict(llama.base.model.named_modules())) == list(dict(apart["base"].model.named_modules()))
    assert not hasattr(llama.base.model, "peft_config")
    ours, theirs = (of.provenance()["weights_sha256"] for of in (llama.base, apart["base"]))
    assert ours == theirs
    told = llama.provenance()["arms"]
    assert told["one"]["held"] == "update alone, unmerged" and told["other"]["held"] == "whole, beside the base"


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["v_proj"], "lora_bias": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [27, 264]}},
    ],
    ids=["dora", "rslora", "saved", "bias", "tokens"],
)
def test_other_kinds_of_adapters_are_exact_too(
    kind: dict[str, Any], tiny_folders: dict[str, Path], tmp_path: Path, prompts: PromptSet
) -> None:
    folder = str(tiny_folders["llama"])
    path = str(adapted(tiny_folders["llama"], tmp_path, 3, **kind))
    arms, apart = load_arms(folder, {"tuned": path}), load_model(folder, adapter=path)
    rows = [Row(prompts[0]), Row(prompts[0], arm=arms.arm("tuned")), Row(prompts[1], arm=arms.arm("tuned"))]
    found = logits_of(cones.forward(arms.base.model, rows))
    for i in (1, 2):
        wanted = oracles.logits(apart.model, rows[i].prompt)[list(rows[i].prompt.predicting)]
        torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_arms_that_would_be_wrong_are_refused(
    tiny_folders: dict[str, Path],
    tuned: Any,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    prompts: PromptSet,
) -> None:
    folder, (_, apart) = str(tiny_folders["llama"]), tuned("llama")
    zero = tmp_path / "zero"
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2)).save_pretrained(zero)
    with pytest.raises(AdapterMismatch, match="changes nothing"):
        load_arms(folder, {"zero": str(zero)})
    same = load_arms(folder, {"zero": str(zero)}, {"self": folder}, identical=["zero", "self"])
    assert same.arm("zero") == Arm("zero")
    with pytest.raises(BadInput, match="arm 'self' has the base's own weights"):
        swap_weights(same, prompts, "self")
    with pytest.raises(BadInput, match="is the base itself"):
        load_arms(folder, checkpoints={"self": folder})
    with pytest.raises(BadInput, match="no tuned version of .*another architecture|differs in"):
        load_arms(folder, checkpoints={"other": str(tiny_folders["gpt2"])})
    with pytest.raises(BadInput, match="carries an adapter"):
        load_arms(apart["one"], {"one": str(apart["one"].adapter)})
    with pytest.raises(BadInput, match="and not 'base'"):
        load_arms(folder, {"base": str(zero)})
    with pytest.raises(AdapterMismatch, match="not found in the base model|has its modules under"):
        load_arms(str(tiny_folders["gpt2"]), {"one": str(apart["one"].adapter)})
    checkpoint = moved(tiny_folders["llama"], tmp_path / "words", tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    other.save_pretrained(checkpoint)
    with pytest.raises(BadInput, match="another tokenizer"):
        load_arms(folder, checkpoints={"words": str(checkpoint)})
    with pytest.raises(BadInput, match="changes nothing in layer 9"):
        same.arm("self", layers=[9])


def test_an_arm_that_disagrees_in_a_batch_is_refused(
    tiny_folders: dict[str, Path], tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, apart = tuned("llama")
    monkeypatch.setattr(model_arms._Lora, "__call__", lambda _self, _inputs, output: output)
    with pytest.raises(UnsupportedModel, match="in one batch with the base its logits part by"):
        load_arms(str(tiny_folders["llama"]), {"one": str(apart["one"].adapter)})


def test_a_checkpoint_on_disk_is_the_one_in_memory(
    tiny_folders: dict[str, Path], tuned: Any, prompts: PromptSet
) -> None:
    arms, _ = tuned("gemma2")
    path = arms.sources["other"].name
    streamed = load_arms(str(tiny_folders["gemma2"]), checkpoints={"other": path}, stream=True)
    assert streamed.provenance()["arms"]["other"]["held"] == "layers read from disk as they are called"
    assert arms.provenance()["arms"]["other"]["held"] == "whole, beside the base"
    rows = rows_of(prompts, [None, streamed.arm("other"), streamed.arm("other", parts=["mlp"], layers=[1])])
    for i, logits in logits_of(cones.forward(streamed.base.model, rows)).items():
        held = logits_of(cones.forward(arms.base.model, [rows[i]]))[0]
        torch.testing.assert_close(logits, held, atol=1e-5, rtol=0)
    assert streamed.cells("other") == arms.cells("other")


def test_a_checkpoint_may_be_in_memory(tiny_models: dict[str, LoadedModel], prompts: PromptSet) -> None:
    """Here one that has an offset on its logits, where the base has no such weights at all."""
    base, made = tiny_models["llama"], favour(tiny_models["llama"], 9, 4.0)
    arms = load_arms(base, checkpoints={"made": made.model})
    found = logits_of(cones.forward(base.model, rows_of(prompts, [arms.arm("made")])))
    alone = logits_of(cones.forward(made.model.model, rows_of(prompts, [None])))
    for i, logits in found.items():
        torch.testing.assert_close(logits, alone[i], atol=1e-5, rtol=0)
    assert "in memory" in arms.provenance()["arms"]["made"]["identity"]
    with pytest.raises(BadInput, match="is the base itself"):
        load_arms(base, checkpoints={"same": base})
    other = replace(base, model=copy.deepcopy(base.model).to(torch.bfloat16))
    with pytest.raises(BadInput, match="load both alike"):
        load_arms(base, checkpoints={"rough": other})


def test_a_checkpoint_that_does_not_fit_is_streamed(
    tiny_folders: dict[str, Path], tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, _ = tuned("llama")
    path = arms.sources["other"].name
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    loaded = load_arms(str(tiny_folders["llama"]), checkpoints={"other": path})
    assert loaded.sources["other"].held == "layers read from disk as they are called"


def test_two_arms_of_one_name_stay_two(tiny_folders: dict[str, Path], tuned: Any, prompts: PromptSet) -> None:
    """Loading another adapter under a name that an earlier one has on the same base does not change the earlier."""
    arms, apart = tuned("llama")
    base = load_model(str(tiny_folders["llama"]))
    first, second = (load_arms(base, {"tuned": arms.sources[name].name}) for name in ("one", "two"))
    assert first.arm("tuned") != second.arm("tuned")
    rows = [Row(prompts[0], arm=of.arm("tuned")) for of in (first, second)]
    found = logits_of(cones.forward(base.model, rows))
    for i, name in enumerate(("one", "two")):
        wanted = oracles.logits(apart[name].model, prompts[0])[list(prompts[0].predicting)]
        torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=0)
    gone = second.arm("tuned")
    del second
    gc.collect()
    assert gone is not None and list(engine_arms.tuned_of(base.model)) == ["tuned"]

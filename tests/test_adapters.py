"""Adapters on a base that is shared: whatever peft writes, the base keeps its bits; what is odd in one is named."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast
from zoo import SHAPE, config

from subjattn.errors import AdapterMismatch, BadInput, UnsupportedModel
from subjattn.models import LoadedModel, check_adapter, load_model
from subjattn.models import arms as model_arms
from subjattn.models.arms import load_arms
from subjattn.models.shared import digests, twin


Q = {"target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Qwen 2 has biases in its attention."""
    folder = tmp_path_factory.mktemp("qwen2")
    return saved(config("qwen2"), folder, tokenizer)


def saved(made: Any, folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(base: Path, out: Path, made: PeftConfig, seed: int = 0) -> str:
    """An adapter all of whose trained tensors were moved."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return str(out)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "biases": lambda: LoraConfig(**Q, bias="all"),
    "biases of its own": lambda: LoraConfig(**Q, bias="lora_only"),
    "residual": lambda: LoraConfig(**Q, init_lora_weights="pissa"),
    "residual in place": lambda: LoraConfig(**Q, init_lora_weights="olora"),
    "magnitudes": lambda: LoraConfig(**Q, use_dora=True, bias="all"),
    "norms": lambda: LNTuningConfig(target_modules=["input_layernorm"]),
    "factors": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "tokens": lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 7]),
    "rotations": lambda: OFTConfig(target_modules=["q_proj"], oft_block_size=4, bias="all"),
    "butterflies": lambda: BOFTConfig(target_modules=["q_proj"], boft_block_size=4, bias="boft_only"),
    "vectors": lambda: VeraConfig(target_modules=["q_proj"], r=4),
    "whole modules": lambda: LoraConfig(**Q, modules_to_save=["mlp", "norm", "lm_head"], bias="all"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_base_and_arm_are_those_of_models_loaded_apart(kind: str, qwen2: Path, tmp_path: Path) -> None:
    adapter = trained(qwen2, tmp_path / "t", KINDS[kind]())
    base = load_model(str(qwen2))
    before, kept = logits(base.model), digests(base.model)
    arms = load_arms(base, {"t": adapter})
    assert torch.equal(logits(arms.base.model), before) and digests(base.model) == kept
    apart = logits(load_model(str(qwen2), adapter=adapter).model)
    with model_arms.routed(base.model, [arms.arm("t")]) as routes:
        routes.choose(torch.ones(1, 38, dtype=torch.long))
        torch.testing.assert_close(logits(base.model), apart, atol=1e-4, rtol=0)
    assert (apart - before).abs().max() > 1e-2


@given(
    targets=st.sets(st.sampled_from(["q_proj", "k_proj", "o_proj", "up_proj", "lm_head", "embed_tokens"]), min_size=1),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    start=st.sampled_from([True, False, "gaussian", "pissa", "olora", "orthogonal"]),
    whole=st.sets(st.sampled_from(["norm", "input_layernorm"])),
    dora=st.booleans(),
    writes=st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["add", "data", "storage", "row"])), max_size=5),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_adding_an_arm_and_taking_it_away_leaves_the_bases_bits(
    tiny_models: dict[str, LoadedModel],
    targets: set[str],
    bias: Any,
    start: Any,
    whole: set[str],
    dora: bool,
    writes: list[tuple[int, str]],
) -> None:
    """Whatever is put around its modules, and written into any of its tensors in any way."""
    base = tiny_models["qwen2"].model
    bits = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    modules, kept = dict(base.named_modules()), digests(base)
    made = LoraConfig(
        r=4,
        target_modules=sorted(targets),
        bias=bias,
        init_lora_weights=start if targets.isdisjoint({"embed_tokens"}) else True,
        modules_to_save=sorted(whole) or None,
        use_dora=dora and targets.isdisjoint({"embed_tokens"}),
    )
    with warnings.catch_warnings(), twin(base) as other:
        warnings.simplefilter("ignore")
        model = get_peft_model(other, made)
        parameters = list(model.parameters())
        for number, way in writes:
            tensor = parameters[number % len(parameters)]
            with torch.no_grad():
                if way == "add":
                    tensor.add_(1.0)
                elif way == "data":
                    tensor.data = torch.zeros_like(tensor)
                elif way == "storage":
                    tensor.detach().view(-1)[::2].mul_(3.0)
                else:
                    tensor[0] = 9.0
        inside = logits(model)
    assert dict(base.named_modules()) == modules and not hasattr(base, "peft_config")
    assert all(torch.equal(tensor, bits[name]) for name, tensor in base.state_dict().items())
    assert digests(base) == kept
    torch.testing.assert_close(logits(model), inside, atol=0, rtol=0)


def test_a_base_that_is_overwritten_all_the_same_is_refused(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind torch's back, in a parameter and in a buffer."""
    adapter = trained(qwen2, tmp_path / "t", LoraConfig(**Q, bias="all"))
    putting = model_arms.with_adapter
    for path in ("model.layers.1.self_attn.k_proj.bias", "model.rotary_emb.inv_freq"):
        base = load_model(str(qwen2))
        tensor = dict(model_arms.tensors_of(base.model))[path]

        def overwriting(model: Any, *args: Any, tensor: torch.Tensor = tensor, **more: Any) -> Any:
            tensor.detach().numpy()[...] += 0.5
            return putting(model, *args, **more)

        monkeypatch.setattr(model_arms, "with_adapter", overwriting)
        with pytest.raises(UnsupportedModel, match=f"(?s)bias='all'.* changed 1 tensors of the base, such as {path}"):
            load_arms(base, {"t": adapter})


def test_the_base_is_compared_with_itself_before_the_arm(qwen2: Path, tmp_path: Path, monkeypatch: Any) -> None:
    adapter = trained(qwen2, tmp_path / "t", LoraConfig(**Q))
    monkeypatch.setattr(model_arms, "_refuse_changed", lambda *_: None)
    putting, base = model_arms.with_adapter, load_model(str(qwen2))

    def overwriting(model: Any, *args: Any, **more: Any) -> Any:
        base.model.lm_head.weight.detach().numpy()[...] += 0.5
        return putting(model, *args, **more)

    monkeypatch.setattr(model_arms, "with_adapter", overwriting)
    with pytest.raises(UnsupportedModel, match="its logits part by"):
        load_arms(base, {"t": adapter})


@pytest.mark.parametrize("load", [load_arms, None])
def test_an_activated_lora_is_named(load: Any, qwen2: Path, tmp_path: Path, tokenizer: Any) -> None:
    """With tokens of the very text on which an adapter is tried, too."""
    for number, text in enumerate((" zebra", " is")):
        tokens = tokenizer(text).input_ids
        adapter = trained(qwen2, tmp_path / f"t{number}", LoraConfig(**Q, alora_invocation_tokens=tokens))
        with pytest.raises(AdapterMismatch, match=r"an activated LoRA: it works behind its invocation tokens alone"):
            load(str(qwen2), {"t": adapter}) if load else load_model(str(qwen2), adapter=adapter)
        with pytest.raises(AdapterMismatch, match="an activated LoRA"):
            check_adapter(str(qwen2), adapter)


def test_a_wrapper_that_moves_the_logits_by_itself_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    """Phi's unembedding has a bias, which peft's wrapper for single tokens loses; trained or not."""
    folder = saved(PhiConfig(**SHAPE), tmp_path / "phi", tokenizer)
    made = LoraConfig(**Q, trainable_token_indices={"lm_head": [5]})
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), made).save_pretrained(tmp_path / "fresh")
    for adapter in (str(tmp_path / "fresh"), trained(folder, tmp_path / "t", made)):
        with pytest.raises(AdapterMismatch, match=r"trainable_token_indices=.*moves its logits before any training"):
            load_model(str(folder), adapter=adapter)
        with pytest.raises(AdapterMismatch, match="moves its logits before any training"):
            load_arms(str(folder), {"t": adapter})


def test_tokens_that_no_text_holds_count_as_a_change(qwen2: Path, tmp_path: Path) -> None:
    made = TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[501])
    adapter = trained(qwen2, tmp_path / "t", made)
    assert load_model(str(qwen2), adapter=adapter).adapter == adapter
    get_peft_model(AutoModelForCausalLM.from_pretrained(qwen2), made).save_pretrained(tmp_path / "fresh")
    with pytest.raises(AdapterMismatch, match="changes nothing"):
        load_model(str(qwen2), adapter=tmp_path / "fresh")


def test_a_tokenizer_or_chat_template_of_its_own_is_said(
    tiny_folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = tiny_folders["llama"]
    adapter = trained(base, tmp_path / "t", LoraConfig(**Q))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(base), adapter=adapter)
        tokenizer.save_pretrained(adapter)
        load_model(str(base), adapter=adapter)
    template = Path(adapter) / "chat_template.jinja"
    template.write_text("{% for m in messages %}### {{ m['content'] }}{% endfor %}")
    with pytest.warns(UserWarning, match="a chat template, and the base has none"):
        load_arms(str(base), {"t": adapter})
    for file in Path(adapter).glob("*token*"):
        file.unlink()
    with pytest.warns(UserWarning, match=r"a chat template.*Prompts are made with the base's"):
        load_model(str(base), adapter=adapter)
    template.unlink()
    other = PreTrainedTokenizerFast.from_pretrained(base)
    other.add_tokens(["<x>"])
    other.eos_token = "<s>"
    other.save_pretrained(adapter)
    with pytest.warns(UserWarning, match=r"1 more token \('<x>'\); eos token '<s>' for '</s>'"):
        load_model(str(base), adapter=adapter)


@pytest.mark.parametrize("how", ["saved", "lora", "resized", "single"])
def test_added_tokens_are_named(how: str, qwen2: Path, tmp_path: Path) -> None:
    own = PreTrainedTokenizerFast.from_pretrained(qwen2)
    own.add_tokens(["<x>", "<y>"])
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    model.resize_token_embeddings(len(own))
    more: dict[str, dict[str, Any]] = {
        "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "lora": {"target_modules": ["q_proj", "embed_tokens"]},
        "resized": {},
        "single": {"trainable_token_indices": [len(own) - 1]},
    }
    adapter = str(tmp_path / "t")
    embeddings = how in ("saved", "resized")
    get_peft_model(model, LoraConfig(**(Q | more[how]))).save_pretrained(adapter, save_embedding_layers=embeddings)
    unnamed = "its folder holds no tokenizer"
    with pytest.raises(AdapterMismatch, match=rf"2 more tokens \({unnamed} that names them\): it has 514 rows .* 512"):
        load_model(str(qwen2), adapter=adapter)
    own.save_pretrained(adapter)
    for load in (check_adapter, lambda base, adapter: load_arms(base, {"t": adapter})):
        with pytest.raises(
            AdapterMismatch, match=r"2 more tokens \('<x>', '<y>'\).*resize_token_embeddings.*\n?"
        ) as told:
            load(str(qwen2), adapter)
        assert "\n" not in str(told.value)


def test_embeddings_that_are_saved_beside_the_update_are_read(qwen2: Path, tmp_path: Path) -> None:
    """Peft then writes what it trained twice, and the base's own beside it."""
    torch.manual_seed(0)
    made = LoraConfig(**Q, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(qwen2), made)
    with torch.no_grad():
        for parameter in (of for of in model.parameters() if of.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "t", save_embedding_layers=True)
    loaded = load_model(str(qwen2), adapter=tmp_path / "t")
    torch.testing.assert_close(logits(loaded.model), logits(model.eval()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("rename", "names"),
    [
        (("model.model.layers", "model.model.language_model.layers"), ("model.language_model.layers", "model.layers")),
        (("model.model.layers", "model.layers"), ("base_model.model", "base_model.model.model")),
        (("base_model.model.", "base_model.model.base_model.model."), ("base_model.model.base_model", "base_model")),
        (("base_model.model.model", "module.model"), ("module.model", "base_model.model.model")),
        (("base_model.model.", ""), ("model", "base_model.model.model")),
    ],
)
@pytest.mark.parametrize("targets", [["q_proj"], "q_proj", r".*language_model.*q_proj"])
def test_keys_under_another_path_are_told_by_both(
    rename: tuple[str, str], names: tuple[str, str], targets: Any, qwen2: Path, tmp_path: Path
) -> None:
    adapter = Path(trained(qwen2, tmp_path / "t", LoraConfig(**Q)))
    file, settings_ = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    save_file({name.replace(*rename): tensor for name, tensor in load_file(file).items()}, file)
    settings_.write_text(json.dumps(json.loads(settings_.read_text()) | {"target_modules": targets}))
    for load in (check_adapter, lambda base, adapter: load_model(base, adapter=adapter)):
        with pytest.raises(AdapterMismatch, match="has its modules under") as told:
            load(str(qwen2), str(adapter))
        assert f"has its modules under {names[0]!r}, and this model under {names[1]!r}" in str(told.value)


def test_subfolders_that_hold_what_is_missed_are_named(qwen2: Path, tmp_path: Path) -> None:
    trained(qwen2, tmp_path / "ckpt" / "t", LoraConfig(**Q))
    with pytest.raises(BadInput, match=r"holds no adapter_config.json: give the folder in it that does, '.*/ckpt/t'"):
        load_model(str(qwen2), adapter=tmp_path / "ckpt")
    shutil.copytree(tmp_path / "ckpt" / "t", tmp_path / "ckpt" / "u")
    with pytest.raises(BadInput, match=r"'.*/ckpt/t' \(or '.*/ckpt/u'\)"):
        load_arms(str(qwen2), {"t": str(tmp_path / "ckpt")})
    shutil.copytree(qwen2, tmp_path / "model" / "checkpoint-3")
    with pytest.raises(BadInput, match=r"holds no config.json: give the folder in it that does, '.*checkpoint-3'"):
        load_model(str(tmp_path / "model"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "m.gguf"])
def test_other_formats_are_refused_with_how_to_convert(file: str, qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(qwen2, folder)
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(b"")
    with pytest.raises(BadInput, match=rf"\({file}\), and only safetensors .*\.save_pretrained\("):
        load_model(str(folder))


def test_a_pickled_adapter_is_refused_with_how_to_convert(qwen2: Path, tmp_path: Path) -> None:
    adapter = adapted(qwen2, tmp_path / "t", 0, target_modules=["q_proj"])
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"if you trust adapter_model.bin, by PeftModel.from_pretrained"):
        load_model(str(qwen2), adapter=adapter)


def test_the_file_of_an_adapter_is_answered_with_its_folder(qwen2: Path, tmp_path: Path) -> None:
    folder = Path(trained(qwen2, tmp_path / "t", LoraConfig(**Q)))
    with pytest.raises(BadInput, match="is a file: give the folder that holds it"):
        load_model(str(qwen2), adapter=folder / "adapter_model.safetensors")

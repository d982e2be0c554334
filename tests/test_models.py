"""Loading: names, adapters, and adapters that would silently do nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subjattn.errors import AdapterMismatch, BadInput
from subjattn.models import fingerprint, load_model, model_shape, packaged_model


def changed(adapter: Path, target: Path, rename: tuple[str, str] | None = None, scale: float = 1.0) -> Path:
    """A copy of the adapter with its tensors renamed or scaled."""
    shutil.copytree(adapter, target)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if rename:
        tensors = {name.replace(*rename): tensor for name, tensor in tensors.items()}
    save_file({name: tensor * scale for name, tensor in tensors.items()}, target / "adapter_model.safetensors")
    return target


def test_adapter_equals_the_merged_checkpoint(tiny_folders: dict[str, Path], adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_folders["llama"])
    from peft import PeftModel

    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    loaded = load_model(str(tiny_folders["llama"]), adapter=adapter)
    ids = torch.arange(2, 20)[None]
    torch.testing.assert_close(loaded.model(ids).logits, merged(ids).logits, atol=1e-4, rtol=0)
    provenance = loaded.provenance()
    assert provenance["adapter_merged"] is False
    assert provenance["weights_sha256"] == load_model(str(tiny_folders["llama"])).provenance()["weights_sha256"]
    assert provenance["adapter_sha256"] is not None


def test_untrained_adapter_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]), LoraConfig(r=4, target_modules="all-linear")
    )
    model.save_pretrained(tmp_path / "fresh")
    with pytest.raises(AdapterMismatch, match="changes nothing in this model"):
        load_model(str(tiny_folders["llama"]), adapter=tmp_path / "fresh")


@pytest.mark.parametrize("rename", [("q_proj", "query_proj"), ("layers.2.", "layers.7.")])
def test_unmatched_keys_are_refused(
    tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path, rename: tuple[str, str]
) -> None:
    with pytest.raises(AdapterMismatch, match="does not match this model's modules"):
        load_model(str(tiny_folders["llama"]), adapter=changed(adapter, tmp_path / "renamed", rename))


def test_adapter_of_another_architecture_is_refused(tiny_folders: dict[str, Path], adapter: Path) -> None:
    with pytest.raises(AdapterMismatch, match="not found in the base model"):
        load_model(str(tiny_folders["gpt2"]), adapter=adapter)


def test_pickled_adapter_is_refused(tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    folder = changed(adapter, tmp_path / "pickled")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="pickled weights are not loaded"):
        load_model(str(tiny_folders["llama"]), adapter=folder)


def test_pickled_model_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "pickled"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "unknown model 'nosuch': use smollm2-135m, a hub id"),
        ("/no/such/folder", "no such folder: '/no/such/folder'"),
        ("./nosuch", "no such folder"),
    ],
)
def test_unknown_model(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_model(name)


def test_folder_that_is_no_model(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds an adapter: give its base model"):
        load_model(str(adapter))
    with pytest.raises(BadInput, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(BadInput, match=r"holds no adapter_config\.json"):
        load_model("smollm2-135m", adapter=tmp_path)
    with pytest.raises(BadInput, match="no such adapter folder"):
        load_model("smollm2-135m", adapter="/no/such")


def test_unknown_dtype() -> None:
    with pytest.raises(BadInput, match="dtype 'int8' is not one of float32"):
        load_model("smollm2-135m", dtype="int8")


def test_packaged_model_is_unpacked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packaged_model()
    monkeypatch.setattr("subjattn.models._unpack_gguf", lambda *_: pytest.fail("unpacked again"))
    assert packaged_model() == folder
    assert (folder / "model.safetensors").is_file()
    assert model_shape("smollm2-135m") == (30, 9)


def test_fingerprint_notices_a_changed_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = fingerprint(tmp_path)
    (tmp_path / "a").write_text("22")
    assert fingerprint(tmp_path) != before
    assert fingerprint("org/name") == "org/name"


def test_a_checkpoint_with_missing_weights_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """Planted: transformers would fill them with random numbers and go on."""
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "holes"))
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.1.self_attn" not in k}, folder / "model.safetensors")
    with pytest.raises(BadInput, match="lacks 4 of its weights, which would be random"):
        load_model(str(folder))
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(BadInput, match="of its weights, which would be random"):
        load_model(str(folder))


def test_a_model_with_an_adapter_inside_is_refused(
    tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """Planted: transformers applies it unasked, and "base" would be the tuned model."""
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "both"))
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, folder)
    with pytest.raises(BadInput, match="holds an adapter"):
        load_model(str(folder))


def test_unexpected_adapter_keys_are_refused(tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    folder = changed(adapter, tmp_path / "more")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors | {"base_model.model.head_typo.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match="1 keys without a partner, such as .*head_typo"):
        load_model(str(tiny_folders["llama"]), adapter=folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_corrupt_files_are_one_line(tiny_folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "corrupt"))
    (folder / name).write_bytes(b"not what it should be")
    with pytest.raises(BadInput, match="cannot be loaded: ") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)

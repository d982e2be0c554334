"""Small random models with a tokenizer trained here, and SmolLM2, shared by the whole session."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import settings
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from zoo import CONFIGS, VOCAB, config

from subjattn.facts import draw, load_facts
from subjattn.models import LoadedModel, load_model
from subjattn.models.arms import Arms, load_arms
from subjattn.study.config import StudyConfig
from subjattn.study.read import load_study, parse_study
from subjattn.study.run import run_study


settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)

ROOT = Path(__file__).parent.parent
CITIES = ROOT / "tests" / "data" / "study.yaml"
SMALL = [
    "facts.n_train=32",
    "facts.n_test=24",
    "training.learning_rate=0.01",
    "measures.knockout={by: layer, facts: 2}",
    "measures.patching={pairs: 2}",
    "measures.token_attention={facts: 2}",
]
TRICKY = [
    "Nairobi",
    "São Paulo",
    "東京",
    "Kraków",
    "L'Aquila",
    'St. "X"',
    "Beyoncé",
    "{odd}",
    "ʻEwa Beach",
    "AC/DC",
    "?!",
]
"""Names that have broken span finders: bytes of one character, quotes, braces, a prefix space, punctuation."""
NAMES = ("one", "two", "other")
"""Two adapters and a checkpoint."""
USUAL = ("llama", "gpt2", "mistral")
"""Architectures that every measure is tested on; test_engine.py goes through all of the zoo."""


@pytest.fixture(autouse=True)
def notes() -> None:
    """Notes are said, though a test may have set a worker up in this process, where they are not."""
    logging.getLogger("subjattn").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def cities() -> pd.DataFrame:
    return load_facts("cities")


@pytest.fixture(scope="session")
def tokenizer(cities: pd.DataFrame) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens learnt from city names."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = [
        f"City: {subject}\nCountry: {answers[0]}"
        for subject, answers in zip(cities.subject, cities.answers, strict=True)
    ]
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text[:5000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    """Saved random models, one folder per architecture."""
    folders = {}
    for name in CONFIGS:
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp("models") / name
        AutoModelForCausalLM.from_config(config(name)).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def tiny_models(tiny_folders: dict[str, Path]) -> dict[str, LoadedModel]:
    return {name: load_model(str(folder)) for name, folder in tiny_folders.items()}


@pytest.fixture(params=USUAL)
def tiny(request: pytest.FixtureRequest, tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    """Each small architecture in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    return load_model("smollm2-135m")


@pytest.fixture(scope="session")
def adapter(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter made by plain peft, trained enough to do something."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folders["llama"]), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    model.save_pretrained(folder)
    return folder


def adapted(folder: Path, out: Path, seed: int, **config: Any) -> Path:
    """An adapter whose update is not zero."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, **config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(out)
    return out


def moved(folder: Path, out: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint all of whose weights differ from the folder's."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tuned(
    tiny_folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Arms, dict[str, LoadedModel]]]:
    """Of an architecture, a base with three arms, and the same four models loaded apart; each made once."""
    made: dict[str, tuple[Arms, dict[str, LoadedModel]]] = {}

    def make(name: str) -> tuple[Arms, dict[str, LoadedModel]]:
        if name not in made:
            folder, out = tiny_folders[name], tmp_path_factory.mktemp(f"arms_{name}")
            adapters = {
                arm: str(adapted(folder, out / arm, seed, target_modules="all-linear"))
                for seed, arm in enumerate(NAMES[:2])
            }
            checkpoint = str(moved(folder, out / "other", tokenizer))
            apart = {arm: load_model(str(folder), adapter=path) for arm, path in adapters.items()}
            apart |= {"base": load_model(str(folder)), "other": load_model(checkpoint)}
            made[name] = load_arms(str(folder), adapters, {"other": checkpoint}), apart
        return made[name]

    return make


@pytest.fixture(scope="session")
def small(tiny_folders: dict[str, Path]) -> StudyConfig:
    """The demo's study on a random model with few facts."""
    return load_study(CITIES, [*SMALL, f"model={tiny_folders['llama']}"])


def changed(small: StudyConfig, **fields: Any) -> StudyConfig:
    """The small study with some of its fields replaced."""
    return parse_study(small.model_dump(mode="json") | fields, "test")


@pytest.fixture(scope="session")
def done(small: StudyConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "small"
    return out, run_study(small, out)


@pytest.fixture(scope="session")
def kinds(cities: pd.DataFrame) -> dict[str, PreTrainedTokenizerFast]:
    """Byte-level BPE with an added prefix space, SentencePiece-like BPE (Llama 2) and Unigram (T5), all learnt here."""
    text = [f"In what country is {name}?" for name in [*draw(cities, 3000)["subject"], *TRICKY * 20]]
    made = {}
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bytes_.decoder = decoders.ByteLevel()
    made["byte-level"] = (
        bytes_,
        trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=900),
    )
    piece = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    piece.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    piece.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    piece.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    made["sentencepiece"] = (piece, trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", "<s>", *fallback]))
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    made["unigram"] = (unigram, trainers.UnigramTrainer(vocab_size=900, special_tokens=["<unk>"], unk_token="<unk>"))
    for tokenizer, trainer in made.values():
        trainer.show_progress = False
        tokenizer.train_from_iterator(text, trainer)
    return {name: PreTrainedTokenizerFast(tokenizer_object=tokenizer) for name, (tokenizer, _) in made.items()}

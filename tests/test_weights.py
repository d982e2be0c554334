"""Weights are held once and in their own precision: peaks of processes of their own, and of storages counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from subjattn.bench import random_pairs
from subjattn.engine.memory import PeakMemory
from subjattn.measures.knockout import knockout
from subjattn.measures.patching import patch_grid


CONFIG = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=8, vocab_size=8000
)
WATCHED = """
import json, sys, threading, time
import psutil, torch
from subjattn import bench
from subjattn.models import load_model
import transformers, transformers.models.llama.modeling_llama, safetensors

what, where = sys.argv[1:]
before, peak, done = psutil.Process().memory_info(), [0], []
anonymous = lambda: (info := psutil.Process().memory_info()).rss - info.shared
start = anonymous()

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
if what == "load":
    model = load_model(where, dtype="bfloat16", device="cpu").model
else:
    bench.SHAPES["mid"] = lambda: transformers.LlamaConfig.from_pretrained(where)
    model = bench.random_model("mid", "bfloat16", "cpu")
done.append(True)
thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
print(json.dumps([size, peak[0] - start, float(model.model.layers[3].mlp.up_proj.weight.float().std())]))
"""


def watched(what: str, where: Path) -> tuple[int, int, float]:
    """Bytes of the weights, the largest growth of a process that makes them, and the spread of one matrix."""
    made = subprocess.run([sys.executable, "-c", WATCHED, what, where], capture_output=True, text=True, check=True)
    size, peak, std = json.loads(made.stdout.splitlines()[-1])
    return size, peak, std


def test_a_sharded_checkpoint_is_read_into_its_precision(tmp_path: Path, tokenizer: object) -> None:
    """Stored in float32, read as bfloat16: never all of it in float32."""
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path, max_shard_size="100MB")
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    size, peak, _ = watched("load", tmp_path)
    assert size > 400_000_000
    assert peak < 1.5 * size


def test_a_random_model_is_made_in_its_precision(tmp_path: Path) -> None:
    CONFIG.save_pretrained(tmp_path)
    size, peak, std = watched("random", tmp_path)
    assert peak < 1.5 * size
    assert 0.015 < std < 0.025


def test_first_use_and_grids_hold_one_copy_of_the_weights() -> None:
    """Every storage that is made, the checks of a model's first use among them, counted beyond the weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    pairs = random_pairs(model, 1, 12, 0)
    with PeakMemory() as memory:
        patch_grid(model, pairs, at="prediction")
        knockout(model, [pairs[0][0]], ["direct"], by="head", metric="kl")
    assert memory.peak < 0.2 * size
    with PeakMemory() as memory:
        held = [p.clone() for p in model.parameters()]
    assert memory.peak > 0.95 * size, "what a second copy would be"
    del held

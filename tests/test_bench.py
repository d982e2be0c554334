"""The benchmark measures what it says: same cells, the floor's arithmetic, peers' numbers, a sample scaled."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig

from subjattn import bench as benches
from subjattn import cli
from subjattn.bench import GRIDS, Roofline, bench, bench_pairs, cone_flops, random_pairs
from subjattn.engine.budget import Budget
from subjattn.engine.interventions import Block, Patch, Row
from subjattn.errors import BadInput
from subjattn.models import LoadedModel
from subjattn.prompts import Prompt


TEMPLATE = "City: {subject}\nCountry:"


@pytest.fixture(scope="module")
def llama(tiny_models: dict[str, LoadedModel]) -> LoadedModel:
    return tiny_models["llama"]


@pytest.fixture
def pairs(llama: LoadedModel, cities: pd.DataFrame) -> list[tuple[Prompt, Prompt]]:
    return bench_pairs(llama.tokenizer, cities.iloc[::300], TEMPLATE, 2, 0, 0)


@pytest.fixture(autouse=True)
def two_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "REPEATS", 2)
    monkeypatch.setattr(benches, "PEER_CELLS", 1000)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_against_hooks(llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], grid: Any) -> None:
    found = bench(llama.model, pairs, grid, peers=["hooks"])
    peer = found["peers"]["hooks"]
    assert peer["max_abs_diff"] < 1e-4
    assert peer["timed_cells"] == found["cells"] > 0
    assert peer["ratio"] == pytest.approx(peer["seconds"] / found["ours_s"])
    assert found["floor_s"] > 0
    assert found["peak_memory_bytes"] > 10_000
    n_tokens = sum(clean.prediction + 1 for clean, _ in pairs)
    live = sum(
        clean.prediction + 1 - next(i for i in range(99) if clean.ids[i] != corrupt.ids[i]) for clean, corrupt in pairs
    )
    cells = {"resid": 3 * live, "attn": 2 * live + 2, "mlp": 2 * live + 2, "window": 6}.get(grid, 24)
    assert found["cells"] == cells
    skipped = 3 * n_tokens - cells if grid in ("resid", "attn", "mlp") else 0
    assert found["skipped_cells"] == skipped


def test_the_floor_counts_cones(llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]]) -> None:
    """By hand: 3 layers of 2·(2·32·32 + 2·32·16 + 3·32·64) FLOP a token, 512 tokens of vocabulary."""
    layer, clean = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64), pairs[0][0]
    prompt = Prompt(**vars(clean) | {"ids": clean.ids[: clean.prediction + 2]})
    end = prompt.prediction
    patch = Row(prompt, patches=(Patch(1, (end - 2,), prompt),))
    block = Row(prompt, Block(frozenset({(end, 1)}), (0,)))
    middle = Row(prompt, patches=(Patch(0, (end - 2,), prompt, "mlp_out"),))
    assert cone_flops(llama.model, [patch], "answer_logprob") == 2 * 3 * layer + 2 * 32 * 512
    assert cone_flops(llama.model, [block], "logit_diff") == 3 * layer + 2 * 32 * 2
    assert cone_flops(llama.model, [middle], "logit_diff") == (1 + 2 * 3) * layer + 2 * 32 * 2


def test_a_sample_of_cells_is_scaled_and_compared(
    llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches, "PEER_CELLS", 5)
    seen = []
    scale = benches._Spy.scale
    monkeypatch.setattr(benches._Spy, "scale", lambda spy: seen.append(scale(spy)) or seen[-1])
    found = bench(llama.model, pairs, "resid", peers=["hooks"])
    peer = found["peers"]["hooks"]
    timed, fixed = peer["timed_cells"], 4 + 2 + 2
    assert 0 < timed <= 5 < found["cells"]
    assert seen[-1] == pytest.approx((found["cells"] + fixed) / (timed + fixed))
    assert peer["max_abs_diff"] < 1e-4


def test_wrong_numbers_of_a_peer_are_reported(
    llama: LoadedModel, pairs: list[tuple[Prompt, Prompt]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the peer's logits are a little off in one direction of the vocabulary."""
    from subjattn.backends.hooks import Hooks

    run = Hooks.forward

    def wrong(self: Hooks, rows: list[Row], **rest: Any) -> Any:
        for output in run(self, rows, **rest):
            off = torch.arange(output.logits.shape[1]) % 2 * 0.01 * (output.control is not None)
            yield replace(output, logits=output.logits + off)

    monkeypatch.setattr(Hooks, "forward", wrong)
    gaps = [bench(llama.model, pairs, grid, peers=["hooks"])["peers"]["hooks"]["max_abs_diff"] for grid in GRIDS[:2]]
    assert max(gaps) > 5e-3


def test_shots_come_before_each_prompt(llama: LoadedModel, cities: pd.DataFrame) -> None:
    facts = cities.iloc[::300]
    (clean, _), *_ = bench_pairs(llama.tokenizer, facts, TEMPLATE, 2, 2, 0)
    *shown, asked = clean.text.split("\n\n")
    pool = {f"City: {s}\nCountry: {a[0]}" for s, a in zip(facts.subject[:3], facts.answers[:3], strict=True)}
    assert len(set(shown)) == 2 and set(shown) < pool
    assert asked == f"City: {clean.subject}\nCountry:"
    assert "".join(clean.tokens[i] for i in clean.subject_positions).strip() == clean.subject
    with pytest.raises(BadInput, match="subject swaps instead of 9000"):
        bench_pairs(llama.tokenizer, facts, TEMPLATE, 9000, 0, 0)


def test_random_shapes_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    monkeypatch.setattr(benches, "SHAPES", {"llama-2-7b": lambda: small})
    target = tmp_path / "bench.json"
    arguments = ["bench", "--grid", "resid", "--random-init", "llama-2-7b", "--dtype", "bfloat16", "--n", "1"]
    monkeypatch.setattr(sys, "argv", ["subjattn", *arguments, "--json", str(target)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    found = json.loads(target.read_text())
    assert (found["cells"], found["tokens"], found["dtype"]) == (40, [20], "bfloat16")
    keys = {"ours_s", "floor_s", "cells", "peers", "peak_memory_bytes"}
    assert keys <= found.keys()


def test_random_pairs_differ_in_their_subject_alone(llama: LoadedModel) -> None:
    for clean, corrupt in random_pairs(llama.model, 3, 12, 0):
        different = [i for i in range(12) if clean.ids[i] != corrupt.ids[i]]
        assert different == [0, 1, 2] == list(clean.subject_positions)
        assert len(clean.answer_ids) == 1
        assert np.all(np.array(clean.ids) < 512)


PEAK = """
import sys, time
import numpy as np, psutil, torch, transformers
import subjattn.knowledge.slick
sys.modules["resource"] = None
from subjattn.bench_facts import PeakProcess
before = psutil.Process().memory_info().rss
with PeakProcess() as memory:
    held = np.ones(40_000_000)
    time.sleep(0.2)
    del held
print(memory.peak - before)
"""


def test_the_peak_of_a_process_is_seen_without_resource() -> None:
    """On a system without the module `resource`, as Windows; memory that is given back before the end counts.

    In a process of its own: one that has run for a while takes memory that it already holds.
    """
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert 0.9 * 320e6 < int(done.stdout) < 1.5 * 320e6


def test_operations_are_counted_by_hand() -> None:
    """A product, a sum in place, rows of a table; views and what stays on the host are free."""
    host = torch.ones(3)
    table, a, b = (torch.ones(*shape, device="meta") for shape in ((1000, 8), (4, 8), (8, 16)))
    at = torch.zeros(5, dtype=torch.long, device="meta")
    with Roofline(torch.device("meta"), (1e3, 1e3)) as counted, torch.inference_mode():
        host + 1
        product = a @ b
        product.view(2, 32).transpose(0, 1)
        product += 1
        table[at]
    moved = [4 * (4 * 8 + 8 * 16 + 4 * 16), 4 * 2 * 4 * 16, 2 * 4 * 5 * 8 + 8 * 5]
    assert counted.launches == 3 and counted.moved == sum(moved)
    assert counted.flops == 2 * 4 * 8 * 16
    assert counted.seconds == pytest.approx(max(moved[0], 2 * 4 * 8 * 16) / 1e3 + sum(moved[1:]) / 1e3)


def seven_billion(monkeypatch: pytest.MonkeyPatch, component: Any) -> tuple[Roofline, int, int]:
    """A grid of 32 × 20 cells of the 7B shape on `meta`: what is counted, the cells, and the floor's FLOP."""
    from subjattn.engine import anatomy, attention, checks, cones

    monkeypatch.setattr(attention, "read", lambda value: True)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_args, **_rest: None)
    model = benches.random_model("llama-2-7b", "bfloat16", "meta")
    checks._own_distance[model] = 0.0
    cones._checked.add(model)
    anatomy.n_kv_heads(model)  # found once a model
    ((clean, corrupt),) = random_pairs(model, 1, 20, 0)
    contrast = (clean.answer_ids[0], corrupt.answer_ids[0])
    cells = [
        Row(corrupt, patches=(Patch(layer, (position,), clean, component),), contrast=contrast)
        for layer in range(32)
        for position in range(20)
        if component == "resid_pre" or layer < 31 or position == 19
    ]
    rows = [Row(clean, contrast=contrast), Row(corrupt, contrast=contrast), *cells]
    with Roofline(model.device) as counted:
        for _ in cones.forward(model, rows, only_contrast=True, budget=Budget.of(model, None, 21)):
            pass
    return counted, len(cells), cone_flops(model, cells, "logit_diff")


def test_the_estimate_for_seven_billion_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of docs/performance.md; nearly all FLOP are those of the floor."""
    launches = moved = cells = 0
    seconds = 0.0
    for component in ("resid_pre", "attn_out", "mlp_out"):
        counted, own, floor = seven_billion(monkeypatch, component)
        assert floor < counted.flops < 1.2 * floor
        launches, moved, cells = launches + counted.launches, moved + counted.moved, cells + own
        seconds += counted.seconds
    assert cells == 640 + 2 * (31 * 20 + 1)
    assert launches / cells == pytest.approx(18.8, rel=0.1)
    assert moved / cells == pytest.approx(330e6, rel=0.05)
    assert seconds == pytest.approx(0.28, rel=0.05)

"""How much is held at a time, so that a run fits a budget of working memory beyond the weights."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from subjattn.engine.interventions import BATCH_TOKENS
from subjattn.errors import BadInput


LOGIT_BYTES = 2**26
"""Logits that are held at a time where no budget is set."""
SHARES = {"base": 0.40, "cones": 0.15, "chunk": 0.30, "logits": 0.15}


@dataclass(frozen=True)
class Budget:
    """Tokens of a base run, of the cones that advance together, and of one pass through a layer; rows of logits."""

    base_tokens: int = BATCH_TOKENS
    cone_tokens: int = 16384
    chunk_tokens: int = 1024
    predictions: int = 256

    @classmethod
    def of(cls, model: PreTrainedModel, memory: int | None, longest: int, *, patterns: bool = False) -> Budget:
        """What fits `memory` bytes (None: a usual machine), for prompts of at most `longest` tokens.

        `patterns` says whether the attention weights of every position are kept and changed.

        Raises:
            BadInput: two prompts do not fit.
        """
        config = model.config.get_text_config()
        n_layers, width, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
        if memory is None:
            chunk = 1024 if model.device.type == "cpu" else 8192
            return cls(chunk_tokens=chunk, predictions=max(1, LOGIT_BYTES // (4 * vocab)))
        size, heads = model.dtype.itemsize, config.num_attention_heads
        d_head = getattr(config, "head_dim", None) or width // heads
        inner = max(getattr(config, "intermediate_size", None) or 4 * width, 4 * width)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        kept = 2 * (n_layers + 1) * width + 2 * n_layers * kv_heads * d_head
        passing = size * (4 * inner + 8 * width) + 4 * heads * (6 * d_head + 6 * longest)
        if patterns:
            kept += -(-4 * n_layers * heads * longest // size)
            passing += 4 * heads * 4 * longest
        costs = {
            "base": size * kept + 16 * vocab // longest + passing,
            "cones": 2 * size * width + longest + 48,
            "chunk": passing,
            "logits": 16 * vocab,
        }
        fits = {part: int(memory * SHARES[part] / cost) for part, cost in costs.items()}
        least = {"base": 2 * longest, "cones": 2 * longest, "chunk": longest, "logits": 2}
        needed = max(least[part] * cost / SHARES[part] for part, cost in costs.items())
        if needed > memory:
            raise BadInput(
                f"a memory budget of {memory:,} bytes is too small for prompts of {longest} tokens on this model: "
                f"give at least {int(needed) + 1:,}"
            )
        return cls(fits["base"], fits["cones"], fits["chunk"], fits["logits"])

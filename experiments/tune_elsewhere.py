"""A LoRA adapter tuned with plain transformers and peft, as anybody's may be: `python tune_elsewhere.py FACTS FOLDER`.

FACTS has columns `subject` and `answer`. It stands here so that the pages of docs/howto have an adapter to look at.
"""

from __future__ import annotations

import sys

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from subjattn.models import packaged_model


def tune(facts: str, folder: str, epochs: int = 2) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(packaged_model()),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    rows = pd.read_csv(facts)
    for epoch in range(epochs):
        for batch in range(0, len(rows), 8):
            some = rows[batch : batch + 8]
            texts = [f"The capital of {row.subject} is {row.answer}" for row in some.itertuples()]
            given = [len(tokenizer(f"The capital of {row.subject} is").input_ids) for row in some.itertuples()]
            ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            labels = ids.input_ids.masked_fill(ids.attention_mask == 0, -100)
            for i, length in enumerate(given):
                labels[i, :length] = -100
            loss = model(**ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.2f}")
    model.save_pretrained(folder)


if __name__ == "__main__":
    tune(*sys.argv[1:3])

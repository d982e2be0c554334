"""Models by hub id, folder or packaged weights, with or without an adapter.

Weights come from safetensors (or the packaged GGUF) only; nothing pickled and no remote code is ever
loaded. An adapter stays unmerged, because merging rounds the very differences a study looks for, and
is refused where it would silently leave the base model as it was. What comes from the hub is loaded and
recorded at one commit.
"""

from subjattn.models.adapter import check_adapter
from subjattn.models.labels import read_labels
from subjattn.models.load import LoadedModel, best_device, load_model, load_tokenizer, model_shape
from subjattn.models.names import fingerprint, identity, resolve_adapter, resolve_model
from subjattn.models.packaged import PACKAGED, PACKAGES, packaged_model
from subjattn.models.provenance import describe
from subjattn.models.reading import quiet


__all__ = [
    "PACKAGED",
    "PACKAGES",
    "LoadedModel",
    "best_device",
    "check_adapter",
    "describe",
    "fingerprint",
    "identity",
    "load_model",
    "load_tokenizer",
    "model_shape",
    "packaged_model",
    "quiet",
    "read_labels",
    "resolve_adapter",
    "resolve_model",
]

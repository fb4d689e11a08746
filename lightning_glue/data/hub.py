"""Models of the Hugging Face hub by name: ``owner/name``, fetched by huggingface_hub into its own cache."""

from __future__ import annotations

from pathlib import Path

from lightning_glue.errors import DataError
from lightning_glue.utils.redact import first_line, hide_secrets

# Weights, never code. The .bin of a model that has safetensors is not fetched.
_WANTED = ["config.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.json", "tokenizer_config.json",
           "special_tokens_map.json", "added_tokens.json", "*.model"]  # fmt: skip
_SAFE = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


def hub_folder(name: str) -> Path:
    """The files of a model of the hub; HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN mean what they do there.

    Raises:
        DataError: it cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(
            f"model {name} is no path here, and the hub needs huggingface_hub; run 'pip install huggingface_hub'"
        ) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED + _SAFE))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=_WANTED + _PICKLED))
        return folder
    except Exception as error:  # its errors are those of several libraries
        why = hide_secrets(first_line(error, 200))
        raise DataError(
            f"model {name}: no such path here, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {why}); expected a path that exists, or owner/name with the network or "
            "the cache of HF_HOME at hand"
        ) from None

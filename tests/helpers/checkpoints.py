"""Small checkpoints of fairseq, as somebody else's pretraining leaves them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lightning_glue.data.tokenizer import load_tokenizer
from lightning_glue.model.pretrained import Pretrained
from lightning_glue.model.roberta import build_model

TINY = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 2}


def write_checkpoint(path: Path, bpe_dir: Path, **changes: Any) -> Path:
    """A random RoBERTa of two layers, for the dictionary of ``bpe_dir``.

    Args:
        changes: arguments of fairseq's model besides the sizes, such as ``max_positions``.
    """
    torch.manual_seed(0)
    args = {**TINY, "max_positions": 512, **changes}
    model = build_model(Pretrained(args, None, load_tokenizer("gpt2", str(bpe_dir)), ""), 2, {})
    weights = {name: tensor for name, tensor in model.state_dict().items() if "classification_heads" not in name}
    torch.save({"args": Namespace(arch="roberta_base", **args), "model": weights}, path)
    return path

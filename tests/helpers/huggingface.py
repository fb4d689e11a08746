"""Folders of Hugging Face as transformers writes them: random weights, tokenizers of real or small vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, BertTokenizer, RobertaTokenizer
from transformers import logging as transformers_logging

from lightning_glue.data import sources

transformers_logging.disable_progress_bar()

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TEXTS = [
    "A man sleeps.",
    "  two spaces before,  two within, and behind  ",
    "Ein Mädchen läuft über die Straße; ça va, niño?",
    "東京は日本の首都です。 Москва — столица России.",
    "Emoji: 😀👩‍👩‍👧‍👦 and 🇩🇪, a zero\u200bwidth space, a no\u00a0break one",
    "I'll won't they've he'd it's DON'T 123 4,567.89% http://a.b/c?d=e&f",
    "<b>markup</b> [brackets] a_b-c \\ / \"quotes\" ``` tab\there",
    "É composed, e\u0301 combining, ﬁ ligature, Ⅷ, ½",
]  # fmt: skip
LONG = " ".join(f"word{i} and many" for i in range(400))


def roberta_vocabulary(bpe_dir: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """vocab.json and merges of a RoBERTa as transformers' conversion makes them of encoder.json and dict.txt."""
    encoder = json.loads((bpe_dir / "encoder.json").read_text(encoding="utf-8"))
    names = {str(number): token for token, number in encoder.items()}
    symbols = [line.split(" ")[0] for line in (bpe_dir / "dict.txt").read_text(encoding="utf-8").splitlines()]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(names.get(symbol, symbol) for symbol in symbols), "<mask>"]
    lines = (bpe_dir / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(line.split()) for line in lines]
    there = set(tokens)  # the small dictionary lacks a token
    return {token: i for i, token in enumerate(tokens)}, [pair for pair in pairs if "".join(pair) in there]


def roberta_tokenizer(bpe_dir: Path, **settings: Any) -> RobertaTokenizer:
    vocabulary, merges = roberta_vocabulary(bpe_dir)
    return RobertaTokenizer(vocab=vocabulary, merges=merges, **settings)


def bert_tokenizer(**settings: Any) -> BertTokenizer:
    lines = (sources.minilm_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return BertTokenizer(vocab={token: i for i, token in enumerate(lines)}, **settings)


def random_model(kind: Any, tokenizer: Any, seed: int = 0, **changes: Any) -> Any:
    """A transformers model with random weights, biases and norms too, of which nothing is zero or one."""
    torch.manual_seed(seed)
    base = kind.config_class(
        **{**TINY, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **changes}
    )
    model = kind(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def save(folder: Path, model: Any, tokenizer: Any, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    return folder


def hidden_states(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last layer's output (batch, length, width) of the encoder in a folder, by transformers."""
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state

"""Text to ids of a fairseq ``Dictionary``: GPT-2 byte-level BPE (RoBERTa) and WordPiece (MiniLM).

The ids equal those of ``examples/roberta/multiprocessing_bpe_encoder.py`` followed by ``fairseq-preprocess``, but the
encoding runs in the Rust library ``tokenizers``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lightning_glue import words
from lightning_glue.errors import UserError

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # fairseq.data.Dictionary: <s> <pad> </s> <unk>
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_CHUNK = 4096  # lines handed to the Rust threads at once
_WORDS_CHUNK = 65536  # lines cut into words at once: enough for most words to come again


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the dictionary its ids refer to.

    Attributes:
        symbols: symbols after the four specials; id of ``symbols[i]`` is ``i + 4``.
        counts: the counts written beside the symbols in ``dict.txt``.
        files: what fairseq needs to encode text with it, file name -> bytes (see :mod:`lightning_glue.export`).
        bpe: fairseq's name of the encoder, ``gpt2`` or ``bert``.
    """

    bpe: str
    backend: Any  # tokenizers.Tokenizer
    symbols: list[str]
    counts: list[int]
    lookup: np.ndarray  # (backend vocabulary,) int32: backend id -> dictionary id
    files: dict[str, bytes]

    @property
    def dictionary_size(self) -> int:
        """Number of dictionary ids without ``<mask>``, which RoBERTa's model appends."""
        return len(SPECIALS) + len(self.symbols)

    @property
    def dictionary_text(self) -> str:
        """The dictionary as fairseq saves it: ``symbol count`` a line, specials left out."""
        return "".join(f"{symbol} {count}\n" for symbol, count in zip(self.symbols, self.counts))

    @property
    def digest(self) -> str:
        """sha256 over the dictionary and the encoder's files."""
        digest = hashlib.sha256(self.dictionary_text.encode())
        for name in sorted(self.files):
            digest.update(name.encode() + hashlib.sha256(self.files[name]).digest())
        return digest.hexdigest()

    def encode(
        self, lines: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode ``lines``, each ended by ``</s>``.

        Args:
            progress: called with the number of lines done since the last call.

        Returns:
            ids: all lines one after the other, (sum of lengths,) int32.
            lengths: ids per line with its ``</s>``, (lines,) int64; an empty line has length 1.
        """
        pieces: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        by_words = self.bpe == "gpt2"
        encode, size = (self._encode_words, _WORDS_CHUNK) if by_words else (self._encode_whole, _CHUNK)
        for start in range(0, len(lines), size):
            chunk = lines[start : start + size]
            for found, out in zip(encode(chunk), (pieces, lengths)):
                out.append(found)
            if progress:
                progress(len(chunk))
        if not lines:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
        return np.concatenate(pieces), np.concatenate(lengths)

    def _encode_texts(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after the other, and how many each has."""
        found = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        return self.lookup[np.fromiter(chain.from_iterable(found), dtype=np.int64)], counts

    def _encode_whole(self, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`encode` of some lines, each as it is."""
        ids, counts = self._encode_texts(list(lines))
        return np.insert(ids, np.cumsum(counts), EOS), counts + 1

    def _encode_words(self, lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`encode` of some lines through their distinct words, which is all that byte-pair encoding looks at."""
        found = words.split(lines)
        ids, counts = self._encode_texts(found.texts)
        begins = np.cumsum(counts) - counts
        end = found.places[found.ends[0]]  # encoded like a word; a byte is one id
        ids[begins[end]] = EOS
        counts = counts[found.places]
        after = np.cumsum(counts)
        ids = ids[np.repeat(begins[found.places] - after + counts, counts) + np.arange(after[-1])]
        return ids, np.diff(after[found.ends], prepend=0)


def read_dictionary(path: Path) -> tuple[list[str], list[int]]:
    """Read a fairseq ``dict.txt``: symbols and counts, specials not included."""
    symbols, counts = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        symbol, _, count = line.rstrip().rpartition(" ")
        if not symbol or not count.isdigit():
            raise UserError(f"{path}:{number}: found {line!r}, expected '<symbol> <count>' as in a fairseq dict.txt")
        symbols.append(symbol)
        counts.append(int(count))
    return symbols, counts


def _lookup_table(vocabulary: dict[str, int], names: Callable[[str, int], str], symbols: list[str]) -> np.ndarray:
    """Map backend ids to dictionary ids through the symbol ``names`` gives a vocabulary entry; unknown -> ``<unk>``."""
    index = {symbol: i for i, symbol in enumerate(symbols, len(SPECIALS))}
    table = np.full(max(vocabulary.values()) + 1, UNK, dtype=np.int32)
    for token, token_id in vocabulary.items():
        table[token_id] = index.get(names(token, token_id), UNK)
    return table


def gpt2(encoder_json: Path, vocab_bpe: Path, dictionary: Path) -> Tokenizer:
    """RoBERTa's byte-level BPE from the ``encoder.json``, ``vocab.bpe`` and ``dict.txt`` fairseq publishes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    for path in (encoder_json, vocab_bpe, dictionary):
        if not path.is_file():
            raise UserError(f"{path} is missing; RoBERTa's BPE needs encoder.json, vocab.bpe and dict.txt")
    encoder, merges = encoder_json.read_bytes(), vocab_bpe.read_bytes()
    symbols, counts = read_dictionary(dictionary)
    vocabulary = json.loads(encoder)
    pairs = [tuple(line.split()) for line in merges.decode("utf-8").split("\n")[1:-1]]
    backend = Backend(models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Tokenizer(
        bpe="gpt2",
        backend=backend,
        symbols=symbols,
        counts=counts,
        lookup=_lookup_table(vocabulary, lambda _, token_id: str(token_id), symbols),
        files={"vocab.json": encoder, "merges.txt": merges},
    )


def wordpiece(vocab_txt: Path) -> Tokenizer:
    """BERT's uncased WordPiece from ``vocab.txt``; ``[CLS] [PAD] [SEP] [UNK] [MASK]`` become fairseq's specials."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    content = vocab_txt.read_bytes()
    tokens = content.decode("utf-8").rstrip("\n").split("\n")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    special = {"[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"}
    symbols = [token for token in tokens if token not in special]
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Tokenizer(
        bpe="bert",
        backend=backend,
        symbols=symbols,
        counts=[1] * len(symbols),
        lookup=_lookup_table(vocabulary, lambda token, _: token, symbols),
        files={"bpecodes": content},
    )


def exported(directory: Path) -> Tokenizer:
    """The tokenizer of a directory written by :mod:`lightning_glue.export`."""
    if (directory / "bpecodes").is_file():
        return wordpiece(directory / "bpecodes")
    return gpt2(directory / "vocab.json", directory / "merges.txt", directory / "input0" / "dict.txt")

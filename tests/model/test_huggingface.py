"""Models and tokenizers of Hugging Face: read, they give what transformers gives; what differs is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.huggingface import (
    LONG,
    TEXTS,
    bert_tokenizer,
    hidden_states,
    random_model,
    roberta_tokenizer,
    roberta_vocabulary,
    save,
)
from helpers.project import torture, write_small_bpe
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaTokenizer,
    XLMRobertaModel,
)

from lightning_glue.config import compose
from lightning_glue.data import huggingface_tokenizer, sources
from lightning_glue.data.datamodule import join_parts
from lightning_glue.data.tokenizer import PAD, UNK, load_tokenizer
from lightning_glue.errors import UserError
from lightning_glue.model import huggingface
from lightning_glue.model.pretrained import load_pretrained
from lightning_glue.model.roberta import HEAD, build_model

ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
BASE = {"num_hidden_layers": 2, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
LARGE = {"num_hidden_layers": 2, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
FULL_LARGE = LARGE | {"num_hidden_layers": 24}


def our_rows(encoder: Any, *columns: list[str], limit: int = 512) -> list[list[int]]:
    """Ids of each example as the program feeds it: texts without blanks around, joined, cut."""
    parts = [encoder.encode([text.strip() for text in column]) for column in columns]
    tokens, lengths, _ = join_parts(parts, limit)
    return [part.tolist() for part in torch.from_numpy(tokens).split(lengths.tolist())]


def theirs_of(renumbered: huggingface_tokenizer.Renumbered, rows: list[list[int]]) -> list[list[int]]:
    """Our ids as those of the folder."""
    return [[renumbered.rows[i] for i in row] for row in rows]


def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, filler)


def assert_equal_states(folder: Path, texts: list[str], atol: float = 1e-5) -> None:
    """Hidden states of every token of the folder's model, here and in transformers."""
    start = load_pretrained(str(folder), "gpt2", None, {})
    renumbered = huggingface_tokenizer.read(folder)
    model = build_model(start, 2, {}).eval()
    rows = our_rows(start.tokenizer, texts)
    ours = padded(rows, PAD)
    with torch.no_grad():
        found = model(ours, features_only=True)[0]
    theirs = padded(theirs_of(renumbered, rows), renumbered.rows[PAD])
    real = ours != PAD
    expected = hidden_states(folder, {"input_ids": theirs, "attention_mask": real.long()})
    assert expected[real].std() > 0.1
    torch.testing.assert_close(found[real], expected[real], atol=atol, rtol=0)


# --- tokenizers -----------------------------------------------------------------------------------------------------


def mask_first(small: Path) -> Any:
    """A tokenizer as the library tokenizers trains one: the five special tokens before all others."""
    vocabulary, merges = roberta_vocabulary(small)
    order = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *vocabulary])
    return RobertaTokenizer(vocab={token: i for i, token in enumerate(order)}, merges=merges)


def pad_first(small: Path) -> Any:
    vocabulary, merges = roberta_vocabulary(small)
    order = dict.fromkeys(["<pad>", "<s>", *vocabulary])
    return RobertaTokenizer(vocab={token: i for i, token in enumerate(order)}, merges=merges)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a byte-pair encoding of 271 tokens."""
    return write_small_bpe(tmp_path_factory.mktemp("bpe"))


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "roberta": roberta_tokenizer,
    "prefix space": lambda small: roberta_tokenizer(small, add_prefix_space=True),
    "mask first": mask_first,
    "pad first": pad_first,
    "uncased": lambda _: bert_tokenizer(),
    "cased": lambda _: bert_tokenizer(do_lower_case=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("files", ["tokenizer.json", "vocabulary"])
def test_ids_are_those_of_transformers(name: str, files: str, given_bpe: Path, small: Path, tmp_path: Path) -> None:
    theirs = TOKENIZERS[name](given_bpe if name == "roberta" else small)
    theirs.save_pretrained(tmp_path)
    if files == "vocabulary":
        (tmp_path / "tokenizer.json").unlink()
        if name in ("cased", "uncased"):
            words = sorted(theirs.get_vocab(), key=theirs.get_vocab().__getitem__)
            (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
        else:
            theirs._tokenizer.model.save(str(tmp_path))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
    found = huggingface_tokenizer.read(tmp_path)
    texts = [text.strip() for text in TEXTS] + [LONG, "a"]
    ours = theirs_of(found, our_rows(found.tokenizer, texts))
    assert ours == theirs(texts, truncation=True, max_length=512)["input_ids"]
    assert len({*map(tuple, ours)}) == len(texts)
    if "cased" in name:  # a pair of BERT has one separator, one of RoBERTa two
        return
    pairs = [*texts[1:], LONG]
    ours = theirs_of(found, our_rows(found.tokenizer, texts, pairs))
    assert ours == theirs(texts, pairs, truncation=True, max_length=512)["input_ids"]
    assert max(map(len, ours)) == 512


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_written_and_read_again_is_the_same(
    name: str, given_bpe: Path, small: Path, tmp_path: Path
) -> None:
    TOKENIZERS[name](given_bpe if name == "roberta" else small).save_pretrained(tmp_path / "theirs")
    first = huggingface_tokenizer.read(tmp_path / "theirs").tokenizer
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    huggingface_tokenizer.write(first, tmp_path / "first", 512)
    second = huggingface_tokenizer.read(tmp_path / "first")
    assert second.rows == list(range(first.embeddings))
    huggingface_tokenizer.write(second.tokenizer, tmp_path / "second", 512)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    texts = [text.strip() for text in TEXTS] + [LONG, "<mask> and <s> [SEP] are words here"]
    pairs = texts[::-1]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert our_rows(first, texts) == our_rows(second.tokenizer, texts) == loaded(texts, truncation=True)["input_ids"]
    assert our_rows(first, texts, pairs) == loaded(texts, pairs, truncation=True)["input_ids"]


def test_tokens_that_a_dictionary_lacks_are_unknown_there_too(small: Path, tmp_path: Path) -> None:
    """A dictionary without a token that merges make: its row is a copy of <unk>'s."""
    encoder = load_tokenizer("gpt2", str(small))
    names = huggingface_tokenizer.token_names(encoder)
    (tmp_path / "out").mkdir()
    huggingface_tokenizer.write(encoder, tmp_path / "out", 512)
    ((_, *ours, _),) = our_rows(encoder, ["you mouth"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")("you mouth", add_special_tokens=False)["input_ids"]
    assert UNK in ours and len(names) == encoder.embeddings + 1
    assert ours == [i if i < encoder.embeddings else UNK for i in theirs]


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RobertaModel, RobertaForSequenceClassification, RobertaForMaskedLM, XLMRobertaModel])
@pytest.mark.parametrize("name", ["roberta", "pad first"])
def test_hidden_states_of_roberta(kind: Any, name: str, small: Path, tmp_path: Path) -> None:
    encoder = TOKENIZERS[name](small)
    folder = save(tmp_path, random_model(kind, encoder, **ROBERTA), encoder)
    start = load_pretrained(str(folder), "gpt2", None, {})
    assert start.args["max_positions"] == 512 + (name == "pad first")
    assert_equal_states(folder, [*TEXTS, LONG])


@pytest.mark.parametrize("shape", [BASE, torture(LARGE), torture(FULL_LARGE)])
def test_hidden_states_at_the_published_shapes(shape: dict, small: Path, tmp_path: Path) -> None:
    encoder = roberta_tokenizer(small)
    assert_equal_states(save(tmp_path, random_model(RobertaModel, encoder, **ROBERTA, **shape), encoder), TEXTS)


@pytest.mark.parametrize("name", ["uncased", "cased"])
def test_hidden_states_of_bert(name: str, tmp_path: Path) -> None:
    """Its epsilon of LayerNorm and its segment 0 count."""
    encoder = TOKENIZERS[name](tmp_path)
    folder = save(tmp_path, random_model(BertModel, encoder, layer_norm_eps=1e-3), encoder)
    assert_equal_states(folder, [*TEXTS, LONG])


def test_hidden_states_of_the_real_minilm() -> None:
    assert_equal_states(sources.minilm_folder(), TEXTS)


def test_weights_in_parts_and_of_other_files(small: Path, tmp_path: Path) -> None:
    encoder = roberta_tokenizer(small)
    model = random_model(RobertaForSequenceClassification, encoder, **ROBERTA)
    whole = huggingface.load(save(tmp_path / "whole", model, encoder))
    parts = save(tmp_path / "parts", model, encoder, max_shard_size="20KB")
    assert len([*parts.glob("model-*.safetensors")]) > 2
    pickled = save(tmp_path / "pickled", model, encoder)
    (pickled / "model.safetensors").unlink()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in model.state_dict().items()}
    torch.save(old, pickled / "pytorch_model.bin")
    for folder in (parts, pickled, pickled / "pytorch_model.bin"):
        found = load_pretrained(str(folder), "gpt2", None, {})
        assert found.state.keys() == whole.state.keys() and found.args == whole.args
        assert all(torch.equal(found.state[name], tensor) for name, tensor in whole.state.items())
    half = save(tmp_path / "half", model.half(), encoder)
    assert {tensor.dtype for tensor in huggingface.load(half).state.values()} == {torch.float32}


@pytest.mark.parametrize("kind", [RobertaForSequenceClassification, BertForSequenceClassification])
def test_a_head_is_read(kind: Any, small: Path, tmp_path: Path) -> None:
    """BERT's pooler and classifier are a head of RoBERTa's kind."""
    bert = kind is BertForSequenceClassification
    encoder = bert_tokenizer() if bert else roberta_tokenizer(small)
    their = random_model(kind, encoder, num_labels=3, **({} if bert else ROBERTA))
    found = huggingface.load(save(tmp_path, their, encoder))
    model = build_model(load_pretrained(str(tmp_path), "gpt2", None, {}), 3, {}).eval()
    model.load_state_dict(found.state, strict=False)
    rows = our_rows(found.tokenizer, TEXTS)
    back = theirs_of(huggingface_tokenizer.read(tmp_path), rows)
    with torch.no_grad():
        for row, their_row in zip(rows, back):
            expected = their(input_ids=torch.tensor([their_row])).logits
            ours = model(torch.tensor([row]), features_only=True, classification_head_name=HEAD)[0]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoder = roberta_tokenizer(small)
    return save(tmp_path_factory.mktemp("theirs"), random_model(RobertaModel, encoder, **ROBERTA), encoder)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load_pretrained(str(folder), "gpt2", None, {})
    said = str(error.value)
    assert str(folder) in said and "\n" not in said
    return said


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "deberta"},
            "model_type is 'deberta', which cannot be read; expected roberta, xlm-roberta or bert",
        ),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is 'True'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": "six"}, "num_hidden_layers is 'six'"),
        ({"num_hidden_layers": 3}, "no weight encoder.layer.2"),
        ({"hidden_size": 10**9}, "hidden_size is '1000000000'"),
        ({"intermediate_size": 65}, "expected (65, 32), as config.json has it"),
        ({"max_position_embeddings": 512}, "expected (512, 32), as config.json has it"),
        ({"vocab_size": 7}, "vocab_size is 7, but its tokenizer has"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"pad_token_id": -1}, "pad_token_id is '-1'"),
    ],
)
def test_a_configuration_without_a_counterpart_is_refused_by_name(
    changes: dict, words: str, folder: Path, tmp_path: Path
) -> None:
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    change_json(theirs / "config.json", **changes)
    assert words in refused(theirs)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("model", {"type": "Unigram"}, "is a tokenizer of kind Unigram, such as XLM-R's of sentencepiece"),
        ("model", {"byte_fallback": True}, "byte_fallback is 'True'"),
        ("model", {"dropout": 0.1}, "dropout is '0.1'"),
        ("pre_tokenizer", {"type": "Metaspace"}, "pre_tokenizer is \"['Metaspace']\""),
        ("", {"normalizer": {"type": "NFC"}}, "normalizer is"),
        ("", {"added_tokens": [{"id": 9, "content": "[URL]"}]}, "'[URL]' that was added by hand"),
        ("", {"model": 7}, "has no model"),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_refused_by_name(
    part: str, changes: dict, words: str, folder: Path, tmp_path: Path
) -> None:
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    spec = json.loads((theirs / "tokenizer.json").read_text(encoding="utf-8"))
    change_json(theirs / "tokenizer.json", **({part: spec[part] | changes} if part else changes))
    assert words in refused(theirs)


def test_damaged_and_missing_files_are_one_line(folder: Path, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    weights = (theirs / "model.safetensors").read_bytes()
    (theirs / "model.safetensors").write_bytes(weights[:-100])
    assert "is damaged or no safetensors" in refused(theirs)
    (theirs / "model.safetensors").unlink()
    assert "no weights; expected model.safetensors or pytorch_model.bin" in refused(theirs)
    for name in ("../model.safetensors", "/etc/passwd", "missing.safetensors", 7):
        (theirs / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        assert "which is not beside it" in refused(theirs)
    (theirs / "model.safetensors.index.json").unlink()
    torch.save({"a": torch.nn.Linear(1, 1)}, theirs / "pytorch_model.bin")
    assert "holds more than tensors and plain values" in refused(theirs)
    (theirs / "config.json").write_text("{")
    assert "is no readable JSON" in refused(theirs)


def test_a_folder_of_sentencepiece_is_refused(folder: Path, tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    (theirs / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused(theirs)
    (theirs / "sentencepiece.bpe.model").write_bytes(b"")
    assert "has a tokenizer of sentencepiece (sentencepiece.bpe.model)" in refused(theirs)


def test_code_of_a_model_is_not_run(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = Path(shutil.copytree(folder, tmp_path / "theirs"))
    (theirs / "modeling.py").write_text("raise SystemExit('ran')")
    change_json(theirs / "config.json", auto_map={"AutoModel": "modeling.Model"})
    with caplog.at_level(logging.WARNING):
        load_pretrained(str(theirs), "gpt2", None, {})
    assert "auto_map" in caplog.text


def test_a_path_that_exists_wins_over_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert compose(model="owner/name").model.source == "owner/name"
    with pytest.raises(UserError, match=r"model owner/name: no such path here, and the Hugging Face hub does not"):
        load_pretrained("owner/name", "gpt2", None, {})
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(folder)
    source = compose(model="owner/name").model.source
    assert source == str(tmp_path / "owner" / "name")
    assert load_pretrained(source, "gpt2", None, {}).sha256 == huggingface.load(folder).sha256

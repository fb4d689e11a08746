"""Files that were damaged, cut, made by something else or made to do harm: each is refused in one line that names it,
or made again; none is used as if it were whole.

Checkpoints, dictionaries and encoders, exports, archives and caches.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import logging
import lzma
import os
import shutil
import tarfile
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary
from helpers.project import write_small_bpe
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lightning_glue.data import binarize, mmap_format, sources, tokenizer
from lightning_glue.data.binarize import prepare
from lightning_glue.data.datamodule import load_split
from lightning_glue.data.download import extract_tar, extract_zip
from lightning_glue.data.tokenizer import Tokenizer
from lightning_glue.errors import UserError
from lightning_glue.export.fairseq import export
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.model import pretrained
from lightning_glue.model.checkpoint_file import model_state, safe_load, weights_file
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import build_model, fairseq_dictionary
from lightning_glue.tasks import TASKS
from lightning_glue.training.checkpoints import AtomicCheckpointIO
from lightning_glue.training.resume import read_checkpoint
from lightning_glue.utils import digests
from lightning_glue.utils.files import locked

ARCHITECTURE = {
    "encoder_layers": 1,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 16,
    "encoder_attention_heads": 2,
    "max_positions": 32,
}
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(path: Path, action: Callable[[], Any]) -> Any:
    """What ``action`` returns, or what the UserError it raises instead says: one line that names ``path``."""
    try:
        return action()
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        assert path.name in str(error)
        return str(error)


def refused(path: Path, action: Callable[[], Any]) -> str:
    found = one_line(path, action)
    assert isinstance(found, str), f"not refused: {found}"
    return found


def flip(path: Path, place: int, bits: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= bits
    path.write_bytes(content)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_bpe(tmp_path_factory.mktemp("small-bpe"))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def a_state() -> dict[str, Any]:
    return {"model": {"a": torch.arange(40.0), "b": torch.ones(3, 5)}, "args": Namespace(arch="x"), "step": 7}


def same_state(state: dict[str, Any]) -> bool:
    names = ("a", "b")
    expected = a_state()
    return state["step"] == 7 and all(torch.equal(state["model"][n], expected["model"][n]) for n in names)


@example(place=5898, bits=241, mapped=False)  # a tensor is marked as a folder: torch returned memory as it was
@given(place=st.integers(0, 100_000), bits=st.integers(1, 255), mapped=st.booleans())
@FUZZ
def test_a_changed_byte_of_a_checkpoint_is_refused_or_changes_nothing(
    place: int, bits: int, mapped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save(a_state(), path)
    flip(path, place, bits)
    state = one_line(path, lambda: safe_load(path, mapped=mapped))
    assert isinstance(state, str) or same_state(state)


@given(place=st.integers(0, 100_000), bits=st.integers(1, 255), cut=st.booleans())
@FUZZ
def test_a_damaged_checkpoint_of_the_oldest_format_is_one_line(
    place: int, bits: int, cut: bool, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.save(a_state(), path, _use_new_zipfile_serialization=False)
    if cut:
        os.truncate(path, place % path.stat().st_size)
    else:
        flip(path, place, bits)
    one_line(path, lambda: safe_load(path, mapped=True))


@pytest.mark.parametrize("mapped", [False, True])
def test_one_bit_of_the_weights_is_seen(mapped: bool, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(100_000)}}, path)
    flip(path, path.stat().st_size // 2, 0x40)
    said = refused(path, lambda: safe_load(path, mapped=mapped))
    assert said == f"{path} is damaged: its record last/data/0 does not have its checksum"


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_damaged_checkpoint_of_a_run_is_not_gone_on_from(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    torch.save({"state_dict": {"w": torch.ones(100_000)}, "position": [0, 3]}, path)
    flip(path, path.stat().st_size // 2)
    for load in (read_checkpoint, AtomicCheckpointIO().load_checkpoint, model_state):
        assert "does not have its checksum" in refused(path, lambda load=load: load(path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x02}q\x00.", b"\0" * 5000, b"text\n" * 99])
def test_what_is_no_checkpoint_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused(path, lambda: safe_load(path))


def test_a_checkpoint_that_would_grow_in_memory_is_refused(tmp_path: Path) -> None:
    path, bomb = tmp_path / "model.pt", tmp_path / "bomb.pt"
    torch.save({"model": torch.zeros(1_000_000)}, path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    for verified in (False, True):
        assert "compressed records" in refused(bomb, lambda verified=verified: safe_load(bomb, verified=verified))


def test_a_checkpoint_written_without_checksums_loads(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(a_state(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert same_state(safe_load(path))


def fairseq_checkpoint(folder: Path, encoder: Tokenizer, **changes: Any) -> Path:
    """A small model.pt as fairseq writes it."""
    model = build_model(Pretrained(ARCHITECTURE, None, encoder, ""), 2, {})
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"args": Namespace(**ARCHITECTURE), "model": model.state_dict()} | changes, folder / "model.pt")
    return folder / "model.pt"


EMBEDDINGS = "encoder.sentence_encoder.embed_tokens.weight"
WEIGHTS = {EMBEDDINGS: torch.zeros(9, 16)}


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({"model": 5}, "'model' is a int"),
        ({"model": {EMBEDDINGS: "text"}}, "is no dense tensor"),
        ({"model": {EMBEDDINGS: torch.eye(3).to_sparse()}}, "is no dense tensor"),
        ({"model": {3: torch.eye(3)}}, "is no dense tensor"),
        ({"model": {EMBEDDINGS: torch.zeros(())}}, "is no RoBERTa"),
        ({"model": {"encoder.embed_tokens.weight": torch.eye(3)}, "args": Namespace()}, "is no RoBERTa"),  # BART
        ({"model": {}}, "is no RoBERTa"),
        ({"model": WEIGHTS}, "names no architecture"),
        ({"model": WEIGHTS, "args": 7}, "names no readable architecture"),
        ({"model": WEIGHTS, "cfg": 7}, "names no readable architecture"),
        ({"model": WEIGHTS, "cfg": {"task": 1}}, "names no readable architecture"),
        ({"model": WEIGHTS, "cfg": {"model": [1]}}, "names no readable architecture"),
        ({"model": WEIGHTS, "args": {"encoder_layers": "six"}}, "encoder_layers is 'six'"),
        ({"model": WEIGHTS, "args": {"encoder_attention_heads": 0}}, "encoder_attention_heads is '0'"),
        ({"model": WEIGHTS, "args": {"encoder_layers": 10**9}}, "encoder_layers is '1000000000'"),
        ({"model": WEIGHTS, "args": {"encoder_layers": 50_000}}, "there are 1 tensors"),
        ({"model": WEIGHTS, "args": {"encoder_embed_dim": 90_000}}, "its embeddings have 16"),
        ({"model": WEIGHTS, "args": {"max_positions": -1}}, "max_positions is '-1'"),
        ({"roberta.embeddings.word_embeddings.weight": torch.zeros(1)}, "is a model of Hugging Face"),
        ({f"key{i}" * 40: 0 for i in range(500)}, "and 495 more"),
        ({}, "found nothing"),
    ],
)
def test_a_checkpoint_of_another_kind_is_one_line(checkpoint: dict, words: str, bpe: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(checkpoint, path)
    assert words in refused(path, lambda: load_pretrained(str(path), "gpt2", str(bpe), {}))
    assert words in refused(path, lambda: model_state(path))


def test_folders_of_archives_and_of_hugging_face(bpe: Path, tmp_path: Path) -> None:
    encoder = pretrained.load_tokenizer("gpt2", str(bpe))
    fairseq_checkpoint(tmp_path / "roberta.base", encoder)
    assert load_pretrained(str(tmp_path / "roberta.base"), "gpt2", str(bpe), {}).args == ARCHITECTURE
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    assert "neither checkpoint_best.pt nor model.pt" in refused(
        theirs, lambda: load_pretrained(str(theirs), "gpt2", str(bpe), {})
    )
    for name in ("config.json", "model.safetensors"):
        (theirs / name).write_text("{}")
    for path in (theirs, theirs / "model.safetensors"):
        assert "model_type is 'None'" in refused(theirs, lambda path=path: load_pretrained(str(path), "gpt2", None, {}))
        said = refused(path, lambda path=path: weights_file(path))
        assert "is a model of Hugging Face; expected a *.pt of fairseq here (MODEL= takes its folder" in said


# --- dictionaries and encoders -------------------------------------------------------------------------------------


def own_dictionary(bpe: Path, folder: Path, *more: str, drop: int = 0) -> Path:
    """The dictionary of ``bpe`` turned round."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (bpe / "dict.txt").read_text().splitlines()[::-1]
    (folder / "dict.txt").write_text("".join(f"{line}\n" for line in [*lines[drop:], *more]))
    return folder / "dict.txt"


@pytest.mark.parametrize("place", ["dict.txt", "input0/dict.txt"])
@pytest.mark.parametrize("name", ["model.pt", "."])
def test_the_dictionary_beside_a_checkpoint_is_its_own(place: str, name: str, bpe: Path, tmp_path: Path) -> None:
    dictionary = own_dictionary(bpe, tmp_path / "elsewhere")
    encoder = tokenizer.gpt2(bpe / "encoder.json", bpe / "vocab.bpe", dictionary)
    fairseq_checkpoint(tmp_path / "own", encoder)
    (tmp_path / "own" / place).parent.mkdir(exist_ok=True)
    shutil.copy(dictionary, tmp_path / "own" / place)
    start = load_pretrained(str(tmp_path / "own" / name), "gpt2", str(bpe), {})
    text = ["the end on a", "in"]
    theirs = Dictionary.load(str(dictionary))
    published = pretrained.load_tokenizer("gpt2", str(bpe))
    assert start.tokenizer.symbols == theirs.symbols[4:]
    assert start.tokenizer.encode(text)[0].tolist() == encoder.encode(text)[0].tolist()
    assert start.tokenizer.encode(text)[0].tolist() != published.encode(text)[0].tolist()
    assert start.tokenizer.digest != published.digest


def test_the_published_dictionary_beside_a_checkpoint_changes_nothing(bpe: Path, tmp_path: Path) -> None:
    published = pretrained.load_tokenizer("gpt2", str(bpe))
    path = fairseq_checkpoint(tmp_path, published)
    shutil.copy(bpe / "dict.txt", tmp_path)
    assert load_pretrained(str(path), "gpt2", str(bpe), {}).tokenizer.digest == published.digest


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_the_encoder_beside_a_checkpoint_is_its_own(names: tuple[str, str], bpe: Path, tmp_path: Path) -> None:
    vocabulary = json.loads((bpe / "encoder.json").read_text())
    swapped = {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}
    own_dictionary(bpe, tmp_path)
    (tmp_path / names[0]).write_text(json.dumps(swapped))
    shutil.copy(bpe / "vocab.bpe", tmp_path / names[1])
    encoder = tokenizer.gpt2(*(tmp_path / name for name in names), tmp_path / "dict.txt")
    path = fairseq_checkpoint(tmp_path, encoder)
    assert load_pretrained(str(path), "gpt2", str(bpe), {}).tokenizer.digest == encoder.digest
    (tmp_path / names[1]).unlink()
    refused(tmp_path / names[1], lambda: load_pretrained(str(path), "gpt2", str(bpe), {}))


def test_a_dictionary_of_another_size_is_refused_with_both(bpe: Path, tmp_path: Path) -> None:
    encoder = pretrained.load_tokenizer("gpt2", str(bpe))
    path = fairseq_checkpoint(tmp_path, encoder)
    own_dictionary(bpe, tmp_path, drop=2)
    said = refused(path, lambda: load_pretrained(str(path), "gpt2", str(bpe), {}))
    rows = len(encoder.symbols) + 5
    assert f"{path} has {rows} token embeddings, but {tmp_path / 'dict.txt'} makes {rows - 2} ids" in said
    (tmp_path / "dict.txt").unlink()
    state = safe_load(path)
    state["model"][EMBEDDINGS] = state["model"][EMBEDDINGS][:-7]
    torch.save(state, path)
    said = refused(path, lambda: load_pretrained(str(path), "gpt2", str(bpe), {}))
    assert f"has {rows - 7} token embeddings, but the published dictionary makes {rows} ids" in said
    assert f"put the dict.txt it was trained with into {tmp_path}" in said


def test_a_model_of_sentencepiece_is_refused(bpe: Path, tmp_path: Path) -> None:
    path = fairseq_checkpoint(tmp_path, pretrained.load_tokenizer("gpt2", str(bpe)))
    (tmp_path / "dict.txt").write_text("".join(f"\u2581piece{i} 1\n" for i in range(269)), encoding="utf-8")
    said = refused(tmp_path / "dict.txt", lambda: load_pretrained(str(path), "gpt2", str(bpe), {}))
    assert "269 of its 269 symbols (such as '\u2581piece0') are none of its tokens" in said
    (tmp_path / "sentencepiece.bpe.model").touch()
    said = refused(tmp_path, lambda: load_pretrained(str(path), "gpt2", str(bpe), {}))
    assert "is a model of sentencepiece (sentencepiece.bpe.model), such as XLM-R" in said


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        (b"13 5\n262 4\n13 5\n", ":3", "'13' is there twice"),
        (b"13 5\n<s> 4\n", ":2", "'<s>' is one of fairseq's own symbols"),
        (b"13 5\n262\n", ":2", "found '262'"),
        (b"13 5\n\n262 4\n", ":2", "found ''"),
        (b"13 5\n262 many\n", ":2", "found '262 many'"),
        ("13 ²\n".encode(), ":1", "found '13 ²'"),
        (b"13 #fairseq:overwrite\n", ":1", "found '13 #fairseq:overwrite'"),
        (b"13 5\n\xff\xfe 4\n", "", "is not UTF-8 at byte 6"),
        ("13 5\n".encode("utf-8-sig"), "", "begins with a byte order mark"),
    ],
)
def test_fairseqs_checks_of_a_dictionary(content: bytes, place: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    said = refused(path, lambda: tokenizer.read_dictionary(path))
    assert said.startswith(f"{path}{place}")
    assert words in said
    if "mark" not in words:  # fairseq makes it part of the first symbol
        with pytest.raises(Exception, match="Duplicate word|Incorrect"):
            Dictionary.load(str(path))


SYMBOLS = st.sampled_from(["13", "262", "<s>", "<mask>", "a b", "", "\u2028", "\x85x", "\x1c", "x\u00a0y"])
LINES = st.tuples(
    SYMBOLS, st.sampled_from([" 1", " -2", " 1_0", "", " x", "  3"]), st.sampled_from(["", " #fairseq:overwrite"])
)


@given(lines=st.lists(LINES, max_size=6), end=st.sampled_from(["\n", "\r\n", "\r"]))
@FUZZ
def test_a_dictionary_is_read_as_by_fairseq(lines: list[tuple[str, str, str]], end: str, tmp_path: Path) -> None:
    path = tmp_path / "dict.txt"
    path.write_bytes("".join("".join(line) + end for line in lines).encode())
    try:
        theirs = Dictionary.load(str(path))
    except Exception:
        refused(path, lambda: tokenizer.read_dictionary(path))
        return
    symbols, counts = tokenizer.read_dictionary(path)
    assert (symbols, counts) == (theirs.symbols[4:], theirs.count[4:])
    ours = Tokenizer("gpt2", None, symbols, counts, np.empty(0), {})
    again = fairseq_dictionary(ours)
    theirs.add_symbol("<mask>")
    assert (again.symbols, again.indices) == (theirs.symbols, theirs.indices)
    assert len(again) == ours.embeddings
    if "\r" not in ours.dictionary_text:
        path.write_text(ours.dictionary_text, encoding="utf-8")
        assert Dictionary.load(str(path)).indices == {k: v for k, v in theirs.indices.items() if v < len(symbols) + 4}


def test_an_overwritten_symbol_has_its_last_place(bpe: Path, tmp_path: Path) -> None:
    dictionary = own_dictionary(bpe, tmp_path, "32 1 #fairseq:overwrite")
    encoder = tokenizer.gpt2(bpe / "encoder.json", bpe / "vocab.bpe", dictionary)
    (token,) = [token for token, i in json.loads((bpe / "encoder.json").read_text()).items() if i == 32]
    assert encoder.encode([token])[0][0] == len(encoder.symbols) + 3
    assert encoder.embeddings == len(encoder.symbols) + 5
    build_model(Pretrained(ARCHITECTURE, None, encoder, ""), 2, {})
    assert encoder.dictionary_text == dictionary.read_text()


@given(place=st.integers(0, 10_000), bits=st.integers(1, 255))
@FUZZ
def test_a_changed_byte_of_a_dictionary_moves_no_other_token(place: int, bits: int, bpe: Path, tmp_path: Path) -> None:
    """Refused, or a count is another, or one symbol is another: no id moves, and none is beyond the embeddings."""
    path = tmp_path / "dict.txt"
    shutil.copy(bpe / "dict.txt", path)
    good = tokenizer.gpt2(bpe / "encoder.json", bpe / "vocab.bpe", path)
    flip(path, place, bits)
    found = one_line(path, lambda: tokenizer.gpt2(bpe / "encoder.json", bpe / "vocab.bpe", path))
    if isinstance(found, Tokenizer):
        assert found.lookup.max() < found.dictionary_size
        moved = (found.lookup != good.lookup) & (found.lookup != tokenizer.UNK)
        assert moved.sum() <= 1 or len(found.symbols) != len(good.symbols)


def test_a_symbol_that_no_token_has_is_said(bpe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = own_dictionary(bpe, tmp_path, "2b2 7")
    tokenizer.gpt2(bpe / "encoder.json", bpe / "vocab.bpe", path)
    assert "1 of 271 symbols, such as '2b2', are no tokens of" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("encoder.json", b"{"),
        ("encoder.json", b"\xff\xfe"),
        ("encoder.json", b"[" * 100_000),
        ("encoder.json", b"[1, 2]"),
        ("encoder.json", b'{"a": "b"}'),
        ("encoder.json", b'{"a": -1}'),
        ("encoder.json", b'{"a": 1000000000000}'),
        ("encoder.json", b'{"a": 1, "b": 1}'),
        ("encoder.json", b"{}"),
        ("encoder.json", b'{"a": 1}'),
        ("vocab.bpe", b"\xff\xfe\x00"),
        ("vocab.bpe", b"#version\ngarbage\nx"),
        ("vocab.bpe", b"#version\na b c\n"),
        ("vocab.bpe", "#version\n\u4e2d \u6587\n".encode()),
        ("dict.txt", b"\xff\n"),
        ("dict.txt", b""),
    ],
)
def test_an_encoder_of_garbage_is_one_line(name: str, content: bytes, bpe: Path, tmp_path: Path) -> None:
    for path in bpe.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, lambda: pretrained.load_tokenizer("gpt2", str(tmp_path)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"", "has no [CLS]"),
        (b"[CLS]\n[SEP]\n[PAD]\n[MASK]\nthe\n", "has no [UNK]"),
        (b"[CLS]\n[SEP]\n[PAD]\n[MASK]\n[UNK]\nthe\nthe\n", "'the' is there twice"),
    ],
)
def test_a_vocabulary_of_garbage_is_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "bpecodes").write_bytes(content)
    assert words in refused(tmp_path / "bpecodes", lambda: tokenizer.exported(tmp_path))


# --- exports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoint_best.pt", "vocab.json", "merges.txt", "input0/dict.txt"])
def test_a_damaged_export_is_one_line(name: str, bpe: Path, tmp_path: Path) -> None:
    encoder = pretrained.load_tokenizer("gpt2", str(bpe))
    model = build_model(Pretrained(ARCHITECTURE, None, encoder, ""), 2, {})
    export(model, TASKS["RTE"], encoder, ["entailment", "not_entailment"], 1, tmp_path)
    load_fine_tuned(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    for damaged in (b"", content[: len(content) // 2] + b"\xff" + content[len(content) // 2 + 1 :]):
        path.write_bytes(damaged)
        refused(path, lambda: load_fine_tuned(tmp_path))
        refused(path, lambda: load_pretrained(str(tmp_path), "gpt2", None, {}))


# --- archives ------------------------------------------------------------------------------------------------------

PACK = {"gz": gzip.compress, "xz": functools.partial(lzma.compress, preset=0), "bz2": bz2.compress}
MEMBERS = {"model.pt": os.urandom(50_000), "dict.txt": b"13 5\n" * 99}


def a_tar(members: dict[str, bytes] = MEMBERS) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"top/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def a_zip(members: dict[str, bytes] = MEMBERS, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"top/{name}", data)
    return content.getvalue()


PACKED = {kind: (pack(a_tar()), extract_tar) for kind, pack in PACK.items()} | {"zip": (a_zip(), extract_zip)}


@given(kind=st.sampled_from(sorted(PACKED)), place=st.integers(0, 60_000), bits=st.integers(1, 255), cut=st.booleans())
@FUZZ
def test_a_damaged_archive_is_refused_or_gives_the_same_files(
    kind: str, place: int, bits: int, cut: bool, tmp_path: Path
) -> None:
    content, extract = PACKED[kind]
    archive, out = tmp_path / f"archive.{kind}", tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    archive.write_bytes(content[: place % len(content)] if cut else content)
    if not cut:
        flip(archive, place, bits)
    if one_line(archive, lambda: extract(archive, out, MEMBERS)) is None:
        assert {name: (out / name).read_bytes() for name in MEMBERS} == MEMBERS
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".part") == []


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_one_bit_in_the_middle_of_an_archive_is_seen(kind: str, tmp_path: Path) -> None:
    content, extract = PACKED[kind]
    archive = tmp_path / f"archive.{kind}"
    archive.write_bytes(content)
    flip(archive, len(content) // 2)
    assert "is not a readable archive" in refused(archive, lambda: extract(archive, tmp_path / "out", MEMBERS))
    assert not (tmp_path / "out").exists()


def headers_of(content: bytes, local: int, central: int, value: int) -> bytes:
    """A zip file with a byte of all its headers changed."""
    changed = bytearray(content)
    for magic, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        place = changed.find(magic)
        while place >= 0:
            changed[place + offset] = value
            place = changed.find(magic, place + 1)
    return bytes(changed)


def test_encrypted_and_unknown_zip_files(tmp_path: Path) -> None:
    archive, small = tmp_path / "a.zip", {"train.tsv": b"text"}
    for changed in (headers_of(a_zip(small), 6, 8, 1), headers_of(a_zip(small), 8, 10, 97)):
        archive.write_bytes(changed)
        assert "is not a readable archive" in refused(archive, lambda: extract_zip(archive, tmp_path / "out", small))


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8b\x08\0" + b"\1" * 100, b"BZh9" + b"\1" * 99, b"\xfd7zXZ\0" + b"\1" * 99]
)
def test_what_is_no_archive(content: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(content)
    for extract in (extract_tar, extract_zip):
        refused(archive, lambda extract=extract: extract(archive, tmp_path / "out", MEMBERS))


@pytest.mark.parametrize("kind", [*PACK, "zip"])
@pytest.mark.parametrize("wanted", [True, False])
def test_an_archive_that_would_fill_the_disk(kind: str, wanted: bool, tmp_path: Path) -> None:
    bomb = {"model.pt" if wanted else "other": bytes(24 << 20), "dict.txt": b"x", "tail.pt": b"y"}
    archive, out = tmp_path / f"bomb.{kind}", tmp_path / "out"
    archive.write_bytes(a_zip(bomb) if kind == "zip" else PACK[kind](a_tar(bomb)))
    extract = extract_zip if kind == "zip" else extract_tar
    if kind == "zip" and not wanted:  # what is not wanted is not unpacked
        extract(archive, out, ("dict.txt",))
        return
    said = refused(archive, lambda: extract(archive, out, ("model.pt", "dict.txt") if wanted else ("dict.txt",)))
    assert "holds more than 1" in said
    assert list(tmp_path.iterdir()) == [archive]


# --- caches --------------------------------------------------------------------------------------------------------

RTE = TASKS["RTE"]
HEADER = "index\tsentence1\tsentence2\tlabel"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A small RTE."""
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    labels = ["entailment", "not_entailment", "not_entailment"]
    rows = [f"{i}\tthe end {i}\tin a {i * 7}\t{labels[i % 3]}" for i in range(12)]
    (folder / "train.tsv").write_text("\n".join([HEADER, *rows]) + "\n")
    (folder / "dev.tsv").write_text("\n".join([HEADER, *rows[:6]]) + "\n")
    return folder.parent


@pytest.fixture
def encoder(bpe: Path) -> Tokenizer:
    return pretrained.load_tokenizer("gpt2", str(bpe))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(path: Path, pattern: bytes) -> None:
    path.write_bytes((pattern * path.stat().st_size)[: path.stat().st_size])


def poke(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


def swap_lines(path: Path) -> None:
    first, second, *rest = path.read_text().split("\n")
    path.write_text("\n".join([second, first, *rest]))


def replace_by(path: Path, make: Callable[[Path], Any]) -> None:
    shutil.rmtree(path)
    make(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "manifest of zero bytes": lambda entry: (entry / "manifest.json").write_text(""),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "another's manifest": lambda entry: (entry / "manifest.json").write_text('{"train": {"x": 1}}'),
    "manifest of a list": lambda entry: (entry / "manifest.json").write_text("[]"),
    "index cut": lambda entry: os.truncate(entry / "bin/input0/train.idx", 100),
    "index of zero bytes": lambda entry: os.truncate(entry / "bin/input0/train.idx", 0),
    "array of zero bytes": lambda entry: os.truncate(entry / "bin/input0/train.bin", 0),
    "no array": lambda entry: (entry / "bin/input0/train.bin").unlink(),
    "ids out of range": lambda entry: fill(entry / "bin/input0/train.bin", b"\xfe\xff"),
    "one id": lambda entry: flip(entry / "bin/input0/train.bin", 20),
    "ids of zeros": lambda entry: fill(entry / "bin/input0/train.bin", b"\0"),
    "lengths swapped": lambda entry: poke(entry / "bin/input0/train.idx", 26, b"\3\0\0\0"),
    "kind of number": lambda entry: poke(entry / "bin/input0/train.idx", 17, b"\x63"),
    "label dictionary of zero bytes": lambda entry: os.truncate(entry / "bin/label/dict.txt", 0),
    "no label dictionary": lambda entry: (entry / "bin/label/dict.txt").unlink(),
    "labels swapped": lambda entry: swap_lines(entry / "bin/label/dict.txt"),
    "label ids out of range": lambda entry: fill(entry / "bin/label/train.bin", b"\x63\0"),
    "fewer labels": lambda entry: [
        shutil.copy(entry / f"bin/label/valid.{end}", entry / f"bin/label/train.{end}") for end in ("bin", "idx")
    ],
    "no second text": lambda entry: shutil.rmtree(entry / "bin/input1"),
    "a file": lambda entry: replace_by(entry, lambda path: path.write_text("")),
    "a link to nothing": lambda entry: replace_by(entry, lambda path: path.symlink_to("nowhere")),
    "an empty folder": lambda entry: replace_by(entry, lambda path: path.mkdir()),
    "record cut": lambda entry: os.truncate(entry / digests.RECORD, 30),
    "no record": lambda entry: (entry / digests.RECORD).unlink(),
    "record of something else": lambda entry: (entry / digests.RECORD).write_bytes(b"\xff\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_of_the_cache_is_made_again(
    damage: str, raw: Path, encoder: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepare(RTE, raw, encoder, tmp_path / "cache")
    entry = prepared.directory.parent
    good = contents(entry)
    DAMAGES[damage](entry)
    with caplog.at_level(logging.WARNING):
        assert prepare(RTE, raw, encoder, tmp_path / "cache") == prepared
    assert contents(entry) == good
    (said,) = caplog.messages
    assert said.startswith(f"cache: {entry} ")
    assert said.endswith("; made again from the raw files")
    caplog.clear()
    assert prepare(RTE, raw, encoder, tmp_path / "cache") == prepared
    assert caplog.messages == []
    assert sorted(path.name for path in entry.parent.iterdir()) == [f".{entry.name}.lock", entry.name]


def test_what_killed_processes_left_in_the_cache_goes(raw: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    entry = prepare(RTE, raw, encoder, tmp_path / "cache").directory.parent
    own, other, living = (
        entry.with_name(f".{name}.0123abcd.part") for name in (entry.name, "MNLI-0123456789", f"{entry.name}.more")
    )
    for part in (own, other, living):
        (part / "bin").mkdir(parents=True)
    other.with_name(".MNLI-0123456789.lock").touch()
    with locked(entry.with_name(f"{entry.name}.more")):
        prepare(RTE, raw, encoder, tmp_path / "cache")
    assert [part.exists() for part in (own, other, living)] == [False, False, True]


def test_a_cache_that_cannot_be_written_is_read(raw: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    prepared = prepare(RTE, raw, encoder, tmp_path / "cache")
    lock = prepared.directory.parent.with_name(f".{prepared.directory.parent.name}.lock")
    lock.unlink()
    lock.mkdir()  # opening it fails, as it does in a folder of another user
    assert prepare(RTE, raw, encoder, tmp_path / "cache") == prepared


def test_raw_files_written_to_while_they_are_read(raw: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    digest = binarize._raw_digests(RTE, raw, RTE.splits)
    with open(raw / "RTE" / "dev.tsv", "a") as file:
        file.write("99\tone\ttwo\tentailment\n")
    with pytest.raises(UserError, match=r"dev\.tsv was written to while it was read"):
        binarize._read_rows(RTE, raw, "stop", binarize._present(RTE, raw), digest)


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGES if not any(w in d for w in ("manifest", "record", "link", "a file"))]
)
def test_a_damaged_folder_of_arrays_is_one_line(damage: str, raw: Path, encoder: Tokenizer, tmp_path: Path) -> None:
    """What has no digests, as a folder of fairseq's own preprocessing, is at least read with care."""
    entry = prepare(RTE, raw, encoder, tmp_path / "cache").directory.parent
    DAMAGES[damage](entry)
    if damage in ("one id", "labels swapped"):  # a digest alone tells
        return
    with pytest.raises(UserError) as caught:
        load_split(RTE, RTE.train, entry / "bin", 32)
    assert "\n" not in str(caught.value)


@given(index=st.binary(max_size=80), data=st.binary(max_size=40), magic=st.booleans())
@FUZZ
def test_any_index_is_read_or_refused(index: bytes, data: bytes, magic: bool, tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(mmap_format._MAGIC * magic + index)
    (tmp_path / "x.bin").write_bytes(data)
    try:
        ids, lengths = mmap_format.read(tmp_path / "x")
    except UserError:
        return
    assert len(ids) == lengths.sum()
    assert (lengths >= 0).all()


def test_damaged_raw_files_of_the_cache_are_named(
    encoder: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path / "cache"))
    root = sources.glue_directory(RTE, "sample", None)
    path = root / "RTE" / "dev.tsv"
    flip(path, path.read_bytes().index(b" the ") + 1)
    for read in (
        lambda: prepare(RTE, root, encoder, tmp_path / "cache"),
        lambda: binarize._read_rows(RTE, root, "stop", RTE.splits),
    ):
        assert f"delete {root} and run again" in refused(path, read)
    path.unlink()
    (root / "RTE" / "test.tsv").unlink()
    assert "no file" in refused(path, lambda: prepare(RTE, root, encoder, tmp_path / "cache"))
    shutil.rmtree(root)
    assert sources.glue_directory(RTE, "sample", None) == root
    (root / "RTE" / "test.tsv").unlink()
    said = refused(root / "RTE" / "test.tsv", lambda: prepare(RTE, root, encoder, tmp_path / "cache"))
    assert "it is gone" in said


def test_a_damaged_model_of_the_cache_is_named(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the oldest format, which has no checksums of its own, and where it was put by hand."""
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "models" / "roberta.base"
    encoder = pretrained.load_tokenizer("gpt2", str(bpe))
    path = fairseq_checkpoint(folder, encoder)
    torch.save(safe_load(path), path, _use_new_zipfile_serialization=False)
    shutil.copy(bpe / "dict.txt", folder)
    start = load_pretrained("roberta.base", "gpt2", str(bpe), {})
    assert start.tokenizer.digest == encoder.digest
    assert (folder / digests.RECORD).read_text().splitlines()[1] == f"{start.sha256}  model.pt"
    good = path.read_bytes()
    flip(path, good.index(start.state[EMBEDDINGS].numpy().tobytes()) + 2)
    said = refused(path, lambda: load_pretrained("roberta.base", "gpt2", str(bpe), {}))
    assert f"expected {start.sha256}; delete {folder} and run again" in said
    path.write_bytes(good)
    swap_lines(folder / "dict.txt")
    refused(folder / "dict.txt", lambda: load_pretrained("roberta.base", "gpt2", str(bpe), {}))
    (folder / "dict.txt").unlink()
    assert "it is gone" in refused(folder / "dict.txt", lambda: load_pretrained("roberta.base", "gpt2", str(bpe), {}))


def test_a_damaged_encoder_of_the_cache_is_named(bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sources.CACHE_VARIABLE, str(tmp_path))
    shutil.copytree(bpe, tmp_path / "gpt2_bpe")
    remotes = [
        sources.Remote(f"fairseq/gpt2_bpe/{name}", digests.file_sha256(bpe / name))
        for name in ("encoder.json", "vocab.bpe", "dict.txt")
    ]
    monkeypatch.setattr(sources, "BPE", tuple(remotes))
    pretrained.load_tokenizer("gpt2", None)
    path = tmp_path / "gpt2_bpe" / "dict.txt"
    swap_lines(path)
    said = refused(path, lambda: pretrained.load_tokenizer("gpt2", None))
    assert f"expected {remotes[2].sha256}; delete it and run again" in said

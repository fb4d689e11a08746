"""The tokenizer of a Hugging Face folder as one with a fairseq ``Dictionary``, and back.

Read are byte-level BPE (``vocab.json`` and ``merges.txt``, or ``tokenizer.json``) and BERT's WordPiece (``vocab.txt``,
or ``tokenizer.json``). Ids of a dictionary are in the order of the ids there, but that ``<s> <pad> </s> <unk>`` come
first, as fairseq has it. Special tokens that are spelled out in a text are text, as in fairseq.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import count as numbers
from pathlib import Path
from typing import Any

from lightning_glue.data import tokenizer
from lightning_glue.data.tokenizer import BERT_SPECIALS, BOS, EOS, SPECIALS, Tokenizer, byte_level, wordpiece
from lightning_glue.errors import DataError
from lightning_glue.utils.files import new_file
from lightning_glue.utils.redact import first_line

BPE_SPECIALS = (*SPECIALS, "<mask>")
_FILLER = re.compile(r"madeupword\d+")  # fairseq's name of an id that no text has
_OF_ROLE = {"cls_token": 0, "bos_token": 0, "pad_token": 1, "sep_token": 2, "eos_token": 2, "unk_token": 3,
            "mask_token": 4}  # fmt: skip
_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_VERSION = "#version"  # begins the first line of merges.txt, which may be missing


@dataclass(frozen=True)
class Renumbered:
    """A tokenizer, and where its ids come from.

    Attributes:
        rows: for each id of the dictionary, ``<mask>`` included, the id that the token has in the folder.
    """

    tokenizer: Tokenizer
    rows: list[int]


@dataclass(frozen=True)
class _Found:
    """What a folder says of its tokenizer."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]] | None  # None: WordPiece
    file: Path
    lower_case: bool = True


def read(folder: Path) -> Renumbered:
    """The tokenizer of a folder that ``save_pretrained`` wrote.

    Raises:
        DataError: there is none, or one of another kind (sentencepiece, a normalizer, tokens added by hand).
    """
    settings = _settings(folder)
    found = _found(folder, settings)
    specials = BERT_SPECIALS if found.merges is None else BPE_SPECIALS
    names, mask = specials[:4], specials[4]
    _check_roles(settings, specials, folder)
    _check_ids(found, specials)
    ordered = sorted(found.vocabulary, key=found.vocabulary.__getitem__)
    others = [token for token in ordered if token not in names]
    if found.merges is None:
        others = [*(token for token in others if token != mask), mask]
    rows = [found.vocabulary[token] for token in (*names, *others)]
    if found.merges is None:
        content = "".join(f"{token}\n" for token in ordered).encode()
        return Renumbered(wordpiece(found.file, cased=not found.lower_case, content=content), rows)
    return Renumbered(_byte_level(found, others, settings), rows)


def _byte_level(found: _Found, others: list[str], settings: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE with an ``encoder.json`` made for it, numbered in the order of the ids."""
    assert found.merges is not None
    encoder: dict[str, int] = {}
    symbols = []
    for token in others[:-1] if others[-1] == "<mask>" else others:  # fairseq appends it
        if token == "<mask>" or _FILLER.fullmatch(token):
            symbols.append(token)
            continue
        symbols.append(str(len(encoder)))
        encoder[token] = len(encoder)
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in found.merges), ""]
    return byte_level(
        json.dumps(encoder).encode(),
        "\n".join(lines).encode(),
        symbols,
        [1] * len(symbols),
        found.file,
        found.file,
        prefix_space=settings.get("add_prefix_space") is True,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` over ``special_tokens_map.json``; what either lacks has transformers' defaults."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found |= _read_json(folder / name)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is no readable JSON ({first_line(error)}); get the file again") from None
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}, expected a JSON object; get the file again")
    return found


def _found(folder: Path, settings: dict[str, Any]) -> _Found:
    """Vocabulary and merges of the first file that is there."""
    added = {token for token in _added(folder, settings) if token not in {*BPE_SPECIALS, *BERT_SPECIALS}}
    if added:
        raise DataError(
            f"{folder}: its tokenizer has tokens that were added by hand, such as {min(added)!r}, which cannot be "
            "read; expected byte-level BPE or WordPiece with its own vocabulary alone"
        )
    if (folder / "tokenizer.json").is_file():
        return _of_tokenizer_json(folder / "tokenizer.json", settings)
    if (folder / "vocab.json").is_file():
        path = folder / "vocab.json"
        return _Found(_numbered(_read_json(path), path), _merges(folder / "merges.txt"), path)
    if (folder / "vocab.txt").is_file():
        _check_accents(settings, folder / "tokenizer_config.json", settings.get("do_lower_case") is not False)
        tokens = [line.rstrip("\n") for line in tokenizer.text_lines(folder / "vocab.txt", "BERT's vocab.txt")]
        numbered = {token: i for i, token in enumerate(tokens)}
        return _Found(numbered, None, folder / "vocab.txt", settings.get("do_lower_case") is not False)
    pieces = [path.name for path in folder.glob("*.model")]
    if pieces:
        raise DataError(
            f"{folder} has a tokenizer of sentencepiece ({pieces[0]}), such as XLM-R's, which cannot be read"
        )
    raise DataError(f"{folder} has no tokenizer; expected {', '.join(_FILES[:-1])} with merges.txt, or {_FILES[-1]}")


def _added(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Tokens that the small files say are looked for before anything else."""
    decoder = settings.get("added_tokens_decoder")
    listed = [*decoder.values()] if isinstance(decoder, dict) else []
    extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    listed += extra if isinstance(extra, list) else [*extra.values()] if isinstance(extra, dict) else []
    if (folder / "added_tokens.json").is_file():
        listed += [*_read_json(folder / "added_tokens.json")]
    return [_content(token) for token in listed]


def _content(token: Any) -> str:
    """A token's text; in these files it is a string, or a dictionary with flags."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _of_tokenizer_json(path: Path, settings: dict[str, Any]) -> _Found:
    spec = _read_json(path)
    model, added = spec.get("model"), spec.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(added, list):
        raise DataError(f"{path} has no model; expected what the library tokenizers writes")
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind not in ("BPE", "WordPiece"):
        raise DataError(
            f"{path} is a tokenizer of kind {kind}, such as XLM-R's of sentencepiece, which cannot be read; expected "
            "byte-level BPE or WordPiece"
        )
    vocabulary = _numbered(model.get("vocab"), path)
    for token in added:
        name, number = _content(token), token.get("id") if isinstance(token, dict) else None
        if name not in {*BPE_SPECIALS, *BERT_SPECIALS} or type(number) is not int:
            raise DataError(f"{path} has the token {name[:80]!r} that was added by hand, which cannot be read")
        vocabulary[name] = number
    normalizer = spec.get("normalizer")
    if kind == "BPE":
        _expect(path, "pre_tokenizer", _types(spec.get("pre_tokenizer")), ["ByteLevel"])
        _expect(path, "normalizer", normalizer, None)
        for name, usual in {"dropout": None, "byte_fallback": False, "ignore_merges": False}.items():
            _expect(path, name, model.get(name) or usual, usual)
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            _expect(path, name, model.get(name) or "", "")
        if "add_prefix_space" not in settings:
            settings["add_prefix_space"] = spec["pre_tokenizer"].get("add_prefix_space") is True
        return _Found(vocabulary, _pairs(model.get("merges"), path), path)
    _expect(path, "pre_tokenizer", _types(spec.get("pre_tokenizer")), ["BertPreTokenizer"])
    _expect(path, "normalizer", _types(normalizer), ["BertNormalizer"])
    _expect(path, "continuing_subword_prefix", model.get("continuing_subword_prefix", "##"), "##")
    _expect(path, "max_input_chars_per_word", model.get("max_input_chars_per_word", 100), 100)
    assert isinstance(normalizer, dict)
    said = {"do_lower_case": normalizer.get("lowercase"), "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars")} | settings  # fmt: skip
    lower = said["do_lower_case"] is not False
    _check_accents(said, path, lower)
    return _Found(vocabulary, None, path, lower)


def _types(part: Any) -> list[Any]:
    """Kinds of a part of ``tokenizer.json``, one or a sequence."""
    if not isinstance(part, dict):
        return []
    parts = part.get("pretokenizers") or part.get("normalizers")
    return [one.get("type") for one in parts] if isinstance(parts, list) else [part.get("type")]


def _expect(path: Path, name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise DataError(
            f"{path}: {name} is {str(found)[:80]!r}, expected {expected!r}; such a tokenizer cannot be read"
        )


def _check_accents(settings: dict[str, Any], path: Path, lower: bool) -> None:
    """fairseq's WordPiece takes accents away where it makes letters small, and only there."""
    accents, chinese = settings.get("strip_accents"), settings.get("tokenize_chinese_chars")
    if accents not in (None, lower) or chinese is False:
        raise DataError(
            f"{path}: do_lower_case {lower}, strip_accents {accents}, tokenize_chinese_chars {chinese} cannot be read "
            "together; expected accents stripped where letters are made small, Chinese characters apart"
        )


def _numbered(found: Any, path: Path) -> dict[str, int]:
    if not isinstance(found, dict) or {*map(type, found.values())} != {int}:
        raise DataError(f"{path} holds no tokens with their ids; expected a vocabulary of byte-level BPE or WordPiece")
    return found


def _merges(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; a vocab.json needs its merges.txt, or a tokenizer.json")
    lines = [line.rstrip("\n") for line in tokenizer.text_lines(path, "the merges of byte-level BPE")]
    return _pairs([line for line in lines[lines[:1] != [] and lines[0].startswith(_VERSION) :] if line], path)


def _pairs(found: Any, path: Path) -> list[tuple[str, str]]:
    """Merges, each as a list of two or with a blank between them."""
    pairs = [line.split(" ") if isinstance(line, str) else line for line in found] if isinstance(found, list) else None
    if pairs is None or any(not isinstance(pair, list) or [*map(type, pair)] != [str, str] for pair in pairs):
        raise DataError(f"{path} holds no merges; expected two tokens each")
    return [(first, second) for first, second in pairs]


def _check_roles(settings: dict[str, Any], names: tuple[str, ...], folder: Path) -> None:
    for role, place in _OF_ROLE.items():
        token = settings.get(role)
        if token is not None and _content(token) != names[place]:
            raise DataError(f"{folder}: its {role} is {_content(token)[:40]!r}, expected {names[place]!r}")


def _check_ids(found: _Found, specials: tuple[str, ...]) -> None:
    """Every id is one token's: the rows of the embeddings are as many."""
    if missing := [token for token in specials if token not in found.vocabulary]:
        raise DataError(f"{found.file} has no token {', '.join(missing)}; expected {', '.join(specials)}")
    count = len(found.vocabulary)
    if sorted(found.vocabulary.values()) != list(range(count)):
        raise DataError(f"{found.file}: the ids of its {count} tokens are not those from 0 to {count - 1}, a row each")


# --- back ----------------------------------------------------------------------------------------------------------


def token_names(encoder: Tokenizer) -> list[str]:
    """The vocabulary of a folder: the token of each row of the embeddings.

    Behind those of the dictionary come the tokens that the encoder makes and the dictionary lacks: ``<unk>`` to the
    model, whose rows are copies of that one's.
    """
    if encoder.bpe == "bert":
        specials = BERT_SPECIALS
        token_of = {token: token for token in encoder.files["bpecodes"].decode().rstrip("\n").split("\n")}
    else:
        specials = BPE_SPECIALS
        token_of = {str(number): token for token, number in json.loads(encoder.files["vocab.json"]).items()}
    token_of["<mask>"] = specials[4]
    symbols = encoder.symbols if "<mask>" in encoder.symbols else [*encoder.symbols, "<mask>"]
    last = {symbol: place for place, symbol in enumerate(symbols)}  # a symbol's id is its last place
    fillers = (name for name in map("madeupword{:04d}".format, numbers()) if name not in last)
    names = [
        token_of[symbol] if last[symbol] == place and symbol in token_of
        else symbol if last[symbol] == place and _FILLER.fullmatch(symbol) else next(fillers)
        for place, symbol in enumerate(symbols)
    ]  # fmt: skip
    there = {*specials, *names}
    return [*specials[:4], *names, *(token for token in token_of.values() if token not in there)]


def write(encoder: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write what ``AutoTokenizer.from_pretrained`` reads: the ids of ``encoder``, and pairs as fairseq joins them.

    Args:
        max_tokens: the length that ``truncation=True`` cuts to.
    """
    bert, names = encoder.bpe == "bert", token_names(encoder)
    specials = BERT_SPECIALS if bert else BPE_SPECIALS
    vocabulary = {name: row for row, name in enumerate(names)}
    merges = [] if bert else _pairs(encoder.files["merges.txt"].decode().split("\n")[1:-1], folder)
    with new_file(folder / "tokenizer.json") as file:
        file.write(_backend(encoder, vocabulary, merges).to_str(pretty=True))
    if bert:
        _write(folder / "vocab.txt", "".join(f"{name}\n" for name in names))
    else:
        _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        _write(folder / "merges.txt", encoder.files["merges.txt"].decode())
    roles = {role: specials[place] for role, place in _OF_ROLE.items()}
    own: dict[str, object] = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": encoder.prefix_space}
    if bert:
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": not encoder.cased}
    general = {"model_max_length": max_tokens, "split_special_tokens": True, "clean_up_tokenization_spaces": False,
               "model_input_names": ["input_ids", "attention_mask"]}  # fmt: skip
    _write(folder / "tokenizer_config.json", json.dumps({**own, **general, **roles}, indent=2) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(roles, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text)


def _backend(encoder: Tokenizer, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    """A tokenizer of the library tokenizers with the folder's ids."""
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    if encoder.bpe == "bert":
        specials = BERT_SPECIALS
        backend = Backend(models.WordPiece(vocabulary, unk_token=specials[3]))
        backend.normalizer = normalizers.BertNormalizer(lowercase=not encoder.cased)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
    else:
        specials = BPE_SPECIALS
        backend = Backend(models.BPE(vocabulary, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=encoder.prefix_space)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*specials[:4], AddedToken(specials[4], lstrip=encoder.bpe != "bert", special=True)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{specials[0]} $A {specials[2]}",
        pair=f"{specials[0]} $A {specials[2]} {specials[2]} $B {specials[2]}",
        special_tokens=[(specials[0], BOS), (specials[2], EOS)],
    )
    return backend

"""Sentences of SST-2 through ``predict``, transformers' pipeline and ONNX runtime, on the same weights and CPU.

    GLUE_DIR=... ROBERTA_BPE_DIR=... python benchmarks/predict.py [ROUNDS [ROWS [SHAPE]]]

Two shapes: all-MiniLM-L6-v2 and, with random weights, roberta.base. Each side begins with texts and ends with labels.
The pipeline takes the batch size that is its fastest in two looks at the same texts; ONNX runtime has the exported
graph in float32, and batches that are sorted by length. Each side is a process of its own, as its users have it, with
as many threads as the processor has cores; sides alternate round by round, and labels are compared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import BASE, describe_machine, versions
from records import keep

from lightning_glue.data.text_stream import TextRow
from lightning_glue.data.tokenizer import Tokenizer, load_tokenizer
from lightning_glue.export.fairseq import export
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.inference.scorer import Scorer
from lightning_glue.inference.stream import predict_rows
from lightning_glue.inference.text_model import Model
from lightning_glue.model.huggingface import to_huggingface
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import HEAD, RobertaModel, build_model
from lightning_glue.tasks import get_task

SST2 = get_task("SST-2")
Side = Callable[[list[str]], list[int]]


def sentences(count: int) -> list[str]:
    """The first rows of SST-2's training split, in the order of the file, as any texts come."""
    import os

    from lightning_glue.data import reader, sources

    folder = os.environ.get("GLUE_DIR")
    root = sources.glue_directory(SST2, "glue" if folder else "sample", folder)
    assert SST2.train
    return reader.read_split(SST2, SST2.train, root).texts[0][:count]


def start(shape: str) -> Pretrained:
    if shape == "minilm":
        return load_pretrained("minilm", "wordpiece", None, {})
    import os

    return Pretrained(BASE, None, load_tokenizer("gpt2", os.environ.get("ROBERTA_BPE_DIR")), "")


def hugging_face(model: RobertaModel, tokenizer: Tokenizer, folder: Path) -> tuple[Any, Any]:
    """transformers' model and tokenizer with the same weights; positions, segments and ids as BERT's or RoBERTa's."""
    import transformers

    hf: Any = transformers  # its stubs know no fast tokenizers

    state, bert = model.state_dict(), tokenizer.bpe == "bert"
    encoder = "encoder.sentence_encoder."
    words = state[f"{encoder}embed_tokens.weight"]
    layers = [name for name in state if name.endswith("fc1.weight")]
    width, inner = words.shape[1], len(state[layers[0]])
    sizes: dict[str, Any] = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers), "layer_norm_eps": 1e-5,
        "num_attention_heads": model.args.encoder_attention_heads,
    }  # fmt: skip
    positions = state[f"{encoder}embed_positions.weight"]
    if bert:
        (folder / "vocab.txt").write_bytes(tokenizer.files["bpecodes"])
        tokens: Any = hf.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True)
        vocabulary = tokens.get_vocab()
        order = torch.zeros(len(vocabulary), dtype=torch.long)
        ours = {name: i for i, name in enumerate(tokenizer.symbols, 4)}
        ours |= {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[UNK]": 3, "[MASK]": len(words) - 1}
        for name, i in vocabulary.items():
            order[i] = ours[name]
        words, positions = words[order], positions[2:]
        config: Any = hf.BertConfig(vocab_size=len(words), max_position_embeddings=len(positions), **sizes)
        config.num_labels = 2
        found: Any = hf.BertForSequenceClassification(config)
        prefix, dense, out = "bert.", "bert.pooler.dense", "classifier"
    else:
        import json

        encoder_json = json.loads(tokenizer.files["vocab.json"])
        vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": len(words) - 1}
        vocabulary |= {name: int(tokenizer.lookup[i]) for name, i in encoder_json.items() if tokenizer.lookup[i] != 3}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_bytes(tokenizer.files["merges.txt"])
        tokens = hf.RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
        config = hf.RobertaConfig(vocab_size=len(words), max_position_embeddings=len(positions), type_vocab_size=1,
                                  pad_token_id=1, bos_token_id=0, eos_token_id=2, **sizes)  # fmt: skip
        config.num_labels = 2
        found = hf.RobertaForSequenceClassification(config)
        prefix, dense, out = "roberta.", "classifier.dense", "classifier.out_proj"
    new = {
        name.replace("roberta.", prefix, 1)
        .replace("classifier.dense", dense)
        .replace("classifier.out_proj", out): value
        for name, value in to_huggingface(state, len(layers), len(words)).items()
    }
    new[f"{prefix}embeddings.word_embeddings.weight"] = words
    new[f"{prefix}embeddings.position_embeddings.weight"] = positions
    segments = f"{prefix}embeddings.token_type_embeddings.weight"
    new[segments] = torch.zeros_like(found.state_dict()[segments])
    found.load_state_dict(new)
    return found.eval(), tokens


def ours(scorer: Scorer) -> Side:
    def predict(texts: list[str]) -> list[int]:
        labels: list[int] = []
        rows = (TextRow(i, (text,)) for i, text in enumerate(texts))
        predict_rows(scorer, rows, lambda row, label, _: labels.append(int(label)), lambda: None)
        return labels

    return predict


def pipeline(model: Any, tokens: Any, texts: list[str]) -> tuple[Side, int]:
    """transformers' pipeline, and the batch size that is its fastest."""
    from transformers import pipeline as make

    classify = make("text-classification", model=model, tokenizer=tokens, device=-1)

    def predict(size: int, texts: list[str]) -> list[int]:
        return [int(one["label"].rpartition("_")[2]) for one in classify(texts, batch_size=size)]

    seconds: dict[int, float] = {}
    for size in 2 * (1, 4, 8, 16, 32):  # twice, alternating, since others use the machine too
        begin = time.perf_counter()
        predict(size, texts)
        seconds[size] = min(seconds.get(size, float("inf")), time.perf_counter() - begin)
    best = min(seconds, key=seconds.__getitem__)
    return lambda texts: predict(best, texts), best


def onnx_session(model: Any, tokens: Any, folder: Path, batch_tokens: int = 2048) -> Side:
    """ONNX runtime on the exported graph, batches sorted by length and padded, as many tokens as ours."""
    import onnxruntime as ort

    example = tokens(["a fine film", "dull"], padding=True, return_tensors="pt")
    inputs = ("input_ids", "attention_mask")
    axes = {name: {0: "batch", 1: "length"} for name in inputs}
    path = folder / "model.onnx"
    model.config.return_dict = False
    torch.onnx.export(model, tuple(example[name] for name in inputs), str(path), input_names=list(inputs),
                      output_names=["logits"], dynamic_axes={**axes, "logits": {0: "batch"}}, dynamo=False,
                      opset_version=17)  # fmt: skip
    model.config.return_dict = True
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def predict(texts: list[str]) -> list[int]:
        ids = tokens(texts, truncation=True)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        labels = np.empty(len(ids), dtype=int)
        while order:
            size = max(1, batch_tokens // len(ids[order[0]]))
            batch, order = order[:size], order[size:]
            padded = tokens.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="np")
            feed = {name: padded[name].astype(np.int64) for name in inputs}
            labels[batch] = session.run(None, feed)[0].argmax(-1)
        return labels.tolist()

    return predict


def make_side(shape: str, name: str, texts: list[str], folder: Path) -> tuple[Side, str]:
    """A side with weights that are the same in every process, and what it is called."""
    torch.manual_seed(1)
    begin = start(shape)
    model = build_model(begin, 2, {}).eval()
    with torch.no_grad():
        model.classification_heads[HEAD].out_proj.weight.mul_(30)  # a new head's answers are all the same
    if name == "lightning-glue":
        return ours(Scorer(Model(load_fine_tuned(export(model, SST2, begin.tokenizer, [], 0, folder))))), name
    hf, tokens = hugging_face(model, begin.tokenizer, folder)
    if name == "ONNX runtime":
        return onnx_session(hf, tokens, folder), name
    piped, size = pipeline(hf, tokens, texts[: max(96, len(texts) // 4)])
    return piped, f"pipeline, batch_size={size}"


def serve_side(shape: str, name: str, texts: list[str], connection: Connection) -> None:
    """A process: says what it is called, then, each time it is asked, its labels and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        side, called = make_side(shape, name, texts, Path(folder))
        connection.send((called, side(texts)))
        while connection.recv():
            begin = time.perf_counter()
            side(texts)
            connection.send(time.perf_counter() - begin)


def measure(shape: str, rounds: int, texts: list[str]) -> dict[str, float]:
    """Take the sides in turn and print a line for each; ours over each of the others, in sentences a second."""
    spawn = get_context("spawn")
    sides: dict[str, Connection] = {}
    labels: dict[str, list[int]] = {}
    for name in ("lightning-glue", "pipeline", "ONNX runtime"):
        here, there = spawn.Pipe()
        spawn.Process(target=serve_side, args=(shape, name, texts, there), daemon=True).start()
        there.close()  # so that the end of a process that fails is seen here
        called, found = here.recv()
        sides[called], labels[called] = here, found
    first, *others = labels.values()
    differ = sum(a != b for other in others for a, b in zip(first, other))
    print(f"\n{shape}: {len(texts)} sentences, {rounds} rounds; labels that differ: {differ} of {2 * len(texts)} "
          f"({sum(first)} are 1)", flush=True)  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            side.send(True)
            seconds[name].append(side.recv())
    for side in sides.values():
        side.send(False)
    best, ratios = next(iter(sides)), {}
    for name, times in seconds.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(times, seconds[best]))
        ratios[f"{shape}: ours / {name}"] = ratio
        print(
            f"  {name:28} {len(texts) / statistics.median(times):8.1f} sentences/s   ours is {ratio:.2f}x", flush=True
        )
    del ratios[f"{shape}: ours / {best}"]
    return ratios


def main() -> None:
    given = [*sys.argv[1:], *("5", "1024", "")[len(sys.argv) - 1 :]]
    rounds, count = map(int, given[:2])
    print(describe_machine(), versions("onnxruntime"), f"{torch.get_num_threads()} threads")
    texts = sentences(count)
    ratios: dict[str, float] = {}
    for shape in [given[2]] if given[2] else ["minilm", "roberta.base"]:
        ratios |= measure(shape, rounds, texts[: count if shape == "minilm" else count // 4])
    keep(ratios)


if __name__ == "__main__":
    main()

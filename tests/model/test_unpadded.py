"""The unpadded forward against fairseq's own, on the same weights and batches."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batches import packed
from helpers.project import torture
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from lightning_glue.data import binarize
from lightning_glue.data.batching import MicroBatch, Packed, moved, train_batches
from lightning_glue.data.datamodule import load_split
from lightning_glue.data.tokenizer import EOS
from lightning_glue.model import roberta as models
from lightning_glue.model import unpadded
from lightning_glue.model.dropout import dropout
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.tasks import get_task

BASE_SHAPED = {"encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12}
SMALL = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_attention_heads": 4}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "pooler_dropout": 0.0}


@pytest.fixture(scope="module")
def minilm() -> Pretrained:
    return load_pretrained("minilm", "wordpiece", None, {})


def random_model(start: Pretrained, **changes: float) -> models.RobertaModel:
    """Random weights; LayerNorms and biases away from their neutral values, so that mistakes in them show."""
    torch.manual_seed(0)
    model = models.build_model(Pretrained({"encoder_layers": 3, **changes}, None, start.tokenizer, ""), 3, {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def batch(lengths: list[int], words: int = 1000) -> Packed:
    """Random ids, ``<s> ... </s>``."""
    rows = [torch.randint(4, words, (length,)) for length in lengths]
    for row in rows:
        row[0], row[-1] = 0, EOS
    return packed(*rows)


def outputs_and_gradients(model: models.RobertaModel, tokens: Packed, *, stock: bool):
    model.zero_grad()
    outputs = (models.stock_logits if stock else models.logits)(model, tokens)
    models.task_loss(outputs, torch.arange(len(outputs), device=outputs.device) % outputs.shape[-1]).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.detach(), gradients


def assert_equal_to_stock(model: models.RobertaModel, tokens: Packed) -> None:
    assert model.runs_unpadded
    theirs, their_gradients = outputs_and_gradients(model, tokens, stock=True)
    ours, our_gradients = outputs_and_gradients(model, tokens, stock=False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(our_gradients) == set(their_gradients) == trainable  # DDP waits for each of them
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-5, atol=1e-5, msg=name)


SHAPES = {"base-shaped": BASE_SHAPED, "small": SMALL}
LENGTHS = ([40, 31, 31, 9, 2], [17], [12, 12, 12], [512, 3])
CASES = [*itertools.product((True, False), LENGTHS, SHAPES)]
EVERYDAY = [case for case in CASES if case[2] == "small" or case[:2] == (True, [40, 31, 31, 9, 2])]


@pytest.mark.parametrize(
    ("training", "lengths", "shape"), [case if case in EVERYDAY else torture(*case) for case in CASES], ids=str
)
def test_logits_and_gradients_equal_fairseqs(
    minilm: Pretrained, shape: str, lengths: list[int], training: bool
) -> None:
    model = random_model(minilm, **SHAPES[shape], **NO_DROPOUT).train(training)
    assert_equal_to_stock(model, batch(lengths))


@pytest.mark.torture
def test_real_batches_through_pretrained_weights(minilm: Pretrained, glue_dir: Path, tmp_path: Path) -> None:
    task = get_task("RTE")
    prepared = binarize.prepare(task, glue_dir, minilm.tokenizer, tmp_path, "stop")
    train = load_split(task, task.splits[0], prepared.directory, 512)
    model = models.build_model(minilm, 2, NO_DROPOUT).train()
    for rows in train_batches(train.lengths, 16, seed=1, epoch=0, pool=1)[:2]:
        assert_equal_to_stock(model, train[MicroBatch(rows, 1.0)])


def test_bf16_stays_as_near_to_float32_as_stock_does(minilm: Pretrained) -> None:
    model = random_model(minilm, **BASE_SHAPED, **NO_DROPOUT).eval()
    tokens = batch([40, 31, 9, 2])
    with torch.no_grad():
        exact = models.stock_logits(model, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            stock, ours = models.stock_logits(model, tokens), models.logits(model, tokens)
    assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_gpu_computes_fairseqs_logits_and_gradients(small_bpe: Path, lengths: list[int], shape: str) -> None:
    start = load_pretrained("random", "gpt2", str(small_bpe), {})
    model = random_model(start, **SHAPES[shape], **NO_DROPOUT).cuda().train()
    assert_equal_to_stock(model, moved(batch(lengths, 200), torch.device("cuda")))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_a_gpu_is_as_near_to_float32_as_fairseqs(
    small_bpe: Path, lengths: list[int], shape: str, dtype: torch.dtype
) -> None:
    start = load_pretrained("random", "gpt2", str(small_bpe), {})
    model = random_model(start, **SHAPES[shape], **NO_DROPOUT).cuda().train()
    tokens = moved(batch(lengths, 200), torch.device("cuda"))
    exact, exact_gradients = outputs_and_gradients(model, tokens, stock=True)
    with torch.autocast("cuda", dtype):
        stock, ours = (outputs_and_gradients(model, tokens, stock=stock) for stock in (True, False))
    assert (ours[0] - exact).abs().max() <= 2 * (stock[0] - exact).abs().max() + 1e-3
    whole = torch.stack([gradient.norm() for gradient in exact_gradients.values()]).norm()
    for name, gradient in exact_gradients.items():  # that of k_proj.bias is zero, in theory
        theirs, mine = ((found[name] - gradient).norm() for found in (stock[1], ours[1]))
        assert mine <= 2 * theirs + 1e-3 * whole, (name, float(mine), float(theirs), float(whole))


def test_models_that_differ_from_roberta_go_through_fairseqs_forward(minilm: Pretrained) -> None:
    model = random_model(minilm, **SMALL, **NO_DROPOUT, encoder_normalize_before=True, encoder_layerdrop=0.1).eval()
    assert not model.runs_unpadded
    tokens = batch([9, 5])
    assert torch.equal(models.logits(model, tokens), models.stock_logits(model, tokens))


def test_a_step_reads_no_value_of_its_batch(minilm: Pretrained) -> None:
    """On a GPU the host would wait for it. Of tensors without values whatever reads one (nonzero, item) raises."""
    model = random_model(minilm, **SMALL).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        tokens, lengths = torch.empty(40 + 9 + 17, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        features = unpadded.features(model, Packed(tokens=tokens, lengths=lengths, longest=40))
        assert features.shape == (3, 64)
        features.sum().backward()
        with pytest.raises(DynamicOutputShapeException):
            tokens.nonzero()


def test_every_forward_calls_the_head(minilm: Pretrained) -> None:
    """A request to stop is acted on there, between two batches of predictions."""
    model, called = random_model(minilm), []
    model.classification_heads[models.HEAD].register_forward_pre_hook(lambda *_: called.append(True))
    for forward in (models.logits, models.stock_logits):
        forward(model, batch([5, 3]))
    assert len(called) == 2


@pytest.mark.parametrize("p", [0.1, 0.5, 0.013])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_torchs_law(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.full((1000, 1003), 2.0, dtype=dtype, requires_grad=True)
    y = dropout(x, p, training=True)
    kept = y != 0
    n = x.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * np.sqrt(p * (1 - p) / n)
    # Neighbours share a draw: any dependence would show in the variance of sums over them.
    sums = kept[:, :1000].double().view(1000, -1, 4).sum(-1)
    assert sums.var().item() == pytest.approx(4 * p * (1 - p), rel=0.02)
    torch.testing.assert_close(
        y[kept], torch.full_like(y[kept], 2 / (1 - p)), rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=0
    )
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    assert dropout(x, p, training=False) is x


def test_dropout_moves_the_outputs_as_fairseqs_does(minilm: Pretrained) -> None:
    """Over many draws the outputs have the same mean and spread, so no place of dropout is missing or doubled."""
    places = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "pooler_dropout": 0.2}
    model = random_model(minilm, **SMALL, **places).train()
    rows = batch([12, 7])["tokens"].split([12, 7])
    tokens = packed(*rows * 1500)
    torch.manual_seed(0)
    with torch.no_grad():
        ours = models.logits(model, tokens).view(1500, 2, 3)
        theirs = models.stock_logits(model, tokens).view(1500, 2, 3)
    error = (ours.std(0) ** 2 / 1500 + theirs.std(0) ** 2 / 1500).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.5 * error).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.1, atol=0)

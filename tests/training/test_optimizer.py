"""Our optimizer and schedule against fairseq's own classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from fairseq.optim.adam import Adam
from fairseq.optim.lr_scheduler.polynomial_decay_schedule import PolynomialDecayLRSchedule
from omegaconf import OmegaConf

from lightning_glue.config import compose
from lightning_glue.model.pretrained import Pretrained, load_pretrained
from lightning_glue.model.roberta import RobertaModel, build_model
from lightning_glue.training.optimizer import FairseqAdamW, parameter_groups, polynomial_decay


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # 1e-6: eps outweighs the gradient, where torch's own AdamW differs
def test_updates_equal_fairseqs_adam(scale: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(50)
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = [FairseqAdamW([ours], fused=True, **options), Adam([theirs], **options)]
    for _ in range(20):
        gradient = torch.randn(50) * scale
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_where_it_stopped() -> None:
    def parameter() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.ones(4))

    def run(optimizer: FairseqAdamW, target: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            target.grad = torch.full((4,), 1e-6 * (step + 1))
            optimizer.step()

    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    whole, first, second = parameter(), parameter(), parameter()
    run(FairseqAdamW([whole], **options), whole, range(10))
    stopped = FairseqAdamW([first], **options)
    run(stopped, first, range(5))
    resumed = FairseqAdamW([second], **options)
    resumed.load_state_dict(stopped.state_dict())
    second.data.copy_(first.data)
    run(resumed, second, range(5, 10))
    torch.testing.assert_close(second, whole, rtol=0, atol=0)


@pytest.mark.parametrize(("warmup", "total"), [(122, 2036), (0, 10), (3, 50)])
def test_the_schedule_is_fairseqs(warmup: int, total: int) -> None:
    config = OmegaConf.create(
        {
            "lr": [2e-5],
            "warmup_updates": warmup,
            "force_anneal": None,
            "end_learning_rate": 0.0,
            "power": 1.0,
            "total_num_update": total,
        }
    )
    rates: list[float] = []
    optimizer = SimpleNamespace(set_lr=rates.append, get_lr=lambda: rates[-1])
    schedule = PolynomialDecayLRSchedule.__new__(PolynomialDecayLRSchedule)
    schedule.cfg, schedule.optimizer, schedule.lr = config, optimizer, 2e-5
    schedule.end_learning_rate, schedule.total_num_update, schedule.power = 0.0, total, 1.0
    for update in range(total + 3):
        expected = schedule.step_update(update)
        assert 2e-5 * polynomial_decay(update, warmup, total) == pytest.approx(expected, abs=1e-15)


@pytest.fixture(scope="module")
def model() -> RobertaModel:
    """Two layers of eight, random."""
    size = {"encoder_layers": 2, "encoder_embed_dim": 8, "encoder_ffn_embed_dim": 8, "encoder_attention_heads": 2}
    start = load_pretrained("minilm", "wordpiece", None, {})
    return build_model(Pretrained(size, None, start.tokenizer, ""), 2, {})


def test_biases_and_layer_norms_can_go_without_decay(model: RobertaModel) -> None:
    settings = compose(["optimizer.weight_decay=0.1"]).optimizer
    (everything,) = parameter_groups(model, settings, 1e-3)
    assert everything["weight_decay"] == 0.1
    settings.decay_biases = False
    decayed, spared = parameter_groups(model, settings, 1e-3)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(everything["params"]) == len(decayed["params"]) + len(spared["params"])


def test_layer_decay_slows_a_layer_by_its_distance_from_the_head(model: RobertaModel) -> None:
    settings = compose(["optimizer.layer_decay=0.5"]).optimizer
    rates = {id(p): group["lr"] for group in parameter_groups(model, settings, 1.0) for p in group["params"]}
    names = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    encoder = "encoder.sentence_encoder."
    assert names["classification_heads.sentence_classification_head.dense.weight"] == 1.0
    assert names[f"{encoder}layers.1.fc1.bias"] == 0.5
    assert names[f"{encoder}layers.0.self_attn.q_proj.weight"] == 0.25
    assert names[f"{encoder}embed_tokens.weight"] == names[f"{encoder}layernorm_embedding.bias"] == 0.125
    assert [group["lr"] for group in parameter_groups(model, settings, 1.0)] == [1.0, 0.5, 0.25, 0.125]

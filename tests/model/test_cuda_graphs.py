"""Steps replayed from CUDA graphs against the same kernel by kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from helpers.batches import packed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_glue.data.batching import Packed, moved
from lightning_glue.model import cuda_graphs
from lightning_glue.model import roberta as models
from lightning_glue.model.cuda_graphs import GraphedTraining, Shape
from lightning_glue.model.pretrained import load_pretrained
from lightning_glue.training.optimizer import FairseqAdamW

SHAPE = {"encoder_layers": 3, "encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_attention_heads": 4}
BATCHES = ([40, 31, 31, 9], [12, 12, 12, 12], [60, 60, 60, 60], [39, 30, 30, 11], [200, 120, 7, 130])


def a_model(bpe: Path, dropout: float, device: str = "cuda") -> models.RobertaModel:
    torch.manual_seed(0)
    rates = dict.fromkeys(("dropout", "attention_dropout", "pooler_dropout"), dropout)
    start = load_pretrained("random", "gpt2", str(bpe), {**SHAPE, "tokens_per_sample": 512})
    model = models.build_model(start, 3, rates)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.to(device).train()


def a_batch(lengths: list[int], device: str = "cuda") -> Packed:
    generator = torch.Generator().manual_seed(sum(lengths))
    batch = packed(*[torch.randint(4, 200, (length,), generator=generator) for length in lengths])
    return moved(batch, torch.device(device))


def loss_of(outputs: Tensor) -> Tensor:
    return models.task_loss(outputs, torch.arange(len(outputs), device=outputs.device) % 3).mean()


def eager(model: models.RobertaModel, batch: Packed) -> Tensor:
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16):
        return models.logits(model, batch)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within bf16's noise, which sums in another order have."""
    assert ours.keys() == theirs.keys()
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():  # that of k_proj.bias is zero, in theory
        error = (ours[name] - gradient).norm()
        assert error < 2e-2 * gradient.norm() + 1e-4 * whole, (name, float(error), float(gradient.norm()))


@given(st.lists(st.integers(1, 512), min_size=1, max_size=64))
def test_batches_are_padded_a_little_into_rows_that_fit(lengths: list[int]) -> None:
    count, longest = sum(lengths), max(lengths)
    batch = Packed(tokens=torch.zeros(count), lengths=torch.tensor(lengths), longest=longest)
    shape = Shape.of(batch, 512)
    left = shape.tokens - count
    assert 0 <= left < max(128, count / 16 + 1) and left <= shape.spare * shape.longest
    assert longest <= shape.longest <= 512 and len(shape.pad(batch["tokens"])) == shape.tokens


def test_few_shapes_serve_all_batches() -> None:
    shapes = {
        Shape.of(Packed(tokens=torch.empty(32 * mean), lengths=torch.empty(32), longest=min(512, mean + 16)), 512)
        for mean in range(8, 128)
    }
    assert len(shapes) <= 40


@pytest.mark.parametrize("count", [128, 640])
def test_rows_that_nobody_reads_change_no_output(small_bpe: Path, count: int) -> None:
    model = a_model(small_bpe, 0.0, "cpu")
    batch = a_batch([40, 31, 31, 9], "cpu")
    shape = Shape(4, count, 512, 2)  # the last one without tokens
    found = cuda_graphs._Outputs(model)(shape, shape.pad(batch["tokens"]), batch["lengths"])
    torch.testing.assert_close(found, models.logits(model, batch), rtol=1e-5, atol=1e-5)


def test_a_cpu_has_none(small_bpe: Path) -> None:
    assert not cuda_graphs.supports(a_model(small_bpe, 0.0, "cpu"), torch.bfloat16)


class _Again:
    """In place of a CUDA graph where there is no GPU: does once more what was recorded."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On the CPU all but the graphs themselves is what a GPU has."""

    def record(self: GraphedTraining, shape: Shape, tokens: Tensor, lengths: Tensor, gradient: Tensor):
        static, made = torch.zeros_like(gradient), []

        def forward() -> None:
            with torch.enable_grad():
                made[:] = [self.forward(shape, tokens, lengths)]
            static.copy_(made[0].detach())

        def backward() -> None:
            self.backward(made.pop(), gradient)

        return cuda_graphs._Captured(tokens, lengths, static, gradient, _Again(forward), _Again(backward))

    if request.param == "cpu":
        monkeypatch.setattr(GraphedTraining, "_record", record)
        monkeypatch.setattr(cuda_graphs, "_aside", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return request.param


def test_replays_give_the_outputs_and_gradients_of_eager_steps(small_bpe: Path, device: str) -> None:
    model = a_model(small_bpe, 0.0, device)
    assert cuda_graphs.supports(model, torch.bfloat16) == (device == "cuda")
    assert not cuda_graphs.supports(model, torch.float32)
    graphed = GraphedTraining(model, torch.bfloat16)
    for lengths in [*BATCHES, *BATCHES]:
        batch = a_batch(lengths, device)
        model.zero_grad()
        outputs = eager(model, batch)
        loss_of(outputs).backward()
        theirs = gradients(model)
        model.zero_grad()
        ours = graphed(batch)
        loss_of(ours).backward()
        torch.testing.assert_close(ours.float(), outputs.float(), rtol=2e-2, atol=2e-2)
        assert_near(gradients(model), theirs)
        with torch.no_grad():  # as an optimizer's step: the next replay sees it
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)


def test_gradients_are_taken_as_they_are(small_bpe: Path, device: str) -> None:
    """No copy of each of them in every step."""
    model = a_model(small_bpe, 0.0, device)
    graphed = GraphedTraining(model, torch.bfloat16)
    loss_of(graphed(a_batch([9, 8], device))).backward()
    own = {gradient.data_ptr() for gradient in graphed.gradients}
    assert {p.grad.data_ptr() for p in model.parameters() if p.grad is not None} == own


def test_micro_batches_add_up(small_bpe: Path, device: str) -> None:
    model = a_model(small_bpe, 0.0, device)
    graphed = GraphedTraining(model, torch.bfloat16)
    for _ in range(2):
        sums = []
        for forward in (lambda batch: eager(model, batch), graphed):
            model.zero_grad()
            for lengths in BATCHES:
                loss_of(forward(a_batch(lengths, device))).backward()
            sums.append(gradients(model))
        assert_near(sums[1], sums[0])


@pytest.mark.cuda
def test_masks_follow_the_seed_and_no_other_thing(small_bpe: Path) -> None:
    """The same when the graphs are made in this very step, were made before, and differ from step to step."""
    model = a_model(small_bpe, 0.3)

    def steps(graphed: GraphedTraining, seeds: list[int]) -> list[Tensor]:
        found = []
        for seed, lengths in zip(seeds, BATCHES):
            model.zero_grad()
            torch.manual_seed(seed)
            outputs = graphed(a_batch(lengths))
            loss_of(outputs).backward()
            found += [outputs.detach().clone(), model.encoder.sentence_encoder.layers[0].fc1.weight.grad.clone()]
        return found

    graphed = GraphedTraining(model, torch.bfloat16)
    seeds = list(range(len(BATCHES)))
    first, second = steps(graphed, seeds), steps(graphed, seeds)
    fresh = steps(GraphedTraining(model, torch.bfloat16), seeds)
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, fresh))
    others = steps(graphed, [seed + 100 for seed in seeds])
    assert not any(map(torch.equal, first, others))
    torch.manual_seed(0)
    batch = a_batch(BATCHES[0])
    assert not torch.equal(graphed(batch), graphed(batch))


@pytest.mark.cuda
def test_dropout_moves_the_outputs_as_fairseqs_does(small_bpe: Path) -> None:
    model = a_model(small_bpe, 0.2)
    graphed = GraphedTraining(model, torch.bfloat16)
    batch = a_batch([12, 7] * 200)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        theirs = torch.cat([models.stock_logits(model, batch).float().view(200, 2, 3) for _ in range(10)])
    ours = torch.cat([graphed(batch).detach().float().view(200, 2, 3) for _ in range(10)])
    error = (ours.std(0) ** 2 / len(ours) + theirs.std(0) ** 2 / len(ours)).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * error + 2e-3).all()
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.15, atol=0)


def test_more_shapes_than_graphs_go_on_kernel_by_kernel(
    small_bpe: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "_MOST", 1)
    model = a_model(small_bpe, 0.0, device)
    graphed = GraphedTraining(model, torch.bfloat16)
    for lengths in BATCHES:
        torch.testing.assert_close(
            graphed(a_batch(lengths, device)).float(),
            eager(model, a_batch(lengths, device)).float(),
            rtol=2e-2,
            atol=2e-2,
        )
    assert len(graphed._captured) == 1


def test_without_room_for_graphs_a_training_goes_on_kernel_by_kernel(
    small_bpe: Path, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = a_model(small_bpe, 0.0, device)
    graphed, record = GraphedTraining(model, torch.bfloat16), GraphedTraining._record
    made: list[Shape] = []

    def lacks(self: GraphedTraining, shape: Shape, *tensors: Tensor) -> cuda_graphs._Captured:
        if made:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")
        made.append(shape)
        return record(self, shape, *tensors)

    monkeypatch.setattr(GraphedTraining, "_record", lacks)
    sums = []
    for forward in (lambda batch: eager(model, batch), graphed):
        model.zero_grad()
        for lengths in BATCHES:  # the first is replayed, the gradients of all add up
            loss_of(forward(a_batch(lengths, device))).backward()
        sums.append(gradients(model))
    assert_near(sums[1], sums[0])
    (said,) = caplog.messages
    assert said == (
        "steps are not replayed from CUDA graphs, which takes longer: CUDA out of memory. Tried to allocate 2 GiB"
    )


@pytest.mark.cuda
@pytest.mark.parametrize("replays", [False, True])
def test_a_step_waits_for_nothing(small_bpe: Path, replays: bool) -> None:
    model = a_model(small_bpe, 0.1)
    forward = GraphedTraining(model, torch.bfloat16) if replays else lambda batch: eager(model, batch)
    adam = FairseqAdamW(model.parameters(), lr=1e-3, eps=1e-6, fused=True)

    def step(batch: Packed) -> None:
        adam.zero_grad()
        loss_of(forward(batch)).backward()
        adam.step()

    batches = [a_batch(lengths) for lengths in BATCHES]
    for batch in batches:  # graphs are made, and Adam's state
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Wrapped(nn.Module):
    def __init__(self, model: models.RobertaModel, replays: bool) -> None:
        super().__init__()
        self.model = model
        self.graphed = [GraphedTraining(model, torch.bfloat16)] if replays else []

    def forward(self, batch: Packed) -> Tensor:
        return self.graphed[0](batch) if self.graphed else eager(self.model, batch)


def _distributed(rank: int, bpe: Path, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for replays in (False, True):
        wrapped = _Wrapped(a_model(bpe, 0.0), replays)
        module = nn.parallel.DistributedDataParallel(
            wrapped, gradient_as_bucket_view=True, broadcast_buffers=False, device_ids=[0]
        )
        for lengths in BATCHES[rank : rank + 3]:
            wrapped.model.zero_grad()
            with module.no_sync():
                loss_of(module(a_batch(lengths))).backward()
            loss_of(module(a_batch(lengths[::-1]))).backward()
        found.append({name: gradient.cpu() for name, gradient in gradients(wrapped.model).items()})
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.cuda
def test_ddp_averages_what_is_replayed(small_bpe: Path, tmp_path: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    mp.spawn(_distributed, (small_bpe, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for theirs, ours in ranks:
        assert_near(ours, theirs)
    assert all(torch.equal(ranks[0][1][name], ranks[1][1][name]) for name in ranks[0][1])

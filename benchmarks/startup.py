"""From the start of the process to the end of the first optimizer step: ``lightning_glue.train`` against
``fairseq-hydra-train``.

    GLUE_DIR=... ROBERTA_BPE_DIR=... python benchmarks/startup.py [ROUNDS]

Both fine-tune RTE (or the sample's) on the CPU from one checkpoint of roberta.base's shape and from the same arrays,
each with its defaults: fairseq with its tutorial's config in float32, this project in bf16 where the processor has it.
The data are preprocessed and the files in the page cache before: one round goes unmeasured. Each side is its own
command line in its own process, stopped as soon as the first step is done.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = 0.5
BASE = {
    "encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12,
    "max_positions": 512,
}  # fmt: skip


class Phases:
    """Wall times at which the phases of a start end; :meth:`finish` prints them and ends the process."""

    def __init__(self) -> None:
        self.ends: dict[str, float] = {}

    def end(self, name: str) -> None:
        self.ends.setdefault(name, time.time())

    def after(self, owner: Any, function: str, name: str) -> None:
        """Have ``owner.function`` end the phase ``name`` when it returns."""
        original: Callable[..., Any] = getattr(owner, function)

        def wrapped(*args: Any, **options: Any) -> Any:
            result = original(*args, **options)
            self.end(name)
            return result

        setattr(owner, function, wrapped)

    def finish(self, examples: int, parameters: int) -> None:
        self.end("first step")
        print(json.dumps({"ends": self.ends, "examples": examples, "parameters": parameters}), flush=True)
        os._exit(0)  # what follows is not measured


def start_ours() -> None:
    """``python -m lightning_glue.train`` up to its first step."""
    phases = Phases()
    from lightning_glue import train
    from lightning_glue.training import run

    original, callbacks = run.build, run.make_callbacks

    def build(*args: Any, **options: Any) -> Any:
        from lightning_glue.data import binarize  # noqa: F401 - the ones it imports itself
        from lightning_glue.model import pretrained, roberta
        from lightning_glue.training import module  # noqa: F401 - the ones it imports itself

        phases.end("imports")
        phases.after(pretrained, "load_pretrained", "checkpoint")
        phases.after(roberta, "build_model", "model")
        built = original(*args, **options)
        phases.end("data")
        return built

    def with_stop(*args: Any, **options: Any) -> list[Any]:
        import pytorch_lightning as pl

        class Stop(pl.Callback):
            def on_train_start(self, *_: object) -> None:
                phases.end("tracking, trainer")

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
                encoder = module.model.encoder.sentence_encoder
                phases.finish(len(batch["rows"]), sum(parameter.numel() for parameter in encoder.parameters()))

        return [Stop(), *callbacks(*args, **options)]

    run.build = build
    run.make_callbacks = with_stop
    phases.end("command line")
    train.main()


def start_theirs() -> None:
    """``fairseq-hydra-train`` up to its first step."""
    phases = Phases()
    from fairseq.trainer import Trainer
    from fairseq_cli import hydra_train

    phases.end("imports")
    phases.after(Trainer, "__init__", "model")
    phases.after(Trainer, "load_checkpoint", "checkpoint")
    phases.after(Trainer, "get_train_iterator", "data")
    step = Trainer.train_step

    def train_step(self: Trainer, samples: list[dict[str, Any]], *args: Any, **options: Any) -> None:
        step(self, samples, *args, **options)
        encoder = self.model.encoder.sentence_encoder
        parameters = sum(parameter.numel() for parameter in encoder.parameters())
        phases.finish(sum(len(sample["target"]) for sample in samples), parameters)

    Trainer.train_step = train_step
    hydra_train.cli_main()


def write_checkpoint(path: Path) -> None:
    """A random model of roberta.base's shape and vocabulary, as fairseq saves one."""
    from lightning_glue.data.tokenizer import load_tokenizer
    from lightning_glue.export.fairseq import export
    from lightning_glue.model.pretrained import Pretrained
    from lightning_glue.model.roberta import build_model
    from lightning_glue.tasks import get_task

    start = Pretrained(BASE, None, load_tokenizer("gpt2", os.environ.get("ROBERTA_BPE_DIR")), "")
    folder = path.parent / "export"
    export(build_model(start, 2, {}), get_task("RTE"), start.tokenizer, ["entailment", "not_entailment"], 0, folder)
    (folder / "checkpoint_best.pt").rename(path)
    shutil.rmtree(folder)


def commands(checkpoint: Path, data: Path) -> dict[str, list[str]]:
    """Both command lines, run by this file."""
    import fairseq

    config = Path(fairseq.__file__).parent / "examples/roberta/config/finetuning"
    options = {
        "task.data": data, "checkpoint.restore_file": checkpoint, "checkpoint.no_save": True, "common.fp16": False,
        "common.cpu": True, "+roberta.max_positions": 512, "+roberta.encoder_layers": 12,
        "+roberta.encoder_embed_dim": 768, "+roberta.encoder_ffn_embed_dim": 3072,
        "+roberta.encoder_attention_heads": 12,
    }  # fmt: skip
    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    ours = ["--task", "RTE", "--model", str(checkpoint), "--data", source, "--gpus", "0"]
    theirs = ["--config-dir", str(config), "--config-name", "rte"]
    theirs += [f"{key}={value}" for key, value in options.items()]
    here = [sys.executable, __file__]
    return {"ours": [*here, "ours", *ours], "theirs": [*here, "theirs", *theirs]}


def preprocess(folder: Path) -> None:
    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    command = [sys.executable, "-m", "lightning_glue.preprocess", "--task", "RTE", "--data", source]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """Start a side; its phases in seconds and what the step worked on."""
    folder.mkdir(exist_ok=True)
    begin = time.time()
    from common import ENVIRONMENT

    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    told = [line for line in result.stdout.splitlines() if line.startswith('{"ends"')]
    if not told:
        sys.exit(f"{' '.join(command)} did not come to its first step:\n{result.stdout}{result.stderr}")
    found = json.loads(told[-1])
    ends = sorted(found["ends"].items(), key=lambda item: item[1])
    starts = [begin, *(end for _, end in ends)]
    found["phases"] = {name: end - start for (name, end), start in zip(ends, starts)}
    found["total"] = found["ends"]["first step"] - begin
    return found


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    from common import describe_machine
    from records import keep

    print(describe_machine())
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(folder / "model.pt")
        preprocess(folder)
        sides = commands(folder / "model.pt", folder / "RTE-bin")
        for number in range(rounds + 1):
            for name, command in sides.items():
                found = run(command, folder / name)
                if number:  # the first round fills the caches
                    results[name].append(found)
    work = {(found["examples"], found["parameters"]) for side in results.values() for found in side}
    assert len(work) == 1, f"the two sides did different work: {work}"
    for name, side in results.items():
        phases = {phase: statistics.median(found["phases"][phase] for found in side) for phase in side[0]["phases"]}
        listed = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items())
        print(f"{name}: first step done after {statistics.median(found['total'] for found in side):.2f} s ({listed})")
    ratio = statistics.median(a["total"] / b["total"] for a, b in zip(results["ours"], results["theirs"]))
    print(
        f"ours takes {ratio:.2f} of fairseq's time, target {TARGET} or less; load {os.getloadavg()[0]:.1f} at the end"
    )
    keep({"to the first step, ours / fairseq's": ratio})


if __name__ == "__main__":
    side = {"ours": start_ours, "theirs": start_theirs}.get(sys.argv[1]) if len(sys.argv) > 1 else None
    if side:
        del sys.argv[1]
        side()
    else:
        main()

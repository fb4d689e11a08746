"""What the unpadded forward does to a training with dropout: dev metrics of pairs of trainings, seed by seed.

    GLUE_DIR=... python benchmarks/paired.py [--task STS-B] [--seeds 5] [key=value ...]

Each pair has the same seed, start, batches and recipe; one side computes with fairseq's own forward, the other without
padding; an epoch each, unless trainer.max_epochs says otherwise. Their dropout masks differ, as they do between two
seeds, so single pairs differ; their mean should not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

from common import describe_machine
from records import keep

from lightning_glue.training.build import Warm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="STS-B", help="default: %(default)s")
    parser.add_argument("--model", default="minilm", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def train(args: argparse.Namespace, seed: int, stock: bool, warm: Warm) -> float:
    """The selection metric of the best evaluation."""
    import pytorch_lightning as pl

    from lightning_glue import config as configuration
    from lightning_glue.model.roberta import logits, stock_logits
    from lightning_glue.training import module as glue_module
    from lightning_glue.training.build import build
    from lightning_glue.training.callbacks import BestEvaluation
    from lightning_glue.training.devices import resolve_precision
    from lightning_glue.training.run import prepare_process

    source = "glue" if os.environ.get("GLUE_DIR") else "sample"
    config = configuration.compose(
        ["trainer.gpus=0", "trainer.max_epochs=1", f"seed={seed}", *args.overrides],
        task=args.task,
        model=args.model,
        data=source,
    )
    prepare_process(config)
    pl.seed_everything(seed, verbose=False)
    module, data, _ = build(config, warm)
    glue_module.logits = stock_logits if stock else logits
    best = BestEvaluation(module.task.selection_metric)
    pl.Trainer(
        accelerator="cpu", max_epochs=config.trainer.max_epochs, max_steps=config.trainer.max_steps,
        precision=resolve_precision(config.trainer, "cpu"), callbacks=[best], logger=False,
        use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    ).fit(module, data)  # fmt: skip
    return best.values[module.task.selection_metric]


def main() -> None:
    args = parse_arguments()
    print(describe_machine())
    warm = Warm()
    differences = []
    for seed in range(1, args.seeds + 1):
        stock, unpadded = (train(args, seed, stock, warm) for stock in (True, False))
        differences.append(unpadded - stock)
        print(
            f"seed {seed}: fairseq's forward {stock:.4f}, unpadded {unpadded:.4f}, {differences[-1]:+.4f}", flush=True
        )
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    print(f"{args.task}: mean difference {mean:+.4f}, standard error {error:.4f} ({len(differences)} pairs)")
    keep({"mean difference": mean, "standard error": error})
    sys.exit(0 if abs(mean) <= 3 * max(error, 1e-6) else "the difference is more than three standard errors")


if __name__ == "__main__":
    main()

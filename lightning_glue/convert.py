"""Write a fine-tuned model in another format: ``python -m lightning_glue.convert RUN --to hf OUT``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_glue.config import compose
from lightning_glue.errors import UserError
from lightning_glue.utils.console import Parser, command, run_main
from lightning_glue.utils.quick_imports import quick_imports
from lightning_glue.utils.redact import first_line

if TYPE_CHECKING:
    from lightning_glue.inference.finetuned import FineTuned
    from lightning_glue.tracking.model_card import Facts, Seeds

FORMATS = ("hf", "fairseq", "onnx")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.convert",
        description="Write a fine-tuned model for transformers (hf), fairseq, or any ONNX runtime, with its card.",
    )
    parser.add_argument("model", metavar="RUN|DIR|FILE", help="MLflow run id, models:/name@alias, a fairseq or Hugging "
                        "Face directory, or a *.pt or *.ckpt in one")  # fmt: skip
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--to", metavar="FORMAT", required=True, choices=FORMATS, help=" or ".join(FORMATS))
    parser.add_argument("--int8", action="store_true", help="onnx: also model_quantized.onnx, with int8 weights")
    parser.add_argument("--data", metavar="DATA", help="onnx: what it is compared on (default: the run's own)")
    parser.add_argument("--uri", metavar="URI", help="tracking store (default: MLFLOW_TRACKING_URI, else ./mlflow.db)")
    args = parser.parse_args()
    if args.int8 and args.to != "onnx":
        parser.error("--int8 is an option of --to onnx")
    return args


def load(reference: str, uri: str | None) -> FineTuned:
    """The model behind a run id, a registered model or a path."""
    from lightning_glue.inference.training_checkpoint import load_any
    from lightning_glue.tracking.artifacts import locate

    return load_any(locate(reference, uri))


def facts_of(fine_tuned: FineTuned, name: str, uri: str | None) -> tuple[Facts, Seeds, str]:
    """What the card says: what the export says of itself, and what the store knows of its run; with what is missing."""
    from mlflow.exceptions import MlflowException

    from lightning_glue.tracking import model_card
    from lightning_glue.tracking.card_of_run import completed
    from lightning_glue.tracking.client import connect, is_missing, store_uri
    from lightning_glue.training.card_facts import of_model

    path = fine_tuned.path
    folders = [path, path.parent, path.absolute().parent.parent / "fairseq"]
    facts = next(filter(None, map(model_card.read, folders)), None) or of_model(fine_tuned, name)
    if not facts.run:
        return facts, {}, "its export names no run, so the card has no seeds beside it"
    try:
        if is_missing(store_uri(uri)):
            raise UserError("no store there")
        client = connect(uri, retries=1)
        return *completed(facts, client, client.get_run(facts.run)), ""
    except (MlflowException, OSError, UserError) as error:
        return (
            facts,
            {},
            f"run {facts.run} was not looked up ({first_line(error, 120)}): the card has its own seed alone",
        )


def write(fine_tuned: FineTuned, form: str, out: Path, facts: Facts, seeds: Seeds, *, int8: bool = False) -> None:
    """Write the folder ``out``, whole or not at all. No folder of this machine is named in it."""
    from lightning_glue.export import fairseq, huggingface
    from lightning_glue.tasks import without_folders
    from lightning_glue.tracking import model_card
    from lightning_glue.utils.files import new_folder

    model, task, encoder = fine_tuned.model.cpu(), without_folders(fine_tuned.task), fine_tuned.tokenizer
    public = {key: value for key, value in fine_tuned.settings.items() if key not in ("GLUE_DIR", "data.glue_dir")}
    with new_folder(out.absolute()) as part:
        if form == "fairseq":
            fairseq.export(model, task, encoder, list(task.labels), 0, part, public)
        elif form == "hf":
            huggingface.export(model, task, encoder, part, public)
        else:
            from lightning_glue.export import onnx

            onnx.export(model, task, encoder, part, public, int8=int8)
        model_card.write(part, facts, form, seeds)


def compare(fine_tuned: FineTuned, out: Path, data: str | None) -> None:
    """Print how the ONNX models do beside the model itself on the whole dev set; where that is not here, say so."""
    from lightning_glue.training.onnx_comparison import compare, table

    try:
        found = compare(fine_tuned, out, compose(["trainer.gpus=0"], data=data), {"data.source"} if data else set())
    except UserError as error:
        print(f"not compared on a dev set: {error}")
        return
    print("\n".join(table(found)))


def main() -> None:
    args = parse_arguments()
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out} exists already; remove it or choose another folder")
    if args.to == "onnx":
        from lightning_glue.export import onnx

        onnx.check_installed()
    with quick_imports():
        from lightning_glue.training.messages import quiet

    quiet()
    fine_tuned = load(args.model, args.uri)
    facts, seeds, missing = facts_of(fine_tuned, Path(args.model).name, args.uri)
    if missing:
        print(f"note: {missing}", file=sys.stderr)
    write(fine_tuned, args.to, args.out, facts, seeds, int8=args.int8)
    print(f"wrote {args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}")
    if args.to == "onnx":
        compare(fine_tuned, args.out, args.data)
    elif args.to == "hf":
        evaluate = command("python", "-m", "lightning_glue.evaluate", str(args.out))
        print(f"transformers: pipeline('text-classification', '{args.out}'); here: {evaluate}")


if __name__ == "__main__":
    run_main(main)

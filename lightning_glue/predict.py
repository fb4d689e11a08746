"""What a fine-tuned model says of texts or of its test splits: ``python -m lightning_glue.predict MODEL [FILE]``."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from lightning_glue.config import compose, quote
from lightning_glue.config.description import is_description
from lightning_glue.errors import DataError, UserError
from lightning_glue.utils.console import Parser, progress_bar, run_main
from lightning_glue.utils.files import make_folder, new_file
from lightning_glue.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from lightning_glue.data.text_stream import TextRow

_OVERRIDE = re.compile(r"[+~]*[A-Za-z_][\w.]*=")
_REPORTED = 20  # bad rows that are told one by one; the end tells how many there were
_OF_FILES = ("format", "text", "pair", "keep", "precision", "calibrated", "out_format")
_OF_SPLITS = ("task", "data")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="python -m lightning_glue.predict",
        usage="%(prog)s MODEL [FILE|-] [options] [key=value ...]",
        description="Predict the texts of FILE; without FILE the unlabelled splits of the model's task, as the GLUE "
        "leaderboard wants them.",
        epilog="A FILE whose name looks like key=value is given as ./NAME. Rows keep their order; a bad one is told on "
        "stderr, and its label is empty.",
    )
    parser.add_argument("model", metavar="MODEL", help="run id, models:/name@alias, directory, *.pt or *.ckpt; without "
                        "FILE a run id or a directory")  # fmt: skip
    parser.add_argument("rest", nargs="*", metavar="key=value", help="FILE: texts to predict, -: standard input; "
                        "without one any key of conf/ (default: the run's own)")  # fmt: skip
    parser.add_argument("--gpus", metavar="N", help="0: CPU; 1: one GPU (default: one if there is one)")
    parser.add_argument("--out", metavar="PLACE", help="with FILE: a file, or - for standard output (default); "
                        "without: a folder (default: predictions)")  # fmt: skip
    files = parser.add_argument_group("with FILE")
    files.add_argument("--format", metavar="FORMAT", help="tsv, csv, jsonl or lines (default: by the suffix; -: lines)")
    files.add_argument("--text", metavar="COLUMN", help="of the text (default: text, sentence, of a pair "
                       "sentence1, or the task's own)")  # fmt: skip
    files.add_argument("--pair", metavar="COLUMN", help="of the second (default: text_pair, sentence2 or the task's)")
    files.add_argument("--keep", metavar="COLUMN", action="append", help="carry it through, such as an id; repeatable")
    files.add_argument("--out-format", metavar="FORMAT", choices=("tsv", "jsonl"),
                       help="tsv or jsonl (default: by --out's suffix, else tsv)")  # fmt: skip
    files.add_argument("--precision", metavar="NAME", choices=("auto", "32-true", "bf16-mixed", "16-mixed"),
                       help="32-true, bf16-mixed, 16-mixed, or auto (default): the run's where the processor "
                       "has it")  # fmt: skip
    files.add_argument("--calibrated", action="store_true", default=None,
                       help="probabilities with the temperature fitted on the run's dev set")  # fmt: skip
    splits = parser.add_argument_group("without FILE")
    splits.add_argument("--task", metavar="TASK", help="AX for a model of MNLI (default: the model's own task)")
    splits.add_argument("--data", metavar="DATA", help="glue or sample, or the description of files of your own "
                        "(default: what the run was trained on)")  # fmt: skip
    args = parser.parse_intermixed_args()
    files_given = [word for word in args.rest if not _OVERRIDE.match(word)]
    args.overrides = [word for word in args.rest if _OVERRIDE.match(word)]
    if len(files_given) > 1:
        parser.error(f"{len(files_given)} files ({', '.join(files_given[:3])}); expected one, or - for a pipe")
    if mistaken := [word for word in args.overrides if os.path.exists(word)]:
        parser.error(f"{mistaken[0]} is taken for key=value; the file of that name is ./{mistaken[0]}")
    args.file = files_given[0] if files_given else None
    _check(parser, args)
    return args


def _check(parser: Parser, args: argparse.Namespace) -> None:
    """End with a line where an option is of the other kind of use."""
    names = _OF_FILES if args.file is None else _OF_SPLITS
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if args.file is None:
        if given:
            parser.error(f"{given[0]} is for the texts of a file; name the FILE, or - for standard input")
        return
    if given := [*given, *args.overrides]:
        parser.error(f"{given[0]} is for the task's own test splits, not for {args.file}; leave one of them out")
    if args.gpus not in (None, "0", "1"):
        parser.error(f"--gpus {args.gpus}; expected 0 or 1")


def main() -> None:
    args = parse_arguments()
    if args.file is None:
        predict_splits(args)
    else:
        predict_file(args)


def predict_splits(args: argparse.Namespace) -> None:
    """Leaderboard files of the task's unlabelled splits."""
    given = [] if args.gpus is None else [f"trainer.gpus={quote(args.gpus)}"]
    source = None if is_description(args.data) else args.data
    config = compose(given + args.overrides, data=source)
    with quick_imports():
        from lightning_glue.training import evaluation
        from lightning_glue.training.messages import quiet

    quiet()
    out = Path(args.out or "predictions")
    make_folder(out, "--out")
    given_keys = evaluation.given_keys(args.overrides, source)
    loaded = evaluation.load(args.model, config, given_keys, args.task, args.data, scores=False, predicts=True)
    if loaded.note:
        print(f"note: {loaded.note}", file=sys.stderr)
    for path in evaluation.predict(loaded.config, loaded.fine_tuned, loaded.data, out):
        print(f"wrote {path}")


def predict_file(args: argparse.Namespace) -> None:
    """A line of output for each row of a file, or of standard input."""
    with _opened(args.file) as stream, ExitStack() as stack:
        from lightning_glue.data.text_stream import Layout, check_layout, format_of, read_rows
        from lightning_glue.pipeline.loading import load_model

        device = None if args.gpus is None else ("cuda" if args.gpus == "1" else "cpu")
        model = load_model(args.model, None, device=device, calibrated=bool(args.calibrated))
        from lightning_glue.inference.scorer import Scorer
        from lightning_glue.inference.stream import Writer, predict_rows

        name = "stdin" if args.file == "-" else args.file
        layout = Layout(
            model.task, args.format or format_of(args.file), args.text or "", args.pair or "", args.keep or ()
        )
        check_layout(layout)
        scorer = Scorer(model, args.precision or "auto")
        file = stack.enter_context(_target(args.out or "-"))
        as_json = (args.out_format or format_of(args.out or "")) == "jsonl"
        writer = Writer(file, model.task, layout.keep, as_json=as_json)
        advance = stack.enter_context(progress_bar(f"predict {name}", None, "rows"))
        told = _Told(name)

        def write(row: TextRow, said: Any, probabilities: Any) -> None:
            told.tell(row)
            writer.write(row, said, probabilities)

        def flush() -> None:
            file.flush()
            if file is sys.stdout and getattr(file, "lost", None):
                raise _OutputLost

        try:
            counts = predict_rows(scorer, _readable(read_rows(stream, name, layout), name), write, flush, advance)
        except _OutputLost:
            return  # run_main says so
        writer.begin()
    cut = f", {counts.truncated} cut to {model.max_tokens} tokens" if counts.truncated else ""
    bad = f", {counts.bad} of them bad and without a prediction" if counts.bad else ""
    print(f"{counts.rows} rows{bad}{cut}", file=sys.stderr)


class _OutputLost(Exception):
    """Standard output takes nothing more: whoever read it has gone, as ``| head`` does, or its disk is full."""


def _readable(rows: Iterator[TextRow], name: str) -> Iterator[TextRow]:
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}; expected a file of texts, or - for stdin") from None
    with stream:
        if os.path.isdir(file):
            raise DataError(f"{file} is a folder; expected a file of texts")
        yield stream


@contextmanager
def _target(out: str) -> Iterator[IO[str]]:
    """Standard output, or a file that appears once all is written."""
    if out == "-":
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        yield sys.stdout
        return
    path = Path(out)
    if path.is_dir():
        raise UserError(f"--out {out} is a folder; expected a file, or - for standard output")
    make_folder(path.parent, "--out")
    try:
        with new_file(path) as file:
            yield file
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None


class _Told:
    """Bad rows on stderr."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0

    def tell(self, row: TextRow) -> None:
        if not row.fault:
            return
        self.count += 1
        if self.count <= _REPORTED:
            print(f"{self.name}:{row.line}: {row.fault}", file=sys.stderr)
        if self.count == _REPORTED:
            print(f"{self.name}: further bad rows are only counted", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)

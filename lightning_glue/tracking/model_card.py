"""A model card: what is to be known of a model, as the README.md of an export, and as a registered version's text.

A function from plain values to Markdown. In front stands what the Hugging Face hub reads of a card, in YAML.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_glue import __version__
from lightning_glue.utils.files import new_file

CARD, FACTS = "README.md", "model_card.json"  # in the folder of an export: the card, and what it was made of
_MOST = 5000  # characters of a version's description in MLflow
_CLASSES = 12  # of a confusion matrix that is shown whole
_OFTEN = 10  # confusions that are listed of a larger one

# The hub's identifiers; any other start has weights of a licence that is not known here.
_LICENCES = {"minilm": "apache-2.0", "roberta.base": "mit", "roberta.large": "mit", "roberta.large.mnli": "mit"}
_HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}
_STARTS = {
    "minilm": "all-MiniLM-L6-v2 (sentence-transformers), its weights in fairseq's RoBERTa",
    "roberta.base": "RoBERTa base (Liu et al. 2019)",
    "roberta.large": "RoBERTa large (Liu et al. 2019)",
    "roberta.large.mnli": "RoBERTa large fine-tuned on MNLI (Liu et al. 2019)",
    "random": "random weights",
}


@dataclass(frozen=True)
class Facts:
    """What a card says. What is empty is not known, and the card says that or leaves it out.

    Attributes:
        name: of the model or its run.
        meanings: what each of ``labels`` says, where these are numbers.
        source: ``model.source`` of the configuration; of a path its last part.
        data: ``glue``, ``sample`` or what own data is called.
        splits: digest (SHA-256) and, where known, rows of each file by split.
        recipe: the configuration that decides what comes out, by dotted key.
        scores: of the best evaluation by name, such as ``dev/accuracy``.
        scale, offset: output * scale + offset is a regression's score.
        confusion: by dev set, counts (true label, predicted label).
        epsilon: of LayerNorm.
        minutes: wall time times devices.
    """

    name: str
    task: str
    problem_type: str
    labels: list[str]
    texts: int = 1
    meanings: list[str] = field(default_factory=list)
    scale: float = 1.0
    offset: float = 0.0
    source: str = ""
    start_sha256: str = ""
    data: str = ""
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: str = ""
    step: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    majority: float | None = None
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    max_tokens: int = 512
    epsilon: float = 1e-5
    precision: str = ""
    devices: str = ""
    minutes: float | None = None
    run: str = ""
    commit: str = ""


Seeds = Mapping[str, Mapping[str, float]]  # scores by name, by seed


def write(folder: Path, facts: Facts, form: str, seeds: Seeds | None = None) -> None:
    """Write the card, and what it was made of, into an export's folder."""
    with new_file(folder / CARD) as file:
        file.write(card(facts, form, seeds))
    with new_file(folder / FACTS) as file:
        file.write(json.dumps(asdict(facts), indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> Facts | None:
    """What the card of an export was made of; None where there is none, or it cannot be read."""
    try:
        found = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        known = {one.name for one in fields(Facts)}
        return Facts(**{key: value for key, value in found.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def card(facts: Facts, form: str, seeds: Seeds | None = None) -> str:
    """The card in Markdown.

    Args:
        form: ``fairseq``, ``hf`` or ``onnx``.
        seeds: scores of the runs with the same configuration but the seed, this one's among them.
    """
    import yaml

    front = yaml.safe_dump(front_matter(facts, form), sort_keys=False, allow_unicode=True, width=1000)
    sections = [f"# {facts.name}", _summary(facts), *_sections(facts, seeds or {}, form)]
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def description(facts: Facts, seeds: Seeds | None = None, first: str = "") -> str:
    """The card as a registered version's text: without front matter, as many sections as there is room for.

    Args:
        first: a line in front.
    """
    text = "\n\n".join(part for part in (first, _summary(facts)) if part)
    for section in _sections(facts, seeds or {}, ""):
        if section and len(text) + len(section) + 2 <= _MOST:
            text += f"\n\n{section}"
    return text[:_MOST]


def front_matter(facts: Facts, form: str) -> dict[str, Any]:
    """What the hub's ``ModelCardData`` has of it."""
    library = {"fairseq": "fairseq", "hf": "transformers", "onnx": "onnx"}[form]
    glue = facts.data in ("glue", "sample")
    found: dict[str, Any] = {
        **({"language": "en"} if glue else {}),
        "license": licence(facts.source) or "unknown",
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": ["lightning-glue", "roberta", facts.problem_type],
    }
    measured = {name: value for name, value in facts.scores.items() if not name.endswith("/loss")}
    if not measured:
        return found
    kinds = [_hub_metric(name) for name in measured]
    split = next(iter(measured)).partition("/")[0]
    data = {"type": "glue" if facts.data == "glue" else "other", "name": _data_name(facts), "split": split}
    metrics = [
        {"type": kind, "value": round(value, 6), "name": name} for kind, (name, value) in zip(kinds, measured.items())
    ]
    result = {"task": {"type": "text-classification"}, "dataset": data, "metrics": metrics}
    return found | {"metrics": [*dict.fromkeys(kinds)], "model-index": [{"name": facts.name, "results": [result]}]}


def licence(source: str) -> str:
    """The hub's identifier of the licence of the weights that a model starts from; empty: not known."""
    return _LICENCES.get(source, "")


def _hub_metric(name: str) -> str:
    plain = name.rpartition("/")[2]
    return _HUB_METRICS.get(plain, plain)


def _data_name(facts: Facts) -> str:
    return {"glue": f"GLUE {facts.task}", "sample": f"generated sentences in the form of {facts.task}"}.get(
        facts.data, facts.data or facts.task
    )


def _summary(facts: Facts) -> str:
    what = {
        "regression": "gives a score to",
        "multi_label_classification": "gives any number of labels to",
    }.get(facts.problem_type, "gives one of the labels to")
    start = _STARTS.get(facts.source, facts.source)
    begins = f", from {start}" if start else ""
    return f"Fine-tuned with lightning-glue {__version__} on {_data_name(facts)}{begins}. It {what} {_inputs(facts)}."


def _inputs(facts: Facts) -> str:
    return "a pair of texts" if facts.texts == 2 else "a text"


def _sections(facts: Facts, seeds: Seeds, form: str) -> list[str]:
    return [
        _labels(facts),
        _scores(facts, seeds),
        *(_confusion(facts, split, counts) for split, counts in facts.confusion.items()),
        _data(facts),
        _limits(facts, form),
        _training(facts),
        _licence_text(facts),
        _recipe(facts),
    ]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(columns: list[str], rows: list[list[object]]) -> str:
    lines: list[list[object]] = [[*columns], ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _labels(facts: Facts) -> str:
    if not facts.labels:
        return ""
    names = [f"{label} ({meaning})" for label, meaning in zip(facts.labels, facts.meanings)] or facts.labels
    shown = ", ".join(names[:50]) + (f" and {len(names) - 50} more" if len(names) > 50 else "")
    return f"## Labels\n\nIn the order of the outputs: {shown}."


def _scores(facts: Facts, seeds: Seeds) -> str:
    if not facts.scores:
        return "## Scores\n\nNot known."
    known = {name: [values[name] for values in seeds.values() if name in values] for name in facts.scores}
    rows: list[list[object]] = []
    for name, value in facts.scores.items():
        rows.append([name, f"{value:.4f}", *_spread(known[name])])
    said = "One seed: how far others are from it is not known."
    if len(seeds) > 1:
        said = (
            f"Runs with the same configuration and data but the seed: {len(seeds)} (seeds {', '.join(sorted(seeds))})."
        )
    majority = "" if facts.majority is None else f" The most frequent class alone: {facts.majority:.4f}."
    head = ["dev score", "this model", "median", "spread", "seeds"]
    return f"## Scores\n\n{_table(head, rows)}\n\n{said}{majority}"


def _spread(scores: list[float]) -> list[object]:
    """Median, range and number of several seeds' scores; of one alone there is no spread."""
    if len(scores) < 2:
        return ["", "", 1]
    return [f"{statistics.median(scores):.4f}", f"{min(scores):.4f} to {max(scores):.4f}", len(scores)]


def _confusion(facts: Facts, split: str, counts: list[list[int]]) -> str:
    names = facts.labels
    if len(names) <= _CLASSES:
        rows: list[list[object]] = [[name, *row[: len(names)]] for name, row in zip(names, counts)]
        return f"## Confusion, {split}\n\n{_table(['true, predicted:', *names], rows)}"
    found = [
        (count, names[true], names[said])
        for true, row in enumerate(counts) for said, count in enumerate(row[: len(names)]) if count and true != said
    ]  # fmt: skip
    found.sort(key=lambda one: -one[0])
    listed: list[list[object]] = [[true, said, count] for count, true, said in found[:_OFTEN]]
    return f"## Most frequent confusions, {split}\n\n{_table(['true', 'predicted', 'rows'], listed)}"


def _data(facts: Facts) -> str:
    rows: list[list[object]] = [
        [name, split.get("rows", ""), f"`{split.get('sha256', '')}`"] for name, split in facts.splits.items()
    ]
    if not rows:
        return "## Data\n\nNot known."
    return f"## Data\n\n{_data_name(facts)}.\n\n{_table(['split', 'rows', 'SHA-256'], rows)}"


def _limits(facts: Facts, form: str) -> str:
    lines = [f"- {_inputs(facts).capitalize()} of more than {facts.max_tokens} tokens, special ones included, is cut."]
    if facts.data == "sample":
        lines.append("- Its data was generated to try the program out: it is of no use for anything else.")
    if facts.data in ("glue", "sample"):
        lines.append("- English alone.")
    lines.append(
        "- Not tested: texts of other kinds than its dev set's, other languages, fairness between groups of people, "
        "texts made to mislead it."
    )
    if facts.problem_type == "regression" and (facts.scale, facts.offset) != (1, 0) and form in ("hf", "onnx"):
        plus = f" plus {facts.offset:g}" if facts.offset else ""
        lines.append(f"- Its output times {facts.scale:g}{plus} is the score on the task's scale.")
    if facts.epsilon != 1e-5 and form == "fairseq":
        lines.append(
            f"- fairseq itself computes LayerNorm with an epsilon of 1e-5; this model has {facts.epsilon:g}, so its "
            "outputs differ there in the third digit."
        )
    return "## Limits\n\n" + "\n".join(lines)


def _training(facts: Facts) -> str:
    cost = "" if facts.minutes is None else f"{facts.minutes:.1f} device minutes"
    where = f" on {facts.devices}" if facts.devices else ""
    how = f" in {facts.precision}" if facts.precision else ""
    parts = {
        "cost": f"{cost}{where}{how}" if cost else "",
        "best evaluation": "" if facts.step is None else f"step {facts.step}",
        "seed": facts.seed,
        "run": facts.run,
        "commit": facts.commit,
        "start weights, SHA-256": facts.start_sha256,
    }
    lines = [f"- {name}: {value}" for name, value in parts.items() if value]
    return "## Training\n\n" + "\n".join(lines) if lines else ""


def _licence_text(facts: Facts) -> str:
    known = {"mit": "MIT", "apache-2.0": "Apache-2.0"}.get(licence(facts.source))
    said = f"The weights it started from are under {known}." if known else "The licence of its weights is not known."
    return f"## Licence\n\n{said} The data has terms of its own."


def _recipe(facts: Facts) -> str:
    import yaml

    if not facts.recipe:
        return ""
    text = yaml.safe_dump(facts.recipe, sort_keys=True, allow_unicode=True, width=1000)
    return f"## Recipe\n\n```yaml\n{text}```"

"""The documents: their Python code, run as it stands, twice, with equal answers; what they name is there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from helpers.project import ROOT, run, torture
from helpers.zygote import FORKED

from lightning_glue.data import sources
from lightning_glue.tasks import TASKS

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
HERE = re.compile(r"\b(?:lightning_glue|tests|benchmarks|conf|docs|\.github)/[\w./-]*\w")
SPAN = re.compile(r"`([\w./-]+(?:/|\.(?:py|ya?ml|toml|md|lock|txt)))(?:::([\w.]+))?`")
BLOCK = re.compile(r"^```(?:python|py)\b[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Runs the code twice in new namespaces. An answer is what it printed, the value of its last expression and that of a
# probe: what the code computed before it was rounded to a word.
TWICE = """
import ast, contextlib, io, json, sys

code, probe = json.loads(sys.argv[1])
*body, last = ast.parse(code).body
assert isinstance(last, ast.Expr), "ends in nothing to look at"
answers = []
for _ in range(2):
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(ast.Module(body, []), "body", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "last", "eval"), names)
    answers.append([said.getvalue(), repr(value), repr(eval(probe, names))])
print(json.dumps(answers))
"""


def blocks() -> list[tuple[str, str]]:
    """Document and code of every Python block."""
    return [(path.name, code) for path in DOCUMENTS for code in BLOCK.findall(path.read_text(encoding="utf-8"))]


@pytest.fixture(scope="session")
def bpe_dir(small_bpe: Path) -> Path:
    return small_bpe


@pytest.fixture(scope="module")
def trained(cache: Path, bpe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A folder with a registered model of RTE, and the fairseq directory of its run."""
    folder = tmp_path_factory.mktemp("readme")
    glue = sources.glue_directory(TASKS["RTE"], "sample", None)
    flags = ["--task", "RTE", "--model", "tiny", "--gpus", "0", "trainer.max_steps=2"]
    run("lightning_glue.train", *flags, cwd=folder, GLUE_DIR=str(glue), ROBERTA_BPE_DIR=str(bpe_dir))
    version = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").get_model_version_by_alias(
        "glue-rte", "champion"
    )
    (export,) = folder.glob(f"mlruns/*/{version.run_id}/artifacts/fairseq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBERTA_BPE_DIR", str(bpe_dir))  # for what is trained by the code itself
        yield folder, export


def answers(code: str, probe: str, folder: Path) -> list[list[str]]:
    result = subprocess.run(
        [sys.executable, "-c", FORKED + TWICE, json.dumps([code, probe])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def fairseq_answers(code: str, trained: tuple[Path, Path]) -> list[str]:
    assert "path/to/fairseq" in code
    code = code.replace("path/to/fairseq", str(trained[1]))
    first, second = answers(code, "roberta.predict('sentence_classification_head', tokens).tolist()", trained[0])
    assert first == second
    assert first[0].strip() in TASKS["RTE"].labels
    return first


def pyfunc_answers(code: str, trained: tuple[Path, Path]) -> list[str]:
    first, second = answers(code, "model.predict(pandas.DataFrame({'text': ['a'], 'text_pair': ['b']}))", trained[0])
    assert first == second
    assert "probability_entailment" in first[1]
    return first


def library_answers(code: str, trained: tuple[Path, Path]) -> list[str]:
    """With a model and data that need no minutes."""
    for usual, small in {
        'model="minilm", data="glue", max_epochs=3': 'model="tiny", data="sample", gpus=0, max_steps=2',
        "trials=20": 'trials=1, model="tiny", data="sample", gpus=0, max_epochs=1',
    }.items():
        assert code.count(usual) == 1
        code = code.replace(usual, small)
    first, second = answers(code, "model.predict('a', 'b').probabilities.tolist()", trained[0])
    assert first == second
    assert "optimizer.lr" in first[1]
    return first


def own_data_answers(code: str, trained: tuple[Path, Path]) -> list[str]:
    rows = "A fine film.,5\nA dull film.,1\n" * 20
    (trained[0] / "films.csv").write_text(f"review,stars\n{rows}")
    assert code.count('model="minilm"') == 1
    code = code.replace('model="minilm"', 'model="tiny", gpus=0, max_steps=2')
    first, second = answers(code, "load(run).predict('a').probabilities.tolist()", trained[0])
    assert first == second
    assert "classes=('1', '5')" in first[1]
    return first


RUNNERS: dict[str, Callable[[str, tuple[Path, Path]], list[str]]] = {
    "from fairseq.models.roberta import RobertaModel": fairseq_answers,
    "import mlflow": pyfunc_answers,
    "import lightning_glue as lg": library_answers,
    "from lightning_glue import fit, load": own_data_answers,
}


@pytest.mark.parametrize(("document", "code"), [torture(*one) if "lg.search" in one[1] else one for one in blocks()])
def test_python_code_gives_the_same_answer_twice(document: str, code: str, trained: tuple[Path, Path]) -> None:
    first_line = code.splitlines()[0]
    assert first_line in RUNNERS, f"{document}: add how to run the code that begins with {first_line!r}"
    RUNNERS[first_line](code, trained)


def test_all_code_is_found() -> None:
    assert len(blocks()) == sum(path.read_text(encoding="utf-8").count("```py") for path in DOCUMENTS) >= len(RUNNERS)
    assert {code.splitlines()[0] for _, code in blocks()} == set(RUNNERS)


def test_a_model_in_training_mode_would_be_found_out(trained: tuple[Path, Path]) -> None:
    (code,) = (code for _, code in blocks() if "roberta.eval()" in code)
    with pytest.raises(AssertionError):
        fairseq_answers("".join(line for line in code.splitlines(True) if "eval()" not in line), trained)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_commands_and_targets_that_a_document_names_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    wrong = [name for name in HERE.findall(text) if not (ROOT / name).exists()]
    wrong += [name for name in re.findall(r"-m,? (lightning_glue[\w.]+)", text) if not module(name).is_file()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong += [f"make {name}" for name in re.findall(r"[`\n]make ([a-z-]+)", text) if name not in targets]
    assert not wrong


def module(name: str) -> Path:
    return (ROOT / name.replace(".", "/")).with_suffix(".py")


def test_what_the_flows_go_through_is_there() -> None:
    """CONTRIBUTING.md names files, from the root or the package, and functions, classes and methods in them."""
    found = SPAN.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len([name for _, name in found if name]) > 40
    wrong = []
    for file, name in found:
        path = next((folder / file for folder in (ROOT, ROOT / "lightning_glue") if (folder / file).exists()), None)
        parts = name.split(".") if name else []
        if path is None or not all(is_defined(part, path.read_text(encoding="utf-8")) for part in parts):
            wrong.append((file, name))
    assert not wrong


def is_defined(name: str, code: str) -> bool:
    return bool(
        re.search(
            rf"^(?: {{4}})?(?:def {name}\(|class {name}\b|{name}(?:: [^=]*)?(?: =|$)|{name}: )", code, re.MULTILINE
        )
    )


def test_the_list_of_folders_is_complete() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listing = text.partition("## Where things are")[2].split("```")[1].splitlines()
    columns = [(line.startswith(" "), re.split(r" {2,}", line.strip())[0]) for line in listing if line]
    named = {within: " ".join(names for inside, names in columns if inside == within) for within in (False, True)}
    package = {name for name in re.findall(r"[\w.]+(?:/|\.py)", named[True])}
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "lightning_glue").glob("[!_.]*")}
    assert package == there
    assert all((ROOT / name).is_dir() for name in re.findall(r"\w+/", named[False]))

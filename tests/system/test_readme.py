"""The Python code of the documents, run as it stands, twice, with equal answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from helpers.project import ROOT, run

from lightning_glue.data import sources
from lightning_glue.tasks import TASKS

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
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
        [sys.executable, "-c", TWICE, json.dumps([code, probe])],
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


RUNNERS: dict[str, Callable[[str, tuple[Path, Path]], list[str]]] = {
    "from fairseq.models.roberta import RobertaModel": fairseq_answers,
    "import mlflow": pyfunc_answers,
    "import lightning_glue as lg": library_answers,
}


@pytest.mark.parametrize(("document", "code"), blocks())
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

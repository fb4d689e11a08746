"""What stands in for a module is nothing but that module to whoever uses it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_glue.utils.deferred import Deferred, DeferredCompiler, deferred

SHAPES = '''
class Square:
    """A square."""

def scaled(factor):
    def decorate(function):
        return lambda *args: factor * function(*args)
    return decorate

class Namespace:
    doubled = staticmethod(lambda: 2)
'''


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that nobody has imported; its name."""
    (tmp_path / "some_shapes.py").write_text(SHAPES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_shapes"
    sys.modules.pop("some_shapes", None)


def test_what_was_taken_of_a_module_is_the_modules_once_it_is_called(shapes: str) -> None:
    with deferred(Deferred(shapes)):
        import some_shapes

        scaled, doubled, square = some_shapes.scaled, some_shapes.Namespace.doubled, some_shapes.Square
    assert shapes not in sys.modules
    assert not isinstance(1, square) and shapes not in sys.modules
    assert doubled() == 2 and scaled(3)(abs)(-2) == 6
    assert shapes in sys.modules
    assert isinstance(square(), square) and not isinstance(1, square)
    assert type(square()) is sys.modules[shapes].Square


def test_a_decorator_waits_for_the_first_call(shapes: str) -> None:
    with deferred(Deferred(shapes)):
        import some_shapes

        @some_shapes.scaled(10)
        def area(side: int) -> int:
            """Of a square."""
            return side * side

    assert area.__doc__ == "Of a square." and shapes not in sys.modules
    assert area(3) == 90 and shapes in sys.modules


def test_modules_that_are_there_already_stay() -> None:
    import colorsys
    import concurrent.futures as futures

    with deferred(Deferred("colorsys"), Deferred("concurrent.futures")):
        assert sys.modules["colorsys"] is colorsys and sys.modules["concurrent.futures"] is futures


def test_stand_ins_go_away_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import xml

    for name in ("wave", "xml.dom"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(KeyError), deferred(Deferred("wave"), Deferred("xml.dom")):
        import wave

        assert isinstance(wave, Deferred) and isinstance(xml.dom, Deferred)
        raise KeyError
    from xml.dom import minidom

    assert "wave" not in sys.modules and minidom.parseString("<a/>").documentElement.tagName == "a"


COMPILING = """
import sys
from lightning_glue.utils.deferred import DeferredCompiler, deferred
with deferred(DeferredCompiler()):
    import pytorch_lightning as pl
    import torch
    {within}
    kept_away = torch.compiler.disable(lambda x: x + 1)
from pytorch_lightning.utilities.compile import _maybe_unwrap_optimized
from pytorch_lightning.demos.boring_classes import BoringModel

model = BoringModel()
assert _maybe_unwrap_optimized(model) is model
assert ("torch._dynamo" in sys.modules) == {imported}, "who asks imports nothing"
compiled = torch.compile(model, backend="eager")
assert _maybe_unwrap_optimized(compiled) is model
assert kept_away(1) == 2
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
assert type(sys.modules["torch._dynamo"]).__name__ == "module"
"""


@pytest.mark.parametrize(
    ("within", "imported"),
    [
        pytest.param("", False, id="unused"),
        pytest.param("import torch._dynamo.config", True, id="a part is imported", marks=pytest.mark.torture),
        pytest.param("from torch._dynamo import config", True, id="a part is taken", marks=pytest.mark.torture),
    ],
)
def test_torchs_compiler_is_there_for_who_compiles(within: str, imported: bool) -> None:
    program = COMPILING.format(within=within, imported=imported)
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_what_is_kept_from_the_compiler_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    stand_in = DeferredCompiler()
    with deferred(stand_in):
        call = stand_in.disable(divmod, True, reason="a test")
        assert call(7, 2) == (3, 1) and call.__name__ == "divmod"
    assert call(7, 2) == (3, 1) and "torch._dynamo" not in sys.modules

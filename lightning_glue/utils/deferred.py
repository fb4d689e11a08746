"""Modules that others import and never use."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any


class Deferred(ModuleType):
    """Stands in for a module while others import it. What they take of it, called later, imports the module itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # torch._dynamo asks for it

    def __getattr__(self, name: str) -> DeferredAttribute:
        if name.startswith("__"):
            raise AttributeError(name)
        return DeferredAttribute(self.__name__, name)


class DeferredAttribute:
    """What others take of a module that is not imported, and what they take of that."""

    def __init__(self, module: str, path: str) -> None:
        self._module, self._path = module, path

    def __getattr__(self, name: str) -> DeferredAttribute:
        if name.startswith("__"):
            raise AttributeError(name)
        return DeferredAttribute(self._module, f"{self._path}.{name}")

    def __instancecheck__(self, instance: object) -> bool:
        """Of nothing, while nobody has imported the class."""
        module = imported(self._module)
        return module is not None and isinstance(instance, attrgetter(self._path)(module))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Within :func:`deferred`: a decorator, which nobody needs yet either."""
        if isinstance(sys.modules.get(self._module), Deferred):
            return functools.partial(self._decorate, args, options)
        return attrgetter(self._path)(importlib.import_module(self._module))(*args, **options)

    def _decorate(self, args: Any, options: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def decorated(*given: Any, **named: Any) -> Any:
            return self(*args, **options)(function)(*given, **named)

        return decorated


class DeferredCompiler(Deferred):
    """Stands in for torch._dynamo, of which Lightning takes two things; who takes another imports it.

    Lightning asks of each model whether ``torch.compile`` made it, and keeps a method of its own from being compiled.
    While nobody has imported that module nothing was compiled, and nothing is.
    """

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        self.__path__ = _PartsOf(self.__name__)  # type: ignore[assignment]  # a list, says ModuleType

    def __getattr__(self, name: str) -> Any:
        if name == "OptimizedModule" or name.startswith("__"):
            return super().__getattr__(name)
        return getattr(_import(self.__name__), name)

    def disable(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """As ``torch._dynamo.disable``, from when there is something to keep away."""
        disabled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            nonlocal disabled
            if disabled is None:
                module = imported(self.__name__)
                if module is None:
                    return function(*given, **named)
                disabled = module.disable(function, *args, **options)
            return disabled(*given, **named)

        return call


class _PartsOf(Iterable[str]):
    """A package's path, which is looked at when somebody imports a part of it; then it is needed after all."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> Iterator[str]:
        return iter(_import(self._name).__path__)


def _import(name: str) -> ModuleType:
    """A module itself, in the place of what stands in for it."""
    if isinstance(sys.modules.get(name), Deferred):
        del sys.modules[name]
    return importlib.import_module(name)


def imported(name: str) -> ModuleType | None:
    """A module itself, where somebody has imported it."""
    module = sys.modules.get(name)
    return None if isinstance(module, Deferred) else module


@contextmanager
def deferred(*modules: Deferred) -> Iterator[None]:
    """These in the place of those that are not imported yet, within this run; parents before their children."""
    stand_ins = {module.__name__: module for module in modules if module.__name__ not in sys.modules}
    for name, stand_in in stand_ins.items():
        sys.modules[name] = stand_in
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:  # else whoever imports it looks as above, as scipy and torch do
            setattr(sys.modules[parent], child, stand_in)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            parent, _, child = name.rpartition(".")
            if parent in sys.modules and vars(sys.modules[parent]).get(child) is stand_in:
                delattr(sys.modules[parent], child)
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]

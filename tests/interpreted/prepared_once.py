"""Triton's interpreter, made quicker for the tests."""

from collections.abc import Callable
from typing import Any


def prepare_once() -> None:
    """Makes the interpreter prepare Triton's language once a launch and kind of module.

    It does so again at every call of a device function, to the same effect: a third of the time of most kernels.
    """
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    kinds: dict[int, frozenset[int]] = {}  # by the globals of a function: the modules of the language among them
    prepared: set[frozenset[int]] = set()  # in this launch

    def prepare_new(function: Callable[..., Any]) -> Any:
        names = function.__globals__
        if id(names) not in kinds:
            language = (interpreter.tl, interpreter.tl.core)
            kinds[id(names)] = frozenset(id(value) for value in names.values() if any(value is m for m in language))
        kind = kinds[id(names)]
        if kind not in prepared:
            prepared.add(kind)
            return prepare(function)
        return None

    def launch_prepared(*args: Any, **kwargs: Any) -> Any:
        prepared.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_new, launch_prepared

"""Triton's interpreter, made quicker for the tests."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any


def prepare_once() -> None:
    """Makes the interpreter prepare Triton's language once a launch and kind of module.

    It does so again at every call of a device function, to the same effect: a third of the time of most kernels.
    """
    from triton.runtime import interpreter

    _leave_out_what_is_repeated(interpreter)
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


def _leave_out_what_is_repeated(interpreter: Any) -> None:
    """Much of the time goes into what has no effect or is always the same: results and errors stay what they are."""
    core, builder = interpreter.tl.core, interpreter.interpreter_builder

    # Every sum, difference and product of integers is computed anew in 64 bits for an assertion that it fits, which
    # the interpreter then skips, as it does all assertions unless its option `debug` is on.
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)

    # NumPy's type of a type of Triton's: from a table made at every call.
    numpy_type = cache(interpreter._get_np_dtype)
    pointer = interpreter._get_np_dtype(core.pointer_type(core.int8))

    def remembered_numpy_type(kind: Any) -> Any:
        return pointer if isinstance(kind.scalar, core.pointer_type) else numpy_type(kind.scalar)

    interpreter._get_np_dtype = remembered_numpy_type

    # The shape of a tensor: a tuple of constants, each an object with a type.
    @cache
    def sizes(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    def init(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = sizes(tuple(kind.shape) if kind.is_block() else ())

    core.tensor.__init__ = init

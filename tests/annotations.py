"""Check annotated types and shapes at every call, as jaxtyping's own decorator does, in less processor time.

jaxtyping's import hook decorates every function with `jaxtyping.jaxtyped`, which generates two functions for each one
when its module is imported, binds the arguments of every call, and checks the parameters twice. `install` replaces the
decorator: functions without annotations stay as they are, others are prepared at their first call, by beartype alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_CONTEXT = jaxtyping.jaxtyped  # as a context, it gives the axes' names of one call their sizes
_CONF = BeartypeConf(violation_type=jaxtyping.TypeCheckError)
# Closures are defined again and again. Code alone is no key, because code of two files may be equal.
_HINTS: dict[tuple[str, str, types.CodeType], dict[str, Any]] = {}


def install(packages: list[str]) -> None:
    """Check every annotated function and dataclass of `packages` that is imported from here on."""
    jaxtyping.jaxtyped = lambda *, typechecker: checked
    jaxtyping.install_import_hook(packages, "beartype.beartype")


def checked(target: Any) -> Any:
    """Return a function that checks what its annotations say, or a dataclass whose fields are checked."""
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and "__init__" in vars(target):
            target.__init__ = checked(target.__init__)
        return target
    if not inspect.isfunction(target) or not target.__annotations__:
        return target
    typed: Callable[..., Any] | None = None

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal typed
        if typed is None:
            typed = beartype(_with_resolved_hints(target), conf=_CONF)
        with _CONTEXT("context"):
            return typed(*args, **kwargs)

    return call


def _with_resolved_hints(function: types.FunctionType) -> types.FunctionType:
    """Copy a function, with types in place of the strings in its annotations.

    A name that exists for type checkers alone leaves its parameter unchecked; beartype would refuse the function.
    """
    key = (function.__module__, function.__qualname__, function.__code__)
    if key not in _HINTS:
        _HINTS[key] = {n: _resolved(hint, function) for n, hint in function.__annotations__.items()}
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, closure=function.__closure__
    )
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    copy.__annotations__ = dict(_HINTS[key])
    return copy


def _resolved(hint: Any, function: types.FunctionType) -> Any:
    holder = types.SimpleNamespace(__annotations__={"hint": hint})
    try:
        return get_type_hints(holder, function.__globals__, include_extras=True)["hint"]
    except Exception:
        return Any

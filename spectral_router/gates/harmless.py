"""Whether a gate's forward touches nothing but what it is given, so that a copy of it can be tried on noise."""

from __future__ import annotations

import dis
import functools
import logging
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

# their functions file nothing anywhere
_PURE = {
    "torch",
    "math",
    "einops",
    "typing",
    "collections",
    "functools",
    "builtins",
    "transformers",
    "numpy",
    "copy",
    "warnings",
}
_PLAIN = (int, float, complex, str, bytes, bool, type(None), frozenset, logging.Logger, type(Ellipsis))
_LEAVES = {"STORE_GLOBAL", "DELETE_GLOBAL"}


def touches_nothing(module: nn.Module) -> bool:
    """By the code of its classes and of what they call: no global, closure or class attribute that can be changed."""
    return all(_class_is_pure(type(part)) for part in module.modules())  # type: ignore[arg-type]


@functools.lru_cache(maxsize=512)
def _class_is_pure(kind: type) -> bool:
    return _pure(kind, set())


def _pure(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return True
    seen.add(id(value))
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0] in _PURE
    if (getattr(value, "__module__", None) or "").partition(".")[0] in _PURE and (callable(value) or isinstance(value, type)):
        return True
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        return all(_pure(part, seen) for part in (value.fget, value.fset) if part is not None)
    if isinstance(value, types.FunctionType):
        return _function_is_pure(value, seen)
    if isinstance(value, type):
        own = [kind for kind in value.__mro__ if kind.__module__.partition(".")[0] not in _PURE]
        return all(_pure(v, seen) for kind in own for name, v in vars(kind).items() if not _of_python(name, v))
    if isinstance(value, tuple):
        return all(_pure(part, seen) for part in value)
    return isinstance(value, _PLAIN) or type(value).__module__ in ("torch", "enum", "typing")


def _of_python(name: str, value: Any) -> bool:
    return (name.startswith("__") and not isinstance(value, types.FunctionType)) or isinstance(
        value, (types.GetSetDescriptorType, types.MemberDescriptorType, types.BuiltinFunctionType)
    )


def _function_is_pure(function: Any, seen: set[int]) -> bool:
    cells = [cell.cell_contents for cell in function.__closure__ or () if not _is_empty(cell)]
    if not all(_pure(value, seen) for value in (*cells, *(function.__defaults__ or ()))):
        return False
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            if instruction.opname in _LEAVES:
                return False
            if instruction.opname == "IMPORT_NAME" and str(instruction.argval).partition(".")[0] not in _PURE:
                return False
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name = instruction.argval
                if name in function.__globals__ and not _pure(function.__globals__[name], seen):
                    return False
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False

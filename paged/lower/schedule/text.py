"""The text of a program: the same in every process, so that a tuning file can name the program by it.

Terms of this package are written out in full. A user's function is named by its module, its name and a digest of its
bytecode, together with the numbers and functions that it closes over. An array is named by shape and dtype. So two
programs with the same text may differ in the values of arrays, or in globals that their functions read. They share a
tuned schedule, which is safe, because every schedule gives the same attention.
"""

import dataclasses
import functools
import hashlib
import inspect
import sys
import types
from typing import Any

import jax
import numpy as np

from ..program import Program

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# The text of a closure is replaced by a digest when it is longer than this.
_LONGEST = 100


def program_text(program: Program) -> str:
    """One line. Programs with the same line share a tuned schedule.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=16, window=8)
    >>> print(program_text(Program.from_spec(spec)))
    Program(2, 1, 16, 0.25, (), And((Causal(), Window(8))), False)
    """
    return _text(program, ())


def _text(value: Any, within: tuple[Any, ...]) -> str:
    """The text of a value. ``within`` are the values around it: meeting one of them again gives "itself"."""
    if isinstance(value, _PLAIN):
        return repr(value)
    if any(value is other for other in within):
        return "itself"
    of = functools.partial(_text, within=(*within, value))
    if isinstance(value, tuple | list):
        return f"({', '.join(map(of, value))}{',' if len(value) == 1 else ''})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return f"{_class_text(type(value), within)}({', '.join(map(of, fields))})"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(of, (value.func, *value.args, *sorted(value.keywords.items()))))})"
    if isinstance(value, types.MethodType):
        return f"{of(value.__func__)}.of({of(value.__self__)})"
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    function = inspect.unwrap(value) if callable(value) else value
    if isinstance(function, types.FunctionType):
        return _function_text(function, (*within, value))
    return _class_text(type(value), within)


def _class_text(kind: type, within: tuple[Any, ...]) -> str:
    """The name of a class. For a class from outside of this package also a digest of its ``__call__``."""
    if kind.__module__.split(".")[0] == __name__.split(".")[0]:
        return kind.__qualname__
    call = inspect.getattr_static(kind, "__call__", None)
    inner = f"#{_function_text(call, within)}" if isinstance(call, types.FunctionType) else ""
    return f"{kind.__module__}.{kind.__qualname__}{inner}"


def _function_text(function: types.FunctionType, within: tuple[Any, ...]) -> str:
    defaults = (*(function.__defaults__ or ()), *sorted((function.__kwdefaults__ or {}).items()))
    held = ", ".join(_text(value, within) for value in (*_cells(function), *defaults))
    held = held if len(held) <= _LONGEST else _digest(held)
    code = _digest(_code_text(function.__code__))
    return f"{function.__module__}.{function.__qualname__}#{code}" + (f"[{held}]" if held else "")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cells(function: types.FunctionType) -> list[Any]:
    """The values that a function closes over, without variables that are not set yet."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            continue
    return values


def _code_text(code: types.CodeType) -> str:
    constants = [_code_text(c) if isinstance(c, types.CodeType) else _constant_text(c) for c in code.co_consts]
    return repr((sys.implementation.cache_tag, code.co_code.hex(), code.co_names, code.co_varnames, constants))


def _constant_text(constant: Any) -> str:
    """A constant's text; a set is sorted, because its order differs between processes."""
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)

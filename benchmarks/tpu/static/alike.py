"""Operations that are alike: libtpu makes the code of such only once, and dumps it under one of their names."""

import re
from collections.abc import Iterable

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][\w-]*)\((.*)$", re.M)
_COMPUTATION = re.compile(r"^%(\S+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_METADATA = re.compile(r", metadata=\{[^}]*\}")
_NAME = re.compile(r"%[^\s,(){}]+")
_CALLED = re.compile(r"(?:calls|to_apply)=%([^\s,]+)")


class Alike:
    """What makes two operations of an optimised program the same code: everything but names and places."""

    def __init__(self, hlo: str):
        self._bodies = {name: _plain(body) for name, body in _COMPUTATION.findall(hlo)}
        found = _INSTRUCTION.findall(hlo)
        self._shapes = {name: shape for name, shape, _, _ in found}
        self._lines = {name: (shape, opcode, rest) for name, shape, opcode, rest in found}

    def first(self, name: str, others: Iterable[str]) -> str | None:
        """The first of ``others`` that is alike; ``None`` where none is."""
        wanted = self._key(name)
        return None if wanted is None else next((other for other in others if self._key(other) == wanted), None)

    def _key(self, name: str) -> tuple[object, ...] | None:
        if name not in self._lines:
            return None
        shape, opcode, rest = self._lines[name]
        operands, _, attributes = rest.partition(")")
        shapes = [self._shapes.get(operand[1:]) for operand in _NAME.findall(operands)]
        bodies = [self._bodies.get(called, called) for called in _CALLED.findall(rest)]
        return (opcode, shape, *shapes, _plain(attributes), *bodies)


def _plain(text: str) -> str:
    return _NAME.sub("%", _METADATA.sub("", text))

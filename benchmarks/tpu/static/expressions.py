"""Scalar instructions that only compute, as Python expressions over the functions of `words`."""

import re
from collections.abc import Sequence

_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_OF_FLOATS = {"sadd.": "({0} + {1})", "ssub.": "({0} - {1})", "smul.": "({0} * {1})"}
# By the opcode's beginning; where several fit, the longest.
_OF_WORDS = {
    "smov": "{0}",
    "sadd.": "wrap({0} + {1})",
    "ssub.": "wrap({0} - {1})",
    "smul.u32": "wrap({0} * {1})",
    "smul.s32": "wrap({0} * {1})",
    "smulhi": "wrap((unsigned({0}) * unsigned({1})) >> 32)",
    "sshll": "shift_left({0}, {1})",
    "sshllo": "shift_left_ones({0}, {1})",
    "sshrl": "shift_right({0}, {1})",
    "sshra": "shift_right_sign({0}, {1})",
    "sand": "both({0}, {1})",
    "sor": "({0} | {1})",
    "sxor": "({0} ^ {1})",
    "smin": "min({0}, {1})",
    "smax": "max({0}, {1})",
    "smin.u32": "wrap(min(unsigned({0}), unsigned({1})))",
    "smax.u32": "wrap(max(unsigned({0}), unsigned({1})))",
    "sclz": "(32 - unsigned({0}).bit_length())",
    "sc.u32": "(unsigned({0}) + unsigned({1}) > 0xFFFFFFFF)",  # the carry of a sum
    "reloc": "0",
    "scalar_parameter_address": "0",
}
_OF_PREDICATES = {
    "por": "({0} or {1})",
    "pand": "({0} and {1})",
    "pnand": "not ({0} and {1})",
    "pnor": "not ({0} or {1})",
    "pxor": "({0} != {1})",
    "pneg": "not {0}",
    "pnot": "not {0}",
    "pmov": "{0}",
}
_HIGH_PRODUCT = re.compile(r"^smul\.[us]32.*hi")


def of_predicates(opcode: str, values: Sequence[str]) -> str | None:
    """The expression of an instruction on predicates; ``None`` for other instructions."""
    template = _OF_PREDICATES.get(opcode)
    return template.format(*values, "False") if template else None


def of_words(opcode: str, values: Sequence[str]) -> str | None:
    """The expression of an instruction on words or floats; ``None`` where it is not known."""
    if opcode.startswith("scmp."):
        _, order, kind = opcode.split(".")[:3]
        sides = [f"unsigned({value})" if kind.startswith("u") else value for value in values]
        return f"{sides[0]} {_COMPARISONS[order]} {sides[1]}"
    opcode = "smulhi" if _HIGH_PRODUCT.match(opcode) else opcode
    table = _OF_FLOATS if ".f32" in opcode and opcode.startswith(tuple(_OF_FLOATS)) else _OF_WORDS
    fitting = [start for start in table if opcode.startswith(start)]
    template = table[max(fitting, key=len)] if fitting else None
    return template.format(*values) if template else None

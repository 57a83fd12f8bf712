"""An extension of griffe for `make docs`: doctests become blocks of code, and a class's constants are no arguments."""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

_EXAMPLE = re.compile(r"(?:^ *>>> .*\n?(?:^ *\S.*\n?)*)+", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring with each doctest, and what it prints, fenced as Python's console."""
    fenced = _EXAMPLE.sub(lambda match: f"\n```pycon\n{match[0].rstrip()}\n```\n", text)
    return re.sub(r"(?<!`)``(?!`)([^`\n]+)``(?!`)", r"`\1`", fenced)


class Doctests(griffe.Extension):
    """Rewrites the docstring of every object that is read, and says which fields belong to a class."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Griffe knows ``ClassVar[...]`` alone, and shows a plain ``ClassVar`` as an argument of a dataclass."""
        if str(attr.annotation).split(".")[-1] == "ClassVar":
            attr.labels = {"class-attribute"}

"""Packages that only the extra `models` brings, imported when they are first used."""

import importlib
import types

_FOR = {
    "gguf": "reads GGUF files",
    "jinja2": "renders chat templates",
    "tokenizers": "turns text into tokens",
}


def package(name: str) -> types.ModuleType:
    """A package of the extra, or a module of one.

    Raises ``ModuleNotFoundError``, which names the extra, where it is not installed.
    """
    root = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != root:
            raise
        raise ModuleNotFoundError(
            f'paged.models needs the package {root}, which {_FOR[root]}: pip install "paged[models]".', name=root
        ) from None

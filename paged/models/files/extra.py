"""Packages that only the extra `models` brings, imported when they are first used."""

import importlib
import types

_FOR = {
    "gguf": "reads GGUF files",
    "jinja2": "renders chat templates",
    "tokenizers": "turns text into tokens",
}


def package(name: str) -> types.ModuleType:
    """A package of the extra. Raises ``ModuleNotFoundError``, which names the extra, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f'paged.models needs the package {name}, which {_FOR[name]}: pip install "paged[models]".', name=name
        ) from None

"""The table of other libraries' signatures, against the library that is installed."""

import importlib
import inspect

import numpy as np
import pytest

from tests.compat.signatures import SIGNATURES

KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional only",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
}


def as_written(default):
    """A parameter's default as the table writes it."""
    if default is inspect.Parameter.empty:
        return None
    return repr(float(default) if isinstance(default, np.floating) else default)


@pytest.mark.parametrize("row", [row for row in SIGNATURES if row.peer == "JAX"], ids=lambda row: row.function)
def test_rows_of_jax_say_what_the_installed_version_has(row):
    module, name = row.function.rsplit(".", 1)
    installed = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    assert [(p.name, KINDS[p.kind], as_written(p.default)) for p in installed] == list(row.parameters)

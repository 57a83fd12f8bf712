"""The installed package, away from this repository: a user's own test file runs, and nothing is imported too early."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from paged.testing import MASK_CHECKS

ROOT = pathlib.Path(__file__).parents[2]
USER_FILE = """
import dataclasses, paged
from paged.testing import check_mask, parametrize_with_checks

@dataclasses.dataclass(frozen=True)
class Near(paged.Mask):
    reach: int
    def __call__(self, p, j):
        return abs(p - j) <= self.reach
    def coverage(self, p0, p1, j0, j1):
        return paged.Coverage(some=(p0 - j1 < self.reach) & (j0 - p1 < self.reach), full=False)

@parametrize_with_checks([Near(3), paged.Causal() & Near(5)])
def test_near(subject, check):
    check(subject)
"""
# One process, because each takes seconds to import JAX.
PROGRAM = """
import sys
late = ("hypothesis", "chex", "pytest", "beartype", "optax", "gguf", "jinja2", "tokenizers")
sys.modules.update(dict.fromkeys(late))
import paged
assert paged.__file__.startswith(sys.argv[1]), paged.__file__
assert not {"paged.runtime", "paged.compat", "paged.models", "paged.testing"} & set(sys.modules)
assert callable(paged.runtime.generate) and callable(paged.compat.page_attention)
assert callable(paged.models.load)
assert not hasattr(paged, "runtimes")
from jax._src import xla_bridge
assert not xla_bridge._backends, xla_bridge._backends
import paged.testing
paged.testing.check_mask(paged.Causal() & paged.Window(3))
for name in late:
    del sys.modules[name]
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "test_mine.py"]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install` makes of these sources, without the network."""
    versions = [found.version for found in importlib.metadata.distributions(name="setuptools")]
    if not versions or int(versions[0].partition(".")[0]) < 77:
        pytest.skip(f"pyproject.toml builds the package with setuptools 77 or later; here are {versions}")
    folder = tmp_path_factory.mktemp("outside")
    sources, target = folder / "sources", folder / "target"
    shutil.copytree(ROOT / "paged", sources / "paged", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--no-compile", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, "--target", target, sources], check=True)
    return target


def test_a_users_file_runs_in_another_folder(installed, tmp_path):
    """The package needs no pytest and no hypothesis, touches no device, and loads the runtime when it is used."""
    (tmp_path / "test_mine.py").write_text(USER_FILE)
    env = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", PROGRAM, str(installed)]
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
    expected = f"{2 * len(MASK_CHECKS)} passed"
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr


def test_every_file_of_the_sources_is_installed(installed):
    here, there = ({path.relative_to(root) for path in (root / "paged").rglob("*.*")} for root in (ROOT, installed))
    assert {path for path in here if "__pycache__" not in path.parts} == there

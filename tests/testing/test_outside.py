"""A user's own test file runs outside of this repository, and the package does without what it needs late."""

import pathlib
import subprocess
import sys

import paged

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
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("hypothesis", "chex", "pytest", "beartype", "optax")))
import paged, paged.testing
paged.testing.check_mask(paged.Causal() & paged.Window(3))
"""


def _run(arguments, folder):
    env = {"PYTHONPATH": str(pathlib.Path(paged.__file__).parents[1]), "PATH": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)


def test_a_users_file_runs_in_another_folder(tmp_path):
    (tmp_path / "test_mine.py").write_text(USER_FILE)
    done = _run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"], tmp_path)
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout + done.stderr


def test_checks_need_neither_hypothesis_nor_pytest(tmp_path):
    done = _run(["-c", WITHOUT], tmp_path)
    assert done.returncode == 0, done.stderr

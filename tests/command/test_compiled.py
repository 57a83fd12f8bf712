"""`python -m paged` keeps what it compiles: the next run compiles nothing that takes a second."""

import os
import subprocess
import sys

import jax
import pytest

from paged.command.compiled import keep_compiled

NAME = "jax_compilation_cache_dir"


@pytest.fixture
def caching(monkeypatch, tmp_path):
    """A process of a user, whose cache folder is ``tmp_path``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update(NAME, None)
    yield tmp_path
    jax.config.update("jax_enable_compilation_cache", before[0])
    jax.config.update(NAME, before[1])


def test_programs_are_kept_in_the_users_cache_folder(caching):
    kept = keep_compiled()
    assert kept is not None and kept.is_relative_to(caching / "paged")
    assert jax.config.jax_compilation_cache_dir == str(kept)


def test_jaxs_own_settings_come_first(caching):
    jax.config.update(NAME, "mine")
    assert keep_compiled() is None and jax.config.jax_compilation_cache_dir == "mine"
    jax.config.update(NAME, None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None and jax.config.jax_compilation_cache_dir is None


@pytest.mark.slow
def test_the_next_run_finds_what_the_first_has_compiled(folder, tmp_path):
    command = [sys.executable, "-m", "paged", "generate", "--model", str(folder), "--prompt", "w1 w2"]
    command += ["--max-new-tokens=4", "--page-size=4", "--chunk-size=4", "--dtype=float32"]
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "XLA_FLAGS": "",
    }
    said, kept = [], []
    for _ in range(2):
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        kept.append(sorted(path.name for path in tmp_path.rglob("*-cache")))
    assert said[0] == said[1]
    assert kept[0] == kept[1] and any("launch" in name for name in kept[0])

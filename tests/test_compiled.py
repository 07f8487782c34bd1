"""Compiled programs are kept, where that is of use, in a folder that the user may name."""

import jax
import pytest

from ctllm_jax.compiled import keep_compiled


@pytest.fixture(autouse=True)
def no_folder(monkeypatch, tmp_path):
    """JAX without a folder, and what it had afterwards."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_an_accelerators_programs_are_kept_below_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ctllm-jax" / "xla")


def test_a_cpus_are_not():
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_jax_was_given_stays(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"

"""Where compiled programs are kept from one start of a job to the next."""

import jax

from ctllm_jax.common.files import cache_folder


def keep_compiled() -> None:
    """Lets JAX keep what it compiles below `~/.cache/ctllm-jax/xla` (or XDG_CACHE_HOME); call before it compiles.

    Process 0 of a job writes, all read, so hosts may share the folder; an entry that cannot be read is compiled anew. A
    folder that JAX has been given (JAX_COMPILATION_CACHE_DIR) stays; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    Nothing is kept on CPUs either, unless JAX has been given a folder: programs for them fit one kind of machine, and
    some refuse what they have kept themselves, in many lines (jax issue 38445).
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))

"""Architectures, by name."""

from ml_collections import ConfigDict

from configs.arguments import checked


def ct_llm_2b() -> ConfigDict:
    """CT-LLM-2B as released (m-a-p/CT-LLM-Base): 2,134,509,568 parameters."""
    return ConfigDict(
        dict(
            num_layers=32,
            d_model=2048,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            d_ff=5504,
            vocab_size=125_696,
            padded_vocab_size=125_824,
            max_length=4096,
            norm_eps=1e-5,
            rope_theta=10_000.0,
            rope_scaling=None,
            tie_embeddings=False,
            qk_norm=False,
            init_std=0.02,
            dtype="bfloat16",
            param_dtype="float32",
            remat="full",
            attention="xla",
        )
    )


def tiny() -> ConfigDict:
    """The same block, small enough to train on two CPU cores in minutes; fp32, which CPUs are fastest at."""
    config = ct_llm_2b()
    config.update(
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=344,
        vocab_size=4096,
        padded_vocab_size=4096,
        max_length=256,
        dtype="float32",
        remat="none",
    )
    return config


_BY_NAME = {"ct_llm_2b": ct_llm_2b, "tiny": tiny}


def named(name: str) -> ConfigDict:
    """The architecture called `name`; ValueError naming the known ones."""
    return _BY_NAME[checked(name, _BY_NAME)]()

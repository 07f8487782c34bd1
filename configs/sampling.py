"""The sampling options that configs share; ctllm_jax/sampling.py says what each does."""


def sampling(max_tokens: int, temperature: float, top_p: float = 1.0) -> dict:
    """All options, those that are not named without effect."""
    return {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": 0,
        "top_p": top_p,
        "seed": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop": (),
    }

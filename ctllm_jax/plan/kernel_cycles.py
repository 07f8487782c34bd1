"""Static time of the attention kernels, by the TPU compiler's own count of cycles."""


def kernel_seconds(chip: str, heads: int, kv_heads: int, length: int, head_dim: int) -> dict[str, float] | None:
    """Not measured yet: None."""
    return None

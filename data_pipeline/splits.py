"""Which documents are held out: decided by the hash of the id alone, before anything else."""

import tensorflow as tf

_BUCKETS = 1 << 20


def is_held_out(id_text: tf.Tensor, share: float) -> tf.Tensor:
    """Scalar bool: whether the document with this id belongs to the validation split, about `share` of all."""
    return tf.strings.to_hash_bucket_fast(id_text, _BUCKETS) < int(share * _BUCKETS)

"""Which documents are held out: decided by the hash of the id alone, before anything else."""

import tensorflow as tf

_BUCKETS = 1 << 20


def is_held_out(id_text: tf.Tensor, share: float) -> tf.Tensor:
    """Bool [...]: whether the documents with ids [...] belong to the validation split, about `share` of all.

    `share` counts in steps of 1 / 2^20; below one step nothing is held out.
    """
    return tf.strings.to_hash_bucket_fast(id_text, _BUCKETS) < int(share * _BUCKETS)

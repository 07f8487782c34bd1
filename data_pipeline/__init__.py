"""Documents to token store: Beam, SeqIO, TFDS, SentencePiece. Never imports JAX."""

"""The token store and what reads it: record format, example order, batches per host, tokenizers, the chat template."""

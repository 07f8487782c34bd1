"""Deduplication: hashes of folded text, MinHash signatures, clusters."""

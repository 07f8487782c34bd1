"""Filters: measures on batches of documents, limits on the measures, the language of a text."""

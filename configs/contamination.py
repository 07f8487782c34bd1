"""Which texts hold items of benchmarks: `hits.jsonl`, a hit a line, with the item, how much of it, and where.

    ctllm contamination --config.corpus=runs/corpus --config.benchmarks.items="('sets/*.jsonl',)" --workdir=runs/seen

What is looked through is one of: documents (globs of what `ctllm corpus` reads, before any filter), records
(conversations and preference pairs in any format that `ctllm tokenize` reads), corpus (a folder of `ctllm corpus`),
store (a folder of `ctllm tokenize`, whose tokens are decoded).

What is looked for: benchmarks.items, JSON lines of the user's own (of sets of open questions, with `field=turns`), and
declared tasks, read as `ctllm eval` reads them:
`--config.benchmarks.data=BENCHMARKS --config.benchmarks.tasks="('ceval_ppl', 'cmmlu_ppl')"`. An item was seen where at
least min_coverage of its units lie in n-grams that the text has, too; a unit is a Chinese character or a word of a
script that parts words, on text without case, width, punctuation and script variants.

`ctllm corpus` takes the same benchmarks.* and leaves such documents out.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.benchmarks = benchmarks()
    config.documents, config.records = (), ()
    config.corpus, config.store = "", ""
    config.fields = ConfigDict({"id": "id", "url": "url", "source": "source", "text": "text"})
    config.beam = ConfigDict({"runner": "local", "options": ()})
    return config


def benchmarks() -> ConfigDict:
    """Nothing to look for yet; 13-grams as GPT-3's, half of an item as Tulu 3's."""
    return ConfigDict({"data": "", "tasks": (), "items": (), "field": "text", "ngram": 13, "min_coverage": 0.5})

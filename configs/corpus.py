"""Raw documents to MAP-CC: filters and deduplication of the Chinese, English and code subsets.

    ctllm corpus --config=configs/corpus.py --config.input="('raw/*.jsonl.gz',)" --workdir=runs/corpus

Input: globs, local or gs://, of JSON lines, Parquet, WARC or WET, plain, gzip or zstd, told by content; NAME.part00,
NAME.part01 ... (the released MAP-CC) are one file. A file called .txt is one document in UTF-8, whose id is its path.
`--config.input="('zh_books=books/*.part*', 'en=wet/*.gz')"` says to which subset an input's records belong; otherwise
their `source` does, or `default_source`. One worker reads a file, or all parts of one; several can share what was cut
at lines first:

    cat zh_cc.jsonl.gz.part* | zcat | split -C 1G -a 5 --additional-suffix=.jsonl.gz --filter='gzip -1 > $FILE' - zh_cc.

Output in the work folder: map_cc/<subset> (TFDS), rejected/ (every rejected document with every reason, value and
threshold), report.html, report.json, signals/ (every measured value, in Parquet: `ctllm sweep` and `ctllm explain` read
it), hashes/ (for comparing a later corpus with this one: `--config.dedup.earlier="('runs/corpus',)"`) and, where
benchmarks are named (configs/contamination.py says how), hits.jsonl.

`--config.pilot=0.01` builds one document in a hundred, says what time, disk and documents all of them will take, and
leaves nothing behind. docs/beam.md says how to run on Prism, Flink and other clusters.

Filters and deduplication of three kinds; `--config=configs/corpus.py:released` takes the third:

default   what we would train on: the rules below, text left as it is but for web addresses and licence headers
ct_llm    as CT-LLM's paper and MAP-NEO's English pipeline mean it: their thresholds, repetition and language counted,
          sentence rules applied, punctuation rewritten to ASCII, links removed
released  decides as the published CT-LLM script does, defects included (Chinese only): repetition never rejects, any
          language passes, `numpy.array` is a link, lists of URLs block by prefix

Only what is measured can be limited (data_pipeline/filters/measures.py; reference.py says in plain Python what each
Chinese measure is); a measure without a limit is recorded all the same. Lists of unwanted sites, in UT1's format:
`--config.filters.urls.folder=blacklists --config.filters.urls.categories="('adult','phishing')"`.

Off until one asks for them: masks for what tells of a person (`--config.filters.mask.email="<EMAIL>"`, likewise phone,
id_card, bank_card, in texts kept or rejected; `meta` and web addresses stay as they came), traditional to simplified
characters (`--config.filters.rewrite.simplify=true`), and a fastText model of quality
(`--config.filters.quality.model=MODEL.bin --config.filters.quality.label=good`).
"""

from ml_collections import ConfigDict, config_dict

from configs.arguments import checked
from configs.contamination import benchmarks

_CHINESE_SUBSETS = ("zh_cc", "zh_baike", "zh_papers", "zh_books", "zh_others")


def get_config(filters: str = "default") -> ConfigDict:
    """`filters` is 'default', 'ct_llm' or 'released'."""
    config = ConfigDict()
    config.input = ()  # PATTERN or SUBSET=PATTERN
    config.fields = ConfigDict({"id": "id", "url": "url", "source": "source", "text": "text"})
    config.default_source = "zh_cc"  # of records without a source
    config.max_record_bytes = 16 * 2**20

    presets = {"default": _default, "ct_llm": _ct_llm, "released": _released}
    config.filters = presets[checked(filters, presets)]()
    config.dedup = _dedup(filters)
    config.benchmarks = benchmarks()  # documents that hold their items are left out

    config.beam = ConfigDict({"runner": "local", "options": ()})
    config.pilot = 0.0
    return config


def _dedup(filters: str) -> ConfigDict:
    """shingle: in characters; 5 Chinese ones carry what 13 letters do. The paper verifies no pair that it finds."""
    ours = {"shingle": 5, "bands": 20, "rows": 6, "min_similarity": 0.7, "similar_lines": ""}
    paper = {"shingle": 13, "bands": 9, "rows": 13, "min_similarity": 0.0, "similar_lines": "paper"}
    chosen = {"default": ours, "ct_llm": paper, "released": paper | {"similar_lines": "released"}}[filters]
    return ConfigDict(chosen | {"key_ranges": 8, "most_edges": 2**22, "earlier": ()})


def _released() -> ConfigDict:
    """The released script, value by value: nothing here follows a change of ours."""
    rules = {
        "bracketed": {"max": 0.1},
        "sentences": {"min": 2},
        "characters": {"min": 50, "max": 10_000},
        "mean_word_length": {"min": 1.3, "max": 10},
        "hash_runs": {"max": 0.1},
        "ellipsis_runs": {"max": 0.1},
        "digits": {"max": 0.3},
        "read_more_lines": {"max": 0.3},
        "bullet_lines": {"max": 0.9},
        "ascii_punctuation": {"min": 1},
        "distinct_in_all": {"above": 0.1},
        "character_entropy": {"min": 3.0},
    }
    whole = config_dict.placeholder(int)  # None: the whole text
    return ConfigDict(
        {
            "rewrite": {"punctuation": True, "links": "released", "simplify": False, "licence_headers": False},
            "lines": {"ends": "", "min_words": 0, "phrases": (), "word_lists": ""},
            "mask": {"email": "", "phone": "", "id_card": "", "bank_card": ""},
            "urls": {"folder": "", "categories": (), "match": "prefix"},
            "measures": {
                "read_more": ("readmore", "展开", "更多", "。。。"),
                "segmenter": "jieba",
                "segmented_characters": whole,
            },
            "rules": {"chinese": rules},
            "language": {"sample_characters": whole, "line_break": ""},
            "languages": {subset: {"labels": (), "min_score": 0.4} for subset in _CHINESE_SUBSETS},
            "quality": {"model": "", "label": "", "min_score": 0.5, "subsets": ("zh_cc",), "segment": False},
        }
    )


def _ct_llm() -> ConfigDict:
    """The released script as the paper describes it."""
    config = _released()
    config.urls.match = "boundaries"
    config.lines.update(ends=".!?…", min_words=3, phrases=("javascript", "lorem ipsum"))
    sentences = {"duplicate_sentences": {"max": 0.30}, "duplicate_sentence_characters": {"max": 0.20}}
    config.rules.chinese.update(_most_frequent("counted") | _repeated() | sentences)
    config.rules.english = _english() | {
        "characters": {"min": 200},
        "lines": {"min": 2},
        "sentences": {"min": 2, "max": 7500},
        "words": {"min": 50, "max": 10_000},
        "distinct_words": {"min": 0.1, "max": 0.8},
        "word_entropy": {"min": 3.0, "max": 6.0},
        "lorem_ipsum": {"max": 3e-8},
    }
    config.languages = {subset: {"labels": ("zh",), "min_score": 0.4} for subset in _CHINESE_SUBSETS}
    config.languages.en = {"labels": ("en",), "min_score": 0.4}
    return config


def _default() -> ConfigDict:
    """The released script, repaired: what is not said here is as there."""
    config = _released()
    config.rewrite.update(punctuation=False, links="remove", licence_headers=True)
    config.urls.match = "boundaries"
    config.measures.update(
        read_more=("readmore", "read more", "Read more", "Read More", "READ MORE", "展开", "更多", "。。。"),
        segmenter="rjieba",
        segmented_characters=500,
    )
    rules = config.rules.chinese
    del rules.ascii_punctuation, rules.distinct_in_all
    rules.characters.max = 10_000_000  # 10,000 lose papers and books
    rules.mean_line_length = {"min": 10}  # EvalWeb's rule: navigation lists
    rules.punctuation = {"min": 1}
    rules.distinct_characters = {"min": 0.1}  # of the first 1,000 characters
    rules.character_entropy.min = 2.0  # the blanks of a table that is set with them bring good ones below 3
    rules.read_more_lines.max = 0.5  # one line in three, the last of a page, is no list of teasers
    rules.update(_repeated() | {f"top_{n}gram": {"max": 0.20} for n in (2, 3, 4)})  # a name such as Docker is several
    config.rules.update(english=_english(), code=_code())
    config.language = {"sample_characters": 400, "line_break": " "}
    chinese = {"labels": ("zh", "yue", "wuu"), "min_score": 0.4, "min_han": 0.5}
    config.languages = {subset: chinese for subset in _CHINESE_SUBSETS} | {"en": {"labels": ("en",), "min_score": 0.4}}
    return config


def _most_frequent(measure: str) -> dict:
    """Shares of the text that the most frequent 2-, 3- and 4-gram may take."""
    return {f"{measure}_{n}gram": {"max": share} for n, share in ((2, 0.20), (3, 0.18), (4, 0.16))}


def _repeated() -> dict:
    """Shares of a Chinese text that may lie in repeated n-grams."""
    return {f"duplicate_{n}gram": {"max": 0.60} for n in range(5, 11)}


def _english() -> dict:
    rules = {
        "characters": {"min": 200, "max": 10_000_000},
        "sentences": {"min": 2},
        "words": {"min": 50, "max": 1_000_000},  # MAP-NEO: at most 10,000, which loses papers and books
        "mean_word_length": {"min": 3, "max": 10},
        "stop_words": {"min": 2},
        "stop_word_share": {"min": 0.06},
        "words_without_letter": {"max": 0.4},
        "symbol_words": {"max": 0.5},
        "capital_words": {"max": 0.1},
        "word_entropy": {"min": 3.0},  # MAP-NEO: at most 6, which loses whatever is long
        "curly_braces": {"max": 0.025},
        "lorem_ipsum": {"max": 0},
        "hash_runs": {"max": 0.1},
        "ellipsis_runs": {"max": 0.1},
        "punctuation": {"min": 1},
        "not_alphabetic": {"max": 0.2},
        "digits": {"max": 0.3},
        "ellipsis_lines": {"max": 0.2},
        "bullet_lines": {"max": 0.9},
        "read_more_lines": {"max": 0.1},
        "duplicate_lines": {"max": 0.30},
        "duplicate_line_characters": {"max": 0.20},
    }
    repeated = {f"duplicate_{n}gram": {"max": round(0.20 - n / 100, 2)} for n in range(5, 11)}
    return rules | _most_frequent("top") | repeated


def _code() -> dict:
    return {
        "characters": {"min": 20, "max": 10_000_000},
        "longest_line": {"max": 1000},
        "mean_line_length": {"max": 100},
        "alphanumeric": {"min": 0.25},
        "alphabetic": {"min": 0.25},
        "generated": {"max": 0},  # a line among the first five that says so
        "encoded": {"max": 0.5},  # base64 and the like
        "longest_encoded": {"max": 1024},
    }

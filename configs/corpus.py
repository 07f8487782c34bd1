"""Raw documents to MAP-CC: filters and deduplication of the Chinese, English and code subsets.

    ctllm corpus --config=configs/corpus.py --config.input="('raw/*.jsonl.gz',)" --workdir=runs/corpus

Input: JSON lines, plain or gzip, one document each. Output in the work folder: map_cc/<subset> (TFDS),
rejected/ (every rejected document with every reason, value and threshold), report.html, report.json.

Limits follow the released CT-LLM filter for Chinese, MAP-NEO's for English and StarCoder's for code; where
they differ, the line says why. Only what is measured can be limited (data_pipeline/filters/measures.py); a
measure without a limit is recorded all the same.

On one core: about 700 Chinese documents (1.4 MB) per second, start-up included, of which the filters take two
thirds.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.input = ()  # glob patterns
    config.fields = ConfigDict({"id": "id", "url": "url", "source": "source", "text": "text"})
    config.default_source = "zh_cc"  # of records without a source
    config.max_record_bytes = 16 * 2**20

    config.filters = ConfigDict()
    config.filters.language_sample_characters = 2000
    config.filters.rules = ConfigDict({"chinese": _chinese(), "english": _english(), "code": _code()})
    chinese = {"labels": ("zh", "yue", "wuu"), "min_score": 0.4}  # the released filter reads the score alone
    languages = {subset: chinese for subset in ("zh_cc", "zh_baike", "zh_papers", "zh_books", "zh_others")}
    config.filters.languages = ConfigDict(languages | {"en": {"labels": ("en",), "min_score": 0.4}})

    config.dedup = ConfigDict()
    config.dedup.shingle = 5  # characters; 5 Chinese characters carry what 13 letters do
    config.dedup.bands = 20
    config.dedup.rows = 6
    config.dedup.min_similarity = 0.7
    config.dedup.key_ranges = 8

    config.beam = ConfigDict({"runner": "local", "options": ()})
    return config


def _chinese() -> dict:
    rules = {
        "sentences": {"min": 2},
        "characters": {"min": 50, "max": 10_000_000},  # released: at most 10,000, which loses papers, books
        "mean_word_length": {"min": 1.3, "max": 10},
        "hash_runs": {"max": 0.1},
        "ellipsis_runs": {"max": 0.1},
        "bracketed": {"max": 0.1},
        "digits": {"max": 0.3},
        "read_more_lines": {"max": 0.3},
        "bullet_lines": {"max": 0.9},
        "mean_line_length": {"min": 10},  # EvalWeb's rule: navigation lists
        "punctuation": {"min": 1},
        "distinct_characters": {"min": 0.1},  # of the first 1,000 characters; released: of all
        "character_entropy": {"min": 3.0},
        "top_2gram": {"max": 0.20},
        "top_3gram": {"max": 0.18},
        "top_4gram": {"max": 0.16},
    }
    return rules | {f"duplicate_{n}gram": {"max": 0.60} for n in range(5, 11)}


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
        "word_entropy": {"min": 3.0},
        "curly_braces": {"max": 0.025},
        "lorem_ipsum": {"max": 0},
        "digits": {"max": 0.3},
        "ellipsis_lines": {"max": 0.2},
        "bullet_lines": {"max": 0.9},
        "read_more_lines": {"max": 0.1},
        "duplicate_lines": {"max": 0.30},
        "duplicate_line_characters": {"max": 0.20},
        "top_2gram": {"max": 0.20},
        "top_3gram": {"max": 0.18},
        "top_4gram": {"max": 0.16},
    }
    return rules | {f"duplicate_{n}gram": {"max": round(0.20 - n / 100, 2)} for n in range(5, 11)}


def _code() -> dict:
    return {
        "characters": {"min": 20, "max": 10_000_000},
        "longest_line": {"max": 1000},
        "mean_line_length": {"max": 100},
        "alphanumeric": {"min": 0.25},
    }

"""datatrove's filters on Chinese text, with the thresholds that FineWeb-2 has for it; runs in the peers' environment.

python datatrove_filters.py JSONL_FOLDER OUTPUT_FOLDER

FineWeb-2's order: repetition, FineWeb's own rules, Gopher's quality rules; thresholds of its `cmn_Hani.yml`. Its
language model has to be downloaded and is left out: one stage less for the peer.
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter

LANGUAGE = "cmn_Hani"
STOP_WORDS = list("的年在月是和日了於·為有被人中为他與後也而由")


def main(documents: str, output: str) -> None:
    """Documents in, kept and rejected documents out: one task, one worker."""

    def excluded(name: str) -> JsonlWriter:
        return JsonlWriter(f"{output}/rejected/{name}")

    steps = [
        JsonlReader(documents),
        GopherRepetitionFilter(
            dup_line_frac=0.287,
            top_n_grams=((2, 0.256), (3, 0.201), (4, 0.171)),
            dup_n_grams=((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127)),
            language=LANGUAGE,
            exclusion_writer=excluded("repetition"),
        ),
        FineWebQualityFilter(
            line_punct_thr=0.106, new_line_ratio=0.178, language=LANGUAGE, exclusion_writer=excluded("fineweb")
        ),
        GopherQualityFilter(
            min_avg_word_length=1,
            max_avg_word_length=5,
            max_non_alpha_words_ratio=0.735,
            stop_words=STOP_WORDS,
            language=LANGUAGE,
            exclusion_writer=excluded("quality"),
        ),
        JsonlWriter(f"{output}/kept"),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{output}/logs").run()


if __name__ == "__main__":
    main(*sys.argv[1:])

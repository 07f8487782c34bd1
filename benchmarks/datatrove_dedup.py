"""datatrove's MinHash deduplication of Chinese text; runs in the peers' environment.

python datatrove_dedup.py JSONL_FOLDER OUTPUT_FOLDER

Its four stages with its defaults (5-grams of jieba's words, 14 buckets of 8 hashes), one task and one worker each.
Survivors and duplicates are written as plain JSON lines, which costs it least.
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter

_LANGUAGE = "cmn_Hani"  # words by jieba; its Languages.chinese has words end at spaces alone


def main(documents: str, output: str) -> None:
    """Documents in, survivors and duplicates out."""
    config = MinhashConfig()
    signatures, buckets, clusters = (f"{output}/{name}" for name in ("signatures", "buckets", "clusters"))
    removed = JsonlWriter(f"{output}/removed", compression=None)
    stages = [
        (1, [JsonlReader(documents), MinhashDedupSignature(signatures, config, _LANGUAGE)]),
        (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        (1, [MinhashDedupCluster(buckets, clusters, config)]),
        (
            1,
            [
                JsonlReader(documents),
                MinhashDedupFilter(clusters, exclusion_writer=removed),
                JsonlWriter(f"{output}/kept", compression=None),
            ],
        ),
    ]
    for number, (tasks, steps) in enumerate(stages):
        LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=f"{output}/logs{number}").run()


if __name__ == "__main__":
    main(*sys.argv[1:])

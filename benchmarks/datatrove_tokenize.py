"""datatrove's tokenizer stage as its documentation has it; runs in the peers' environment.

python datatrove_tokenize.py JSONL_FOLDER TOKENIZER_JSON OUTPUT_FOLDER EOS
"""

import sys

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer


def main(documents: str, tokenizer: str, output: str, eos: str) -> None:
    """Documents in, shuffled token files out: one task, one worker."""
    steps = [JsonlReader(documents), DocumentTokenizer(f"{output}/tokens", tokenizer, eos_token=eos)]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{output}/logs").run()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The peer of `evaluate.py`: lm-eval-harness with Hugging Face's Llama scores all requests, once for each line read.

    python lm_eval_scores.py MODEL_FOLDER REQUESTS.jsonl ROWS

A line of REQUESTS holds the (context, continuation) pairs of an item. Prints a line of JSON when the model is loaded,
then one for each line of standard input: {"cpu": s, "wall": s, "logprobs": [[of each option] of each item]}. Knows
nothing of ctllm_jax.
"""

import importlib.metadata
import json
import sys
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main(folder: str, requests_file: str, rows: str) -> None:
    """Answers until standard input is closed."""
    torch.set_num_threads(1)
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=int(rows), add_bos_token=True)
    with open(requests_file, encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    say({name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "torch")})
    for _ in sys.stdin:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=number)
            for item in items
            for number, pair in enumerate(item)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        found = iter(model.loglikelihood(requests, disable_tqdm=True))
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        say({**cost, "logprobs": [[next(found)[0] for _ in item] for item in items]})


def say(entry: dict) -> None:
    """A line of JSON, at once."""
    print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

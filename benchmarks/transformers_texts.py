"""The peer of `decode.py`: Hugging Face's Llama continues all prompts, once for each line read.

    python transformers_texts.py MODEL_FOLDER PROMPTS.json NEW_TOKENS

Prints a line of JSON when the model is loaded, then one for each line of standard input: {"cpu": s, "wall": s, "ids":
[[new ids] of each prompt]}. Knows nothing of ctllm_jax.
"""

import importlib.metadata
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def main(folder: str, prompts_file: str, new_tokens: str) -> None:
    """Answers until standard input is closed."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with open(prompts_file) as file:
        prompts = torch.tensor(json.load(file))
    count = {"min_new_tokens": int(new_tokens), "max_new_tokens": int(new_tokens)}
    say({name: importlib.metadata.version(name) for name in ("transformers", "torch")})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **count)
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        say({**cost, "ids": ids[:, prompts.shape[1] :].tolist()})


def say(entry: dict) -> None:
    """A line of JSON, at once."""
    print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The peer of `train.py`: Hugging Face's Llama trained by PyTorch, some steps at a time, as its standard input says.

    python torch_step.py MODEL_FOLDER BATCHES.npz SETTINGS.json eager|compiled THREADS

Prints a line of JSON when it is ready, then one for each line read, a number of steps: {"cpu": s, "wall": s,
"losses": [mean over the tokens predicted, before each update]}. Knows nothing of ctllm_jax.
"""

import itertools
import json
import sys
import time

import numpy as np
import torch
import transformers


def main(folder: str, batches_file: str, settings_file: str, mode: str, threads: str) -> None:
    """Answers until standard input is closed."""
    torch.set_num_threads(int(threads))
    with open(settings_file, encoding="utf-8") as file:
        settings = json.load(file)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    model.config.use_cache = False
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    scales = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]}, {"params": scales, "weight_decay": 0.0}],
        lr=settings["learning_rate"],
        betas=(settings["beta1"], settings["beta2"]),
        eps=settings["epsilon"],
        fused=True,
    )
    arrays = np.load(batches_file)
    batches = itertools.cycle(
        [
            {name: torch.from_numpy(arrays[name][number].astype(np.int64)) for name in ("input_ids", "labels")}
            for number in range(len(arrays["input_ids"]))
        ]
    )
    forward = torch.compile(model) if mode == "compiled" else model

    def step() -> torch.Tensor:
        loss = forward(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    count = sum(parameter.numel() for parameter in model.parameters())
    say({"parameters": count, "torch": torch.__version__, "transformers": transformers.__version__})
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        losses = [step() for _ in range(int(line))]
        found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        say({**found, "losses": [float(loss) for loss in losses]})


def say(entry: dict) -> None:
    """A line of JSON, at once."""
    print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

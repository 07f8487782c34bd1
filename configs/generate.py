"""Text from a checkpoint.

    ctllm generate --config.model=runs/pretrain --config.prompts="('从前有座山，',)" --workdir=runs/samples
    ctllm generate --config.model=runs/sft --config.input=asked.jsonl --config.chat=True --workdir=runs/out

One device is enough: by estimate the 2B model needs 4.3 GB for its bf16 parameters, and 8 MB of bf16 cache for every 32
tokens of each of the `slots` texts decoded together. Expect samples.jsonl, and the samples on standard output; lines
of the input that are no prompts are named on standard error and in rejected.jsonl.
"""

from ml_collections import ConfigDict, config_dict

from configs.sampling import sampling


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": "",
            "step": config_dict.placeholder(int),
            "dtype": config_dict.placeholder(str),
            "tensor": 1,
            "prompts": (),
            "input": config_dict.placeholder(str),
            "chat": False,
            "slots": 16,
            "sampling": sampling(max_tokens=128, temperature=0.8, top_p=0.95),
        }
    )

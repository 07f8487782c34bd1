"""Between our run directories and Hugging Face `LlamaForCausalLM` folders.

    ctllm convert --config.source=runs/dpo --config.to=huggingface --workdir=exports/ctllm-2b
    ctllm convert --config.source=hf/CT-LLM-Base --config.to=run --config.dtype=float32 --workdir=runs/base
    ctllm convert --config.source=runs/pretrain --config.all_steps=True --workdir=exports/series

The result is {workdir}/model; with all_steps, a folder for each checkpoint that the run has kept, named after the
tokens it had gone through: {workdir}/13.33B/model. Export refuses unless the written folder gives the same logits, in a
plain numpy Llama too. Runs on a CPU host; by estimate the 2B model needs 25 GB of memory; it has not been tried.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "source": "",
            "step": config_dict.placeholder(int),
            "to": "huggingface",
            "dtype": "bfloat16",
            "all_steps": False,
        }
    )

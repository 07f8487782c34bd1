"""Between our run directories and Hugging Face `LlamaForCausalLM` folders.

    ctllm convert --config.source=runs/dpo --config.to=huggingface --workdir=exports/ctllm-2b
    ctllm convert --config.source=hf/CT-LLM-Base --config.to=run --config.dtype=float32 --workdir=runs/base

The result is {workdir}/model. Export refuses unless the written folder gives the same logits,
also in a plain numpy Llama. Runs on a CPU host; by estimate the 2B model needs 25 GB of
memory; it has not been tried.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "source": "",
            "step": config_dict.placeholder(int),
            "to": "huggingface",
            "dtype": "bfloat16",
        }
    )

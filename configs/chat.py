"""A conversation with a model in a terminal, in the chat template that it was trained with.

    ctllm chat --config.model=runs/sft
    ctllm chat --config.model=hf/CT-LLM-SFT --config.sampling.temperature=0 < questions.txt

A line is a message. Ctrl-C ends an answer, a second one the program. One device is enough: by estimate the 2B model
needs 4.3 GB for its bf16 parameters and 1.1 GB for the bf16 cache of its 4,096 tokens.
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
            "context": config_dict.placeholder(int),
            "system": config_dict.placeholder(str),
            "sampling": sampling(max_tokens=1_024, temperature=0.8, top_p=0.95),
        }
    )

"""Answers to open questions, for judges.

    ctllm answer --config.model=runs/sft --workdir=runs/sft-answers
    ctllm answer --config.model=hf/CT-LLM-SFT --config.questions='CHC-Bench/*.parquet' --workdir=DIR

`bafang` is the set that ships with the project: 120 questions in CHC-Bench's eight categories. Files of CHC-Bench,
MT-bench and AlignBench are read as they circulate. The temperature is that of FastChat's default; MT-bench's categories
have their own. One device is enough, as for `ctllm generate`. Expect answers.jsonl.
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
            "questions": "bafang",
            "system": "",
            "sampling": sampling(max_tokens=1_024, temperature=0.7),
        }
    )

"""Everything, small: from documents to an aligned, evaluated, exported model on one CPU machine.

    make quickstart
    make quickstart INPUT='documents/*.jsonl.gz'
    ctllm quickstart --workdir=runs/quickstart [--config.input="('documents/*.jsonl.gz',)"] [--config.last=STAGE]

6 to 9 minutes on two cores with the shipped sample. Whatever is set here is passed to the stages on their own command
lines, which the run prints; everything else keeps the stages' own configs.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        dict(
            input=("sample/documents/*.jsonl",),
            chats=("sample/sft.jsonl",),
            preferences=("sample/preference.jsonl",),
            tasks=("sample/choice.toml",),
            vocab_size=4096,
            character_coverage=0.99,  # 0.9999 of real Chinese needs more characters than this vocabulary has pieces
            sample_bytes=20_000_000,
            sequence_length=256,
            validation_share=0.1,
            alignment_validation_share=0.2,
            pretrain_steps=240,
            sft_steps=40,
            dpo_steps=40,
            evaluation_rows=500,  # most held-out rows of a source that each of the four evaluations reads
            prompts=("春天来了，", "茶叶", "The river", "def "),
            questions=("怎样泡一壶好茶？", "为什么天空是蓝色的？", "How can I sleep better?"),
            max_tokens=48,
            last=config_dict.placeholder(str),
        )
    )

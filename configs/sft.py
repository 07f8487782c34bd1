"""Supervised fine-tuning on a chat store: the pretraining loop, loss on the assistant's tokens only.

    ctllm train --config=configs/sft.py --config.init_from=RUN --config.data.store=STORE --workdir=RUN-SFT

CT-LLM's values as far as they are known (3 epochs, batch 128, peak 2e-5, decay 0.1). `:tiny` fits the quickstart's
model and data. `--config.lora.rank=16`, here and in configs/dpo.py, trains LoRA adapters alone; the run's folder then
has the starting point in base/, and `ctllm convert` writes the merged model.
"""

from ml_collections import ConfigDict, config_dict

from configs import pretrain


def get_config(name: str = "ct_llm_2b") -> ConfigDict:
    """`name` is "ct_llm_2b" or "tiny"."""
    config = pretrain.get_config(name)
    config.model = config_dict.placeholder(object)
    config.init_from = config_dict.placeholder(str)
    config.data.rates = ConfigDict()
    config.optimizer.update(learning_rate=2e-5, final_learning_rate=0.0, warmup="3%")
    config.update(batch_size=128, duration="3 epochs")
    config.eval.every = 500
    config.eval.prompts = ("怎样泡一壶好茶？", "为什么天空是蓝色的？", "How can I sleep better?")
    config.checkpoints.update(every=500, keep_every=0)
    if name == "tiny":
        config.optimizer.update(learning_rate=3e-4, warmup="12.5%")
        config.update(batch_size=8, duration="40 steps")
        config.log.every, config.eval.every, config.checkpoints.every = 2, 10, 20
    return config

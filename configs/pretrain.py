"""Pretraining on a token store.

    ctllm train --config=configs/pretrain.py:tiny --config.data.store=STORE --workdir=RUN
    ctllm train --config=configs/pretrain.py:ct_llm_2b@v5e:16x16 --config.data.store=STORE --workdir=RUN

`tiny` (1.8 M parameters) runs on a CPU. `ct_llm_2b` has CT-LLM's published hyper-parameters (AdamW, 2e-4 to 2e-5
cosine, 2,000 warm-up steps, about 2.1 M tokens a step for 1,254.68 B tokens); parameters, gradients and moments take
32 GiB in all, divided over the fsdp axis. What follows @ is a slice of configs/hardware.py, which decides mesh,
microbatches and kernels; without it any devices are used, in plain JAX. It has run for 60 steps on one H200
(docs/log.md), no more. Its rates are the paper's shares of tokens; a store that lacks a source needs
`--config.data.rates.NAME=0` for it.
"""

from ml_collections import ConfigDict, config_dict

from configs import hardware, models
from configs.mixtures import CT_LLM_TOKEN_SHARES


def get_config(name: str = "tiny") -> ConfigDict:
    """`name` is an architecture of configs/models.py, with or without a slice of configs/hardware.py after an @."""
    name, _, slice_name = name.partition("@")
    config = ConfigDict(
        dict(
            objective=dict(name="lm", z_loss=0.0, cross_entropy="auto", logit_metrics=False, preference=None),
            model=models.named(name),
            init_from=None,
            init_step=config_dict.placeholder(int),
            lora=dict(rank=0, alpha=16.0, targets=("q", "k", "v", "out", "gate", "up", "down")),
            data=dict(store="", rates=dict(CT_LLM_TOKEN_SHARES), rate_changes=(), mask_documents=True),
            optimizer=dict(
                learning_rate=2e-4,
                final_learning_rate=2e-5,
                schedule="cosine",
                warmup="2000 steps",
                decay="",
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
                clip_norm=1.0,
                spike_window=128,
                spike_deviations=6.0,
                ema_half_life="",
            ),
            mesh=dict(slice=1, data=1, fsdp=-1, tensor=1, context=1),
            distributed=False,
            batch_size=512,
            microbatches=1,
            duration="1254.68e9 tokens",
            seed=42,
            log=dict(every=10, tensorboard=True, wandb=config_dict.placeholder(str), profile=()),
            eval=dict(
                every=2000,
                batches=8,
                tasks=("sample/choice.toml",),
                items=60,
                prompts=("春天来了，", "人工智能是", "The river", "def "),
                sample_tokens=48,
            ),
            checkpoints=dict(every=2000, minutes=30.0, kept=3, keep_every=50_000, keep_best=0, best="lowest loss"),
            watch=dict(stall_minutes=15.0, slow_minutes=60.0, stop_minutes=10.0, notices=""),
            deterministic=False,
            xla_options=dict(),
        )
    )
    if slice_name:
        hardware.lay_out(config, slice_name)
    if name == "tiny":
        config.data.rates = ConfigDict()
        config.optimizer.update(learning_rate=3e-3, final_learning_rate=3e-4, warmup="6.67%")  # 40 of 600 steps
        config.update(batch_size=16, duration="600 steps")
        config.eval.update(every=100, batches=4)
        config.checkpoints.update(every=100, keep_every=0)
    return config

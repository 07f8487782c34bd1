"""Direct preference optimisation on a preference store; the reference is the starting point.

    ctllm train --config=configs/dpo.py --config.init_from=RUN-SFT --config.data.store=STORE --workdir=RUN-DPO

CT-LLM's values (model card of CT-LLM-SFT-DPO): beta 0.5, peak 1e-6, 2 epochs, decay 0.1, warm-up 3 %, effective batch
probably 128. `:tiny` fits the quickstart's model and data. With `--config.checkpoints.keep_best=1` the checkpoint of
the highest held-out accuracy stays beside the newest.
"""

from ml_collections import ConfigDict

from configs import sft


def get_config(name: str = "ct_llm_2b") -> ConfigDict:
    """`name` is "ct_llm_2b" or "tiny"."""
    config = sft.get_config(name)
    config.objective.update(
        name="dpo",
        preference=dict(
            loss="sigmoid",
            beta=0.5,
            label_smoothing=0.0,
            divergence="reverse_kl",
            sft_weight=0.0,
            tail_weight=1.0,
            policy_weighted=False,
            reference="cached",
        ),
    )
    config.optimizer.update(learning_rate=1e-6, warmup="3%")
    config.update(duration="2 epochs")
    config.checkpoints.best = "highest accuracy"
    if name == "tiny":
        config.optimizer.update(learning_rate=5e-5, warmup="12.5%")
        config.update(duration="40 steps")
    return config

"""Scores of a checkpoint: held-out perplexity beside a unigram baseline, benchmarks, samples.

    ctllm eval --config.model=runs/pretrain --config.perplexity.store=data/store --workdir=runs/pretrain-eval
    ctllm eval --config=configs/eval.py:ct_llm --config.model=hf/CT-LLM-Base --config.data=BENCHMARKS --workdir=DIR
    ctllm eval --config.model=hf/CT-LLM-Base --config.benchmarks="('ceval_ppl',)" --config.data=BENCHMARKS --workdir=DIR

`:ct_llm` takes the benchmarks of CT-LLM's table, in the protocols that its scores were probably made with; `:lm_eval`
the same in lm-eval-harness's, but for TheoremQA, which it lacks; `:chinese` all Chinese ones. BENCHMARKS holds a folder
for each benchmark, with its files as published; where one is missing, the message says what belongs there, or
`--config.partly` goes on without it and says so. The declarations are in ctllm_jax/evaluate/tasks; the path of a TOML
file of your own is as good as their names. `--config.chat=True` asks tasks that a model answers in words (GSM8K,
HumanEval, CValues, ceval_gen) in its chat template and calls them NAME_chat.

One device is enough; of several in a machine each holds the whole model and works on blocks of items of its own, or
each group of `tensor` devices, over which a larger one is split (run on virtual CPU devices, not on several GPUs). A
scoring batch of 4,096 tokens needs 2.1 GB for the 2B model's logits, beside 4.3 GB of bf16 parameters, on each (sizes
estimated, not measured); `batch_tokens` changes speed and memory only.
Expect a table on standard output, scores.json, and one log line per question under parts/. The same workdir takes other
benchmarks or another limit later, and `cache` a folder that several evaluations share: no request is answered twice.
"""

from ml_collections import ConfigDict, config_dict

from configs.arguments import checked
from configs.sampling import sampling

SUITES = {
    "": (),
    "ct_llm": (
        *("boolq_ppl", "cb_ppl", "copa_ppl", "rte_ppl", "multirc_ppl", "wic_ppl", "piqa_ppl", "siqa_ppl"),
        *("hellaswag_ppl", "winogrande_ll", "arc_e_ppl", "arc_c_ppl", "obqa_ppl", "csqa_ppl", "mmlu_ppl"),
        *("nq_gen", "triviaqa_gen", "lambada_gen", "squad2_gen", "gsm8k_gen", "theoremqa_gen"),
        *("humaneval_gen", "mbpp_gen", "ceval_ppl", "cmmlu_ppl"),
    ),
    "lm_eval": (
        *("boolq_lm_eval", "cb_lm_eval", "copa_lm_eval", "rte_lm_eval", "multirc_lm_eval", "wic_lm_eval"),
        *("piqa_lm_eval", "siqa_lm_eval", "hellaswag_lm_eval", "winogrande_lm_eval", "arc_e_lm_eval", "arc_c_lm_eval"),
        *("obqa_lm_eval", "csqa_lm_eval", "mmlu_lm_eval", "nq_lm_eval", "triviaqa_lm_eval", "lambada_lm_eval"),
        *("squad2_lm_eval", "gsm8k_lm_eval", "humaneval_lm_eval", "mbpp_lm_eval", "ceval_lm_eval", "cmmlu_lm_eval"),
    ),
    "chinese": (
        *("ceval_ppl", "cmmlu_ppl", "agieval_zh_ppl", "agieval_several_gen", "agieval_cloze_gen", "gaokao_ppl"),
        *("gaokao_several_gen", "gaokao_parts_gen", "gaokao_usage_gen", "gaokao_gaps_gen", "cmath_gen", "c3_m_ppl"),
        *("c3_d_ppl", "cmrc_gen_3749cd", "xcopa_zh_ppl", "afqmc_ppl", "ocnli_ppl", "cmnli_ppl", "ocnli_fc_ppl"),
        *("tnews_ppl", "eprstmt_ppl", "bustm_ppl", "chid_ppl", "csl_ppl", "cluewsc_ppl", "cvalues_gen"),
    ),
}


def get_config(suite: str = "") -> ConfigDict:
    """`suite` is "ct_llm", "lm_eval", "chinese", or "": no benchmark but those that are named."""
    return ConfigDict(
        {
            "model": "",
            "step": config_dict.placeholder(int),
            "dtype": config_dict.placeholder(str),
            "tensor": 1,
            "perplexity": {
                "store": "",
                "split": "validation",
                "rows": 2_000,
                "baseline_rows": 20_000,
            },
            "benchmarks": SUITES[checked(suite, SUITES)],
            "data": "",
            "partly": False,
            "unsafe_programs": False,
            "limit": config_dict.placeholder(int),
            "bos": True,
            "prompts": (),
            "chat": False,
            "sampling": sampling(max_tokens=128, temperature=0.0),
            "batch_tokens": 4_096,
            "cache": "",
        }
    )

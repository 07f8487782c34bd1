"""What every logged metric means: one definition and one unit each. docs/metrics.md is made of them:

python -m ctllm_jax.metrics.definitions > docs/metrics.md
"""

import dataclasses
import re

KINDS = {
    "train": "every `log.every` steps, and of the first step",
    "eval": "of each look at held-out data: before the first step, every `eval.every` steps, after the last; "
    "of the average where `optimizer.ema_half_life` has one kept",
    "job": "of the job's time: when a process begins, after a save, after a step when the last line is a minute old",
}


@dataclasses.dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl.

    Attributes:
      name: the key; a word in capitals stands for a name, as in loss/SOURCE.
      kinds: kinds of the lines that it is in.
      unit: of its values; a metric by layer has a list of them, the first layer's first.
      meaning: its definition.
      origin: the module that works it out.
      timing: whether it is measured with a clock or of the machine, so that runs with equal results differ in it.
    """

    name: str
    kinds: tuple[str, ...]
    unit: str
    meaning: str
    origin: str
    timing: bool = False


_ALL, _TRAIN, _EVAL, _JOB, _BOTH = tuple(KINDS), ("train",), ("eval",), ("job",), ("train", "eval")

METRICS = (
    Metric("kind", _ALL, "name", "which kind of line this is", "metrics/log.py"),
    Metric("step", _ALL, "steps", "steps that lay behind the run; they count from 1", "metrics/log.py"),
    Metric("time", _ALL, "s", "when the line was made, since 1970 (UTC)", "metrics/log.py", timing=True),
    # ---- What is learned
    Metric("count", _BOTH, "tokens, or pairs", "what was predicted, by which means are taken", "objectives.py"),
    Metric(
        "loss",
        _BOTH,
        "nats per token, or pair",
        "cross-entropy of the predicted tokens, without z-loss; of pairs the preference loss",
        "objectives.py",
    ),
    Metric("loss/SOURCE", _BOTH, "nats per token", "`loss` over the tokens of one source", "objectives.py"),
    Metric(
        "bits_per_byte",
        _EVAL,
        "bits per byte",
        "cross-entropy summed over held-out documents, in bits, divided by their bytes as UTF-8 text",
        "evaluate/in_loop.py",
    ),
    Metric("bits_per_byte/SOURCE", _EVAL, "bits per byte", "the same over one source", "evaluate/in_loop.py"),
    Metric("dft_loss", _BOTH, "nats per token", "DFT: what is minimised; `loss` is plain cross-entropy", "losses.py"),
    Metric("entropy", _BOTH, "nats per token", "of the predicted distributions (with logit_metrics)", "losses.py"),
    Metric("token_accuracy", _BOTH, "share", "tokens that were the likeliest (with logit_metrics)", "losses.py"),
    Metric("mean_logit", _BOTH, "1", "of the whole vocabulary (with logit_metrics)", "losses.py"),
    # ---- Pairs
    Metric(
        "accuracy",
        _BOTH,
        "share",
        "DPO: pairs whose chosen answer has the larger reward",
        "preference.py",
    ),
    Metric("accuracy/TASK", _EVAL, "share", "questions of a task that are answered rightly", "evaluate/in_loop.py"),
    Metric(
        "chance/TASK",
        _EVAL,
        "share",
        "`accuracy/TASK` of guessing; in the line of step 0 alone",
        "evaluate/in_loop.py",
    ),
    Metric("margin", _BOTH, "nats", "DPO: `reward_chosen` less `reward_rejected`", "preference.py"),
    Metric(
        "reward_chosen",
        _BOTH,
        "nats",
        "DPO: beta times how much likelier the chosen answer is than under the reference, in log-probability",
        "preference.py",
    ),
    Metric("reward_rejected", _BOTH, "nats", "the same of the rejected answer", "preference.py"),
    Metric("logprob_SIDE", _BOTH, "nats", "DPO: log-probability of the chosen or rejected answer", "preference.py"),
    Metric("tokens_SIDE", _BOTH, "tokens", "DPO: learned tokens of the chosen or rejected answer", "preference.py"),
    Metric(
        "kl",
        _BOTH,
        "nats per answer",
        "DPO: mean over both answers of log-probability under the reference less that under the policy; where the "
        "reference wrote the answers, an unbiased estimate of KL(reference || policy); else it may be negative",
        "preference.py",
    ),
    Metric("entropy_SIDE", _BOTH, "nats per token", "DPO: `entropy` over the tokens of one side", "objectives.py"),
    Metric("token_accuracy_SIDE", _BOTH, "share", "DPO: `token_accuracy` of one side", "objectives.py"),
    Metric("mean_logit_SIDE", _BOTH, "1", "DPO: `mean_logit` of one side", "objectives.py"),
    # ---- How
    Metric(
        "grad_norm",
        _TRAIN,
        "nats per token, or pair, per unit of parameter",
        "Euclidean norm of the gradient over all parameters that are trained, before clipping",
        "step.py",
    ),
    Metric("update_norm", _TRAIN, "parameter", "Euclidean norm of the update, applied or skipped", "step.py"),
    Metric(
        "param_norm",
        _TRAIN,
        "parameter",
        "Euclidean norm of what is trained (parameters, or LoRA's adapters) before the step",
        "step.py",
    ),
    Metric("layers/grad_norm", _TRAIN, "as `grad_norm`", "`grad_norm` of each layer's own parameters", "step.py"),
    Metric(
        "layers/update_ratio",
        _TRAIN,
        "share",
        "of each layer: norm of its update divided by the norm of its parameters before",
        "step.py",
    ),
    Metric("learning_rate", _TRAIN, "1", "what the step multiplied its direction by", "optim.py"),
    Metric(
        "skipped",
        _TRAIN,
        "steps",
        "steps so far that changed nothing: the gradient was not finite, or a spike",
        "step.py",
    ),
    # ---- How fast
    Metric(
        "step_ms",
        _TRAIN,
        "ms",
        "time from one finished step to the next, mean since the last line; without the first step after the start, an "
        "evaluation, a save or a profile",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "tokens_per_second",
        _TRAIN,
        "tokens/s",
        "tokens of a step, padding included, divided by `step_ms`; all devices together",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "mfu_causal",
        _TRAIN,
        "share",
        "model FLOP/s (6 per matrix weight and token, 4 where it is frozen; attention over the visible half; nothing "
        "for what is computed twice) divided by the dense bf16 peak of all devices; absent where the peak is not known",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "mfu_full",
        _TRAIN,
        "share",
        "the same, attention counted over the full square",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "input_wait_ms",
        _TRAIN,
        "ms",
        "time a step that process 0 waited for its next batch; the device is busy with the step before meanwhile, and "
        "idles only for what exceeds it",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "device_memory_peak_gib",
        _TRAIN,
        "GiB",
        "most memory in use so far on the fullest device of process 0; absent where the device does not say",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "host_memory_gib",
        _TRAIN,
        "GiB",
        "resident memory of process 0",
        "metrics/meter.py",
        timing=True,
    ),
    Metric(
        "evaluation_seconds",
        _EVAL,
        "s",
        "time that training stood still for it; absent before the first step, where it is part of the start",
        "metrics/meter.py",
        timing=True,
    ),
    # ---- Where the job's time went
    Metric(
        "checkpoint_seconds",
        _JOB,
        "s",
        "time that training stood still for the save (it goes on in the background)",
        "metrics/meter.py",
        timing=True,
    ),
    Metric("starts", _JOB, "processes", "how often the run has been started", "metrics/goodput.py", timing=True),
    Metric(
        "goodput",
        _JOB,
        "share",
        "`seconds/steps` divided by the sum of all `seconds`, which is the time since the run was first started",
        "metrics/goodput.py",
        timing=True,
    ),
    Metric("seconds/steps", _JOB, "s", "in steps whose results were kept", "metrics/goodput.py", timing=True),
    Metric(
        "seconds/start",
        _JOB,
        "s",
        "from opening the folder to the end of the first step: restoring, compiling, the first look at held-out data",
        "metrics/goodput.py",
        timing=True,
    ),
    Metric("seconds/evaluation", _JOB, "s", "in evaluations that were kept", "metrics/goodput.py", timing=True),
    Metric("seconds/checkpoint", _JOB, "s", "standing still for saves", "metrics/goodput.py", timing=True),
    Metric("seconds/profile", _JOB, "s", "starting and writing profiles", "metrics/goodput.py", timing=True),
    Metric(
        "seconds/lost",
        _JOB,
        "s",
        "after the checkpoint that a later process went on from: its work was done again",
        "metrics/goodput.py",
        timing=True,
    ),
    Metric(
        "seconds/down",
        _JOB,
        "s",
        "between the last line of a process and the next one's opening of the folder",
        "metrics/goodput.py",
        timing=True,
    ),
)


def find(kind: str, key: str) -> Metric | None:
    """The definition of a key in a line of that kind; None where it has none."""
    known = [metric for metric in METRICS if kind in metric.kinds]
    by_name = {metric.name: metric for metric in known}
    patterns = (metric for metric in known if re.fullmatch(re.sub("[A-Z]+", ".+", metric.name), key))
    return by_name.get(key) or next(patterns, None)


def document() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# What a run logs",
        "",
        "`RUN/metrics.jsonl` has an object a line; `kind` says which metrics it may have. TensorBoard",
        "(`RUN/tensorboard/`) and Weights & Biases get the same as KIND/NAME. A metric by layer is a list. This page",
        "is made by `python -m ctllm_jax.metrics.definitions > docs/metrics.md`; a test holds every logged key to it.",
        "",
        *(f"- **{kind}**: a line {text}" for kind, text in KINDS.items()),
        "",
        "Means are over what was predicted in the step or split, never means of means. A metric marked ◷ is measured",
        "with a clock or of the machine; all others are the same to the last bit, on CPUs, in a run that was killed",
        "and taken up.",
        "",
        "| metric | in | unit | definition | from |",
        "|---|---|---|---|---|",
    ]
    for metric in METRICS:
        name = f"`{metric.name}`" + (" ◷" if metric.timing else "")
        kinds = ", ".join(metric.kinds)
        lines.append(f"| {name} | {kinds} | {metric.unit} | {metric.meaning} | {metric.origin} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")

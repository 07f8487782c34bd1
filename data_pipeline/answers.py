"""What to know of the answers in a chat or preference store before training on them; said once, when it is built.

Records that cannot be used at all never come here: see `records`.
"""

from collections.abc import Mapping

from ctllm_jax.data.tokenizer import Tokenizer

LONGER = 1.2  # chosen answers' mean length over the rejected ones', from which on answers are expected to grow


def warnings(entries: Mapping[str, Mapping], kind: str, length: int, tokenizer: Tokenizer) -> list[str]:
    """Sentences for the user; none where all is well.

    Args:
      entries: {source: counts} of a store's training split, as its manifest has them.
      kind: "chat" or "preference".
      length: tokens of a row.
      tokenizer: the store's.
    """
    total = {key: sum(entry[key] for entry in entries.values()) for key in ("documents", "truncated", "dropped")}
    found = []
    if total["truncated"]:
        found.append(
            f"{_share(total, 'truncated')} were longer than {length} tokens and cut: with keep 'start' the last answer "
            "has no end, from which a model learns not to stop; with keep 'end' its question may be gone"
        )
    if total["dropped"]:
        what = "left no answer" if kind == "chat" else "left no answer, or two that do not differ"
        found.append(f"{_share(total, 'dropped')} were dropped: cutting at {length} tokens {what}")
    if kind == "preference" and (longer := _longer(entries)) >= LONGER:
        found.append(
            f"chosen answers have {longer:.2f} times the tokens of rejected ones: losses of summed log-probabilities "
            "then teach length as well; losses per token (sigmoid_norm, ipo) or a tail_weight below 1 do so less"
        )
    if tokenizer.pad_id is not None and tokenizer.pad_id == tokenizer.eos_id:
        found.append(
            "the tokenizer pads with the id that ends a document: here what is learned goes by place, and the end is; "
            "trainers that leave out padding by its id would never teach a model to stop"
        )
    return found


def _share(total: Mapping[str, int], key: str) -> str:
    return f"{total[key]:,} of {total['documents']:,} examples"


def _longer(entries: Mapping[str, Mapping]) -> float:
    chosen, rejected = (sum(entry[f"tokens_{side}"] for entry in entries.values()) for side in ("chosen", "rejected"))
    return chosen / max(rejected, 1)

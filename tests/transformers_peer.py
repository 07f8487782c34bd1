"""The peer of `test_transformers.py`: what Hugging Face's transformers make of exported folders.

    python transformers_peer.py REQUEST.json

The request: {"folders", "ids": token ids to score, "prompts": texts, "chats": conversations, "new_tokens"}. Writes
{folder}/peer.npz, the logits of `ids`, and {folder}/peer.json, for each prompt and chat its ids and the text that
greedy decoding continues it with. Knows nothing of ctllm_jax.
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def main(request_file: str) -> None:
    """Answers one request."""
    request = json.loads(pathlib.Path(request_file).read_text(encoding="utf-8"))
    for folder in map(pathlib.Path, request["folders"]):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([request["ids"]])).logits[0].numpy()
            answers = [
                continued(model, tokenizer, ids, request["new_tokens"])
                for ids in (
                    *([tokenizer.bos_token_id, *tokenizer.encode(text)] for text in request["prompts"]),
                    *(chat_ids(tokenizer, messages) for messages in request["chats"]),
                )
            ]
        np.savez(folder / "peer.npz", logits=logits)
        (folder / "peer.json").write_text(json.dumps(answers), encoding="utf-8")


def chat_ids(tokenizer, messages: list[dict]) -> list[int]:
    """Ids of a conversation up to where the assistant speaks, by the template that came with the folder."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def continued(model, tokenizer, ids: list[int], new_tokens: int) -> dict:
    """The ids given, and the text of the greedy continuation, which ends as generation_config.json says."""
    inputs = torch.tensor([ids])
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new_tokens, do_sample=False)[
        0
    ]
    return {"ids": ids, "text": tokenizer.decode(output[len(ids) :], skip_special_tokens=True)}


if __name__ == "__main__":
    main(*sys.argv[1:])

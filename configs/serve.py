"""A checkpoint as an HTTP server in the words of OpenAI's API: chat and text completions, streams, one model.

    ctllm serve --config.model=runs/sft
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "sft@2000", "messages": [{"role": "user", "content": "你好"}]}'

pip install 'ctllm-jax[serve]'. One device is enough: by estimate the 2B model needs 4.3 GB for its bf16 parameters and
1.1 GB of bf16 cache for every slot of 4,096 tokens; `--config.tensor=N` splits both over N devices. It listens on this
machine alone and asks nobody for a key: what others can reach (`--config.host=0.0.0.0`) belongs behind a proxy that
does. Web pages cannot reach it through a browser: a body has to be application/json, and a server that listens on
127.0.0.1 has to be called by that name or localhost.
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
            "name": config_dict.placeholder(str),
            "host": "127.0.0.1",
            "port": 8_000,
            "slots": 8,
            "context": config_dict.placeholder(int),
            "queue": 64,
            "connections": 256,
            "body_bytes": 1_048_576,
            "header_seconds": 10.0,
            "seconds": 300.0,
            "stop_seconds": 20.0,
            "sampling": sampling(max_tokens=1_024, temperature=0.8, top_p=0.95),
        }
    )

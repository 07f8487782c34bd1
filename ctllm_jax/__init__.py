"""ctllm-jax: the model and everything that runs on an accelerator. Pure JAX: no TensorFlow, no Beam."""

__version__ = "0.1.0"

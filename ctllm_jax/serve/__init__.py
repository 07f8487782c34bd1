"""A model behind HTTP, in the words of OpenAI's API. `serve.run` is the verb `ctllm serve`."""

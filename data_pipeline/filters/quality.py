"""A quality classifier of the user's own: a fastText model (`.bin` or `.ftz`) by its path."""

import dataclasses
import functools
import pathlib

import fasttext

from ctllm_jax.common.errors import UserError
from data_pipeline.documents import SUBSETS
from data_pipeline.filters.batch import segmenter, utf8

RULE = "quality_score"


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """model: path of a supervised model ('': none is asked).

    subsets: those that are judged; label: what the model calls good, without `__label__`; min_score: [probability] its
    least; segment: the text is cut into words by rjieba first, for models that were trained so.
    """

    model: str
    label: str
    min_score: float
    subsets: tuple[str, ...]
    segment: bool

    def __post_init__(self) -> None:
        for subset in self.subsets:
            if subset not in SUBSETS:
                raise UserError(f"filters.quality.subsets: unknown subset {subset!r}; known: {', '.join(SUBSETS)}")
        if not self.model:
            return
        if not pathlib.Path(self.model).is_file():
            raise UserError(f"filters.quality.model: no file {self.model!r}")
        if not self.label or not self.subsets:
            raise UserError("filters.quality: a model needs a label and subsets to judge")


@functools.cache
def _load(path: str) -> fasttext.FastText._FastText:
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise UserError(f"filters.quality.model: {path} is no fastText model ({error})") from None


class Quality:
    """Callable: (subset, text) -> the probability that the text is good, None where none is asked for."""

    def __init__(self, config: QualityConfig):
        self._config = config
        self._cut = segmenter("rjieba") if config.segment else None
        self._label = f"__label__{config.label}"
        if config.model and self._label not in (labels := _load(config.model).predict("the 的", k=-1)[0]):
            raise UserError(
                f"filters.quality.label: {config.label!r} is none of the model's: {', '.join(labels)[:500]}"
            )

    def __call__(self, subset: str, text: str) -> float | None:
        if not self._config.model or subset not in self._config.subsets:
            return None
        words = " ".join(text.split())  # the model reads one line
        if self._cut:
            words = " ".join(word for word in self._cut(words) if not word.isspace())
        labels, scores = _load(self._config.model).predict(utf8(words), k=-1)
        return min(float(dict(zip(labels, scores, strict=True)).get(self._label, 0.0)), 1.0)

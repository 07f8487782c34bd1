"""Limits on measures, and the decision: every failed rule with its value and threshold."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctllm_jax.common.errors import UserError
from data_pipeline.documents import SUBSETS
from data_pipeline.filters import lines, mask, measures, quality, rewrite, urls
from data_pipeline.filters.batch import MeasureConfig, TextBatch
from data_pipeline.filters.language import LanguageConfig, LanguageId

LANGUAGE_RULES = ("language_label", "language_score")
URL_RULE = "url_list"
_KANA_HANGUL = 0.02  # share up to which a name or a quotation explains them


@dataclasses.dataclass(frozen=True)
class Limits:
    """A document passes if min <= value <= max and above < value; None means no bound."""

    min: float | None = None  # [the measure's] least value that passes; None: no bound
    above: float | None = None  # [the measure's] values up to this one do not pass; None: no bound
    max: float | None = None  # [the measure's] largest value that passes; None: no bound


@dataclasses.dataclass(frozen=True)
class Language:
    """Labels of fastText's lid.176 that a subset accepts (empty: any), and the least score.

    min_han: [share] of Han characters from which on, with next to no kana and hangul, a text is Chinese and the model
    is not asked (there is no score then): it takes classical and technical Chinese for Japanese or Serbo-Croatian now
    and then. None: it always is.
    """

    labels: tuple[str, ...]  # of fastText's lid.176 that the subset accepts; empty: any
    min_score: float  # [probability] least score of the label
    min_han: float | None = None

    def shown_by_script(self, signals: Mapping[str, float]) -> bool:
        """Whether the characters alone tell that a text is Chinese."""
        return self.min_han is not None and signals["han"] >= self.min_han and signals["kana_hangul"] <= _KANA_HANGUL


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """What is done to a document, in this order: its text is rewritten, lines are dropped, what tells of a person is
    masked, the rest is judged."""

    rewrite: rewrite.RewriteConfig  # what is changed in a text
    lines: lines.LineConfig  # which lines are dropped
    mask: mask.MaskConfig  # what tells of a person, and what stands in its place
    urls: urls.UrlConfig  # addresses that are not wanted
    measures: MeasureConfig  # what measures need to know
    rules: dict[str, dict[str, Limits]]  # family -> measure -> limits
    language: LanguageConfig  # how the language is told
    languages: dict[str, Language]  # subset -> its language; subsets not named are unchecked
    quality: quality.QualityConfig  # a model of quality, if one is wanted

    def __post_init__(self) -> None:
        for family, limits in self.rules.items():
            if family not in measures.FAMILIES:
                raise UserError(f"filters.rules: unknown family {family!r}; known: {', '.join(measures.FAMILIES)}")
            for name in limits:
                if name not in measures.names(family):
                    known = ", ".join(measures.names(family))
                    raise UserError(f"filters.rules.{family}: no measure is called {name!r}; known: {known}")
        for subset, language in self.languages.items():
            if language.min_han is not None and measures.family(subset) != "chinese":
                raise UserError(f"filters.languages.{subset}: min_han is for Chinese subsets")
            if subset not in SUBSETS:
                raise UserError(f"filters.languages: unknown subset {subset!r}; known: {', '.join(SUBSETS)}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a document; without reasons it is kept.

    text: as it is kept; aside: what goes into the document's `meta`: licence header, how much was masked of each kind.
    signals: every measured value; reasons: every failed rule, in the order in which the released script decides.
    """

    text: str
    aside: dict[str, Any]
    signals: dict[str, Any]
    reasons: list[dict[str, Any]]

    @property
    def passed_rules(self) -> bool:
        """Whether nothing but its language speaks against the document."""
        return all(reason["rule"] in LANGUAGE_RULES for reason in self.reasons)


def limits_of(filters: Mapping[str, Any], subset: str) -> dict[str, dict[str, float]]:
    """{measure, language_score or quality_score: {bound (a field of Limits): threshold}} for a subset's documents.

    filters: a FilterConfig as a mapping, as a corpus's stage.json has it.
    """
    limits = dict(filters["rules"].get(measures.family(subset), {}))
    if language := filters["languages"].get(subset):
        limits["language_score"] = {"min": language["min_score"]}
    if filters["quality"]["model"] and subset in filters["quality"]["subsets"]:
        limits[quality.RULE] = {"min": filters["quality"]["min_score"]}
    return {
        name: {bound: threshold for bound, threshold in own.items() if threshold is not None}
        for name, own in limits.items()
    }


class Filters:
    """All filters of a configuration. Lists and models are read once in a process."""

    def __init__(self, config: FilterConfig):
        self._config = config
        self._language = LanguageId(config.language)
        self._urls = urls.load(config.urls)
        self._lines = lines.LineFilter(config.lines, config.measures.segmenter)
        self._quality = quality.Quality(config.quality)

    def judge(self, subset: str, texts: Sequence[str], addresses: Sequence[str]) -> list[Verdict]:
        """One verdict per document of a batch from one subset."""
        family = measures.family(subset)
        rewritten, aside = self._rewrite(family, texts)
        values = measures.measure(family, TextBatch(rewritten, self._config.measures, texts))
        columns = [np.round(column, 6).tolist() for column in values.values()]  # what is recorded is what is compared
        limits = self._config.rules.get(family, {})
        limits = {name: limits[name] for name in values if name in limits}
        language = self._config.languages.get(subset)
        verdicts = []
        for i, row in enumerate(zip(*columns, strict=True)):
            signals: dict[str, Any] = dict(zip(values, row, strict=True))
            reasons = broken(signals, limits)
            listed = self._urls.find(addresses[i]) if self._urls and addresses[i] else None
            if listed:
                first = bool(reasons) and reasons[0]["rule"] == "bracketed"
                reasons.insert(first, {"rule": URL_RULE, "value": listed})
            if language is not None and language.shown_by_script(signals):
                signals["language"] = "zh"
            elif language is not None:
                label, score = self._language(rewritten[i])
                signals |= {"language": label, "language_score": round(score, 6)}
                reasons += _language_reasons(label, signals["language_score"], language)
            score = self._quality(subset, rewritten[i])
            if score is not None:
                signals[quality.RULE] = round(score, 6)
                reasons += broken(signals, {quality.RULE: Limits(min=self._config.quality.min_score)})
            verdicts.append(Verdict(rewritten[i], aside[i], signals, reasons))
        return verdicts

    def _rewrite(self, family: str, texts: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
        """Texts as they would be kept, and what goes into the `meta` of each."""
        config = self._config.rewrite
        aside: list[dict[str, Any]] = [{} for _ in texts]
        if family == "code":
            parts = [rewrite.take_licence_header(text) if config.licence_headers else ("", text) for text in texts]
            rewritten = [text for _, text in parts]
            aside = [{"licence_header": header} if header else {} for header, _ in parts]
        else:
            rewritten = [rewrite.rewrite(text, config) for text in texts]
        if family == "chinese":
            rewritten = [self._lines(rewrite.simplify(text) if config.simplify else text) for text in rewritten]
        masked = [mask.mask(text, self._config.mask) for text in rewritten]
        aside = [own | ({"masked": counts} if counts else {}) for own, (_, counts) in zip(aside, masked, strict=True)]
        return [text for text, _ in masked], aside


def broken(values: Mapping[str, float], limits: Mapping[str, Limits]) -> list[dict[str, Any]]:
    """The rules that these values break: {rule, value, bound (a field of Limits), threshold}."""
    reasons = []
    for name, limit in limits.items():
        value = values[name]
        if limit.min is not None and value < limit.min:
            reasons.append({"rule": name, "value": value, "bound": "min", "threshold": limit.min})
        if limit.above is not None and value <= limit.above:
            reasons.append({"rule": name, "value": value, "bound": "above", "threshold": limit.above})
        if limit.max is not None and value > limit.max:
            reasons.append({"rule": name, "value": value, "bound": "max", "threshold": limit.max})
    return reasons


def _language_reasons(label: str, score: float, language: Language) -> list[dict[str, Any]]:
    reasons: list[dict[str, Any]] = []
    if language.labels and label not in language.labels:
        reasons.append({"rule": "language_label", "value": label, "bound": "in", "threshold": list(language.labels)})
    if score < language.min_score:
        reasons.append({"rule": "language_score", "value": score, "bound": "min", "threshold": language.min_score})
    return reasons

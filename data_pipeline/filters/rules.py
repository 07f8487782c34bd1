"""Limits on measures, and the decision: every failed rule with its value and threshold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.errors import UserError
from data_pipeline.documents import SUBSETS
from data_pipeline.filters import measures
from data_pipeline.filters.batch import TextBatch
from data_pipeline.filters.language import LanguageId

LANGUAGE_RULES = ("language_label", "language_score")


@dataclasses.dataclass(frozen=True)
class Limits:
    """A document passes if min <= value <= max; None means no bound."""

    min: float | None = None
    max: float | None = None


@dataclasses.dataclass(frozen=True)
class Language:
    """Labels of fastText's lid.176 that a subset accepts, and the least score."""

    labels: tuple[str, ...]
    min_score: float


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """rules: family -> measure -> limits; languages: subset -> language, subsets not named are unchecked."""

    rules: dict[str, dict[str, Limits]]
    languages: dict[str, Language]
    language_sample_characters: int

    def __post_init__(self) -> None:
        for family, limits in self.rules.items():
            if family not in measures.FAMILIES:
                raise UserError(f"filters.rules: unknown family {family!r}; known: {', '.join(measures.FAMILIES)}")
            for name in limits:
                if name not in measures.names(family):
                    known = ", ".join(measures.names(family))
                    raise UserError(f"filters.rules.{family}: no measure is called {name!r}; known: {known}")
        for subset in self.languages:
            if subset not in SUBSETS:
                raise UserError(f"filters.languages: unknown subset {subset!r}; known: {', '.join(SUBSETS)}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """signals: every measured value; reasons: every failed rule. A document without reasons is kept."""

    signals: dict[str, Any]
    reasons: list[dict[str, Any]]

    @property
    def passed_rules(self) -> bool:
        """Whether nothing but its language speaks against the document."""
        return all(reason["rule"] in LANGUAGE_RULES for reason in self.reasons)


class Filters:
    """All filters of a configuration. Holds the language model; make one per worker."""

    def __init__(self, config: FilterConfig):
        self._config = config
        self._language = LanguageId(config.language_sample_characters)

    def judge(self, subset: str, batch: TextBatch) -> list[Verdict]:
        """One verdict per document of a batch from one subset."""
        family = measures.family(subset)
        values = {name: column.tolist() for name, column in measures.measure(family, batch).items()}
        limits = self._config.rules.get(family, {})
        language = self._config.languages.get(subset)
        verdicts = []
        for i, text in enumerate(batch.texts):
            signals: dict[str, Any] = {name: _rounded(column[i]) for name, column in values.items()}
            reasons = broken(signals, limits)
            if language is not None:
                label, score = self._language(text)
                signals |= {"language": label, "language_score": _rounded(score)}
                reasons += _language_reasons(label, signals["language_score"], language)
            verdicts.append(Verdict(signals, reasons))
        return verdicts


def broken(values: Mapping[str, float], limits: Mapping[str, Limits]) -> list[dict[str, Any]]:
    """The rules that these values break: {rule, value, bound: 'min' or 'max', threshold}."""
    reasons = []
    for name, limit in limits.items():
        value = values[name]
        if limit.min is not None and value < limit.min:
            reasons.append({"rule": name, "value": value, "bound": "min", "threshold": limit.min})
        if limit.max is not None and value > limit.max:
            reasons.append({"rule": name, "value": value, "bound": "max", "threshold": limit.max})
    return reasons


def _language_reasons(label: str, score: float, language: Language) -> list[dict[str, Any]]:
    reasons: list[dict[str, Any]] = []
    if label not in language.labels:
        reasons.append({"rule": "language_label", "value": label, "bound": "in", "threshold": list(language.labels)})
    if score < language.min_score:
        reasons.append({"rule": "language_score", "value": score, "bound": "min", "threshold": language.min_score})
    return reasons


def _rounded(value: float) -> float:
    """Six digits after the point: what is recorded is what is compared."""
    return round(value, 6)

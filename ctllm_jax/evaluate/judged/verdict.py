"""What a judge's text says: a mark from 1 to 10, marks of aspects, or which of two answers is better.

Tolerant in form, strict in sense: a mark is read wherever a judge plainly gives one, with the form that it was found
in; where there is none, where it lies outside 1 to 10, or where plain forms contradict each other, there is no mark.

Where FastChat's and AlignBench's parsers read otherwise: they miss spaces within brackets, 【【9】】, 9/10, 8分, double
quotes, full-width digits (FastChat fails on them) and decimals (AlignBench takes 7.5 for 7); FastChat accepts 0, 11 and
any list of one number. Of several different [[x]] the first one counts, as in FastChat, under a form of its own.
"""

import dataclasses
import re

LOWEST, HIGHEST = 1, 10
_NUMBER = r"(-?[0-9]+(?:\.[0-9]*)?)"
_OF_TEN = r"(?:\s*/\s*10(?![0-9/])|\s*分)?"
_BRACKETS = re.compile(rf"(?:\[\[|【【)\s*{_NUMBER}{_OF_TEN}\s*(?:\]\]|】】)")
_LABEL = re.compile(
    # Possessive (*+): white space is taken whole, or a long run would be divided among its places in all ways.
    r"(?:评分|得分|分数|打分|总分|rating|score)[\"'*]*+\s*+(?:(?:[:=为是]|is)\s*+)?"
    rf"(?:\*\*\s*+|(?:\*\*)?[\[【(]\s*+)?{_NUMBER}{_OF_TEN}(?!\s*/|[0-9%]|\.[0-9])",
    re.IGNORECASE,
)
_PLAIN = re.compile(
    rf"(?<![0-9./-]){_NUMBER}\s*/\s*10(?![0-9/])|(?<!满分)(?<!满分为)(?<![0-9./-]){_NUMBER}\s*分(?=$|[\s。，,.!！;；)】\]])"
)
_ASPECTS = re.compile(r"\{[^{}]*\}")
_ASPECT = re.compile(rf"[\"']([^\"']+)[\"']\s*:\s*{_NUMBER}\s*(?=[,}}])")
OVERALL = "综合得分"
_BETTER = re.compile(r"(?:\[\[|【【)\s*([ABC])\s*(?:\]\]|】】)")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}


@dataclasses.dataclass(frozen=True)
class Mark:
    """What was read. `value` is None exactly when `form` is missing, out of range or contradictory.

    Attributes:
      value: 1 to 10.
      form: where it was found (brackets, first of several brackets, aspects, label, plain), or why there is none.
      aspects: marks of aspects, where the judge gave them.
    """

    value: float | None
    form: str
    aspects: dict[str, float]


def read_mark(text: str) -> Mark:
    """The mark that a judgement gives: the first [[x]], else the overall mark among aspects, else what all labelled
    numbers ("评分：8"), else what all plain ones ("8分", "8/10") agree on."""
    text = _without_thoughts(text)
    groups = [dict(_ASPECT.findall(group)) for group in _ASPECTS.findall(text)]
    aspects = {name: float(number) for name, number in (groups[-1] if groups else {}).items()}
    if bracketed := _BRACKETS.findall(text):
        form = "brackets" if len({float(number) for number in bracketed}) == 1 else "first of several brackets"
        return _mark(bracketed[:1], form, aspects)
    if OVERALL in aspects:
        return _mark([aspects[OVERALL]], "aspects", aspects)
    if labelled := _LABEL.findall(text):
        return _mark(labelled, "label", aspects)
    plain = [one or other for one, other in _PLAIN.findall(text)]
    return _mark(plain, "plain", aspects) if plain else Mark(None, "missing", aspects)


def _without_thoughts(text: str) -> str:
    """The judgement without thoughts before it, in plain characters."""
    return text.rpartition("</think>")[2].translate(_FULL_WIDTH)


def _mark(found: list, form: str, aspects: dict[str, float]) -> Mark:
    values = {float(number) for number in found}
    if len(values) > 1:
        return Mark(None, "contradictory", aspects)
    value = values.pop()
    return Mark(value, form, aspects) if LOWEST <= value <= HIGHEST else Mark(None, "out of range", aspects)


def read_preference(text: str) -> str | None:
    """ "A" or "B" where the judge prefers that answer, "C" for neither; None where the text gives none of [[A]], [[B]],
    [[C]], or several different ones."""
    found = set(_BETTER.findall(_without_thoughts(text)))
    return found.pop() if len(found) == 1 else None

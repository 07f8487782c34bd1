"""Answers to exams and readings in Chinese, taken from what a model wrote and held to the keys.

The rules are OpenCompass's (GAOKAO-Bench, AGIEval, CMRC) and CMATH's own, quirks included. `extract` lists them among
the others.
"""

import re

from ctllm_jax.evaluate.math_answers import boxed

# ---- GAOKAO-Bench


def several_options(text: str) -> str:
    """The letters A to D behind 【答案】; of the last ten characters where it stands nowhere or first."""
    text = re.sub(r"\s+", "", text)
    start = text.find("【答案】")
    return "".join(re.findall("[A-D]", text[start:] if start > 0 else text[-10:]))


def answer_sheet(text: str, wanted: int) -> str:
    """The letters behind each 【答案】 if they are as many as wanted, else as many of the first capitals."""
    marked = re.findall(r"【答案】\s*+(?:[:：]++\s*+)?([A-Z])", text)
    return "".join(marked if len(marked) == wanted else re.findall("[A-Z]", text)[:wanted])


def five_of_seven(text: str) -> str:
    """The first five of the letters A to G."""
    return "".join(re.findall("[A-G]", text)[:5])


def places(answer: str, key: str) -> float:
    """The share of a key's letters that stand in their places; 0 where answer and key differ in length."""
    if len(answer) != len(key):
        return 0.0
    return sum(map(str.__eq__, answer, key)) / len(key)


def partial_credit(answer: str, key: str) -> float:
    """1 for all of a key's letters in its order, 1/2 for nothing but letters of it."""
    if answer == key:
        return 1.0
    return 0.5 if answer and set(answer) <= set(key) else 0.0


# ---- AGIEval


def agieval_math(text: str) -> str:
    """A final expression: of the last box, else between the last line's dollar signs, else what follows the last "="
    or the last number; "The answer is therefore" and 答案是 before it are taken off."""
    for mark in ("The answer is therefore", "答案是"):
        if text.startswith(mark):
            text = text[len(mark) :].strip()
        elif mark in text:
            text = text.rpartition(mark)[2].strip()
    if "\\boxed" in text:
        inside = boxed(text)
        return "" if inside is None else _right_side(inside)
    quoted = re.findall(r"\$(.*)\$", text)
    if quoted and (answer := _right_side(quoted[-1])):
        return answer
    if "=" in text:
        return text.split("=")[-1].lstrip(" ").rstrip(".").split("\\n")[0]
    numbers = re.findall(r"\$?(?<!\d)\d++(?:\.\d++)?(?!\w)", text)
    return numbers[-1] if numbers else ""


def _right_side(text: str) -> str:
    return text.split("=")[-1].lstrip(" ") if "=" in text else text


# ---- CMRC


def cmrc(text: str) -> str:
    """What stands between the first and the second 答案是, or all of it."""
    return text.split("答案是")[1] if "答案是" in text else text


# ---- CMATH

# Possessive (++): a run of digits is taken whole or not at all, or a long one would be tried in all its parts.
_NUMBER = r"\d++(?:[./]\d*+)?%?"
_LATEX_FRACTION = re.compile(r"\\frac{([^}]+)}{([^}]+)}")
_IN_LINE = (  # numbers and what may stand around them, in this order
    re.compile(rf"^({_NUMBER}) ?(?=[\u4e00-\u9fa5,，。°℃$])"),
    re.compile(rf"(?<=[\u4e00-\u9fa5$:：，＝≈=->{{]) ?({_NUMBER}) ?(?:[\u4e00-\u9fa5,，。°℃$}}（]|\([^\d\s]|\.$)"),
)
_CHINESE_FRACTION = re.compile(r"(?<!\d)(\d++)分之(\d+)")
_LINE_END = (re.compile(rf"(?<=[\u4e00-\u9fa5$:：＝≈=\->]) ?({_NUMBER})$"), re.compile(rf"^{_NUMBER}$"))


def cmath(text: str) -> str:
    """The last two numbers, a space between them: integers, decimals, percentages, fractions (1/2, 2分之1, \\frac)."""
    text = re.sub(r"(?<=\d)[, ](?=\d)", "", _LATEX_FRACTION.sub(r"\1/\2", text))
    found = []
    for line in text.splitlines():
        found += [number for pattern in _IN_LINE for number in pattern.findall(line)]
        found += [f"{above}/{below}" for below, above in _CHINESE_FRACTION.findall(line)]
        found += [number for pattern in _LINE_END for number in pattern.findall(line)]
    return " ".join([number for number in found if not number.startswith("/") and not number.endswith("/")][-2:])


def near_number(answer: str, key: str) -> bool:
    """Whether one of the numbers is the key: whole numbers exactly, others to one per cent of the smaller."""
    values = [_value(number) for number in answer.split()]
    return any(_near(value, _value(key)) for value in values if value is not None)


def _value(number: str) -> int | float | None:
    """What a number's text says; None of one that is cut short."""
    try:
        return _parsed(number)
    except ValueError:
        return None


def _parsed(number: str) -> int | float:
    if number.endswith("%"):
        return float(number.replace("%", "")) / 100
    if "/" in number:
        above, _, below = number.partition("/")
        return float(above) / float(below) if float(below) else 0
    return float(number) if "." in number else int(number)


def _near(one: int | float, other: int | float) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    try:
        return abs(one - other) / (min(abs(one), abs(other)) + 1e-6) < 1e-2
    except OverflowError:  # a whole number beyond all floats
        return False

"""Answers to mathematics problems: taken from a solution's text, brought into one form, compared.

The rules are OpenCompass's (which go back to the MATH data set's and Minerva's), quirks included, since published
scores were made with them: an answer that a mathematician would accept may count as wrong.
"""

import functools
import re
from collections.abc import Callable

_REPLACED = (
    *(("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text")),
    *((",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"), ("\\le", "<")),
)
_UNITS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue"),
    *("points", "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges"),
    *("students", "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2"),
    *("\\text{}^3", "\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"'),
    *("\\dots", "\n", "\r", "\f"),
)
# What an expression is wrapped in, and what it is then replaced by.
_WRAPPINGS = (
    (r"(\\text\{)\((.*?)\)(\})", r"\2"),
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
)
_MARKS = (r"finalansweris(.*)", r"answer?is:?(.*)", r"oxed\{(.*?)\}", r"\$(.*?)\$")


def boxed(text: str, unwrap: bool = False) -> str | None:
    """What the last \\boxed{...} (or \\fbox) of a text holds, its braces balanced; None without one.

    `unwrap` takes away a second pair of braces around all of it.
    """
    start = text.rfind("\\boxed")
    start = start if start >= 0 else text.rfind("\\fbox")
    if start < 0:
        return None
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if text[end] == "}" and depth == 0:
            break
    else:
        return None
    inside = text[start : end + 1]
    if not inside.startswith("\\boxed{"):
        return None
    inside = inside[len("\\boxed{") : -1]
    match = re.match(r"^\{(.*)\}$", inside) if unwrap else None
    return match.group(1) if match else inside


def normalise(answer: str) -> str:
    """Minerva's normal form of a final answer."""
    for old, new in _REPLACED:
        answer = answer.replace(old, new)
    for unit in _UNITS:
        answer = answer.replace(unit, "")
    for pattern, new in _WRAPPINGS:
        answer = re.sub(pattern, new, answer)
    for pattern in _MARKS:
        if found := re.findall(pattern, answer):
            answer = found[-1]
    answer = answer.strip()
    if "rac" in answer and "\\frac" not in answer:
        answer = answer.replace("rac", "\\frac")
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer).replace("$", "")
    digits = answer.replace(",", "")
    return digits if digits.isdigit() else answer


def final_answer(text: str) -> str:
    """The first sentence that names the final answer, or the first one, in normal form."""
    sentences = text.split(".")
    return normalise(next((s for s in sentences if "final answer" in s.lower()), sentences[0]))


def final_answer_v2(text: str) -> str:
    """The last box, else the first sentence with "final answer" or "answer is", else the first sentence."""
    if inside := boxed(text, unwrap=True):
        return inside
    sentences = text.split(".")
    named = (s for s in sentences if re.search("final answer|answer is", s.lower()))
    return normalise(next(named, sentences[0]))


def equivalent_plain(one: str | None, other: str | None, strict: bool = False) -> bool:
    """Whether two answers are the same expression by the MATH data set's own rule, which AGIEval keeps: equal in plain
    form, or letter by letter where one has none; a quotient of letters has none if `strict` (lm-eval-harness's
    hendrycks_math)."""
    if one is None or other is None:
        return one is other
    try:
        return _plain(one, strict) == _plain(other, strict)
    except (ValueError, IndexError):
        return one == other


def equivalent_v1(one: str | None, other: str | None) -> bool:
    """The same by OpenCompass's first version."""
    return _equivalent(one, other, functools.partial(_plain, strict=True))


def equivalent_v2(one: str | None, other: str | None) -> bool:
    """The same by its second version, which forgives more: units, text, decimals that are whole numbers."""
    return _equivalent(one, other, _plain_v2)


def _equivalent(one: str | None, other: str | None, plain: Callable[[str], str]) -> bool:
    if one is None or other is None:
        return one is other
    forms = (plain, lambda text: normalise(plain(text)), normalise)
    return any(_same(form, one, other) for form in forms) or one == other


def _same(form: Callable[[str], str], one: str, other: str) -> bool:
    try:
        return form(one) == form(other)
    except (ValueError, IndexError):  # no such form, as of "a/b" with letters
        return False


def _without(text: str, *parts: str) -> str:
    for part in parts:
        text = text.replace(part, "")
    return text


def _plain(text: str, strict: bool) -> str:
    """The MATH data set's form; a quotient whose sides are no whole numbers stays as it is, or has none if `strict`."""
    text = _without(text, "\n", "\\!").replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    text = _without(text, "\\left", "\\right", "^{\\circ}", "^\\circ", "\\$")
    if "\\text{ " in text:  # a unit, on the right
        text, _ = text.split("\\text{ ")
    text = _without(text, "\\%").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = _roots(_value(text))
    text = _fractions(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    try:
        return _quotient(text)
    except ValueError:
        if strict:
            raise
        return text


def _plain_v2(text: str) -> str:
    text = _without(text.strip(), "\n").rstrip(".")
    text = _without(text, "\\!", "\\ ").replace("\\\\", "\\").replace("\\\\", "\\")
    text = _without(text.replace("tfrac", "frac").replace("dfrac", "frac"), "\\left", "\\right")
    text = re.sub(r"\\text{.*?}$", "", text).strip() or text  # a unit, where something is left
    text = _without(text, "^{\\circ}", "^\\circ", "\\$", "$", "\\text", "x\\in", "\\%", "%")
    text = _without(text.replace(" .", " 0.").replace("{.", "{0."), "\\cdot").replace("infinity", "\\infty")
    if "\\infty" not in text:
        text = text.replace("inf", "\\infty")
    text = re.sub(r"\\mbox{.*?}", "", _without(text.replace("+\\inity", "\\infty"), "and", "\\mathbf"))
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = _whole(text)
    if not text:
        return text
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", _value(text))
    return _quotient(_fractions(text.replace(" ", "")))


def _whole(text: str) -> str:
    """Decimals that are whole numbers without their zeros. The digits are looked back at, not matched: of a long run of
    them all parts would be tried."""
    return re.sub(r"(?<=\d)\.0+$", "", re.sub(r"(?<=\d)\.0+([^\d])", r"\1", text))


def _value(text: str) -> str:
    """The right side of "x = ...", with a zero before a leading point."""
    text = "0" + text if text[0] == "." else text
    sides = text.split("=")
    return sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text


def _roots(text: str) -> str:
    """\\sqrt3 as \\sqrt{3}."""
    first, *rest = text.split("\\sqrt")
    return first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)


def _fractions(text: str) -> str:
    """\\frac12 as \\frac{1}{2}, \\frac1{72} as \\frac{1}{72}; the text as it was where one is cut short.

    Raises:
      IndexError: nothing follows one.
    """
    first, *rest = text.split("\\frac")
    found = first
    for part in rest:
        if part[0] == "{":
            found += "\\frac" + part
        elif len(part) < 2:
            return text
        else:
            below = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            found += f"\\frac{{{part[0]}}}{below}"
    return found


def _quotient(text: str) -> str:
    """3/4 as \\frac{3}{4}; ValueError where one side is no whole number."""
    sides = text.split("/")
    if len(sides) != 2:
        return text
    above, below = int(sides[0]), int(sides[1])
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text

"""Answers taken from what a model wrote, and held to the accepted ones.

OpenCompass's and lm-eval-harness's rules, quirks included, since published scores were made with them. An extractor
that finds nothing gives "", "NULL", "[invalid]" or "Need_Check", as theirs do; `failed` knows them, and failures are
counted.
"""

import ast
import functools
import re
import string
from collections.abc import Callable, Sequence

from ctllm_jax.data.tokenizer import lone_surrogate
from ctllm_jax.evaluate import exams, harness, replies
from ctllm_jax.evaluate.math_answers import (
    equivalent_plain,
    equivalent_v1,
    equivalent_v2,
    final_answer,
    final_answer_v2,
)

_CODE = re.compile(r"```(.*?)```", re.DOTALL)


def failed(answer: str) -> bool:
    """Whether an extractor found nothing."""
    return answer in ("", "NULL", "[invalid]", replies.NEED_CHECK)


# ---- Options


def first_capital(text: str) -> str:
    """The first upper-case letter."""
    return next((letter for letter in text if letter.isupper()), "")


def last_capital(text: str) -> str:
    """The last upper-case letter."""
    return first_capital(text[::-1])


def first_capitals(text: str) -> str:
    """The first run of the letters A to D."""
    match = re.search("[A-D]+", text)
    return match.group() if match else ""


def first_option(text: str, options: str = "ABCD") -> str:
    """The option that the first phrase on a list names: OpenCompass's for chat models, Chinese and English."""
    text = text.strip()
    for pattern in _OPTION_PHRASES:
        match = re.search(pattern.replace("@", f"([{options}])").replace("#", f"[{options}]"), text, re.DOTALL)
        if match:
            named = match.group(1) or match.group()
            if found := next((option for option in options if option in named), None):
                return found
    return ""


def last_option(text: str, options: str = "ABCD") -> str:
    """The last option letter."""
    return next((letter for letter in reversed(text) if letter in options), "")


# @ is an option, caught; # is one, not caught. Order decides. One pattern never matches ("故选?@只有..."): two lines of
# the original lack a comma between them.
_OPTION_PHRASES = (
    *(r"答案是?\s*@", r"答案是?\s*：\s*@", r"答案是?\s*:\s*@", r"答案选项应?该?是\s*@", r"答案选项应?该?为\s*@"),
    *(r"答案应该?是\s*@", r"答案应该?选\s*@", r"答案选项为?\s*：\s*@", r"答案选项为?\s+\(?\*?\*?@\*?\*?\)?"),
    *(r"答案选项是?\s*:\s*@", r"答案为\s*@", r"答案选\s*@", r"选择?\s*@", r"故选?\s*@只有选?项?\s?@\s?是?对"),
    *(r"只有选?项?\s?@\s?是?错", r"只有选?项?\s?@\s?不?正确", r"只有选?项?\s?@\s?错误"),
    *(r"说法不?对选?项?的?是\s?@", r"说法不?正确选?项?的?是\s?@", r"说法错误选?项?的?是\s?@", r"@\s?是正确的"),
    *(r"@\s?是正确答案", r"选项\s?@\s?正确", r"所以答\s?@", r"所以\s?(#[.。$]?$)", r"所有\s?(#[.。$]?$)"),
    *(r"[\s，：:,]@[。，,\.]?$", r"[\s，,：:][故即]@[。\.]?$", r"[\s，,：:]因此@[。\.]?$", r"[是为。]\s?@[。\.]?$"),
    *(r"因此\s?@[。\.]?$", r"显然\s?@[。\.]?$", r"答案是\s?(\S+)(?:。|$)", r"答案应该是\s?(\S+)(?:。|$)"),
    *(r"答案为\s?(\S+)(?:。|$)", r"(?i)ANSWER\s*:\s*@", r"[Tt]he answer is:?\s+\(?@\)?"),
    *(r"[Tt]he answer is:?\s+\(?\*?\*?@\*?\*?\)?", r"[Tt]he answer is option:?\s+\(?@\)?"),
    *(r"[Tt]he correct answer is:?\s+\(?@\)?", r"[Tt]he correct answer is option:?\s+\(?@\)?"),
    *(r"[Tt]he correct answer is:?.*?boxed{@}", r"[Tt]he correct option is:?.*?boxed{@}"),
    *(r"[Tt]he correct answer option is:?.*?boxed{@}", r"[Tt]he answer to the question is:?\s+\(?@\)?"),
    *(r"^选项\s?@", r"^@\s?选?项", r"(\s|^)#[\s。，,：:\.$]", r"1.\s?(.*?)$", r"1.\s?@[.。$]?$", r"@:", r"@"),
)


# ---- Short answers


def cleaned(text: str) -> str:
    """Up to the first newline, full stop or comma; without punctuation and articles, white space squeezed."""
    text = re.sub(r"[^\w\s]", "", re.split(r"[\n.,]", text, maxsplit=1)[0])
    return re.sub(r"\s+", " ", re.sub(r"\b(a|an|the)\b", "", text, flags=re.IGNORECASE)).strip()


def triviaqa(text: str) -> str:
    """The first line, what follows its last "answer is", "a:" and "answer:", cleaned."""
    line = text.strip().split("\n")[0].lower()
    for mark in ("answer is", "a:", "answer:"):
        line = line.split(mark)[-1]
    return cleaned(line.strip())


def natural_questions(text: str) -> str:
    """The first line after its last "answer is", cleaned."""
    return cleaned(text.strip().split("\n")[0].lower().split("answer is")[-1])


def squad2(text: str) -> str:
    """As `natural_questions`, but a leading newline ends it."""
    return cleaned(text.split("\n")[0].lower().split("answer is")[-1])


def lambada(text: str) -> str:
    """The first word up to its first punctuation mark, cleaned."""
    return cleaned(re.split(f"[{string.punctuation}]", text.strip().split(" ")[0])[0])


def tydiqa(text: str) -> str:
    """The first line in lower case."""
    return text.split("\n")[0].lower()


def theoremqa(text: str) -> str:
    """The word after the first "answer is", or all of it."""
    found = re.findall(r"answer is ([^\s]+)", text.strip())
    return found[0].strip(".,?!\"';:") if found else text.strip()


# ---- Numbers


def gsm8k(text: str) -> str:
    """The last number before "Question:"; a comma ends a number (1,000 gives 000)."""
    numbers = re.findall(r"-?\d+\.\d+|-?\d+", text.split("Question:")[0])
    return numbers[-1] if numbers else "NULL"


def gsm8k_strict(text: str) -> str:
    """The number after the first "#### "."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match.group(1).strip() if match else "[invalid]"


def gsm8k_flexible(text: str) -> str:
    """The last thing that looks like a number."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next(part for part in found[-1] if part).strip() if found else "[invalid]"


# ---- Programs


def _unquoted(text: str) -> str:
    """The value of a Python string literal, where the text is one, and of a text that UTF-8 can hold."""
    try:
        value = ast.literal_eval(text)
        return text if not isinstance(value, str) or lone_surrogate(value) else value
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError):  # "{[]}", "999...9+1j"
        return text


def _first_block(text: str) -> str:
    """The first fenced block without its language, or what follows a lone fence."""
    if "```" not in text:
        return text
    block = _CODE.search(text)
    if not block:
        return text.split("```")[1]
    inside = block.group(1)
    return inside if inside.startswith("\n") else inside[inside.find("\n") + 1 :]


def _body(text: str) -> str:
    """What follows the line of the first `def`, where the text begins with imports."""
    start = text.find("def")
    if not text.strip().startswith(("from", "import")) or start < 0:
        return text
    return text[text.find("\n", start) + 1 :]


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.split("\n"))


def humaneval_first(text: str) -> str:
    """A function's body, as OpenCompass took it in March 2024 at first: up to an empty line."""
    text = _body(_first_block(text)).split("\n\n")[0].lstrip("\n")
    if text.strip().startswith("def"):
        text = text.partition("\n")[2]
    if text.startswith("    "):
        return text
    return "    " + text.lstrip() if text.startswith(" ") else _indented(text)


def humaneval(text: str) -> str:
    """A function's body, as OpenCompass took it in March 2024: without empty lines, up to where indentation falls."""
    text = _body(_first_block(_unquoted(text).lstrip("\n")))
    text = "\n".join(line for line in text.split("\n") if line)
    if text.strip().startswith("def"):
        text = text.partition("\n")[2]
    lines = ("    " + text.lstrip() if text.startswith(" ") else _indented(text)).split("\n")
    least = None
    for number, line in enumerate(lines):
        if line.strip() == "" or line.strip()[0] in "'\"#":
            continue
        depth = len(line.rstrip()) - len(line.strip())
        if least is None:
            least = depth
        elif depth < least:
            return "\n".join(lines[:number])
    return "\n".join(lines)


def humaneval_block(text: str) -> str:
    """The first fenced block, or the text; leading white space goes (OpenCompass, 2026), a bare body's indent too."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return (blocks[0] if blocks else text).lstrip()


def humaneval_last_block(text: str) -> str:
    """The same of the last block."""
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return (blocks[-1] if blocks else text).lstrip()


def humaneval_indented(text: str) -> str:
    """Lines up to the first one without indent, of the text before two empty lines or a fence."""
    text = " " + text if text.startswith("   ") and not text.startswith("    ") else text
    found = []
    for line in text.split("\n\n\n")[0].split("\n```")[0].split("\n"):
        if line and line[0] != " ":
            break
        found.append(line)
    return "\n".join(found)


def mbpp(text: str) -> str:
    """A program between [BEGIN] and [DONE], as OpenCompass took it in March 2024; backslashes go."""
    text = _first_block(_unquoted(text)).strip()
    if match := re.search(r"('\s*|)(\[DONE\]|DONE)", text):
        text = text[: match.start()]
    if match := re.search(r"(\[BEGIN\]|BEGIN)('\s*|)", text):
        text = text[match.end() :]
    return text.strip().removeprefix("'").removesuffix("'").replace("\\", "")


# What a program stands between, in order: the first that is found counts. OpenCompass's, but for one that comes after
# another that is found wherever it is.
_PROGRAMS = (
    *((r"\[BEGIN\]\s*'", r"'\s*\[DONE\]"), (r"BEGIN\s*'", r"'\s*\[DONE\]"), (r"\[BEGIN\]\s*'", r"'\s*DONE")),
    *((r"BEGIN\s*'", r"'\s*DONE"), (r"\[BEGIN\]\s*'", r"\[DONE\]"), (r"BEGIN\s*'", r"\[DONE\]")),
    *((r"\[BEGIN\]\s*'", "DONE"), (r"BEGIN\s*'", "DONE"), (r"\[BEGIN\]\s*", r"\[DONE\]"), (r"BEGIN\s*", r"\[DONE\]")),
    *((r"\[BEGIN\]\s*", "DONE"), (r"BEGIN\s*", "DONE"), (r"```python\s*", "```"), (r"```\s*", "```")),
    *((r"```python\s*", r"\Z"), (r"```\s*", r"\Z"), (r"\[BEGIN\]\s*'", r"\Z"), (r"\[BEGIN\]", r"\Z")),
    *((r"'", r"'\s*\[DONE\]"),),
)


def _between(text: str, opener: str, closer: str) -> str | None:
    """What stands between the first opener and the last closer behind it: what `opener(.*)closer` catches, in a time
    that grows with the text's length alone."""
    if not (opened := re.search(opener, text)):
        return None
    ends = [closed.start() for closed in re.compile(f"(?={closer})").finditer(text, opened.end())]
    return text[opened.end() : ends[-1]] if ends else None


def mbpp_2026(text: str) -> str:
    """The same by OpenCompass's later rules."""
    programs = (_between(text, *marks) for marks in _PROGRAMS)
    text = next((program for program in programs if program is not None), text).split("```")[0]
    before, done, _ = text.partition("DONE")
    if done:
        before = before.removesuffix("[").rstrip().removesuffix("'")
    return before.replace("\\_", "_").strip()


EXTRACTORS: dict[str, Callable[[str], str]] = {
    "whole": lambda text: text,
    "stripped": str.strip,
    "math": final_answer,
    "math_v2": final_answer_v2,
    "nq": natural_questions,
    **{
        function.__name__: function
        for function in (
            *(first_capital, last_capital, first_capitals, first_option, last_option, cleaned, triviaqa, squad2),
            *(lambada, tydiqa, theoremqa, gsm8k, gsm8k_strict, gsm8k_flexible, humaneval, humaneval_first),
            *(humaneval_block, humaneval_last_block, humaneval_indented, mbpp, mbpp_2026),
            *(exams.several_options, exams.five_of_seven, exams.agieval_math, exams.cmrc, exams.cmath),
            *(replies.preferred_reply, harness.between_dollars),
        )
    },
}
# Rules whose answers are outcomes with names, which are counted, and the outcomes that are no decision: averages are
# given over the decided items, too.
UNDECIDED: dict[str, tuple[str, ...]] = {"preferred_reply": replies.UNDECIDED}
# Rules that go by the number of letters in the key.
COUNTED: dict[str, Callable[[str, int], str]] = {"answer_sheet": exams.answer_sheet}


def until_stop(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of those that end it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)]


def extracted(name: str, text: str, accepted: Sequence[str]) -> str:
    """The answer in a text, by the rule of this name."""
    return COUNTED[name](text, len(accepted[0])) if name in COUNTED else EXTRACTORS[name](text)


# ---- Agreement


def _number(answer: str, accepted: str) -> bool:
    try:
        return answer == accepted or abs(float(answer) - int(accepted)) < 1e-6
    except (ValueError, OverflowError):
        return False


def _lm_eval_number(answer: str, accepted: str) -> bool:
    def plain(text: str) -> str:
        for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
            text = re.sub(pattern, "", text)
        return text.lower()

    return plain(answer) == plain(accepted)


def overlap(answer: str, accepted: str) -> float:
    """F1 of the cleaned answers' words."""
    return harness.f1(cleaned(answer).split(), cleaned(accepted).split())


# (extracted answer, an accepted one) -> 0 to 1. A question's score is the best over its accepted answers.
MATCHES: dict[str, Callable[[str, str], float]] = {
    "equal": lambda answer, accepted: answer == accepted,
    "contains": lambda answer, accepted: cleaned(accepted).lower() in answer,
    "cleaned": lambda answer, accepted: answer == cleaned(accepted),
    "cleaned_lower": lambda answer, accepted: answer == cleaned(accepted).lower(),
    "both_cleaned": lambda answer, accepted: cleaned(answer) == cleaned(accepted),
    "number": _number,
    "lm_eval_number": _lm_eval_number,
    "math": equivalent_plain,
    "math_strict": functools.partial(equivalent_plain, strict=True),
    "math_v1": equivalent_v1,
    "math_v2": equivalent_v2,
    "places": exams.places,
    "partial_credit": exams.partial_credit,
    "near_number": exams.near_number,
    "overlap": overlap,
    "same_letters": harness.same_letters,
    "same_without_articles": harness.same_without_articles,
    "squad_exact": harness.squad_exact,
    "squad_f1": harness.squad_f1,
    "tydiqa_exact": harness.tydiqa_exact,
    "tydiqa_f1": harness.tydiqa_f1,
}


def agreement(match: str, answer: str, accepted: Sequence[str]) -> float:
    """The score of an extracted answer: the best agreement with an accepted one."""
    return max((float(MATCHES[match](answer, one)) for one in accepted), default=0.0)

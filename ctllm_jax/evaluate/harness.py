"""lm-eval-harness's answers to open questions: taken from what a model wrote, held to the accepted ones.

Of its tasks triviaqa, nq_open, squadv2, tydiqa_goldp and hendrycks_math; gsm8k's rules are in `extract`.
"""

import collections
import re
import string
import unicodedata

_ASCII = str.maketrans("", "", string.punctuation)


def between_dollars(text: str) -> str:
    """What stands between the first and the last dollar sign, or all of it where there are not two."""
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if first < last else text


def same_letters(answer: str, accepted: str) -> bool:
    """Equal but for case and punctuation; white space counts."""
    return answer.lower().translate(_ASCII) == accepted.lower().translate(_ASCII)


def same_without_articles(answer: str, accepted: str) -> bool:
    """The same, articles left out that a space follows: at the beginning of a word, in lower case or capitalised."""
    bare = (re.sub(r"\b(?:The|the|An|A|a|an) ", "", text) for text in (answer, accepted))
    return same_letters(*bare)


def squad_words(text: str) -> list[str]:
    """The words in lower case, without ASCII's punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_ASCII)).split()


def squad_exact(answer: str, accepted: str) -> bool:
    """The same words in the same order; no word is the same as none."""
    return squad_words(answer) == squad_words(accepted)


def squad_f1(answer: str, accepted: str) -> float:
    """F1 of the words; no word is the same as none."""
    return float(squad_exact(answer, accepted)) or f1(squad_words(answer), squad_words(accepted))


def tydiqa_exact(answer: str, accepted: str) -> bool:
    """As `squad_exact`, without the punctuation of any script."""
    return _plain_words(answer) == _plain_words(accepted)


def tydiqa_f1(answer: str, accepted: str) -> float:
    """F1 of the words, without the punctuation of any script."""
    return f1(_plain_words(answer), _plain_words(accepted))


def _plain_words(text: str) -> list[str]:
    return squad_words("".join(mark for mark in text.lower() if not unicodedata.category(mark).startswith("P")))


def f1(ours: list[str], theirs: list[str]) -> float:
    """F1 of two bags of words; 0 where either is empty."""
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0

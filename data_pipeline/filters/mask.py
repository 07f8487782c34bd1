"""Masking what tells of a person: e-mail addresses, telephone, identity card and bank card numbers.

Numbers are taken by their form and, where they have one, their check digit. A number stands by itself: digits or ASCII
letters before or behind make it another one, as does the point of a decimal. Full-width digits count as digits.
"""

import dataclasses
import datetime
import re
from collections import Counter

_ASCII_DIGITS = str.maketrans("０１２３４５６７８９", "0123456789", " -()（）+")

_EMAIL = re.compile(
    r"(?<![a-zA-Z0-9._%+-])[a-zA-Z0-9][a-zA-Z0-9._%+-]{0,63}@(?:[a-zA-Z0-9-]{1,63}\.){1,4}([a-zA-Z]{2,24})(?![a-zA-Z0-9])"
)
_PICTURES = ("png", "jpg", "jpeg", "gif", "webp", "svg")  # icon@2x.png
_DIGIT = "[0-9０-９]"
_LIKELY = re.compile(f"{_DIGIT}{{3,4}}[ )）-]?{_DIGIT}{{4}}")  # in every number sought, and quick to look for
_NUMBER = re.compile(
    rf"""(?<![0-9０-９a-zA-Z_])(?<![0-9０-９][.-])(?:
      {_DIGIT}{{17}}[0-9０-９xX]                                              # identity card, or bank card
    | {_DIGIT}{{15,19}}                                                       # bank card
    | {_DIGIT}{{4}}([ -]){_DIGIT}{{4}}\1{_DIGIT}{{4}}\1{_DIGIT}{{4}}(?:\1{_DIGIT}{{1,3}})?
    | (?:(?:\+|00)?86[ -]?)?[1１][3-9３-９]{_DIGIT}([ -]?){_DIGIT}{{4}}\2{_DIGIT}{{4}}    # mobile
    | (?:[(（][0０]{_DIGIT}{{2,3}}[)）]|[0０]{_DIGIT}{{2,3}}-){_DIGIT}{{7,8}}             # with an area code
    )(?![0-9０-９a-zA-Z_]|\.[0-9０-９])""",
    re.VERBOSE,
)
_MOBILE = re.compile(r"(?:(?:00)?86)?1[3-9]\d{9}")
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """What each kind is replaced with; '' leaves it.

    phone: mobile numbers of mainland China, with or without +86, and numbers with an area code that is set apart.
    id_card: of mainland China, 18 places, with a date of birth and the right check digit.
    bank_card: 15 to 19 digits, in fours or together, as issued to persons, with the right check digit (Luhn).
    """

    email: str  # what stands in place of an address; '': it stays
    phone: str
    id_card: str
    bank_card: str


def mask(text: str, config: MaskConfig) -> tuple[str, dict[str, int]]:
    """(the text with masks, {kind: how many}); linear in the text's length."""
    counts: Counter[str] = Counter()

    def put(kind: str | None, found: re.Match) -> str:
        replacement = getattr(config, kind) if kind else ""
        counts.update([kind] if replacement else [])
        return replacement or found.group()

    if config.email and "@" in text:
        text = _EMAIL.sub(lambda found: put(_email(found), found), text)
    if (config.phone or config.id_card or config.bank_card) and _LIKELY.search(text):
        text = _NUMBER.sub(lambda found: put(_kind(found.group()), found), text)
    return text, dict(counts)


def _email(found: re.Match) -> str | None:
    return None if found.group(1).lower() in _PICTURES else "email"


def _kind(number: str) -> str | None:
    """'phone', 'id_card' or 'bank_card' of what `_NUMBER` finds; None if the check digit is wrong."""
    digits = number.translate(_ASCII_DIGITS).upper()
    if _MOBILE.fullmatch(digits) or (digits[0] == "0" and digits != number):
        return "phone"
    if len(digits) == 18 and is_id_card(digits):
        return "id_card"
    return "bank_card" if digits.isdecimal() and is_bank_card(digits) else None


def is_id_card(digits: str) -> bool:
    """Whether 17 digits and a check digit (X is 10) are an identity card's: ISO 7064, MOD 11-2."""
    try:
        datetime.date(int(digits[6:10]), int(digits[10:12]), int(digits[12:14]))
    except ValueError:
        return False
    if digits[0] == "0" or digits[6:8] not in ("19", "20"):
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_WEIGHTS, digits[:17], strict=True))
    return "10X98765432"[total % 11] == digits[17]


def is_bank_card(digits: str) -> bool:
    """Whether digits begin as cards do (3 to 6; 9558 of one Chinese bank) and fulfil Luhn's formula."""
    if digits[0] not in "3456" and not digits.startswith("9558"):
        return False
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[::-2]))) % 10 == 0

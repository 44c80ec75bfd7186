"""Numbers and sizes in a response as a person reads them, in mm and ml; and responses as publishers read them.

The publishers' readings are kept to the letter beside our own: names end in _v1 (Photon's reading of DeepTumorVQA v1)
or _v2 (DeepTumorVQA v2). They take the first match, right or wrong. The time is linear in the text in all of them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_WORDS = "zero|one|two|three|four|five|six|seven|eight|nine|ten"
_DIGITS = {word: str(number) for number, word in enumerate(_WORDS.split("|"))}
# Before a number, words that are < > ≤ ≥.
COMPARISON = re.compile(
    r"\b(?:((?:less|smaller|fewer|lower|shorter) than|below|under)"
    r"|((?:more|greater|larger|bigger|longer|higher) than|over|above|exceeding)"
    r"|(at most|up to|no more than|not more than)|(at least|no less than|not less than))"
    rf" (?=\d|(?:{_WORDS})\b)",
    re.IGNORECASE,
)
HAS_NUMBER = re.compile(rf"\d|\b(?:{_WORDS})\b", re.IGNORECASE)
# Factors to mm and ml.
LENGTHS = {"mm": 1.0, "cm": 10.0} | {
    f"{prefix}met{end}{plural}": factor
    for prefix, factor in (("milli", 1.0), ("centi", 10.0))
    for end in ("er", "re")
    for plural in ("", "s")
}
VOLUMES = dict.fromkeys(["ml", "cc", "ccm", "cm3", "milliliter", "milliliters", "millilitre", "millilitres"], 1.0) | {
    **dict.fromkeys(["l", "liter", "liters", "litre", "litres"], 1000.0),
    "mm3": 0.001,
}


OPENS, CLOSES = "<think>", "</think>"


def number_of(digits: str) -> float | None:
    """Return what digits with points and commas are: "1,234.5" 1234.5, "1,5" 1.5, "1,234" 1234; None for "1.2.3"."""
    whole, mark, decimals = digits, "", ""
    if (last := max(digits.rfind(","), digits.rfind("."))) >= 0:
        whole, mark, decimals = digits[:last], digits[last], digits[last + 1 :]
    groups = re.split("[.,]", whole)
    others = set(whole) & {",", "."}
    is_grouped = len(groups[0]) <= 3 and groups[0] != "0" and all(len(group) == 3 for group in groups[1:])
    if mark in others or (mark == "," and not others and len(decimals) == 3 and is_grouped):  # 1,234 and 1.234.567
        groups, decimals = [*groups, decimals], ""
        is_grouped = is_grouped and len(groups[-1]) == 3 and len(others) <= 1
    if len(groups) > 1 and not is_grouped:
        return None
    return float(f"{''.join(groups)}.{decimals or 0}")


def canonical(words: list[str]) -> list[str]:
    """Return words with numbers in one form, lengths in mm and volumes in ml: "1 - 3 cm" is "10 - 30 mm"."""
    words = [_DIGITS.get(word, word) for word in words]
    factor, unit, is_joined = 1.0, "", False
    for at in range(len(words) - 1, -1, -1):
        word = words[at]
        if word[0].isdecimal() and word[0].isascii():
            value = number_of(word)
            # A float holds 15 digits: a longer number, as in a UID, is only equal to itself.
            words[at] = word if value is None or len(word) > 15 else f"{value * (factor if unit else 1):.15g}"
            is_joined = True
        elif unit and is_joined and word in ("-", "x", "to", "by"):
            is_joined = False
        else:
            length, volume = LENGTHS.get(word), VOLUMES.get(word)
            is_joined, factor, unit = False, length or volume or 1.0, "mm" if length else "ml" if volume else ""
            words[at] = unit or word
    return words


class Quantity(NamedTuple):
    """A number, and its unit: "mm", "ml", "hu", "%", or "" where it has none."""

    value: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.value:.10g} {self.unit}".strip()


# Digits that stand alone, not those of T2 or BDMAP_00012, and the word behind them.
_NUMBER = re.compile(
    r"(?<![\w.,])(minus |[-+])?(\d+(?:[.,]\d+)*|\.\d+)(e[-+]?\d{1,3})?(?!\d)"
    r"( ?)((?!(?:x|to|by|of|and|or)\b)(?:(?:mm|cm)\^?3|%|[^\W\d_]+))?",
    re.IGNORECASE,
)
_STATED = re.compile(
    r"\b(?:answer|total|result)(?: is| of|:| =)|= ?(?=[-+]?[\d.])|\\boxed\b|答案[是为]?:?", re.IGNORECASE
)
_END_OF_STATEMENT = re.compile(r"[;\n]|[.,](?!\d)")
# A number in words; not "the one on the left".
_NUMBER_WORD = re.compile(rf"\b(?!one (?:of|on|in|is|that|which|side)\b)(?:{_WORDS})\b", re.IGNORECASE)
_CHANGING = ("<", ">", "≤", "≥", "±", "/")


def quantity_in(text: str, unit: str = "") -> Quantity | None:
    """Return the one number that a normalised text means: "about -1,234.5 HU" -> -1234.5 hu; None for none or several.

    With several, those of the wanted `unit` count alone, and those behind "answer is", "total:" or "=" before all
    others. A range (2-3 mm), a bound (< 5 mm), a size (2x3 mm) and a fraction (2/3) are no number.
    """
    if not re.search(r"\d", text):
        text = _NUMBER_WORD.sub(lambda word: _DIGITS[word[0].lower()], text)
    stated = [_END_OF_STATEMENT.split(text[cue.end() :], maxsplit=1)[0] for cue in [*_STATED.finditer(text)][-1:]]
    for part in [*stated, text]:
        found = _quantities(part)
        wanted: set[Quantity | None] = {one for one in found if unit and one and one.unit == unit}
        if len(meant := wanted or set(found)) == 1:
            return meant.pop()
    return None


def _quantities(text: str) -> list[Quantity | None]:
    """Return all numbers of a normalised text, None for one that is a part of more."""
    found: list[Quantity | None] = []
    end = 0
    for match in _NUMBER.finditer(text):
        sign, digits, exponent, space, word = match.groups(default="")
        between = text[max(end, match.start() - 8) : match.start()].strip().lower()
        end = match.end()
        joined = bool(found) and between in ("x", "*", "-", "/", "to", "by", "of", "±", "+/-", "and", "or")
        value = number_of(digits if digits[0] != "." else f"0{digits}")
        if joined:
            found[-1] = None
        if value is None or joined or between.endswith(_CHANGING):
            found.append(None)
        elif one := _with_unit(value, word, exponent, is_attached=not space):
            found.append(one._replace(value=-one.value) if sign[:1] in ("-", "m", "M") else one)
    return found


def _with_unit(value: float, word: str, exponent: str, *, is_attached: bool) -> Quantity | None:
    """Return a quantity in mm or ml; None for "3D" and "5th". A word apart that is no unit is left out: "3 nodules"."""
    value *= 10.0 ** min(int(exponent[1:] or 0), 300)
    unit = word.lower().replace("^", "")
    for name, factors in (("mm", LENGTHS), ("ml", VOLUMES)):
        if unit in factors:
            return Quantity(float(f"{value * factors[unit]:.12g}"), name)
    if unit in ("", "hu", "%") or not is_attached:
        return Quantity(value, unit if unit in ("hu", "%") else "")
    return None


# "30x13 mm", "2 cm x 15 mm": lengths with a multiplication sign between; a unit counts for those before it without one.
_LENGTH = r"(?:\d+(?:[.,]\d+)*|(?<!\w)\.\d+)"
_LENGTH_UNIT = rf"(?:{'|'.join(LENGTHS)})\b"
_SIZE = re.compile(rf"{_LENGTH}\s*(?:{_LENGTH_UNIT})?(?:\s*[x×*]\s*{_LENGTH}\s*(?:{_LENGTH_UNIT})?)*", re.IGNORECASE)
_SIDE = re.compile(rf"({_LENGTH})\s*({_LENGTH_UNIT})?", re.IGNORECASE)


class Size(NamedTuple):
    """Sides in mm, the longest first, and "<" or ">" where they are a bound."""

    sides_mm: tuple[float, ...]
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{' x '.join(f'{side:.10g}' for side in self.sides_mm)} mm"


def size_in(text: str) -> Size | None:
    """Return the one size that a normalised text has: "15 x 20 mm", "2x1.5 cm" -> (20, 15).

    None for lengths without a unit, for what is no number ("1.2.3 mm"), and for several sizes that differ.
    """
    found: set[Size] = set()
    for match in _SIZE.finditer(text):
        mm_per_unit, sides = 0.0, []
        for length, unit in reversed(_SIDE.findall(match[0])):
            mm_per_unit = LENGTHS[unit.lower()] if unit else mm_per_unit
            sides.append((number_of(length) or 0.0) * mm_per_unit)
        if all(sides):
            bound = text[max(match.start() - 2, 0) : match.start()].strip()[-1:]
            found.add(Size(tuple(sorted(sides, reverse=True)), bound if bound in ("<", ">", "≤", "≥") else ""))
    return found.pop() if len(found) == 1 else None


def without_thinking(text: str) -> str:
    """Return the response without its <think> parts, and without white space at both ends.

    What `<think>.*?</think>|^.*</think>` matches goes; a tag that stays open stays. Each tag is looked at once.
    """
    if CLOSES in text and not text.startswith(OPENS):
        return text[text.rfind(CLOSES) + len(CLOSES) :].strip()
    kept, start = [], 0
    while (opens := text.find(OPENS, start)) >= 0 and (closes := text.find(CLOSES, opens)) >= 0:
        kept.append(text[start:opens])
        start = closes + len(CLOSES)
    return "".join([*kept, text[start:]]).strip()


def collapsed(text: str) -> str:
    """Return lower-case text with single spaces: "Upper  Lobes. " -> "upper lobes."."""
    return " ".join(text.lower().split())


def without_punctuation(text: str) -> str:
    """Return collapsed text without punctuation: "Upper lobes." -> "upper lobes"."""
    return collapsed(re.sub(r"[^\w\s]|_", " ", text))


def parse_letter_v2(response: str) -> str | None:
    """Return the first character if it is one of A-D, else the first such word.

    All of it in upper case, so that "A large cyst" is A and "Both" is B.
    """
    found = re.search(r"^[A-D]|\b[A-D]\b", without_thinking(response).upper())
    return found[0] if found else None


def parse_yes_no_v2(response: str) -> str | None:
    """Return "yes" or "no", whichever word comes first; None where neither does."""
    found = re.search(r"\b(yes|no)\b", without_thinking(response), re.IGNORECASE)
    return found[1].lower() if found else None


def parse_number_v1(response: str) -> float | None:
    """Return the first number, sign, decimals and exponent included: "30x13 mm" -> 30, "about -1e3" -> -1000."""
    found = re.search(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", response)
    return float(found[0]) if found else None


def parse_number_v2(response: str) -> float | None:
    """Return the first number, without an exponent: "1e3" -> 1."""
    found = re.search(r"-?\d+\.?\d*", without_thinking(response))
    return float(found[0]) if found else None

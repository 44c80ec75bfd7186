"""A response in words -> the choice, yes or no, or number that it means; None where it means none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from photon_data.questions.question import LETTERS

_THINKING = re.compile(r"(?s)<think>.*?</think>|^.*</think>")
# A letter that is the answer, not the article of "A large cyst": alone, or followed by . ) : or ,
_LEADING_LETTER = re.compile(r"\(?([A-H])(?:[.):,]|\s*$)")
_NAMED_LETTER = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)\(?([A-H])\b")
_V2_LETTER = re.compile(r"\b[A-D]\b")
_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_V2_NUMBER = re.compile(r"-?\d+\.?\d*")
# "30x13 mm", "2 cm x 15 mm": numbers with a sign of multiplication between; a unit counts for those before it that have none.
_LENGTH = r"\d+(?:[.,]\d+)?"
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)\b"
_SIZE = re.compile(rf"{_LENGTH}\s*(?:{_UNIT})?(?:\s*[x×*]\s*{_LENGTH}\s*(?:{_UNIT})?)*", re.IGNORECASE)
_PART = re.compile(rf"({_LENGTH})\s*({_UNIT})?", re.IGNORECASE)
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_IN_BRACKETS = re.compile(r"\s*\([^)]*\)")


def without_thinking(text: str) -> str:
    """Return the response without its <think> part, and without white space at both ends."""
    return _THINKING.sub("", text).strip()


def collapsed(text: str) -> str:
    """Return lower-case text with single spaces: "Upper  Lobes. " -> "upper lobes."."""
    return " ".join(text.lower().split())


def without_punctuation(text: str) -> str:
    """Return collapsed text without punctuation: "Upper lobes." -> "upper lobes"."""
    return collapsed(_PUNCTUATION.sub(" ", text))


def contains_letter(response: str, letter: str) -> bool:
    """Tell whether "B." stands anywhere in the response: the accuracy of 3D-RAD and M3D as they publish it."""
    return f"{letter}." in response


def letter_v2(response: str) -> str | None:
    """Return the letter that DeepTumorVQA v2 reads: the first character if it is one of A-D, else the first such word.

    All of it in upper case, so that "A large cyst" is A and "Both" is B.
    """
    text = without_thinking(response).upper()
    if text[:1] in tuple("ABCD"):
        return text[0]
    found = _V2_LETTER.search(text)
    return found[0] if found else None


def choice(response: str, choices: Sequence[str]) -> int | None:
    """Return the index of the one choice that a response means, however it is put; None where that cannot be told.

    In this order: the choice's text, a letter ("B", "B.", "(B)", "B. No"), a text it begins with, "the answer is B", the one
    text that it holds. A letter whose text contradicts it ("A. No", of A. Yes B. No) means neither.
    """
    return _choice(response, tuple(choices))


@lru_cache(maxsize=1 << 16)
def _choice(response: str, choices: tuple[str, ...]) -> int | None:
    text = without_thinking(response)
    shapes = _shapes(choices)
    plain = without_punctuation(text)
    same = [index for index, shape in enumerate(shapes) if plain in shape]
    if len(same) == 1:
        return same[0]
    leading = _LEADING_LETTER.match(text)
    if leading and leading[1] in LETTERS[: len(choices)]:
        index = LETTERS.index(leading[1])
        said = _text_held(without_punctuation(text[leading.end() :]), shapes)
        return index if said in (None, index) else None
    named = _NAMED_LETTER.search(text)
    if named and named[1] in LETTERS[: len(choices)]:
        return LETTERS.index(named[1])
    return _text_held(plain, shapes)


def yes_no(response: str) -> str | None:
    """Return "yes" or "no", whichever word comes first; None where neither does."""
    found = _YES_NO.search(without_thinking(response))
    return found[1].lower() if found else None


def number(response: str) -> float | None:
    """Return the first number, sign, decimals and exponent included: "30x13 mm" -> 30, "about -1e3" -> -1000."""
    found = _NUMBER.search(response)
    return float(found[0]) if found else None


def number_v2(response: str) -> float | None:
    """Return the first number as DeepTumorVQA v2 reads it, without an exponent: "1e3" -> 1."""
    found = _V2_NUMBER.search(without_thinking(response))
    return float(found[0]) if found else None


@lru_cache(maxsize=1 << 16)
def size_mm(text: str) -> tuple[float, ...] | None:
    """Return the first size in mm, the longest side first: "15 x 20 mm" and "2x1.5 cm" -> (20, 15); None without a unit."""
    for found in _SIZE.finditer(without_thinking(text)):
        unit, sides = 0.0, []
        for length, said in reversed(_PART.findall(found[0])):
            unit = {"m": 1.0, "c": 10.0}[said[0].lower()] if said else unit
            sides.append(float(length.replace(",", ".")) * unit)
        if all(sides):
            return tuple(sorted(sides, reverse=True))
    return None


@lru_cache(maxsize=4096)
def _shapes(choices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return what each choice may be written as: in full, and without what it has in brackets if that tells it apart."""
    full = [without_punctuation(text) for text in choices]
    short = [without_punctuation(_IN_BRACKETS.sub("", text)) for text in choices]
    return tuple((a, b) if b and short.count(b) == 1 else (a,) for a, b in zip(full, short, strict=True))


def _text_held(plain: str, shapes: Sequence[Sequence[str]]) -> int | None:
    """Return the choice whose text a response begins with (the longest), or else the only one whose text it holds."""
    begun = [(len(text), i) for i, shape in enumerate(shapes) for text in shape if text and f"{plain} ".startswith(f"{text} ")]
    if begun:
        return max(begun)[1]
    held = [(text, i) for i, shape in enumerate(shapes) for text in shape if text and f" {text} " in f" {plain} "]
    # "left lung" also holds the choice "lung".
    longest = {i for text, i in held if not any(text != other and text in other and i != j for other, j in held)}
    return longest.pop() if len(longest) == 1 else None

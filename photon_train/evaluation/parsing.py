"""A response in words -> the choice, letter, number or size that it means; None where it means none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from photon_data.questions.question import LETTERS

# What a model writes before its answer.
THINKING = re.compile(r"(?s)<think>.*?</think>|^.*</think>")


def without_thinking(text: str) -> str:
    """Return the response without its <think> part, and without white space at both ends."""
    return THINKING.sub("", text).strip()


def collapsed(text: str) -> str:
    """Return lower-case text with single spaces: "Upper  Lobes. " -> "upper lobes."."""
    return " ".join(text.lower().split())


def without_punctuation(text: str) -> str:
    """Return collapsed text without punctuation: "Upper lobes." -> "upper lobes"."""
    return collapsed(re.sub(r"[^\w\s]|_", " ", text))


# A letter that is the answer, not the article of "A large cyst": alone, or followed by . ) : or ,
_LEADING_LETTER = re.compile(r"\(?([A-H])(?:[.):,]|\s*$)")
_NAMED_LETTER = re.compile(r"(?i:\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*)\(?([A-H])\b")


@lru_cache(maxsize=1 << 16)
def parse_choice(response: str, choices: tuple[str, ...]) -> int | None:
    """Return the index of the one choice that a response means, however it is written; None where that cannot be told.

    In this order: the choice's text, a letter ("B", "B.", "(B)", "B. No"), a text it begins with, "the answer is B",
    the one text that it contains. A letter whose text contradicts it ("A. No", of A. Yes B. No) means neither.
    """
    text, spellings, letters = without_thinking(response), _spellings(choices), LETTERS[: len(choices)]
    plain = without_punctuation(text)
    same = [index for index, texts in enumerate(spellings) if plain in texts]
    if len(same) == 1:
        return same[0]
    leading = _LEADING_LETTER.match(text)
    if leading and leading[1] in letters:
        index = LETTERS.index(leading[1])
        by_text = _contained(without_punctuation(text[leading.end() :]), spellings)
        return index if by_text in (None, index) else None
    named = _NAMED_LETTER.search(text)
    if named and named[1] in letters:
        return LETTERS.index(named[1])
    return _contained(plain, spellings)


@lru_cache(maxsize=4096)
def _spellings(choices: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return how each choice may be written: in full, and without its brackets if that tells it apart."""
    full = [without_punctuation(text) for text in choices]
    short = [without_punctuation(re.sub(r"\s*\([^)]*\)", "", text)) for text in choices]
    return tuple((a, b) if b and short.count(b) == 1 else (a,) for a, b in zip(full, short, strict=True))


def _contained(plain: str, spellings: Sequence[Sequence[str]]) -> int | None:
    """Return the choice that a response begins with (the longest), or else the only one that it contains."""
    pairs = [(text, i) for i, texts in enumerate(spellings) for text in texts if text]
    begun = [(len(text), i) for text, i in pairs if f"{plain} ".startswith(f"{text} ")]
    if begun:
        return max(begun)[1]
    inside = [(text, i) for text, i in pairs if f" {text} " in f" {plain} "]
    # "left lung" also contains the choice "lung".
    longest = {i for text, i in inside if not any(text != other and text in other and i != j for other, j in inside)}
    return longest.pop() if len(longest) == 1 else None


def parse_letter_v2(response: str) -> str | None:
    """Return the letter that DeepTumorVQA v2 reads: the first character if it is one of A-D, else the first such word.

    All of it in upper case, so that "A large cyst" is A and "Both" is B.
    """
    found = re.search(r"^[A-D]|\b[A-D]\b", without_thinking(response).upper())
    return found[0] if found else None


def parse_number(response: str) -> float | None:
    """Return the first number, sign, decimals and exponent included: "30x13 mm" -> 30, "about -1e3" -> -1000."""
    found = re.search(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", response)
    return float(found[0]) if found else None


def parse_number_v2(response: str) -> float | None:
    """Return the first number as DeepTumorVQA v2 reads it, without an exponent: "1e3" -> 1."""
    found = re.search(r"-?\d+\.?\d*", without_thinking(response))
    return float(found[0]) if found else None


# "30x13 mm", "2 cm x 15 mm": lengths with a multiplication sign between; a unit counts for those before it without one.
_LENGTH = r"\d+(?:[.,]\d+)?"
_UNIT = r"(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?)\b"
_SIZE = re.compile(rf"{_LENGTH}\s*(?:{_UNIT})?(?:\s*[x×*]\s*{_LENGTH}\s*(?:{_UNIT})?)*", re.IGNORECASE)
_SIDE = re.compile(rf"({_LENGTH})\s*({_UNIT})?", re.IGNORECASE)


@lru_cache(maxsize=1 << 16)
def parse_size_mm(text: str) -> tuple[float, ...] | None:
    """Return the first size in mm, longest side first: "15 x 20 mm", "2x1.5 cm" -> (20, 15); None without a unit."""
    for found in _SIZE.finditer(without_thinking(text)):
        mm_per_unit, sides = 0.0, []
        for length, unit in reversed(_SIDE.findall(found[0])):
            mm_per_unit = {"m": 1.0, "c": 10.0}[unit[0].lower()] if unit else mm_per_unit
            sides.append(float(length.replace(",", ".")) * mm_per_unit)
        if all(sides):
            return tuple(sorted(sides, reverse=True))
    return None

"""How publishers read a response, kept to the letter beside our own readers: names end in _v1 (Photon's reading of
DeepTumorVQA v1) or _v2 (DeepTumorVQA v2). They take the first match, right or wrong; the time is linear all the same.
"""

from __future__ import annotations

import re

OPENS, CLOSES = "<think>", "</think>"


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

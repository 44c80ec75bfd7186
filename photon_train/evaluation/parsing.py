"""A response in words -> the choice, yes or no, number or size that it means; None where that cannot be told.

A text is read as a person reads it; what a person would ask back about is refused: two answers, an answer that is
taken back, a list of the choices. The time is linear in any text: a model that loops writes 400 kB. The rules are in
docs/evaluation.md, and publishers' readings in `readings`.

A text is a list of tokens: words, numbers, signs that change a meaning (< + -), and breaks (. , : and brackets).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from string import ascii_uppercase
from typing import NamedTuple

from photon_train.evaluation.readings import COMPARISON, HAS_NUMBER, Quantity, Size, canonical, quantity_in, size_in

LONGEST = 100_000
THINK = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def said(response: str) -> str:
    """Return what a response says outside its think tags.

    Nothing after a tag that stays open counts, and nothing before a closing one without its opening one. More than
    LONGEST characters are no answer but a loop: "".
    """
    kept: list[str] = []
    start, is_thinking = 0, False
    for tag in THINK.finditer(response):
        if not is_thinking and tag[1]:
            kept.clear()
        elif not is_thinking:
            kept.append(response[start : tag.start()])
        start, is_thinking = tag.end(), not tag[1]
    told = "\n".join([*kept, "" if is_thinking else response[start:]]).strip()
    return told if len(told) <= LONGEST else ""


# Signs with many forms. Chinese and full-width punctuation becomes that of ASCII.
_SAME = str.maketrans(
    {
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **dict.fromkeys("’‘ʼ`´", "'"),
        **dict.fromkeys("“”„«»「」『』", '"'),
        **dict.fromkeys("【〔《〈", "["),
        **dict.fromkeys("】〕》〉", "]"),
        **dict.fromkeys("≦⩽", "≤"),
        **dict.fromkeys("≧⩾", "≥"),
        "。": ".",
        "、": ",",
        "×": "x",
    }
)


def normalised(text: str) -> str:
    """Return a text with one form of each sign (NFKC, ASCII punctuation, < for "less than"), and single spaces.

    Words are composed in pieces of 100 characters: the time for a run of accents is the square of its length.
    """
    if not text.isascii():
        text = re.sub(r"\S{1,100}", lambda piece: unicodedata.normalize("NFKC", piece[0]), text).translate(_SAME)
    text = re.sub(r"[^\S\n]+", " ", text)
    return COMPARISON.sub(lambda found: "<>≤≥"[(found.lastindex or 1) - 1], text)


_THIN_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f'](?=\d{3}(?!\d))")  # between thousands; a usual space is not
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_TOKEN = re.compile(
    r"\d+(?:[.,]\d+)*"
    rf"|[{_CJK}]"
    r"|(?<=\d)x(?=\d)|(?<=\d )x(?= \d)"
    rf"|[^\W\d_{_CJK}][^\W_{_CJK}]*(?:'[^\W\d_{_CJK}]+)*"
    r"|<=|>=|[-=]>"
    r"|(?<![^\W_])-(?=\d)|(?<=\d)-(?=\d)|(?<=[^\W_])[-+](?![^\W_])"
    r"|[<>≤≥=+±%/°]"
    r"|[.,;:!?()\[\]{}\n|&]"
)
BREAKS = frozenset(".,;:!?()[]{}\n|&")


class Token(NamedTuple):
    """A piece of a text."""

    text: str  # as it is compared
    written: str
    start: int
    end: int


def tokens_of(text: str) -> list[Token]:
    """Return the tokens of a normalised text. "Less than 3 cm" is "< 30 mm", "two" is "2", "1,234.0" is "1234"."""
    found = [Token(m[0].lower(), m[0], m.start(), m.end()) for m in _TOKEN.finditer(text)]
    if HAS_NUMBER.search(text):
        words = canonical([token.text for token in found])
        return [token._replace(text=word) for word, token in zip(words, found, strict=True)]
    return found


def comparable(text: str) -> tuple[str, ...]:
    """Return the tokens of a text without its breaks: two texts with the same ones say the same."""
    return tuple(token.text for token in tokens_of(normalised(text)) if token.text not in BREAKS)


@lru_cache(maxsize=1 << 14)
def parse_choice(response: str, choices: tuple[str, ...]) -> int | None:
    """Return the index of the one choice that a response means, by its letter or its text, or None."""
    return _read(response, _spellings(choices, ascii_uppercase[: len(choices)]))


@lru_cache(maxsize=1 << 14)
def parse_yes_no(response: str) -> str | None:
    """Return "yes" or "no", whichever a response means, or None; a letter means neither."""
    index = _read(response, _spellings(("yes", "no"), ""))
    return None if index is None else ("yes", "no")[index]


@lru_cache(maxsize=1 << 14)
def parse_quantity(response: str, unit: str = "") -> Quantity | None:
    """Return the one number that a response means (see `quantity_in`), or None."""
    return quantity_in(normalised(_THIN_SPACE.sub(",", said(response))), unit)


@lru_cache(maxsize=1 << 14)
def parse_size(response: str) -> Size | None:
    """Return the one size that a response means (see `size_in`), or None."""
    return size_in(normalised(_THIN_SPACE.sub(",", said(response))))


class _Spellings(NamedTuple):
    """How the choices may be written."""

    choices: tuple[str, ...]
    letters: str
    by_first: dict[str, list[tuple[tuple[str, ...], int]]]  # tokens and choice, by first token, the longest first
    yes_no: frozenset[int]  # which choices are "yes" and "no"
    both: int | None  # the choice "both", if the other two are the halves of it


_TIE = -1  # of a spelling: it is that of two choices
_CONFLICT = -2  # of a reading: it means two choices
BRACKETED = re.compile(r" ?\([^()]*\)")


@lru_cache(maxsize=4096)
def _spellings(choices: tuple[str, ...], letters: str) -> _Spellings:
    """Return the spellings of choices: in full; without brackets, first letter or article where this tells it apart."""
    labelled = all(re.match(rf"{re.escape(a)}[.):]", c.strip()) for a, c in zip(ascii_uppercase, choices, strict=False))
    variants = [[comparable(text) for text in choices], [comparable(BRACKETED.sub("", text)) for text in choices]]
    variants += [[comparable(text.strip()[2:]) for text in choices]] if labelled else []
    variants += [[words[1:] if words[:1] in (("a",), ("an",), ("the",)) else () for words in variants[0]]]
    owners: dict[tuple[str, ...], int] = {}
    for texts in variants:
        places, times = {words: index for index, words in enumerate(texts)}, Counter(texts)
        new = {words: index if times[words] == 1 else _TIE for words, index in places.items() if words}
        owners = new | owners
    both = [i for i, words in enumerate(variants[0]) if words[:1] in (("both",), ("bilateral",))]
    if len(both) == 1 and {("left",), ("right",)} <= {words[:1] for words in variants[0]}:
        owners |= {(word,): both[0] for word in ("both", "bilateral", "bilaterally")}
    others = [i for i, words in enumerate(variants[0]) if i not in both and words[:1] not in (("neither",), ("none",))]
    by_first: dict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    for words in sorted(owners, key=len, reverse=True):
        by_first[words[0]].append((words, owners[words]))
    yes_no = frozenset(index for index, words in enumerate(variants[0]) if words in (("yes",), ("no",)))
    whole = both[0] if len(both) == 1 and len(others) == 2 else None
    return _Spellings(choices, letters, dict(by_first), yes_no, whole)


# What stands before an answer that is stated as such, which outweighs the rest.
_CUE = re.compile(
    r"\banswers? ?(?:(?:is|was|(?:would|should|must) be)\b|[:=]):?"
    r"|\b(?:correct|right|best) (?:option|choice|one) ?(?:is|:):?"
    r"|\b(?:option|choice|conclusion) ?:|\bi (?:(?:would|will) )?(?:choose|select|pick|go with)\b"
    r"|</?answer>|\\boxed\b|答案 ?(?:应该?)?[是为]?:?|选择?项?[是为]?:?",
    re.IGNORECASE,
)
_RETRACTION = re.compile(  # what takes back everything before it
    r"\b(?:wait|actually|correction:|scratch that|i mean|i meant|on second thoughts?|let me (?:reconsider|think again)"
    r"|sorry|my mistake|or rather|i changed? my mind)\b|不对|更正",
    re.IGNORECASE,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WRAPPERS = " \t\n.,;:!?*_'\"()[]{}#$<>|=&"
_LETTER_CUES = _words(  # before a letter that is a choice
    "option options choice choices answer answers letter is be choose select pick with for so therefore thus hence"
    " : = -> => 选 项 是 为 案 择"
)
_OPENING, _CLOSING = frozenset("([{"), frozenset(".)]},:;!?\n")
_AND = _words("and or nor & / + vs versus 和 或")
_VERBS = _words("is are was would seems looks because since isn't but") | _AND
_NEGATIONS = _words(
    "not no never without neither nor cannot can't isn't aren't wasn't doesn't don't didn't won't wouldn't instead"
    " unlikely improbable incorrect wrong false exclude excludes excluded excluding eliminate eliminates eliminated"
    " ruled rule rules ruling against discard discarded absence lacks lack than 不 没 无 非 排 错"
)
_COPULAS = _words("is are was were be been can could should would seems seem looks look has have does do")
_DENYING = _words("isn't aren't wasn't doesn't can't cannot don't")
_DENIED = _words("not incorrect wrong false unlikely improbable excluded eliminated ruled absent less")
_IDIOMS = _words("idea answer information clue doubt way need")  # "no idea" is no No
# Beside a number, these make it another one: "3 cm" is not in "<3 cm", nor in "2 x 3 cm".
_CHANGES_NUMBER = _words("< > ≤ ≥ - + ± x / to")


class _Mention(NamedTuple):
    """A choice that is named at tokens `start` to `end`."""

    choice: int
    start: int
    end: int


def _read(response: str, choices: _Spellings) -> int | None:
    text = said(response)
    if text and choices.choices.count(text) == 1:
        return choices.choices.index(text)
    text = normalised(text)
    taken_back = [*_RETRACTION.finditer(text)]
    text = text[taken_back[-1].end() :] if taken_back else text
    cues = [*_CUE.finditer(text)]
    ends = [*(cue.start() for cue in cues[1:]), len(text)][: len(cues)]
    lines = {_line(text[cue.end() : end]) for cue, end in zip(cues, ends, strict=True)}
    stated = {_reading(line, choices) for line in lines} - {None}
    if not stated:
        found = _reading(text, choices)
        return None if found == _CONFLICT else found
    found = stated.pop()
    before = _opening(text[: cues[0].start()], choices)
    return None if stated or found == _CONFLICT or before not in (None, _CONFLICT, found) else found


def _line(text: str) -> str:
    """Return the first line that says something."""
    text = text.lstrip(_WRAPPERS)
    return text[: text.find("\n")] if "\n" in text else text


def _opening(text: str, choices: _Spellings) -> int | None:
    """Return what a text means if it begins with a letter, yes or no."""
    first = next((token for token in tokens_of(text[:40]) if token.text not in BREAKS), None)
    is_letter = first and first.written in choices.letters and text[first.end : first.end + 1] in _CLOSING
    return _reading(text, choices) if first and (is_letter or first.text in ("yes", "no")) else None


def _reading(text: str, choices: _Spellings) -> int | None:
    """Return the choice that a text without cues means, _CONFLICT where it means two, None where it means none."""
    tokens = tokens_of(text)
    words = tuple(token.text for token in tokens if token.text not in BREAKS)
    same = (
        next((owner for spelled, owner in choices.by_first.get(words[0], ()) if spelled == words), None)
        if words
        else None
    )
    if same is not None:
        return _CONFLICT if same == _TIE else same
    alone = text.strip(_WRAPPERS).lstrip("-• ").upper()
    if len(alone) == 1 and alone in choices.letters:
        return choices.letters.index(alone)
    named = _named_texts(tokens, choices)
    letters = _affirmed(_named_letters(text, tokens, named, choices), tokens)
    if any(mention.choice == _TIE for mention in named):
        return _CONFLICT
    texts = _affirmed(named, tokens)
    if named and choices.yes_no and (lead := _leading_yes_or_no(tokens, named, choices)) is not None:
        texts = {lead}
    if len(letters) == 1:
        return next(iter(letters)) if not texts or letters <= texts else _CONFLICT
    if letters or len(texts) > 1:
        halves = [mention for mention in named if mention.choice != choices.both]
        is_both = not letters and choices.both is not None and _joined(tokens, halves)
        return choices.both if is_both else _CONFLICT
    return texts.pop() if texts else None


def _named_texts(tokens: Sequence[Token], choices: _Spellings) -> list[_Mention]:
    """Return where the texts of choices stand, the longest first: "left lung" is not "lung"."""
    places = [place for place, token in enumerate(tokens) if token.text not in BREAKS]
    words = [tokens[place].text for place in places]
    found, at = [], 0
    while at < len(words):
        step = 1
        for spelled, owner in choices.by_first.get(words[at], ()):
            end = at + len(spelled)
            if tuple(words[at:end]) == spelled and not _is_of_more(words, at, end):
                found.append(_Mention(owner, places[at], places[end - 1] + 1))
                step = len(spelled)
                break
        at += step
    return found


def _is_of_more(words: Sequence[str], start: int, end: int) -> bool:
    """Tell whether the words before or after change what words[start:end] mean: a sign, a unit, "no idea"."""
    before, after = words[start - 1] if start else "", words[end] if end < len(words) else ""
    first, last = words[start], words[end - 1]
    if first[0].isdigit() and (before in _CHANGES_NUMBER or before[:1].isdigit()):
        return True
    if last[0].isdigit() and (after in _CHANGES_NUMBER or after[:1].isdigit() or after in ("%", "mm", "ml", "hu")):
        return True
    return (
        after in ("+", "-")
        or (last == "mm" and after == "x")
        or (end - start == 1 and last == "no" and after in _IDIOMS)
    )


def _leading_yes_or_no(tokens: Sequence[Token], named: Sequence[_Mention], choices: _Spellings) -> int | None:
    """Return the yes or no that a text begins with, unless the other one stands alone later: "Yes, but no effusion"."""
    first = named[0]
    after = tokens[first.end].text if first.end < len(tokens) else ""
    if first.choice not in choices.yes_no or any(t.text not in BREAKS for t in tokens[: first.start]) or after in _AND:
        return None
    for other in named[1:]:
        around = [
            *(t.text for t in tokens[other.start - 1 : other.start]),
            *(t.text for t in tokens[other.end : other.end + 1]),
        ]
        if other.choice in choices.yes_no - {first.choice} and all(text in BREAKS for text in around):
            return None
    return first.choice


def _named_letters(
    text: str, tokens: Sequence[Token], named: Sequence[_Mention], choices: _Spellings
) -> list[_Mention]:
    """Return where letters of choices stand. An article, a pronoun and the B of "hepatitis B" are none."""
    inside = {place for mention in named for place in range(mention.start, mention.end)}
    starts = {mention.start: mention.choice for mention in named}
    found: list[_Mention] = []
    for place, token in enumerate(tokens):
        letter = token.written.upper()
        if len(letter) != 1 or letter not in choices.letters or place in inside:
            continue
        before = tokens[place - 1].text if place else "\n"
        after = tokens[place + 1].text if place + 1 < len(tokens) else "\n"
        is_upper, is_word = token.written.isupper(), letter in "AI"  # "A cyst", "I think"
        follows = bool(found) and found[-1].end == place - 1 and (before in _AND or before == ",")
        marks = {text[token.start - 1 : token.start], text[token.end : token.end + 1]}
        closes = after in _CLOSING
        is_clear = closes or after in _VERBS or (is_upper and not is_word)
        has_own_text = after in (".", ")", "]", ":") and starts.get(place + 2) == choices.letters.index(letter)
        is_judged = after in ("is", "are", "would", "isn't", "seems") and is_upper and not is_word
        if (
            (before in _OPENING and after in (")", "]", "}"))
            or (len(marks) == 1 and marks <= {"*", '"', "_", "'", "$"})
            or (before == "\n" and (is_clear or _is_title(tokens, place)))
            or (before in _LETTER_CUES and is_clear)
            or (before in ("both", "either", "neither", "between") and after in _AND)
            or (follows and is_clear)
            or (is_upper and (after == ")" or has_own_text or is_judged))
        ):
            found.append(_Mention(choices.letters.index(letter), place, place + 1))
    return found


def _is_title(tokens: Sequence[Token], place: int) -> bool:
    """Tell whether a capital A is followed by a capital: "A Right" is the letter, "A cyst" the article."""
    return tokens[place].written == "A" and place + 1 < len(tokens) and tokens[place + 1].written[:1].isupper()


def _affirmed(named: Sequence[_Mention], tokens: Sequence[Token]) -> set[int]:
    """Return the choices that are named and nowhere denied."""
    denied = {mention.choice for mention in named if _is_denied(mention, tokens)}
    return {mention.choice for mention in named} - denied


def _is_denied(mention: _Mention, tokens: Sequence[Token]) -> bool:
    """Tell whether a negation stands in the same clause, up to 5 words before it or 4 behind it."""
    for token in reversed(tokens[max(mention.start - 5, 0) : mention.start]):
        if token.text in BREAKS or token.text in ("but", "因"):
            break
        if token.text in _NEGATIONS:
            return True
    has_copula = False
    for token in tokens[mention.end : mention.end + 4]:
        if (token.text in BREAKS and token.text not in "()") or (has_copula and token.text in _AND):
            break
        if token.text in _DENYING or token.text in ("不", "错") or (has_copula and token.text in _DENIED):
            return True
        has_copula = has_copula or token.text in _COPULAS
    return False


def _joined(tokens: Sequence[Token], named: Sequence[_Mention]) -> bool:
    """Tell whether just two texts are named, as "left and right"."""
    return len({mention.choice for mention in named}) == 2 and any(
        [token.text for token in tokens[one.end : other.start]] in (["and"], ["&"], ["+"], ["as", "well", "as"], ["和"])
        for one, other in pairwise(named)
    )

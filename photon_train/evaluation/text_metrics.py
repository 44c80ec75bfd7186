"""BLEU, ROUGE, METEOR and BERTScore, as the libraries of the field compute them. All between 0 and 1.

BLEU is that of Hugging Face evaluate's "bleu" (max_order=N, smooth=False): of the whole corpus, tokenizer 13a, case kept,
with brevity penalty. Counts are sacrebleu's. ROUGE is rouge-score's F-measure without stemmer, its mean over questions
(evaluate prints the median of unseeded bootstrap means instead, so that its last digits change from run to run).

Findings in reports, from tables of labels: F1 and CRG. What makes the labels (RadBERT, a person) is not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from photon_data.errors import UsageError, nearest_name
from photon_data.questions.table import Problem, read_table, refuse
from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import Metric, mean_of, ratio, with_ones

BERTSCORE_MODEL, BERTSCORE_LAYER = "roberta-large", 17

Applies = Callable[[Case], bool]


def bleu(order: int, applies: Applies) -> Metric:
    """Return corpus BLEU up to n-grams of `order`."""
    return Metric(f"bleu{order}", applies, lambda cases: _bleu_sums(cases, order), lambda sums: bleu_of_sums(sums, order))


def bleu_of_sums(sums: np.ndarray, order: int) -> np.ndarray:
    """Return BLEU of [matches by order, n-grams by order, tokens of the responses, tokens of the references]."""
    matches, totals = sums[..., :order], sums[..., order : 2 * order]
    response, reference = sums[..., -2], sums[..., -1]
    precision = np.exp(np.mean(np.log(matches / totals), axis=-1))
    brevity = np.where(response > reference, 1.0, np.exp(1 - reference / response))
    return np.asarray(np.where(np.all(matches > 0, axis=-1), precision * brevity, 0.0))


def rouge(kind: str, applies: Applies) -> Metric:
    """Return the mean F-measure of "rouge1" or "rougeL"."""
    return mean_of(kind.lower(), applies, lambda case: rouge_f(kind, case.answer, case.response))


@lru_cache(maxsize=1 << 18)
def rouge_f(kind: str, reference: str, response: str) -> float:
    """Return the F-measure of one response."""
    return float(_rouge_scorer(kind).score(reference, response)[kind].fmeasure)


def meteor_exact_stem(applies: Applies) -> Metric:
    """Return the mean METEOR with matches of words and of stems only.

    nltk's METEOR also matches synonyms of WordNet, which has to be downloaded; with it scores are a little higher.
    """
    return mean_of("meteor_exact_stem", applies, lambda case: meteor_f(case.answer, case.response))


@lru_cache(maxsize=1 << 16)
def meteor_f(reference: str, response: str) -> float:
    """Return METEOR (alpha 0.9, beta 3, gamma 0.5) of one response, tokens by 13a."""
    tokenize = Tokenizer13a()
    return float(single_meteor_score(tokenize(reference).split(), tokenize(response).split(), wordnet=_NoSynonyms()))


def bertscore(applies: Applies) -> Metric:
    """Return the mean BERTScore F1 (roberta-large, layer 17, no idf, no rescaling); needs the package bert-score.

    UsageError where it is not installed. A blind baseline costs as much as a model's answers.
    """
    try:
        from bert_score import BERTScorer
    except ImportError:
        raise UsageError("bert-score wanted for BERTScore, not found; pip install bert-score, or leave it out") from None
    scorer = lru_cache(maxsize=1)(lambda: BERTScorer(model_type=BERTSCORE_MODEL, num_layers=BERTSCORE_LAYER))

    def observe(cases: Sequence[Case]) -> np.ndarray:
        _, _, f1 = scorer().score([case.response for case in cases], [case.answer for case in cases])
        return with_ones(map(float, f1))

    return Metric("bertscore_f1", applies, observe, ratio)


class _NoSynonyms:
    """A WordNet of no words."""

    def synsets(self, word: str) -> list[object]:
        return []


def _bleu_sums(cases: Sequence[Case], order: int) -> np.ndarray:
    return np.array([_bleu_counts(case.response, case.answer, order) for case in cases], float)


@lru_cache(maxsize=1 << 18)
def _bleu_counts(response: str, reference: str, order: int) -> tuple[int, ...]:
    found = _bleu_counter(order).sentence_score(response, [reference])
    return (*found.counts, *found.totals, found.sys_len, found.ref_len)


@lru_cache(maxsize=4)
def _bleu_counter(order: int) -> BLEU:
    # effective_order changes the score of a sentence, which nobody reads, not its counts.
    return BLEU(max_ngram_order=order, smooth_method="none", tokenize="13a", effective_order=True)


@lru_cache(maxsize=2)
def _rouge_scorer(kind: str) -> RougeScorer:
    return RougeScorer([kind], use_stemmer=False)


ID_COLUMNS = ("id", "volume_id", "VolumeName")
_SCAN = ".nii.gz"


@dataclass(frozen=True)
class LabelTable:
    """0 or 1 for each finding of each report: rows by question id or volume id."""

    names: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]

    def of(self, case: Case) -> tuple[int, ...] | None:
        """Return the labels of a case, None where the table has none."""
        return self.rows.get(case.id, self.rows.get(case.volume_id))


def read_labels(path: Path) -> LabelTable:
    """Return a table of labels: a column id, volume_id or VolumeName, and one column of 0 and 1 per finding. UsageError."""
    table = read_table(path)
    key = next((name for name in ID_COLUMNS if name in table.columns), None)
    if key is None:
        hint = nearest_name("volume_id", table.columns)
        raise UsageError(f"{path}: a column called {', '.join(ID_COLUMNS)} wanted, got none; is {hint!r} meant?")
    names = tuple(name for name in table.columns if name not in ID_COLUMNS)
    problems = [*table.problems]
    rows = {}
    for row in table.rows:
        try:
            rows[str(row.values[key]).removesuffix(_SCAN)] = tuple(_label(row.values[name]) for name in names)
        except ValueError as error:
            problems.append(Problem(row.place, "no label", str(error)))
    if problems:
        refuse(path, problems)
    return LabelTable(names, rows)


def label_metrics(reference: LabelTable, response: LabelTable) -> list[Metric]:
    """Return precision, recall and F1 over all labels, F1 as a mean over findings, and CRG, of cases that both tables have.

    UsageError for tables of different findings.
    """
    if sorted(reference.names) != sorted(response.names):
        odd = sorted(set(reference.names) ^ set(response.names))
        raise UsageError(f"the same findings in both tables of labels wanted, got {', '.join(odd)} in one of them")
    order = [response.names.index(name) for name in reference.names]

    def applies(case: Case) -> bool:
        return reference.of(case) is not None and response.of(case) is not None

    def observe(cases: Sequence[Case]) -> np.ndarray:
        """float[n, 3 * findings + 1]: found, missed, false, and the number of labels."""
        true = np.array([reference.of(case) for case in cases], bool)
        said = np.array([response.of(case) for case in cases], bool)[:, order]
        parts = np.stack([true & said, true & ~said, ~true & said], axis=2).reshape(len(cases), -1)
        return np.c_[parts, np.full(len(cases), true.shape[1])].astype(float)

    formulas = {
        "label_precision": lambda sums: _micro(sums, 0, 1),
        "label_recall": lambda sums: _micro(sums, 1, 0),
        "label_f1_micro": lambda sums: _micro(sums, 1, 1, twice=2),
        "label_f1_macro": _macro_f1,
        "crg": _crg_of_sums,
    }
    return [Metric(name, applies, observe, formula, of_words=False) for name, formula in formulas.items()]


def constant_labels(like: LabelTable, value: int) -> LabelTable:
    """Return a table that says the same of every finding: the blind baselines of label metrics."""
    return LabelTable(like.names, dict.fromkeys(like.rows, (value,) * len(like.names)))


def crg(found: np.ndarray, missed: np.ndarray, false: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the VLM3D challenge's CRG: U / (2 U - s), s = r found - r missed - false, r = (X - A) / 2A, U = (X - A) / 2.

    X is the number of labels, A of those that are 1. Perfect is 1; all negative and all positive are both exactly 1/3. A
    missed finding costs r false ones. NaN without any positive or negative label.
    """
    positives = found + missed
    half = (labels - positives) / 2
    worth = half / positives
    score = worth * found - worth * missed - false
    return np.asarray(half / (2 * half - score))


def _crg_of_sums(sums: np.ndarray) -> np.ndarray:
    totals = _totals(sums)
    return crg(totals[..., 0], totals[..., 1], totals[..., 2], sums[..., -1])


def _totals(sums: np.ndarray) -> np.ndarray:
    """Return [..., 3]: found, missed, false of all findings together."""
    return np.asarray(sums[..., :-1].reshape(*sums.shape[:-1], -1, 3).sum(axis=-2))


def _micro(sums: np.ndarray, missed: int, false: int, twice: int = 1) -> np.ndarray:
    totals = _totals(sums)
    return np.asarray(twice * totals[..., 0] / (twice * totals[..., 0] + missed * totals[..., 1] + false * totals[..., 2]))


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Return the mean over findings that are there or were said to be; of others F1 is not defined."""
    found, missed, false = np.moveaxis(sums[..., :-1].reshape(*sums.shape[:-1], -1, 3), -1, 0)
    total = 2 * found + missed + false
    return np.asarray(np.where(total > 0, 2 * found / total, 0.0).sum(axis=-1) / (total > 0).sum(axis=-1))


def _label(value: object) -> int:
    """Return 0 or 1; ValueError."""
    if value in (0, 1) or (isinstance(value, str) and value.strip() in ("0", "1", "0.0", "1.0")):
        return int(float(str(value)))
    raise ValueError(f"labels of 0 and 1 wanted, got {value!r}")

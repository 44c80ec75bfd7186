"""Scores of text, 0 to 1: BLEU, ROUGE, METEOR, BERTScore as the libraries of the field have them; tables of findings.

docs/evaluation.md has the definitions. Findings in reports are compared by tables of labels, F1 and CRG; what makes the
labels (RadBERT, a person) is not part of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from photon_data.errors import UsageError, name_hint
from photon_data.questions.table import Problem, read_table, refuse
from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import Applies, Metric, mean_of, ratio, with_ones

ID_COLUMNS = ("id", "volume_id", "VolumeName")


def bleu(order: int, applies: Applies[Case]) -> Metric[Case]:
    """Return corpus BLEU up to n-grams of `order`: that of Hugging Face evaluate with smooth=False."""
    # effective_order changes the score of a sentence, which nobody reads, not its counts.
    counter = BLEU(max_ngram_order=order, smooth_method="none", tokenize="13a", effective_order=True)

    @lru_cache(maxsize=1 << 18)
    def counts(response: str, reference: str) -> tuple[int, ...]:
        """Return matches by order, n-grams by order, tokens of the response, tokens of the reference."""
        found = counter.sentence_score(response, [reference])
        return (*found.counts, *found.totals, found.sys_len, found.ref_len)

    def of_sums(sums: np.ndarray) -> np.ndarray:
        matches, totals = sums[..., :order], sums[..., order : 2 * order]
        response, reference = sums[..., -2], sums[..., -1]
        precision = np.exp(np.mean(np.log(matches / totals), axis=-1))
        brevity = np.where(response > reference, 1.0, np.exp(1 - reference / response))
        return np.where(np.all(matches > 0, axis=-1), precision * brevity, 0.0)

    def observe(cases: Sequence[Case]) -> np.ndarray:
        return np.array([counts(case.response, case.answer) for case in cases], float)

    return Metric(f"bleu{order}", applies, observe, of_sums, is_mean=False)


def rouge(kind: str, applies: Applies[Case]) -> Metric[Case]:
    """Return the mean F-measure of "rouge1" or "rougeL" (evaluate prints a median of unseeded bootstrap means)."""
    scorer = RougeScorer([kind], use_stemmer=False)

    @lru_cache(maxsize=1 << 18)
    def score(reference: str, response: str) -> float:
        return float(scorer.score(reference, response)[kind].fmeasure)

    return mean_of(kind.lower(), applies, lambda case: score(case.answer, case.response))


def meteor_exact_stem(applies: Applies[Case]) -> Metric[Case]:
    """Return the mean METEOR (alpha 0.9, beta 3, gamma 0.5; tokens by 13a) with matches of words and of stems only.

    nltk's METEOR also matches synonyms of WordNet, which has to be downloaded; with it scores are a little higher.
    """
    tokenize, no_synonyms = Tokenizer13a(), SimpleNamespace(synsets=lambda word: [])

    @lru_cache(maxsize=1 << 16)
    def score(reference: str, response: str) -> float:
        words = [tokenize(text).split() for text in (reference, response)]
        return float(single_meteor_score(*words, wordnet=no_synonyms))

    return mean_of("meteor_exact_stem", applies, lambda case: score(case.answer, case.response))


def bertscore(applies: Applies[Case]) -> Metric[Case]:
    """Return the mean BERTScore F1 (roberta-large, layer 17, no idf, no rescaling); needs the package bert-score.

    UsageError where it is not installed. A pair of texts is scored once; a baseline costs as much as a model's answers.
    """
    try:
        from bert_score import BERTScorer
    except ImportError:
        hint = "pip install bert-score, or leave it out"
        raise UsageError(f"expected the package bert-score for BERTScore, found none; {hint}") from None
    scorer = lru_cache(maxsize=1)(lambda: BERTScorer(model_type="roberta-large", num_layers=17))

    known: dict[tuple[str, str], float] = {}  # F1 by response and answer

    def observe(cases: Sequence[Case]) -> np.ndarray:
        pairs = [(case.response, case.answer) for case in cases]
        if new := list(dict.fromkeys(pair for pair in pairs if pair not in known)):
            _, _, f1 = scorer().score(*map(list, zip(*new, strict=True)))
            known.update(zip(new, map(float, f1), strict=True))
        return with_ones(known[pair] for pair in pairs)

    return Metric("bertscore_f1", applies, observe, ratio, is_costly=True)


@dataclass(frozen=True)
class LabelTable:
    """0 or 1 for each finding of each report: rows by question id or volume id."""

    names: tuple[str, ...]
    rows: Mapping[str, tuple[int, ...]]

    def of(self, case: Case) -> tuple[int, ...] | None:
        """Return the labels of a case, None where the table has none."""
        return self.rows.get(case.id, self.rows.get(case.volume_id))

    def constant(self, value: int) -> LabelTable:
        """Return a table with the same label for every finding: the baselines of label metrics."""
        return LabelTable(self.names, dict.fromkeys(self.rows, (value,) * len(self.names)))


def read_labels(path: Path) -> LabelTable:
    """Return a table: a column id, volume_id or VolumeName, and one column of 0 and 1 per finding. UsageError."""
    table = read_table(path)
    key = next((name for name in ID_COLUMNS if name in table.columns), None)
    if key is None:
        hint = name_hint("volume_id", table.columns)
        raise UsageError(f"{path}: expected a column called {', '.join(ID_COLUMNS)}, found none; {hint}")
    names = tuple(name for name in table.columns if name not in ID_COLUMNS)
    rows, problems = {}, [*table.problems]
    for row in table.rows:
        try:
            rows[str(row.values[key]).removesuffix(".nii.gz")] = tuple(_label(row.values[name]) for name in names)
        except ValueError as error:
            problems.append(Problem(row.place, "no label", str(error)))
    if problems:
        refuse(path, problems)
    return LabelTable(names, rows)


def _label(value: object) -> int:
    """Return 0 or 1; ValueError for what is neither."""
    if value in (0, 1) or (isinstance(value, str) and value.strip() in ("0", "1", "0.0", "1.0")):
        return int(float(str(value)))
    raise ValueError(f"expected labels of 0 and 1, found {value!r}")


def label_metrics(reference: LabelTable, response: LabelTable) -> list[Metric[Case]]:
    """Return precision, recall, F1 over all labels, F1 as a mean over findings, and CRG, of cases in both tables.

    UsageError for tables of different findings.
    """
    if sorted(reference.names) != sorted(response.names):
        odd = ", ".join(sorted(set(reference.names) ^ set(response.names)))
        raise UsageError(f"expected the same findings in both tables of labels, found {odd} in one of them only")
    order = [response.names.index(name) for name in reference.names]

    def applies(case: Case) -> bool:
        return reference.of(case) is not None and response.of(case) is not None

    def observe(cases: Sequence[Case]) -> np.ndarray:
        """Return float[n, 3 * findings + 1]: found, missed, false of each finding, and the number of labels."""
        true = np.array([reference.of(case) for case in cases], bool)
        labelled = np.array([response.of(case) for case in cases], bool)[:, order]
        parts = np.stack([true & labelled, true & ~labelled, ~true & labelled], axis=2).reshape(len(cases), -1)
        return np.c_[parts, np.full(len(cases), true.shape[1])].astype(float)

    def by_finding(sums: np.ndarray) -> np.ndarray:
        """Return float[3, ..., findings]: found, missed, false."""
        return np.moveaxis(sums[..., :-1].reshape(*sums.shape[:-1], -1, 3), -1, 0)

    def metric(name: str, formula: Callable[..., np.ndarray]) -> Metric[Case]:
        """Return the metric of found, missed and false over all findings, and the number of labels."""
        return Metric(
            name,
            applies,
            observe,
            lambda sums: formula(*by_finding(sums).sum(-1), sums[..., -1]),
            by_question=False,
            of_text=False,
        )

    def macro_f1(sums: np.ndarray) -> np.ndarray:
        found, missed, false = by_finding(sums)
        total = 2 * found + missed + false  # F1 of a finding that neither table has is not defined
        return np.asarray(np.where(total > 0, 2 * found / total, 0.0).sum(axis=-1) / (total > 0).sum(axis=-1))

    return [
        metric("label_precision", lambda tp, fn, fp, labels: tp / (tp + fp)),
        metric("label_recall", lambda tp, fn, fp, labels: tp / (tp + fn)),
        metric("label_f1_micro", lambda tp, fn, fp, labels: 2 * tp / (2 * tp + fn + fp)),
        Metric("label_f1_macro", applies, observe, macro_f1, by_question=False, of_text=False),
        metric("crg", crg),
    ]


def crg(found: np.ndarray, missed: np.ndarray, false: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return CRG of the VLM3D challenge: U / (2 U - s), s = r found - r missed - false, r = U / A, U = (X - A) / 2.

    X is the number of labels, A of those that are 1. Perfect is 1; all negative and all positive are both exactly
    1/3. A missed finding costs r false ones. NaN without any positive or negative label.
    """
    positives = found + missed
    half = (labels - positives) / 2
    worth = half / positives
    return np.asarray(half / (2 * half - (worth * found - worth * missed - false)))

"""BLEU, ROUGE, METEOR and BERTScore, as the libraries of the field compute them. All between 0 and 1.

BLEU is that of Hugging Face evaluate's "bleu" (max_order=N, smooth=False): of the whole corpus, tokenizer 13a, case kept,
with brevity penalty. Counts are sacrebleu's. ROUGE is rouge-score's F-measure without stemmer, its mean over questions
(evaluate prints the median of unseeded bootstrap means instead, so that its last digits change from run to run).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from photon_data.errors import UsageError
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

"""Every metric against numbers worked by hand or another library."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
from answers import case, row
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_data.errors import UsageError
from photon_train.evaluation.baselines import best_constant
from photon_train.evaluation.cases import case_of
from photon_train.evaluation.choice_metrics import (
    ACCURACIES,
    ACCURACY_LETTER_V2,
    CLASS_METRICS,
    YES_NO_METRICS,
    any_question,
    mra_linear,
    mra_thresholds,
    same_size,
    within,
)
from photon_train.evaluation.evaluate import BENCHMARKS
from photon_train.evaluation.parsing import parse_size
from photon_train.evaluation.text_metrics import (
    LabelTable,
    bertscore,
    bleu,
    crg,
    label_metrics,
    meteor_exact_stem,
    read_labels,
    rouge,
)
from photon_train.rows import Prediction

YES_NO = ("Yes", "No")


def value(metrics, name, cases):
    (metric,) = [metric for metric in metrics if metric.name == name]
    return metric.value([one for one in cases if metric.applies(one)])


def test_bleu1_of_hand_worked_corpora():
    one = [case("the cat sat on the mat", "the the the cat")]
    assert bleu(1, any_question).value(one) == pytest.approx(3 / 4 * math.exp(1 - 6 / 4))
    two = [
        case("Upper lobes.", "Upper lobes"),
        case("Both lungs", "both lungs"),
    ]  # a full stop is a word, and case counts
    assert bleu(1, any_question).value(two) == pytest.approx(3 / 4 * math.exp(1 - 5 / 4))
    assert bleu(1, any_question).value([case("no", "")]) == 0


WORDS = st.lists(st.sampled_from(["Upper", "upper", "lobes.", "30x13", "mm", "no,", "nodule"]), max_size=12).map(
    " ".join
)
NOT_BLANK = WORDS.filter(lambda text: text.strip())


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, NOT_BLANK), min_size=1, max_size=6), st.sampled_from([1, 2, 3, 4]))
def test_bleu_of_a_corpus_is_that_of_sacrebleu(pairs, order):
    cases = [case(reference, response) for response, reference in pairs]
    theirs = sacrebleu.BLEU(max_ngram_order=order, smooth_method="none", tokenize="13a")
    expected = theirs.corpus_score([r for r, _ in pairs], [[a for _, a in pairs]]).score
    assert 100 * bleu(order, any_question).value(cases) == pytest.approx(expected, abs=1e-9)


def test_rouge_of_hand_worked_pairs():
    rouge1, rouge_l = rouge("rouge1", any_question), rouge("rougeL", any_question)
    assert rouge1.value([case("Upper lobes.", "upper left lobes")]) == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert rouge_l.value([case("upper lobes", "lobes upper")]) == pytest.approx(0.5)
    assert rouge("rouge1", any_question).value([case("a b", "a b"), case("a b", "c")]) == pytest.approx(0.5)


def test_meteor_matches_stems_but_no_synonyms():
    def meteor(reference, response):
        return meteor_exact_stem(any_question).value([case(reference, response)])

    assert meteor("one two three four", "one two three four") == pytest.approx(1 - 0.5 * (1 / 4) ** 3)
    assert meteor("lung nodules", "lung nodule") == meteor("lung nodule", "lung nodule")
    assert meteor("huge", "big") == 0


def test_bertscore_without_its_package_says_what_to_install():
    try:
        import bert_score  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="pip install bert-score"):
            bertscore(any_question)


def test_bertscore_scores_a_pair_of_texts_once_and_every_case_by_its_own_pair(monkeypatch):
    scored = []

    class Scorer:
        def __init__(self, model_type, num_layers):
            assert (model_type, num_layers) == ("roberta-large", 17)

        def score(self, responses, answers):
            scored.extend(zip(responses, answers, strict=True))
            shares = [len(response) / 100 for response in responses]
            return shares, shares, shares

    monkeypatch.setitem(sys.modules, "bert_score", SimpleNamespace(BERTScorer=Scorer))
    metric, cases = bertscore(any_question), [case("No nodule", said) for said in ("None", "A nodule", "None")]
    assert metric.of_each(cases).tolist() == [0.04, 0.08, 0.04]
    cases.insert(0, case("None", "No nodule"))
    assert metric.of_each(cases).tolist() == [0.09, 0.04, 0.08, 0.04]
    assert metric.value(cases) == pytest.approx(0.0625)  # (9 + 4 + 8 + 4) / 4 hundredths
    assert scored == [("None", "No nodule"), ("A nodule", "No nodule"), ("No nodule", "None")]


@pytest.mark.parametrize(
    ("response", "answer", "thresholds", "linear"),
    [
        ("13", "10", 0.5, 0.7),  # 1 - 0.70 is a little more than 0.3
        ("10 mm", "10", 1, 1),
        ("10.4", "10", 1, 0.96),
        ("5", "10", 0, 0.5),
        ("25", "10", 0, 0),
        ("0", "0", 1, 1),
        ("0.001", "0", 0, 0),
        ("-9", "-10", 0.8, 0.9),  # |error| / |truth| is 0.1: below 1 - .50 ... 1 - .85, and 0.1 < 1 - 0.9 fails
        ("many", "10", 0, 0),
    ],
)
def test_the_two_mras_of_hand_worked_numbers(response, answer, thresholds, linear):
    assert mra_thresholds(response, answer) == pytest.approx(thresholds)
    assert mra_linear(response, answer) == pytest.approx(linear)


def test_a_tolerance_band_holds_its_edge():
    assert [within("11", "10", band) for band in (0.05, 0.1, 0.2)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("text", "sides"),
    [
        ("30x13 mm", (30, 13)),
        ("13 × 30 mm.", (30, 13)),
        ("3x1.3 cm", (30, 13)),
        ("1,3 cm x 30 millimeters", (30, 13)),
        ("3 nodules, the largest 7 mm", (7,)),
        ("Less than 5 mm.", (5,)),
        ("1,234 mm", (1234,)),
        ("1,234.5 mm x 1'100 mm", (1234.5, 1100)),
        ("1.234,5 x 20 mm", (1234.5, 20)),
        ("1.234 mm", (1.234,)),
        ("0,125 cm", (1.25,)),
        (".5 Centimetre", (5,)),
        ("Seen before.7 mm now", (7,)),
        ("1.2.3 mm", None),
        ("about 12", None),
    ],
)
def test_sizes_are_read_in_mm_the_longest_side_first(text, sides):
    size = parse_size(text)
    assert (size and size.sides_mm) == (sides and pytest.approx(sides))


def test_a_size_is_right_in_any_unit_and_order_and_wrong_with_a_side_missing():
    said = ["2 cm x 15 mm", "15x20 mm", "16x22 mm", "20 mm", "20x15", "17x20 mm"]
    assert [same_size(text, "20x15 mm", 0.1) for text in said] == [1, 1, 1, 0, 0, 0]
    cases = [case("20x15 mm", text, extra={"answer_type": "measurement"}) for text in said]
    assert value(BENCHMARKS["3d-rad"], "size_within_20_percent", cases) == pytest.approx(4 / 6)
    assert value(BENCHMARKS["3d-rad"], "exact_normalised", cases) == 0


def test_the_accuracies_differ_in_what_they_take_for_the_answer():
    cases = [case("No", response, YES_NO) for response in ("B. No", " no ", "No", "B", "B. It is not")]
    found = {name: value(ACCURACIES, name, cases) for name in ("accuracy_robust", "accuracy_contains_letter")}
    found |= {name: value(ACCURACIES, name, cases) for name in ("accuracy_normalised", "accuracy_strict")}
    assert found == {
        "accuracy_robust": 1.0,
        "accuracy_contains_letter": 0.4,
        "accuracy_normalised": 0.4,
        "accuracy_strict": 0.2,
    }
    assert ACCURACY_LETTER_V2.value(cases) == 0.6


def test_labels_written_as_letters_are_compared_as_letters():
    extra = {"plain_answer": "No", "letter": "B"}
    cases = [case(label, label, YES_NO, extra=extra) for label in ("B", "B. No")]
    for name in ("accuracy_robust", "accuracy_normalised", "accuracy_strict"):
        assert value(ACCURACIES, name, cases) == 1


def test_yes_no_metrics_of_a_hand_count():
    said = {"Yes": ["Yes"] * 3 + ["No"] + ["?"], "No": ["No"] * 2 + ["Yes"] * 2 + ["?"]}
    cases = [case(answer, response, YES_NO) for answer, responses in said.items() for response in responses]
    expected = {
        "sensitivity": 3 / 5,
        "specificity": 2 / 5,
        "specificity_unparsed_is_no": 3 / 5,
        "balanced_accuracy": 0.5,
    }
    expected |= {"f1_yes": 2 * 3 / (2 * 3 + 2 + 3)}
    assert {name: value(YES_NO_METRICS, name, cases) for name in expected} == pytest.approx(expected)


def test_balanced_accuracy_and_f1_of_three_classes_by_hand():
    pairs = [("left", "left"), ("left", "right"), ("right", "right"), ("both", "left")]
    cases = [case(answer, response, ("left", "right", "both")) for answer, response in pairs]
    assert value(CLASS_METRICS, "balanced_accuracy_classes", cases) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert value(CLASS_METRICS, "macro_f1_classes", cases) == pytest.approx((2 / 4 + 2 / 3 + 0) / 3)


def scored(answer, score):
    return case(answer, answer, YES_NO, scores={"Yes": score, "No": 0.0})


def test_auroc_of_a_hand_count_with_a_tie():
    cases = [scored("Yes", 0.9), scored("Yes", 0.4), scored("No", 0.4), scored("No", 0.1)]
    assert value(YES_NO_METRICS, "auroc", cases) == pytest.approx(3.5 / 4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_in_order(pairs):
    yes, no = ([score for is_yes, score in pairs if is_yes is wanted] for wanted in (True, False))
    found = value(YES_NO_METRICS, "auroc", [scored("Yes" if is_yes else "No", score) for is_yes, score in pairs])
    if yes and no:
        wins = [(a > b) + (a == b) / 2 for a in yes for b in no]
        assert found == pytest.approx(sum(wins) / len(wins))
    else:
        assert math.isnan(found)


def test_crg_of_a_hand_worked_table():
    assert crg(*map(np.array, (1.0, 1.0, 1.0, 10.0))) == pytest.approx(4 / 9)  # r 2, U 4, s -1


@given(st.integers(1, 50), st.integers(1, 50))
def test_crg_of_constant_labels_is_one_third_and_of_perfect_ones_one(positives, negatives):
    total = positives + negatives
    for found, missed, false, expected in (
        (0, positives, 0, 1 / 3),
        (positives, 0, negatives, 1 / 3),
        (positives, 0, 0, 1),
    ):
        assert crg(*(np.array(float(n)) for n in (found, missed, false, total))) == pytest.approx(expected)


def test_label_metrics_are_read_from_tables_whatever_the_order_of_their_columns(tmp_path):
    (tmp_path / "true.csv").write_text("VolumeName,Nodule,Effusion\nv-a.nii.gz,1,0\nv-b.nii.gz,1,1\nv-c.nii.gz,0,0\n")
    (tmp_path / "said.csv").write_text("id,Effusion,Nodule\na,1,1\nb,0,1\nc,0,0\n")
    metrics = label_metrics(read_labels(tmp_path / "true.csv"), read_labels(tmp_path / "said.csv"))
    cases = [case("a report", "a report", id=id) for id in "abc"]
    found = {metric.name: metric.value(cases) for metric in metrics}
    expected = {"label_precision": 2 / 3, "label_recall": 2 / 3, "label_f1_micro": 2 / 3, "label_f1_macro": (1 + 0) / 2}
    # X 6, A 3, r 1/2, U 3/2, s 1 - 1/2 - 1
    assert found == pytest.approx({**expected, "crg": 1.5 / (3 + 0.5)})


def test_label_tables_of_other_findings_or_values_are_refused(tmp_path):
    with pytest.raises(UsageError, match="Effusion"):
        label_metrics(LabelTable(("Nodule",), {}), LabelTable(("Nodule", "Effusion"), {}))
    with pytest.raises(UsageError, match="expected labels of 0 and 1, found 'yes'"):
        read_labels(put_csv(tmp_path, "id,Nodule\na,yes\n"))
    with pytest.raises(UsageError, match="VolumeName"):
        read_labels(put_csv(tmp_path, "name,Nodule\na,1\n"))


def put_csv(folder, text):
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


def test_v1_scores_each_question_as_it_is_published():
    numeric = {"answer_type": "number"}
    cases = [
        case("10", "13", extra=numeric),
        case("spleen", "Spleen"),
        case("B", "B", YES_NO, extra={"plain_answer": "No", "letter": "B", "mc_question": "? A: Yes B: No"}),
    ]
    assert value(BENCHMARKS["deeptumorvqa-v1"], "score_v1", cases) == pytest.approx((0.5 + 0 + 1) / 3)
    assert value(BENCHMARKS["deeptumorvqa-v2"], "score_v2", cases) == pytest.approx((0.7 + 1 + 1) / 3)


def test_a_question_whose_choices_are_an_empty_text_has_none():
    assert (case("left", "left", ("",)).choices, case("left", "left", ("",)).form) == ((), "text")


def test_the_free_text_form_of_a_question_with_choices_is_not_closed():
    extra = {"mc_question": "Where? A: head B: tail", "letter": "A", "answer_type": "text"}
    free = case_of(row("q", "head", ("head", "tail"), question="Where?", extra=extra), Prediction("q", "head"))
    put_as_letters = case_of(
        row("q", "A", ("head", "tail"), extra={**extra, "plain_answer": "head"}), Prediction("q", "A")
    )
    assert (free.closed, free.form) == (False, "text")
    assert (put_as_letters.closed, put_as_letters.form, put_as_letters.answer) == (True, "choice", "head")


def test_what_3d_rads_prompt_puts_before_open_answers_is_not_scored():
    open_one = case("-. Upper lobes.", "-. Upper lobes.", extra={"plain_answer": "Upper lobes."})
    assert (open_one.answer, open_one.response) == ("Upper lobes.", "Upper lobes.")


def test_the_best_constant_is_the_best_by_the_metric_not_the_most_frequent():
    cases = [
        case(answer, "", id=str(i), extra={"answer_type": "number"})
        for i, answer in enumerate(("1", "1", "9", "10", "11"))
    ]
    assert best_constant(cases, BENCHMARKS["vqa"]).answer in ("9", "10")
    shuffled = [
        case(a, "", choices)
        for a, choices in (("x", ("x", "y")), ("v", ("v", "w")), ("y", ("y", "x")), ("x", ("y", "x")))
    ]
    constant = best_constant(shuffled, BENCHMARKS["vqa"])
    assert (constant.answer, constant.by_letter) == ("A", True)
    assert [constant.of(one) for one in shuffled] == ["x", "v", "y", "y"]

"""Joining, averages, intervals, blind baselines, and what was kept."""

import csv
import random
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from answers import RAD3D, case, put_rows, rad3d_questions, rad3d_rows, row
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_data.errors import UsageError
from photon_data.questions.question import PROMPTS, Question
from photon_train.evaluation.cases import case_of, join, rows_by_id
from photon_train.evaluation.choice_metrics import ACCURACIES, YES_NO_METRICS
from photon_train.evaluation.evaluate import BLIND, evaluate, table_of
from photon_train.evaluation.kept import overlap_of, summarise_costs, summarise_kept
from photon_train.evaluation.metric import draw_patients, interval
from photon_train.evaluation.results import Settings
from photon_train.evaluation.text_metrics import LabelTable
from photon_train.rows import Prediction, pack_mask, question_digest

YES_NO = ("Yes", "No")
RAD3D_QUESTIONS = rad3d_questions("test")[::5]
FEW = Settings(bootstrap=50)


def found(evaluation, metric, task, average="macro_over_subtasks", subtask="", file=0):
    (score,) = [
        score
        for score in evaluation.answers[file].scores
        if (score.metric, score.task, score.subtask, score.average) == (metric, task, subtask, average)
    ]
    return score


# --- joining


def test_every_kind_of_gap_is_an_error_that_lists_its_ids():
    rows = [row(id, "No", YES_NO) for id in ("a", "b", "c", "d", "e", "f")]
    answers = [
        Prediction("a", "No"),
        Prediction("e", "No", asked=question_digest(row("e", "No", YES_NO, question="Where?"))),
        Prediction("f", "No", asked=question_digest(row("f", "Yes", YES_NO))),
        Prediction("b", "No"),
        Prediction("b", "Yes"),
        Prediction("c", error="x"),
        Prediction("z", "No"),
    ]
    with pytest.raises(UsageError) as error:
        join(rows_by_id(rows), answers)
    for said in (
        "1 without a prediction: d",
        "1 whose prediction is an error: c",
        "1 predicted more than once: b",
        "1 whose prediction answers another question or volume: e",
        "1 not in the data: z",
    ):
        assert said in str(error.value)
    joined = join(rows_by_id(rows), answers, allow_partial=True)
    assert [case.id for case in joined.cases] == ["a", "f"]
    gaps = joined.gaps
    assert (gaps.missing, gaps.failed, gaps.repeated, gaps.changed, gaps.unknown) == (
        ("d",),
        ("c",),
        ("b",),
        ("e",),
        ("z",),
    )
    assert gaps.sentence().startswith("PARTIAL: 2 of 6 questions are scored")


def test_rows_that_repeat_or_have_no_answer_are_refused():
    with pytest.raises(UsageError, match="expected every question once in the data, found 1 that occur again: a"):
        join(rows_by_id([row("a", "No"), row("a", "No")]), [Prediction("a", "No")])
    with pytest.raises(UsageError, match="questions with an answer"):
        join(rows_by_id([row("a", "")]), [Prediction("a", "No")])


def test_partial_predictions_of_nothing_are_refused():
    with pytest.raises(UsageError, match="found none"):
        join(rows_by_id([row("a", "No")]), [Prediction("b", "No")], allow_partial=True)


@settings(max_examples=20, deadline=None)
@given(st.randoms())
def test_the_order_of_rows_and_predictions_does_not_matter(rnd):
    rows = [row(f"q{i}", rnd.choice(YES_NO), YES_NO, patient=f"p{i % 3}", kind=f"k{i % 2}") for i in range(12)]
    answers = [Prediction(one["id"], rnd.choice(["Yes", "No", "?"])) for one in rows]
    first = evaluate("vqa", rows, {"m": answers}, settings=FEW)
    shuffled = evaluate("vqa", rnd.sample(rows, 12), {"m": rnd.sample(answers, 12)}, settings=FEW)
    assert shuffled == first


# --- averages


def test_macro_and_question_weighted_averages_by_hand():
    rows = [row(f"a{i}", "No", YES_NO, task="t", kind="big") for i in range(3)] + [
        row("b", "No", YES_NO, task="t", kind="small")
    ]
    rows.append(row("c", "Yes", YES_NO, task="u", kind="only"))
    said = {"a0": "No", "a1": "No", "a2": "Yes", "b": "Yes", "c": "Yes"}
    done = evaluate("vqa", rows, {"m": [Prediction(id, text) for id, text in said.items()]}, settings=FEW)
    assert found(done, "accuracy_robust", "t").estimate.value == pytest.approx(100 * (2 / 3 + 0) / 2, abs=1e-4)
    assert found(done, "accuracy_robust", "t", "question_weighted").estimate.value == 50
    assert found(done, "accuracy_robust", "t", "subtask", "small").estimate.value == 0
    assert found(done, "accuracy_robust", "all").estimate.value == pytest.approx(100 * (2 / 3 + 0 + 1) / 3, abs=1e-4)
    assert found(done, "accuracy_robust", "all", "question_weighted").estimate.value == 60
    # Sensitivity is not defined where nothing is there: only task u has a yes.
    assert found(done, "sensitivity", "t").estimate == (None, None, None)
    assert found(done, "sensitivity", "all").estimate.value == 100


TUMOUR = {"mc_question": "Where? A: head B: tail C: body", "choices": ["head", "tail", "body"], "letter": "B"}
FREE = [
    Question("d0", "v0", "How large?", "12.5", extra={"answer_type": "number", "subtask": "largest lesion diameter"}),
    Question(
        "d1", "v1", "Is there a lesion?", "no", extra={"answer_type": "yes-no", "subtask": "liver lesion existence"}
    ),
    Question(
        "d2", "v1", "Where?", "tail", extra={"answer_type": "text", "subtask": "largest lesion location", **TUMOUR}
    ),
]


@pytest.mark.parametrize("choices", ["shown", "hidden"])
@pytest.mark.parametrize(
    ("benchmark", "style"),
    [(name, style) for name in ("deeptumorvqa-v1", "deeptumorvqa-v2") for style in sorted(PROMPTS)]
    + [(name, style) for name in ("3d-rad", "vqa") for style in ("plain", "letters", "3d-rad")],
)
def test_the_label_itself_is_right_however_the_question_was_put(benchmark, style, choices):
    rows = put_rows(FREE if benchmark.startswith("deep") else RAD3D_QUESTIONS, style, choices)
    done = evaluate(
        benchmark, rows, {"m": [Prediction(one["id"], one["answer"]) for one in rows]}, settings=Settings(bootstrap=0)
    )
    right = (
        "accuracy_robust",
        "accuracy_normalised",
        "accuracy_strict",
        "score_v1",
        "mra_thresholds",
        "mra_linear",
        "rouge1",
    )
    scores = [score for score in done.answers[0].scores if score.metric in right]
    assert scores
    assert {(score.metric, score.estimate.value) for score in scores} == {(score.metric, 100) for score in scores}
    assert done.answers[0].unparsed == {}


def test_unparsed_responses_are_wrong_and_counted():
    rows = [row(f"q{i}", "No", YES_NO) for i in range(4)]
    done = evaluate(
        "vqa", rows, {"m": [Prediction(f"q{i}", "No" if i else "cannot say") for i in range(4)]}, settings=FEW
    )
    assert done.answers[0].unparsed == {"task": 1}
    assert found(done, "accuracy_robust", "task").estimate.value == 75


# --- intervals


def together(size, count, same):
    """Cases of `count` patients with `size` questions each, right or wrong together, under one name or many."""
    rnd = random.Random(0)
    right = [rnd.random() < 0.6 for _ in range(count)]
    return [
        case("Yes", "Yes" if right[p] else "No", YES_NO, id=f"{p:03}-{i}", patient=f"p{p}" if same else f"p{p}-{i}")
        for p in range(count)
        for i in range(size)
    ]


def widths(cases, metric):
    patients = draw_patients([one.patient for one in cases], 1000, seed=0)
    (replicated,) = [one for key, one in table_of(cases, [metric], patients).items() if key.average == "subtask"]
    low, high = interval(replicated.values)
    return high - low


def test_an_interval_of_clustered_answers_is_as_wide_as_that_of_their_patients():
    naive, clustered = widths(together(10, 60, False), ACCURACIES[0]), widths(together(10, 60, True), ACCURACIES[0])
    single = widths(together(1, 60, True), ACCURACIES[0])
    assert clustered == pytest.approx(single)
    assert clustered == pytest.approx(naive * 10**0.5, rel=0.15)
    normal = 2 * 1.96 * (0.6 * 0.4 / 60) ** 0.5
    assert clustered == pytest.approx(normal, rel=0.2)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(-2, 2)), min_size=4, max_size=25),
    st.integers(0, 99),
)
def test_every_resampled_value_is_that_of_the_patients_drawn(answers, seed):
    cases = [
        case(
            "Yes" if is_yes else "No", "Yes", YES_NO, id=str(i), patient=f"p{patient}", scores={"Yes": score, "No": 0.0}
        )
        for i, (patient, is_yes, score) in enumerate(answers)
    ]
    patients = draw_patients([one.patient for one in cases], 5, seed)
    for metric in [ACCURACIES[0], *YES_NO_METRICS]:
        values = metric.replicates(cases, patients.of([one.patient for one in cases]), patients.weights)
        for weights, value in zip(patients.weights, values, strict=True):
            again = [one for one in cases for _ in range(int(weights[patients.index[one.patient]]))]
            assert value == pytest.approx(metric.value(again), nan_ok=True)


def test_a_paired_difference_is_narrower_than_either_interval():
    rnd = random.Random(1)
    rows = [row(f"q{i}", "Yes", YES_NO, patient=f"p{i // 4}") for i in range(200)]
    first = [Prediction(one["id"], rnd.choice(YES_NO)) for one in rows]
    second = [Prediction(one.id, "Yes" if i % 20 == 0 else one.response) for i, one in enumerate(first)]
    done = evaluate("vqa", rows, {"first": first, "second": second}, settings=Settings(bootstrap=400))
    (score,) = [s for s in done.comparisons[0].scores if (s.metric, s.average) == ("accuracy_robust", "subtask")]
    right = Counter(one.response for one in first)["Yes"], Counter(one.response for one in second)["Yes"]
    assert score.estimate.value == pytest.approx((right[1] - right[0]) / 2)
    own = found(done, "accuracy_robust", "task").estimate
    assert score.estimate.high - score.estimate.low < (own.high - own.low) / 2
    assert score.estimate.low >= 0


# --- blind baselines


def csv_rows(pattern):
    for file in sorted((RAD3D / "test").glob(pattern)):
        with file.open(encoding="utf-8", newline="") as handle:
            yield file.stem, list(csv.DictReader(handle))


def letters(rows):
    return Counter(one["AnswerChoice"] for one in rows)


@pytest.fixture(scope="module")
def blind():
    return evaluate("3d-rad", rad3d_rows("test"), {}, settings=FEW)


def test_without_predictions_the_best_constant_is_scored(blind):
    assert [answers.name for answers in blind.answers] == [BLIND]
    score = found(blind, "accuracy_robust", "Static_Temporal_Diagnosis")
    assert score.estimate.value == score.baselines["best_constant"] > 0


@pytest.mark.parametrize(
    "task", ["Existence_Detection", "Static_Temporal_Diagnosis", "Longitudinal_Temporal_Diagnosis"]
)
def test_constants_on_3d_rads_rows_are_those_counted_in_its_files(blind, task):
    parts = {stem: letters(rows) for stem, rows in csv_rows(f"Task?_{task}/*.csv")}
    best, _ = sum(parts.values(), Counter()).most_common(1)[0]
    for metric in ("accuracy_robust", "accuracy_contains_letter", "accuracy_normalised", "accuracy_strict"):
        score = found(blind, metric, task)
        macro = [100 * count[best] / count.total() for count in parts.values()]
        assert score.baselines["best_constant"] == pytest.approx(sum(macro) / len(macro), abs=1e-4)
        each = [100 * max(count.values()) / count.total() for count in parts.values()]
        assert score.baselines["majority_per_subtask"] == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_text_rules_on_3d_rads_rows_are_those_counted_in_its_file(blind):
    ((_, rows),) = csv_rows("Task6_*/b.csv")
    right = Counter()
    for one in rows:
        priors = re.search(r"\[(.*?)\]", one["Question"])[1].split(", ")
        right["text_rule_last_prior"] += one["AnswerChoice"] == (
            "D" if "1" not in priors else "A" if priors[-1] == "1" else "B"
        )
        right["text_rule_any_prior"] += one["AnswerChoice"] == ("B" if "1" in priors else "D")
    score = found(blind, "accuracy_contains_letter", "Longitudinal_Temporal_Diagnosis")
    for rule, count in right.items():
        assert score.baselines[rule] == pytest.approx(100 * count / len(rows), abs=1e-4)
    assert "text_rule_last_prior" not in found(blind, "accuracy_robust", "Static_Temporal_Diagnosis").baselines


@pytest.mark.parametrize(
    ("history", "last", "any_"),
    [("0", "D", "D"), ("1", "A", "B"), ("0, 0", "D", "D"), ("1, 0", "B", "B"), ("0, 1", "A", "B")],
)
def test_text_rules_read_longer_histories(history, last, any_):
    from photon_train.evaluation.baselines import any_prior, last_prior

    choices = ("Refractory Lesion (x)", "Resolved Lesion (y)", "New Lesion (z)", "No Abnormality (w)")
    one = case(
        choices[0], "", choices, question=f"Emphysema: [{history}]. Now?", task="Longitudinal_Temporal_Diagnosis"
    )
    assert (last_prior(one), any_prior(one)) == (choices["ABCD".index(last)], choices["ABCD".index(any_)])


def test_the_question_of_a_case_is_what_the_user_asked_last_whatever_stands_before():
    one = row("q", "B", ("Old", "New"), question="Emphysema: [0, 1]. Now?\nA. Old\nB. New")
    before = [
        {"role": "system", "content": "You are a radiologist."},
        {"role": "user", "content": "<video>Is this a chest? A. yes"},
        {"role": "assistant", "content": "Yes."},
    ]
    later = {**one["messages"][0], "content": one["messages"][0]["content"].replace("<video>", "")}
    found = case_of({**one, "messages": [*before, later, one["messages"][1]]}, Prediction("q"))
    assert found == case_of(one, Prediction("q"))
    assert (found.question, found.answer) == ("Emphysema: [0, 1]. Now?\nA. Old\nB. New", "New")


def test_constants_are_learned_on_the_training_rows_where_there_are_any():
    rows = [row(f"q{i}", "Yes", YES_NO, kind="k") for i in range(3)]
    train = [row("t", "No", YES_NO, kind="other")]
    done = evaluate("vqa", rows, {"m": [Prediction(one["id"], "Yes") for one in rows]}, train=train, settings=FEW)
    score = found(done, "accuracy_robust", "task")
    assert score.baselines == {"best_constant": 0.0, "majority_per_subtask": 0.0}
    assert score.above_constant == (100.0, 100.0, 100.0)
    assert done.learned_on == "the training rows"
    assert done.constants == {"task, yes-no, choices shown": "No"}


def test_label_metrics_stand_beside_constant_labels():
    reference = LabelTable(("Nodule", "Effusion"), {f"q{i}": (int(i < 2), int(i == 0)) for i in range(5)})
    said = LabelTable(("Effusion", "Nodule"), {f"q{i}": (int(i == 0), 1) for i in range(5)})
    rows = [row(f"q{i}", "lungs are clear", kind="report") for i in range(5)]
    answers = [Prediction(one["id"], "lungs are clear") for one in rows]
    done = evaluate("report", rows, {"m": answers}, settings=Settings(bootstrap=20, labels=(reference, said)))
    score = found(done, "crg", "task")
    assert score.baselines == {"labels_all_negative": 33.3333, "labels_all_positive": 33.3333}
    assert score.estimate.value > 33.4
    assert found(done, "bleu4", "task").estimate.value == 0  # three words hold no four
    assert found(done, "rougel", "task").baselines["best_constant"] == 100
    with pytest.raises(UsageError, match="expected one file of predictions beside labels"):
        evaluate("report", rows, {"m": answers, "n": answers}, settings=Settings(labels=(reference, said)))


def test_tasks_that_the_training_rows_lack_are_learned_on_the_evaluated_ones_and_it_is_said():
    rows = [row("a", "Yes", YES_NO, task="t"), row("b", "Yes", YES_NO, task="u")]
    train = [row("c", "No", YES_NO, task="t"), row("d", "", YES_NO, task="u")]
    done = evaluate("vqa", rows, {"m": [Prediction(id, "Yes") for id in "ab"]}, train=train, settings=FEW)
    assert [found(done, "accuracy_robust", task).baselines["best_constant"] for task in "tu"] == [0, 100]
    assert done.learned_on == "the training rows, which lack u: there on the evaluated rows"


# --- what was kept, what it cost


def test_overlap_of_hand_made_sets():
    masks = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
    different = np.ones((4, 4), bool)
    different[0, 2] = False
    shared, chance, pairs = overlap_of(masks, different)
    # Pairs 01: 1/3; 03, 12, 13: 0; 23, both empty: 1; 02 does not count.
    assert (shared, pairs) == (pytest.approx(1 / 3 + 1), 5)
    assert chance == pytest.approx(1 / 3 + 1)  # 2 of 4 and 2 of 4 share 1 by chance


def test_what_was_kept_is_told_by_task_slab_and_pair():
    def one(id, volume, question, slabs):
        mask = np.zeros((4, 1, 2), bool)
        mask[slabs] = True
        said = Prediction(
            id, "Yes", volume_id=volume, visual_tokens=8, kept_tokens=int(mask.sum()), kept=pack_mask(mask.ravel())
        )
        return row(id, "Yes", YES_NO, question=question, volume_id=volume), said

    made = [
        one("a", "v", "Q1", [0, 1]),
        one("b", "v", "Q2", [1, 2]),
        one("c", "w", "Q1", [0, 1]),
        one("d", "x", "Q3", [3]),
    ]
    rows, said = zip(*made, strict=True)
    result = summarise_kept(join(rows_by_id(rows), said).cases, grid_zyx=(4, 1, 2))
    assert result.questions_on_a_volume.jaccard == pytest.approx(2 / 6)
    assert result.volumes_of_a_question.jaccard == 1
    assert result.slabs == (0.5, 0.75, 0.25, 0.25)
    assert result.mean_ratio == pytest.approx((0.5 * 3 + 0.25) / 4)
    assert result.tokens["task"]["kept_tokens"] == 3.5
    bare = evaluate("vqa", rows, {"m": [Prediction(one["id"], "Yes") for one in rows]}, settings=FEW).answers[0]
    assert bare.kept is None and bare.costs is None


def test_costs_add_up_over_stages():
    slow = Prediction("b", "Yes", seconds={"answer": 5.0}, peak_memory_mib=700)
    said = [Prediction("a", "Yes", seconds={"read": 1.0, "answer": 2.0}, peak_memory_mib=300), slow]
    result = summarise_costs(join(rows_by_id([row(id, "Yes") for id in "ab"]), said).cases)
    assert result.seconds["total"].total == 8
    assert (result.seconds["read"].mean, result.seconds["answer"].median) == (0.5, 3.5)
    assert result.questions_per_second == 2 / 8
    assert result.prefill_tflop is None
    assert result.peak_memory_mib == 700


def test_flops_fall_with_what_is_kept():
    from photon_train import PhotonConfig

    said = [Prediction("a", "Yes", visual_tokens=1000, kept_tokens=400, text_tokens=50)]
    result = summarise_costs(join(rows_by_id([row("a", "Yes")]), said).cases, PhotonConfig(stage=2))
    assert 0 < result.prefill_tflop < result.prefill_tflop_unpruned


def test_flops_of_a_volume_are_shared_by_its_questions_and_are_those_of_the_scheduler():
    from photon_train import PhotonConfig, costs

    rows = [row(id, "Yes", volume_id="v") for id in "ab"]
    config, size = PhotonConfig(stage=2), costs.prompt_size(50, 1000)
    for scheduler, kept in (("none", 1000), ("divprune", 400), ("random", 400)):
        counts = {"visual_tokens": 1000, "kept_tokens": kept, "text_tokens": 50, "scheduler": scheduler}
        said = [Prediction(id, "Yes", **counts) for id in "ab"]
        result = summarise_costs(join(rows_by_id(rows), said).cases, config)
        shared = costs.on_a_prefix(config, scheduler, size, config.patches_thw, kept, questions=2).total()
        assert result.shared_tflop == pytest.approx(shared / 2 / 1e12)
        assert result.shared_tflop_unpruned == pytest.approx(result.shared_tflop) or scheduler != "none"
        assert result.prefill_tflop > result.shared_tflop


def test_peak_memory_is_that_since_it_was_counted_anew():
    import torch

    from photon_train.costs import peak_memory_mib, reset_peak_memory

    cpu = torch.device("cpu")
    large = np.ones(40_000_000)  # 305 MiB
    assert large[-1] == 1
    with_large = peak_memory_mib(cpu)
    del large
    assert peak_memory_mib(cpu) > with_large - 50  # the system counts in parts of some MiB
    reset_peak_memory(cpu)
    assert peak_memory_mib(cpu) < with_large - 200


@pytest.mark.parametrize("benchmark", ["vqa", "deeptumorvqa-v1", "deeptumorvqa-v2", "3d-rad", "report"])
def test_every_question_is_judged_by_a_number(benchmark):
    rows = [
        row("a", "no"),
        row("b", "yes"),
        row("c", "12 mm"),
        row("d", "lungs"),
        row("e", "No", YES_NO),
        row("f", "x", ("x", "y")),
    ]
    rows.append(row("g", "2x3 mm", extra={"answer_type": "measurement"}))
    judged = (
        evaluate(benchmark, rows, {"m": [Prediction(one["id"], "no") for one in rows]}, settings=FEW)
        .answers[0]
        .scored_cases
    )
    assert [one.case.id for one in judged] == [one["id"] for one in rows]
    assert all(0 <= one.score <= 100 for one in judged)
    assert judged[0].score > 0


def test_questions_that_a_benchmark_cannot_score_are_refused():
    with pytest.raises(UsageError, match="1 that need a number, 'a' first; vqa has metrics for all"):
        evaluate("3d-rad", [row("a", "12"), row("b", "No", YES_NO)], {}, settings=FEW)


def test_all_forms_of_phantom_like_rows_are_scored_by_their_own_metrics():
    rows = [
        row("a", "yes", ("yes", "no"), kind="existence"),
        row("b", "12 mm", kind="size"),
        row("c", "upper lobe", kind="words"),
        row("d", "two", ("one", "two"), kind="count"),
    ]
    done = evaluate("vqa", rows, {"m": [Prediction(one["id"], one["answer"]) for one in rows]}, settings=FEW)
    by_metric = defaultdict(set)
    for score in done.answers[0].scores:
        if score.average == "subtask":
            by_metric[score.metric].add(score.subtask)
            # Nobody put a letter before the answer.
            assert score.estimate.value in ((0,) if score.metric == "accuracy_contains_letter" else (100, None))
    assert by_metric["accuracy_robust"] == {"existence", "count"}
    assert by_metric["mra_thresholds"] == {"size"}
    assert by_metric["bleu1"] == {"words"}
    assert by_metric["sensitivity"] == {"existence"}

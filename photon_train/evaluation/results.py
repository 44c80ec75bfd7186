"""What `evaluate` returns and both reports show: scores, costs, what was kept, by file of predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from photon_train.evaluation.cases import Case, Gaps
from photon_train.evaluation.choice_metrics import ReliabilityBin
from photon_train.evaluation.kept import Costs, Kept, MaskRecalls
from photon_train.evaluation.metric import Estimate
from photon_train.evaluation.text_metrics import LabelTable

ALL_TASKS = "all"  # the task of scores over all of them
QUESTIONS = "per_question.jsonl"  # a line per question, which later evaluations are compared with

# "subtask": of that subtask alone. Of a task: the mean of its subtasks, with equal weights ("macro_over_subtasks") or
# weighted by their numbers of questions.
Average = Literal["subtask", "macro_over_subtasks", "question_weighted"]


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    allow_partial: bool = False  # leave questions without a prediction out, and say so, instead of refusing
    bootstrap: int = 1000  # resamplings of the patients
    seed: int = 0  # of the resamplings
    labels: tuple[LabelTable, LabelTable] | None = None  # findings of the reference reports, and of the responses
    with_bertscore: bool = False  # needs the package bert-score and its weights
    grid_zyx: tuple[int, int, int] = (10, 10, 10)  # of visual tokens
    tasks: tuple[str, ...] = ()  # only questions of these; none: of all
    limit: int | None = None  # only so many questions, the first ones of the data


@dataclass(frozen=True)
class Score:
    """One number of a table, in points (0 to 100)."""

    metric: str
    task: str
    subtask: str
    average: Average
    estimate: Estimate
    questions: int
    patients: int
    baselines: dict[str, float | None] = field(default_factory=dict)  # the same metric over the same questions, by name
    above_constant: Estimate | None = None  # score minus that of the best constant answer, patients resampled together
    p_value: float | None = None  # of a difference: how often one as large comes by chance, answers swapped by patient


@dataclass(frozen=True)
class ScoredCase:
    """A case, what its response is read as (None: it means no answer), and its scores in points."""

    case: Case
    metric: str  # the first one that applies
    name_of_each: str  # of its score among `scores`
    score: float  # by this metric
    read: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)  # by every metric that scores single questions


@dataclass(frozen=True)
class Answers:
    """What became of one file of predictions."""

    name: str
    gaps: Gaps
    scores: tuple[Score, ...]
    unparsed: dict[str, int] = field(default_factory=dict)  # by task, responses that mean no answer
    scored_cases: tuple[ScoredCase, ...] = ()  # by id
    costs: Costs | None = None
    kept: Kept | None = None
    mask_recalls: MaskRecalls | None = None
    reliability: tuple[ReliabilityBin, ...] = ()  # of predictions with scores of the choices


@dataclass(frozen=True)
class Comparison:
    """second - first, patients resampled together, over the questions that both answered."""

    first: str
    second: str
    questions: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Moved:
    """How many answers of one set of predictions an edit has moved, in points, with intervals by patient."""

    predictions: str
    edit: str
    questions_of: str  # "all", or of a mirrored volume "a side", "no side"
    questions: int
    patients: int
    moved: Estimate
    expected: Estimate | None  # share that is as it should be: of a mirrored volume alone
    right_before: Estimate
    right_after: Estimate  # against the row's answer, mirrored where the volume is


@dataclass(frozen=True)
class MovedMore:
    """By how much one edit moves more answers than another, over the questions that both apply to."""

    predictions: str
    first: str
    second: str
    questions: int
    difference: Estimate


@dataclass(frozen=True)
class Counterfactuals:
    """All that edits have changed; `responses` by name of the predictions, id and edit."""

    moved: tuple[Moved, ...] = ()
    more: tuple[MovedMore, ...] = ()
    responses: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """All results."""

    benchmark: str
    settings: Settings
    questions: int
    patients: int
    answers: tuple[Answers, ...]
    comparisons: tuple[Comparison, ...]
    constants: dict[str, str]  # the best constant answer by kind of question
    learned_on: str  # the rows on which it was chosen
    is_partial: bool  # whether any file of predictions lacks questions or has others
    counterfactuals: Counterfactuals = field(
        default_factory=Counterfactuals
    )  # what edits of the volumes changed, where any were made

"""Rows and predictions -> everything there is to say about them. Reads and writes no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from photon_data.errors import UsageError
from photon_train.answering.prediction import Prediction
from photon_train.evaluation.baselines import Baseline, Kind, Learned, learn
from photon_train.evaluation.benchmarks import METRICS, anything
from photon_train.evaluation.cases import Case, Gaps, Joined, by_id, case_of, join
from photon_train.evaluation.choice_metrics import meant
from photon_train.evaluation.costs import Costs, costs
from photon_train.evaluation.kept import Kept, MaskRecalls, kept, mask_recalls
from photon_train.evaluation.metric import Metric, Patients, draw
from photon_train.evaluation.parsing import number
from photon_train.evaluation.tables import POINTS, Score, Table, differences, scores_of, table_of, table_of_baseline
from photon_train.evaluation.text_metrics import LabelTable, bertscore, constant_labels, label_metrics
from photon_train.kept_tokens import CountedMask

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig

BLIND = "blind baselines"
LABEL_BASELINES = {"labels_all_negative": 0, "labels_all_positive": 1}


@dataclass(frozen=True)
class Settings:
    """How to evaluate.

    allow_partial   leave questions without a prediction out, and say so, instead of refusing
    bootstrap       resamplings of the patients; seed: of them
    labels          findings of the reference reports and of the responses, for the benchmark "report"
    with_bertscore  needs the package bert-score and its weights
    grid_zyx        of visual tokens, for the share that is kept of each slab
    """

    allow_partial: bool = False
    bootstrap: int = 1000
    seed: int = 0
    labels: tuple[LabelTable, LabelTable] | None = None
    with_bertscore: bool = False
    grid_zyx: tuple[int, int, int] = (10, 10, 10)


@dataclass(frozen=True)
class Judged:
    """A case and its score by the first metric that applies to it, in points."""

    case: Case
    metric: str
    score: float


@dataclass(frozen=True)
class Answers:
    """What became of one file of predictions.

    unparsed    by task, how many responses mean no choice, no yes or no, no number; they count as wrong
    judged      every case, by id
    """

    name: str
    gaps: Gaps
    scores: tuple[Score, ...]
    unparsed: dict[str, int]
    judged: tuple[Judged, ...]
    costs: Costs | None
    kept: Kept | None
    mask_recalls: MaskRecalls | None = None


@dataclass(frozen=True)
class Comparison:
    """second - first, patients resampled together, over the questions that both answered."""

    first: str
    second: str
    questions: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Evaluation:
    """All results. `constants`: the best constant answer by kind of question; `learned_on`: where it was chosen."""

    benchmark: str
    settings: Settings
    questions: int
    patients: int
    answers: tuple[Answers, ...]
    comparisons: tuple[Comparison, ...]
    constants: dict[str, str]
    learned_on: str

    @property
    def is_partial(self) -> bool:
        """Whether any file of predictions lacks questions or has others."""
        return any(answers.gaps for answers in self.answers)


def evaluate(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    predictions: Mapping[str, Iterable[Prediction]],
    *,
    train: Sequence[Mapping[str, Any]] = (),
    settings: Settings | None = None,
    config: PhotonConfig | None = None,
    masks: Mapping[str, Sequence[CountedMask]] | None = None,
) -> Evaluation:
    """Return the scores of each named set of predictions of the rows, and of each later set against the first.

    `benchmark` is a key of METRICS. Rows are a manifest's; `train` those that constant answers are chosen on (the evaluated
    ones where there are none). `config` is the model's, to count FLOPs; `masks` those of volumes,
    by id, to see what was kept of them. Without any predictions, only the blind baselines are
    scored, under the name BLIND. The same rows and predictions, in whatever order, give the same result. UsageError for
    predictions that do not match the rows (see `joining.join`), an unknown benchmark, rows without
    answers, and rows that the benchmark has no metric for.
    """
    settings = settings or Settings()
    metrics = _metrics(benchmark, settings)
    if settings.labels and len(predictions) > 1:
        raise UsageError(f"one file of predictions wanted beside labels of its responses, got {len(predictions)}")
    asked = by_id(rows)
    joined = {name: join(rows, given, allow_partial=settings.allow_partial) for name, given in predictions.items()}
    everything = [case_of(asked[id], Prediction(id)) for id in sorted(asked)]
    _check_scored(benchmark, everything, metrics)
    training = [case_of(row, Prediction(row["id"])) for row in sorted(train, key=lambda row: row["id"]) if row["answer"]]
    learned = learn(training, everything, metrics)
    patients = draw([case.patient for case in everything], settings.bootstrap, settings.seed)
    answers = [
        _answers(name, one, metrics, learned.baselines, patients, settings, config, masks or {}) for name, one in joined.items()
    ]
    first, *others = joined or [""]
    return Evaluation(
        benchmark=benchmark,
        settings=settings,
        questions=len(everything),
        patients=len(patients.index),
        answers=tuple(answers or [_blind_alone(everything, metrics, learned.baselines, patients, settings)]),
        comparisons=tuple(_compare((first, joined[first]), (name, joined[name]), metrics, patients) for name in others),
        constants={_words(kind): constant.answer for kind, constant in sorted(learned.constants.items())},
        learned_on=_learned_on(learned) if training else "the evaluated rows themselves",
    )


def check(benchmark: str, rows: Sequence[Mapping[str, Any]], settings: Settings) -> None:
    """UsageError for what `evaluate` would refuse whatever the predictions are: worth knowing before a model makes them."""
    _metrics(benchmark, settings)
    by_id(rows)


def _metrics(benchmark: str, settings: Settings) -> list[Metric]:
    if benchmark not in METRICS:
        raise UsageError(f"one of {', '.join(METRICS)} wanted as benchmark, got {benchmark!r}")
    extra = label_metrics(*settings.labels) if settings.labels else []
    return [*METRICS[benchmark](), *extra, *([bertscore(anything)] if settings.with_bertscore else [])]


def _check_scored(benchmark: str, cases: Sequence[Case], metrics: Sequence[Metric]) -> None:
    without = [case for case in cases if not any(metric.applies(case) for metric in metrics)]
    if without:
        found = f"{len(without)} that want a {without[0].form}, {without[0].id!r} first"
        raise UsageError(f"questions that {benchmark} has metrics for wanted, got {found}; vqa has metrics for all")


def _answers(
    name: str,
    joined: Joined,
    metrics: Sequence[Metric],
    blind: Sequence[Baseline],
    patients: Patients,
    settings: Settings,
    config: PhotonConfig | None,
    masks: Mapping[str, Sequence[CountedMask]],
) -> Answers:
    cases = joined.cases
    scores = scores_of(table_of(cases, metrics, patients), _blind_tables(cases, metrics, blind, patients, settings))
    judged = tuple(_judged(cases, metrics))
    return Answers(
        name=name,
        gaps=joined.gaps,
        scores=tuple(scores),
        unparsed=dict(sorted(Counter(case.task for case in cases if is_unparsed(case)).items())),
        judged=judged,
        costs=costs(cases, config),
        kept=kept(cases, settings.grid_zyx),
        mask_recalls=mask_recalls(cases, masks, patients) if masks else None,
    )


def _blind_tables(
    cases: Sequence[Case], metrics: Sequence[Metric], blind: Sequence[Baseline], patients: Patients, settings: Settings
) -> dict[str, Table]:
    words = [metric for metric in metrics if metric.of_words]
    tables = {baseline.name: table_of_baseline(cases, baseline, words, patients) for baseline in blind}
    if settings.labels:
        reference, said = settings.labels
        for name, value in LABEL_BASELINES.items():
            tables[name] = table_of(cases, label_metrics(reference, constant_labels(said, value)), patients)
    return tables


def _blind_alone(
    cases: Sequence[Case], metrics: Sequence[Metric], blind: Sequence[Baseline], patients: Patients, settings: Settings
) -> Answers:
    """Return the best constant answers as if a model had given them."""
    tables = _blind_tables(cases, metrics, blind, patients, settings)
    scores = scores_of(tables[blind[0].name], tables)
    return Answers(BLIND, Gaps(len(cases)), tuple(scores), {}, (), None, None)


def is_unparsed(case: Case) -> bool:
    """Tell whether a response means no answer of the wanted form; words always mean something."""
    if case.closed or case.form == "yes-no":
        return meant(case) is None
    return case.form == "number" and number(case.response) is None


def _judged(cases: Sequence[Case], metrics: Sequence[Metric]) -> Iterable[Judged]:
    for case in cases:
        metric = next((metric for metric in metrics if metric.applies(case)), None)
        if metric is not None:
            yield Judged(case, metric.name, round(POINTS * float(metric.of_sums(metric.observe([case]))[0]), 4))


def _compare(first: tuple[str, Joined], second: tuple[str, Joined], metrics: Sequence[Metric], patients: Patients) -> Comparison:
    both = {case.id for case in first[1].cases} & {case.id for case in second[1].cases}
    tables = [table_of([case for case in one.cases if case.id in both], metrics, patients) for _, one in (first, second)]
    return Comparison(first[0], second[0], len(both), tuple(differences(*tables)))


def _learned_on(learned: Learned) -> str:
    rest = ", ".join(sorted({kind.task for kind in learned.not_in_training}))
    return "the training rows" + (f", which lack {rest}: there on the evaluated rows" if rest else "")


def _words(kind: Kind) -> str:
    return f"{kind.task}, {kind.form}, {'choices shown' if kind.closed else 'open'}"

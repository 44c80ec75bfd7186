import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_data.errors import UsageError
from photon_train import PhotonConfig
from photon_train.rows import TrainRow, prefix_of, read_train_rows
from photon_train.training.config import TrainConfig, s2
from photon_train.training.plan import check_shares, cost, group_rows, plan_epoch, steps_per_epoch
from photon_train.training.setup import set_curriculum


def make_rows(counts):
    """counts[v] rows on volume v; None: a row without a volume."""
    found = []
    for volume, count in enumerate(counts):
        for i in range(abs(count)):
            videos = (f"v{volume}",) if count > 0 else ()
            found.append(TrainRow(f"{volume}-{i}", videos, [{"role": "user", "content": "q" * (i + 1)}], videos))
    return found


skewed = st.lists(st.integers(-3, 41).filter(bool), min_size=1, max_size=12)


def planned(rows, epoch=0, processes=1, **settings):
    return plan_epoch(rows, TrainConfig(**settings), epoch, processes)


by_groups = st.fixed_dictionaries({"groups_per_step": st.integers(1, 8), "questions_per_volume": st.integers(1, 9)})
by_questions = st.fixed_dictionaries(
    {"questions_per_step": st.integers(1, 20), "questions_per_volume": st.integers(1, 9)}
)


@settings(deadline=None)
@given(skewed, by_groups | by_questions, st.integers(1, 4), st.integers(0, 3))
def test_every_row_is_in_one_group_of_an_epoch_and_only_there(counts, size, processes, epoch):
    rows, config = make_rows(counts), TrainConfig(**size, seed=3)
    steps = plan_epoch(rows, config, epoch, processes)
    counted = Counter(index for step in steps for group in step if group.weight > 0 for index in group.rows)
    assert counted == Counter(range(len(rows)))
    assert all(step[0].weight > 0 and len(step) % processes == 0 for step in steps)
    assert len(steps) == steps_per_epoch(rows, config)
    assert all(len(group.rows) <= size["questions_per_volume"] for step in steps for group in step)
    assert all(len({rows[index].videos for index in group.rows}) == 1 for step in steps for group in step)
    assert all(sum(group.weight for group in step) == pytest.approx(len(step)) for step in steps)
    alone = plan_epoch(rows, config, epoch)
    assert [[g.rows for g in step if g.weight] for step in steps] == [[g.rows for g in step] for step in alone]


@pytest.mark.parametrize("questions_per_volume", [1, 2, 5, 8, 40])
@pytest.mark.parametrize("counts", [[10] * 200, [1] * 2000, [1, 3, 30, 6] * 50])  # 2000 questions in all
def test_a_step_is_of_16_questions_however_many_a_volume_has(counts, questions_per_volume):
    rows = make_rows(counts)
    steps = planned(rows, questions_per_volume=questions_per_volume)
    assert len(steps) == 125  # 2000 / 16
    sizes = [sum(len(group.rows) for group in step) for step in steps]
    assert max(abs(size - 16) for size in sizes) <= max(min(questions_per_volume, max(counts), 16) - 1, 0)


def test_a_question_counts_alike_in_groups_of_any_size():
    step, *more = planned(make_rows([6, 3, 1]), questions_per_step=10)
    assert not more
    assert {len(group.rows): group.weight for group in step} == pytest.approx({6: 1.8, 3: 0.9, 1: 0.3})
    step = planned(make_rows([6, 3, 1]), questions_per_step=10, processes=2)[0]
    assert [group.weight for group in step[3:]] == [0.0]
    assert {len(group.rows): group.weight for group in step[:3]} == pytest.approx({6: 2.4, 3: 1.2, 1: 0.4})


@pytest.mark.parametrize("questions_per_volume", [1, 8])
def test_the_published_run_makes_its_steps_and_phases_at_the_questions_they_were_published_for(questions_per_volume):
    """14,000 volumes of 10 questions, 3 epochs: a step of 16 for each 16 questions, whatever shares a volume."""
    rows, config = make_rows([10] * 14_000), replace(s2(), questions_per_volume=questions_per_volume)
    steps, photon = steps_per_epoch(rows, config), PhotonConfig(stage=2)
    set_curriculum(photon, config, len(rows) / steps, steps * config.epochs, {})
    assert steps * config.epochs == 26_250
    assert (photon.soft_start, photon.hard_start, photon.flip_start) == (2000, 4000, 4500)
    wide = replace(config, questions_per_step=32)
    set_curriculum(photon, wide, len(rows) / steps_per_epoch(rows, wide), 13_125, {})
    assert (photon.soft_start, photon.hard_start, photon.flip_start) == (1000, 2000, 2250)


def test_a_run_that_would_end_before_tokens_are_dropped_is_refused():
    with pytest.raises(UsageError, match=r"found soft from step 2000, hard from 4000, flip from 4500, of 4000; set sh"):
        set_curriculum(PhotonConfig(stage=2), s2(), 16.0, 4000, {})
    set_curriculum(PhotonConfig(stage=2), s2(), 16.0, 4001, {})
    shares = {"soft_start": 0.1, "hard_start": 0.5, "flip_start": 0.3}
    with pytest.raises(UsageError, match=r"in the order soft, hard, flip, found soft from step 1, hard from 5"):
        set_curriculum(PhotonConfig(stage=2, **shares), replace(s2(), photon=shares), 16.0, 10, {})


def test_processes_that_most_steps_have_no_group_for_are_refused_with_what_to_set():
    rows, config = make_rows([10] * 64), s2()  # 128 groups of 5 questions in 40 steps
    check_shares(config, rows, steps_per_epoch(rows, config), 3)
    with pytest.raises(
        UsageError, match=r"each of the 8 processes, found 128 in 40 steps .*; set questions_per_volume=2"
    ):
        check_shares(config, rows, steps_per_epoch(rows, config), 8)
    fewer = replace(config, questions_per_volume=2)
    check_shares(fewer, rows, steps_per_epoch(rows, fewer), 8)


def test_41_questions_on_one_volume_travel_in_groups_as_even_as_can_be():
    groups = group_rows(make_rows([41]), 8)
    assert sorted(len(group) for group in groups) == [6, 7, 7, 7, 7, 7]


def test_an_epoch_is_the_same_again_and_another_epoch_or_seed_is_not():
    rows = make_rows([5, 1, 2, 7, 3, 1, 1, 9, 2, 2])
    plan = planned(rows, groups_per_step=2, seed=1)
    assert plan == planned(rows, groups_per_step=2, seed=1)
    assert plan != planned(rows, groups_per_step=2, seed=1, epoch=1)
    assert plan != planned(rows, groups_per_step=2, seed=2)


def chat(*turns, videos=("a",)):
    return {"videos": list(videos), "messages": [{"role": role, "content": content} for role, content in turns]}


def test_rows_share_a_prefix_when_volumes_and_text_before_the_last_of_them_are_the_same():
    first = chat(("user", "<video>Is it well?"), ("assistant", "yes"))
    second = chat(("user", "<video>How large is it?"))
    others = [
        chat(("system", "Be brief."), ("user", "<video>Is it well?")),
        chat(("user", "Look: <video>Is it well?")),
        chat(("user", "<video>Is it well?"), videos=("b",)),
        chat(("user", "<video><video>Is it well?"), videos=("a", "a")),
        chat(("user", "<video>Is it well?"), ("assistant", "yes"), ("user", "<video>And now?"), videos=("a", "b")),
    ]
    assert prefix_of(first) == prefix_of(second)
    assert len({prefix_of(row) for row in (first, *others)}) == 6
    scan = object()  # in memory
    assert prefix_of(chat(("user", "<video>a"), videos=(scan,))) == prefix_of(
        chat(("user", "<video>b"), videos=(scan,))
    )
    assert prefix_of(chat(("user", "<video>a"), videos=(scan,))) != prefix_of(
        chat(("user", "<video>a"), videos=(object(),))
    )
    text = chat(("system", "Be brief."), ("user", "What is a CT?"), videos=())
    assert prefix_of(text) == prefix_of(chat(("user", "What is an MR?"), videos=()))


def test_rows_of_another_prefix_and_rows_with_an_early_answer_are_computed_alone(tmp_path):
    early = (("user", "<video>Is it well?"), ("assistant", "yes"), ("user", "<video>And now?"), ("assistant", "no"))
    late = (("user", "<video>Is it well?"), ("assistant", "yes"))
    rows = [chat(*late), chat(*late), chat(("system", "Be brief."), *late)] + [chat(*early, videos=("a", "b"))] * 2
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(rows)))
    assert sorted(group_rows(read_train_rows([manifest]), 8)) == [(0, 1), (2,), (3,), (4,)]


def test_answers_do_not_decide_which_volumes_share_a_step():
    """Were groups sorted by their exact length, a step would hold "yes" or "no" alone."""

    def answered(volume):
        answer = "yes" if volume % 2 else "no"
        return [{"role": "user", "content": "<video>Is it?"}, {"role": "assistant", "content": answer}]

    rows = [TrainRow(f"{v}", (f"v{v}",), answered(v), v) for v in range(256)]
    mixed = [
        len({index % 2 for group in step for index in group.rows}) == 2 for step in planned(rows, groups_per_step=8)
    ]
    assert sum(mixed) > 0.9 * len(mixed)  # of eight fair draws all are alike once in 128


def test_the_groups_of_a_step_cost_about_the_same():
    rows = make_rows([1, 30, 2, 25, 1, 28, 3, 33] * 8)
    steps = planned(rows, questions_per_volume=40, groups_per_step=4)
    spreads = [max(costs) / min(costs) for step in steps if (costs := [cost(rows, group.rows) for group in step])]
    assert sorted(spreads)[len(spreads) // 2] < 1.25

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon_train.rows import TrainRow, prefix_of, read_train_rows
from photon_train.training.batches import cost, group_rows, plan_epoch, steps_per_epoch


def make_rows(counts):
    """counts[v] rows on volume v; None: a row without a volume."""
    found = []
    for volume, count in enumerate(counts):
        for i in range(abs(count)):
            videos = (f"v{volume}",) if count > 0 else ()
            found.append(TrainRow(f"{volume}-{i}", videos, [{"role": "user", "content": "q" * (i + 1)}], videos))
    return found


skewed = st.lists(st.integers(-3, 41).filter(bool), min_size=1, max_size=12)


@settings(deadline=None)
@given(skewed, st.integers(1, 9), st.integers(1, 8), st.integers(0, 3))
def test_every_row_is_in_one_group_of_an_epoch_and_only_there(counts, questions, slots, epoch):
    rows = make_rows(counts)
    steps = plan_epoch(rows, questions, slots, seed=3, epoch=epoch)
    counted = Counter(index for step in steps for group in step if group.weight > 0 for index in group.rows)
    assert counted == Counter(range(len(rows)))
    assert all(len(step) == slots for step in steps)
    assert len(steps) == steps_per_epoch(rows, questions, slots)
    assert all(len(group.rows) <= questions for step in steps for group in step)
    assert all(len({rows[index].videos for index in group.rows}) == 1 for step in steps for group in step)


@settings(deadline=None)
@given(skewed, st.integers(1, 8))
def test_the_weights_of_a_step_add_up_to_its_slots_also_when_it_was_filled_up(counts, slots):
    for step in plan_epoch(make_rows(counts), 4, slots, seed=0, epoch=0):
        assert sum(group.weight for group in step) == pytest.approx(slots)


def test_41_questions_on_one_volume_travel_in_groups_as_even_as_can_be():
    groups = group_rows(make_rows([41]), 8)
    assert sorted(len(group) for group in groups) == [6, 7, 7, 7, 7, 7]


def test_an_epoch_is_the_same_again_and_another_epoch_or_seed_is_not():
    rows = make_rows([5, 1, 2, 7, 3, 1, 1, 9, 2, 2])
    plan = plan_epoch(rows, 4, 2, seed=1, epoch=0)
    assert plan == plan_epoch(rows, 4, 2, seed=1, epoch=0)
    assert plan != plan_epoch(rows, 4, 2, seed=1, epoch=1)
    assert plan != plan_epoch(rows, 4, 2, seed=2, epoch=0)


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
        len({index % 2 for group in step for index in group.rows}) == 2
        for step in plan_epoch(rows, 4, 8, seed=0, epoch=0)
    ]
    assert sum(mixed) > 0.9 * len(mixed)  # of eight fair draws all are alike once in 128


def test_the_groups_of_a_step_cost_about_the_same():
    rows = make_rows([1, 30, 2, 25, 1, 28, 3, 33] * 8)
    steps = plan_epoch(rows, 40, 4, seed=0, epoch=0)
    spreads = [max(costs) / min(costs) for step in steps if (costs := [cost(rows, group.rows) for group in step])]
    assert sorted(spreads)[len(spreads) // 2] < 1.25

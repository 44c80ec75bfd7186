"""Questions on different volumes in one batch: each is answered as it would be alone, and what fails costs itself."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from askable import QUESTIONS, SHORT, blocks, predictor, row, store
from torch.utils._python_dispatch import TorchDispatchMode

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_train import pruners
from photon_train.answering.generation import AnswerSettings
from photon_train.answering.manifest import Shard, predict_rows, wait_for_parts
from photon_train.answering.predictor import settings_of
from photon_train.answering.request import (
    RequestGroup,
    answer_ids,
    batches_of,
    group_rows,
    reading_ahead,
    texts_of_choices,
)
from photon_train.pruners import SCHEDULERS
from photon_train.rows import plain_row, read_predictions

MIXED = replace(SHORT, choices=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Four volumes: some with one question, one with three; with choices and without, of one volume, two and none."""
    places = [store(tmp_path_factory.mktemp("data"), f"v{i}", i) for i in range(4)]
    return [
        row("a", QUESTIONS[0], places[0]),
        row("b", QUESTIONS[1], places[0], choices=["left", "right", "the lower lobe of the left lung"]),
        row("c", QUESTIONS[2], places[0]),
        row("d", QUESTIONS[1], places[1]),
        row("e", QUESTIONS[3], places[2], choices=["yes", "no"]),
        row("f", QUESTIONS[0], places[3], system="Answer in one word, whatever you are asked."),
        row("g", QUESTIONS[0], places[1], places[3]),
        row("h", "What is a nodule?"),
    ]


def answers(model, rows, path: Path):
    predict_rows(model, rows, path)
    return {p.id: p for p in read_predictions(path)}


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_a_row_does_not_depend_on_its_batch_mates(model_dir, rows, tmp_path, scheduler):
    model = predictor(model_dir, MIXED, scheduler=scheduler)
    alone = {}
    for one in rows:
        alone |= answers(model, [one], tmp_path / f"{one['id']}.jsonl")
    for size in (3, 16):
        model.batch = size
        together = answers(model, rows, tmp_path / f"{size}.jsonl")
        assert together.keys() == alone.keys()
        for id, found in together.items():
            assert (found.response, found.kept, found.error) == (alone[id].response, alone[id].kept, ""), (id, size)
            assert found.token_logprobs == pytest.approx(alone[id].token_logprobs, abs=2e-4), (id, size)
            assert found.choice_scores == pytest.approx(alone[id].choice_scores, abs=2e-4), (id, size)
    assert len({p.response for p in alone.values()}) > 3


def test_volumes_of_a_batch_are_encoded_in_one_pass_each_once(model, rows, tmp_path):
    passes = []
    model.model.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    assert predict_rows(model, rows, tmp_path / "p.jsonl").failed == {}
    # 0, 1 and 2 together, the one behind a longer text, and the pair
    assert sorted(passes) == [1, 2, 3]
    assert model.encodings == 5


class Counted(TorchDispatchMode):
    """Counts the operations that torch starts."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_sixteen_volumes_in_a_batch_start_less_than_an_eighth_of_the_operations_of_one_at_a_time(model, tmp_path):
    volumes = [blocks(seed) for seed in range(16)]
    rows = [row(f"{i}", QUESTIONS[0], volume) for i, volume in enumerate(volumes)]
    model.model.generation_config.eos_token_id = []  # all answers are equally long
    counts = {}
    for model.batch in (1, 16):
        with Counted() as counted:
            assert predict_rows(model, rows, tmp_path / f"{model.batch}.jsonl").failed == {}
        counts[model.batch] = counted.count
    assert counts[16] < counts[1] / 8


def test_what_is_drawn_depends_on_the_row_and_the_seed_alone_however_many_samples(model_dir, rows, tmp_path):
    settings = replace(SHORT, sample=True, temperature=2.0, top_p=0.9, seed=3)
    one = answers(predictor(model_dir, settings), rows[:4], tmp_path / "one.jsonl")
    many = answers(predictor(model_dir, replace(settings, samples=3)), rows[:6], tmp_path / "many.jsonl")
    other = answers(predictor(model_dir, replace(settings, seed=4)), rows[:4], tmp_path / "other.jsonl")
    assert all(many[id].response == many[id].samples[0] == p.response for id, p in one.items())
    assert all(len(p.samples) == 3 for p in many.values()) and any(len(set(p.samples)) == 3 for p in many.values())
    assert [p.response for p in other.values()] != [p.response for p in one.values()]


def test_tokens_have_the_probabilities_of_the_models_own_logits(model, rows, tmp_path):
    found = answers(model, [rows[0], rows[3], rows[6], rows[7]], tmp_path / "p.jsonl")
    for one in (rows[0], rows[6], rows[7]):
        inputs = model.processor(rows=[one])
        options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False, "max_new_tokens": 6}
        out = model.model.generate(**inputs, **options)
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logs = [float(x[0].log_softmax(-1)[n]) for x, n in zip(out.logits, tokens, strict=True)]
        assert found[one["id"]].token_logprobs == pytest.approx(logs, abs=1e-3)


def test_scores_per_token_are_the_scores_divided_by_the_tokens_of_each_choice(model_dir, rows, tmp_path):
    model = predictor(model_dir, MIXED)
    found = answers(model, [rows[1]], tmp_path / "p.jsonl")["b"]
    (group,), _ = group_rows([rows[1]], model.processor)
    for choice, score in found.choice_scores.items():
        tokens = len(answer_ids(group.requests[0], choice, model.processor))
        assert found.choice_scores_per_token[choice] == pytest.approx(score / tokens)
    assert sum(found.token_logprobs) == pytest.approx(found.choice_scores[found.response], abs=1e-3)


def test_volumes_of_which_other_numbers_of_tokens_are_kept_are_encoded_once_each(model_dir, tmp_path, monkeypatch):
    def as_many_as_it_needs(context):
        number = 20 + int(context.tokens_VD.double().abs().sum() * 1e4) % 80
        return pruners.Choice(pruners._top(context.received_V, number), context.received_V, context.tokens_VD)

    monkeypatch.setitem(pruners.CHOOSERS, "nucleus", as_many_as_it_needs)
    rows = [row(f"{i}{k}", QUESTIONS[k], store(tmp_path, f"v{i}", i)) for i in range(3) for k in range(3)]
    alone = answers(predictor(model_dir, scheduler="nucleus", batch=1), rows, tmp_path / "alone.jsonl")
    assert len({p.kept_tokens for p in alone.values()}) == 3
    model, passes = predictor(model_dir, scheduler="nucleus", batch=2), []
    model.model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    together = answers(model, rows, tmp_path / "together.jsonl")
    assert len(passes) == 3
    assert {id: (p.response, p.kept) for id, p in together.items()} == {
        id: (p.response, p.kept) for id, p in alone.items()
    }


def test_memory_that_does_not_suffice_halves_the_batch_and_the_run_goes_on(model, rows, tmp_path):
    expected = answers(model, rows, tmp_path / "expected.jsonl")
    tried = []

    def limited(module, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model.model.register_forward_pre_hook(limited, with_kwargs=True)
    outcome = predict_rows(model, rows, tmp_path / "p.jsonl")
    assert (outcome.failed, outcome.batch, model.batch) == ({}, 2, 2)
    assert [n for n in tried if n > 2] == [5, 3]  # never again so many
    found = {p.id: p.response for p in read_predictions(tmp_path / "p.jsonl")}
    assert found == {id: p.response for id, p in expected.items()}


def test_a_volume_that_cannot_be_read_costs_its_own_questions_in_a_shared_batch(model, rows, tmp_path):
    lost = row("lost", QUESTIONS[0], str(tmp_path / "nowhere.ome.zarr"))
    found = answers(model, [*rows, lost], tmp_path / "p.jsonl")
    assert [p.id for p in found.values() if p.error] == ["lost"]


def test_a_row_whose_logits_are_not_finite_has_no_answer_and_its_batch_mates_have_theirs(model_dir, rows, tmp_path):
    rows = [rows[i] for i in (0, 2, 3)]
    expected = answers(predictor(model_dir), rows, tmp_path / "expected.jsonl")
    for settings in (SHORT, replace(SHORT, sample=True)):
        model = predictor(model_dir, settings)

        def diverged(module, args, logits):
            if len(logits) == 3:  # a, c and d; halves would be tried of a batch that fails
                logits[2] = math.nan
            return logits

        model.model.lm_head.register_forward_hook(diverged)
        path = tmp_path / f"{settings.sample}.jsonl"
        assert list(predict_rows(model, rows, path).failed) == ["d"]
        found = {p.id: p for p in read_predictions(path)}
        assert found["d"].response == "" and "finite" in found["d"].error
        assert settings.sample or all(found[id].response == expected[id].response for id in "ac")


def test_a_row_of_which_one_sample_has_logits_that_are_not_finite_has_no_answer(model_dir, rows, tmp_path):
    model = predictor(model_dir, replace(SHORT, sample=True, samples=3))

    def diverged(module, args, logits):
        logits[-1] = math.nan
        return logits

    model.model.lm_head.register_forward_hook(diverged)
    (found,) = answers(model, rows[:1], tmp_path / "p.jsonl").values()
    assert (found.response, found.samples) == ("", []) and "finite" in found.error


def test_lines_are_in_the_order_of_their_ids_whatever_the_order_of_answers(model, rows, tmp_path):
    predict_rows(model, rows[4:], tmp_path / "p.jsonl")
    predict_rows(model, rows[::-1], tmp_path / "p.jsonl")
    assert [json.loads(line)["id"] for line in (tmp_path / "p.jsonl").open()] == list("abcdefgh")


def test_another_chat_template_or_tokenizer_is_another_setting(model_dir):
    model = predictor(model_dir)
    before = settings_of(model)
    model.processor.tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=5)
    assert settings_of(model) == before  # how it was last called is no setting
    model.processor.tokenizer.chat_template += " "
    assert {k for k, v in settings_of(model).items() if v != before[k]} == {"template"}


def test_a_store_that_was_prepared_by_another_recipe_is_asked_again(model, tmp_path):
    place = store(tmp_path, "v0", 0)
    rows = [row("a", QUESTIONS[0], place), row("t", "What is a nodule?")]
    first = answers(model, rows, tmp_path / "p.jsonl")
    digest = json.loads((Path(place) / "zarr.json").read_text())["attributes"]["photon"]["digest"]
    assert (first["a"].recipe, first["t"].recipe) == (digest, "")
    path = tmp_path / "p.jsonl"
    path.write_text(path.read_text().replace(digest, "0" * 16))
    again = predict_rows(model, rows, path)
    assert (again.answered, again.before, again.changed) == (1, 1, 1)
    assert {p.id: p.recipe for p in read_predictions(path)} == {"a": digest, "t": ""}


@pytest.mark.parametrize(
    ("answer", "prompt", "said"),
    [
        ("No", "Is it?", ("Yes", "No")),
        ("B", "Is it? A. Yes B. No", ("A", "B")),
        ("B. No", "Is it?\nChoices: A. Yes B. No\nAnswer:", ("A. Yes", "B. No")),
        ("", "A. Yes B. No\nAnswer with ONLY the single letter (A or B).", ("A", "B")),
        ("", "Is it?\nChoices: A. Yes B. No C. - D. -\nAnswer:", ("A. Yes", "B. No")),
        ("", "Is it?\nA. Yes\nB. No", ("Yes", "No")),
        ("something else", "Which letter?", ("Yes", "No")),
    ],
)
def test_a_choice_is_scored_in_the_form_that_the_prompt_asks_for(answer, prompt, said):
    one = row("r", prompt, choices=["Yes", "No"])
    assert texts_of_choices({**one, "answer": answer}) == dict(zip(("Yes", "No"), said, strict=True))


def test_more_choices_than_letters_are_refused_where_letters_are_asked_for():
    choices = [f"segment {n}" for n in range(27)]
    assert len(texts_of_choices(row("r", "Which?", choices=choices))) == 27
    with pytest.raises(UsageError, match="r: expected at most 26 choices"):
        texts_of_choices(row("r", "Say its letter.", choices=choices))


def test_a_row_of_ms_swift_alone_is_read_as_ours(model):
    parts = [{"type": "video", "video": "v.ome.zarr"}, {"type": "text", "text": "Where?"}]
    made = plain_row({"messages": [{"role": "user", "content": parts}]}, "test-4")
    assert (made["id"], made["videos"]) == ("test-4", ["v.ome.zarr"])
    assert made["messages"] == [{"role": "user", "content": "<video>Where?"}]
    assert plain_row({"id": "x", "messages": [], "videos": "v.ome.zarr"}, "test-1")["videos"] == ["v.ome.zarr"]
    odd = plain_row({"messages": [{"role": "user", "content": [{"type": "image"}]}], "videos": []}, "test-5")
    _, problems = group_rows([odd], model.processor)
    assert "image" in problems["test-5"]


def test_batches_hold_groups_of_one_shape_and_take_the_size_that_is_said_last():
    def group(name, start, count):
        return RequestGroup((name,), [_Asked(f"{name}{i}", start) for i in range(count)])

    groups, size = [group("a", 9, 1), group("b", 9, 3), group("c", 9, 2), group("d", 7, 1)], [4]
    found = batches_of(groups, lambda: size[0])
    assert [asked.request.id for asked in next(found)] == ["a0", "b0", "b1", "b2"]
    size[0] = 1
    assert [[asked.request.id for asked in batch] for batch in found] == [["c0"], ["c1"], ["d0"]]


class _Asked:
    def __init__(self, id, start):
        self.id, self.start = id, start


def test_volumes_are_read_before_they_are_needed_and_errors_come_when_they_are():
    def read(place):
        if place == 2:
            raise OSError("gone")
        started.append(place)
        return place

    started: list[int] = []
    with reading_ahead(read, 1) as ahead:
        ahead.ask([0, 1, 2])
        assert ahead.get(1) == 1
        assert started == [0, 1]  # in the order in which they were asked for
        with pytest.raises(OSError, match="gone"):
            ahead.get(2)
        assert ahead.get(7) == 7  # nobody asked for it


def test_waiting_for_other_parts_ends_when_every_row_has_a_line(model, rows, tmp_path):
    predict_rows(model, rows[-1:], tmp_path / "p.jsonl")
    wait_for_parts(tmp_path / "p.jsonl", rows[-1:])
    assert Location(str(tmp_path)).read("p.jsonl")


def test_a_part_that_is_done_does_not_take_what_others_have_to_answer_again_for_their_answers(model, tmp_path):
    rows = [row(str(i), QUESTIONS[0], store(tmp_path, f"v{i}", i)) for i in range(12)]
    path = tmp_path / "p.jsonl"
    own, other = Shard(0, 2), Shard(1, 2)
    groups, _ = group_rows(rows, model.processor)
    theirs = {group.requests[0].id for group in groups if other.holds(group)}
    assert 0 < len(theirs) < 12  # by their paths: of fewer volumes, one part might have all
    predict_rows(model, rows, path)
    digest = read_predictions(path)[0].recipe
    path.write_text(path.read_text().replace(digest, "0" * 16))  # prepared again since
    outcome = predict_rows(model, rows, path, own)
    assert not outcome.merged
    assert not theirs & {p.id for p in read_predictions(path)}
    assert predict_rows(model, rows, path, other).merged
    assert {p.recipe for p in read_predictions(path)} == {digest}


def test_settings_that_are_not_said_leave_nothing_to_the_models_own_generation_config(model_dir, rows, tmp_path):
    model, plain = predictor(model_dir, AnswerSettings(max_new_tokens=6)), predictor(model_dir)
    for name, value in {"num_beams": 4, "repetition_penalty": 3.0, "do_sample": True, "min_length": 9}.items():
        setattr(model.model.generation_config, name, value)
    made = answers(model, rows[:2], tmp_path / "a.jsonl")
    assert {p.response for p in made.values()} == {
        p.response for p in answers(plain, rows[:2], tmp_path / "b.jsonl").values()
    }

"""A file of predictions: one line per row whatever happens on the way."""

import fcntl
import json
from dataclasses import replace

import pytest
from answers import put
from askable import QUESTIONS, SHORT, predictor, row, store

from photon_data.errors import UsageError
from photon_train.answering.manifest import Shard, predict_rows
from photon_train.rows import question_digest, read_predictions, read_rows


@pytest.fixture
def rows(tmp_path):
    stores = [store(tmp_path / "data", f"v{i}", i) for i in range(2)]
    found = [
        row(f"{i}-{k}", question, place) for i, place in enumerate(stores) for k, question in enumerate(QUESTIONS[:3])
    ]
    return [*found, row("text", "What is a nodule?"), row("both", QUESTIONS[0], *stores)]


def content(path):
    """The predictions by id, without what a clock said; numbers that rounding may change are rounded."""
    found = read_predictions(path)
    assert len({p.id for p in found}) == len(found)
    exact = {"seconds": {}, "peak_memory_mib": 0.0, "token_logprobs": []}
    return {p.id: replace(p, **exact, threshold=p.threshold and round(p.threshold, 4)) for p in found}


def test_the_same_rows_in_any_order_give_the_same_predictions(model, rows, tmp_path):
    assert predict_rows(model, rows, tmp_path / "a.jsonl").answered == 8
    assert predict_rows(model, rows[::-1], tmp_path / "b.jsonl").answered == 8
    assert content(tmp_path / "a.jsonl") == content(tmp_path / "b.jsonl")
    for prediction in read_predictions(tmp_path / "a.jsonl"):
        assert set(prediction.seconds) == {"read", "encode", "answer"}
    assert content(tmp_path / "a.jsonl")["0-1"].volume_id == "v0"


def test_a_run_that_was_cut_off_in_a_line_goes_on_as_if_it_had_not(model, rows, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    predict_rows(model, rows, whole)
    predict_rows(model, rows, cut)
    lines = cut.read_bytes()
    cut.write_bytes(lines[: len(lines) * 2 // 3])
    kept = cut.read_bytes().count(b"\n")
    outcome = predict_rows(model, rows, cut)
    assert (outcome.before, outcome.answered) == (kept, 8 - kept)
    assert content(cut) == content(whole)
    before = model.encodings
    assert predict_rows(model, rows, cut).answered == 0
    assert model.encodings == before


def test_ctrl_c_leaves_whole_lines_of_what_is_done(model, rows, tmp_path):
    def stop(group, replies):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_rows(model, rows, tmp_path / "p.jsonl", on_batch=stop)
    done = len(content(tmp_path / "p.jsonl"))
    assert 0 < done < 8
    assert predict_rows(model, rows, tmp_path / "p.jsonl").before == done


def test_a_question_that_changed_under_its_id_is_answered_anew_and_others_are_not(model, rows, tmp_path):
    path, new = tmp_path / "p.jsonl", tmp_path / "new.jsonl"
    predict_rows(model, rows, path)
    rows[0]["messages"][0]["content"] += " And on the left?"
    rows[4] |= {"videos": rows[0]["videos"], "volume_id": rows[0]["volume_id"]}
    rows[5]["messages"].append({"role": "assistant", "content": "an answer, which is not asked"})
    for shards in (1, 2):  # parts leave out what the output answers, but not what it answers no more
        outcomes = [predict_rows(model, rows, path, Shard(number, shards)) for number in range(shards)]
        assert sum(outcome.answered for outcome in outcomes) == 2
        assert outcomes[-1].merged
        predict_rows(model, rows, new)
        assert {p.id: p.response for p in read_predictions(path)} == {p.id: p.response for p in read_predictions(new)}
        rows[0]["messages"][0]["content"] += " Or on the right?"
        rows[4]["messages"][0]["content"] += " Now?"


def test_an_answer_goes_with_a_folder_that_is_moved_and_not_with_another_volume():
    moved = [
        row("a", "Where?", f"{folder}/v1.ome.zarr") for folder in ("/data/volumes", "s3://bucket/volumes", "volumes")
    ]
    others = [row("a", "Where?", "/data/v2.ome.zarr"), row("a", "What?", "/data/v1.ome.zarr"), row("a", "Where?")]
    assert len({question_digest(one) for one in moved}) == 1
    assert {question_digest({**moved[0], "choices": none}) for none in ([], [""], None)} == {question_digest(moved[0])}
    assert len({question_digest(one) for one in [moved[0], {**moved[0], "choices": ["left", "right"]}, *others]}) == 5


def test_a_bad_row_and_a_bad_volume_cost_themselves_and_are_tried_again(model, rows, tmp_path):
    bad = [
        row("lost", QUESTIONS[0], str(tmp_path / "nowhere.ome.zarr")),
        row("empty", " ", str(tmp_path)),
        {**row("odd", QUESTIONS[0]), "messages": None},
        {**row("image", QUESTIONS[0]), "images": ["x.png"]},
    ]
    outcome = predict_rows(model, rows + bad, tmp_path / "p.jsonl")
    assert (outcome.answered, sorted(outcome.failed)) == (8, ["empty", "image", "lost", "odd"])
    found = content(tmp_path / "p.jsonl")
    assert len(found) == 12
    assert "a store of photon-data" in found["lost"].error
    assert found["lost"].response == ""
    store(tmp_path, "v7", 7)
    bad[0] |= {"videos": [str(tmp_path / "volumes" / "v7.ome.zarr")], "volume_id": "v7"}
    again = predict_rows(model, [*rows, bad[0]], tmp_path / "p.jsonl")
    assert (again.answered, again.before, again.failed) == (1, 8, {})
    assert content(tmp_path / "p.jsonl")["lost"].error == ""


def test_one_row_that_fails_does_not_take_its_batch_with_it(model_dir, rows, tmp_path):
    model = predictor(model_dir, replace(SHORT, choices=True))
    rows = [{**one, "choices": ["Yes", "No"]} for one in rows]
    rows[1]["choices"] = ["Yes", "<|im_end|>"]
    outcome = predict_rows(model, rows, tmp_path / "p.jsonl")
    assert (outcome.answered, list(outcome.failed)) == (7, ["0-1"])
    assert "special tokens" in content(tmp_path / "p.jsonl")["0-1"].error


def test_other_settings_another_model_or_an_unknown_file_are_refused(model_dir, rows, tmp_path):
    path = tmp_path / "p.jsonl"
    predict_rows(predictor(model_dir), rows[:1], path)
    lines = path.read_bytes()
    for other, said in (
        (predictor(model_dir, replace(SHORT, max_new_tokens=7)), "max_new_tokens was 6 and is 7"),
        (predictor(model_dir, scheduler="random"), "scheduler was 'its' and is 'random'"),
    ):
        with pytest.raises(UsageError, match=said):
            predict_rows(other, rows, path)
    other = predictor(model_dir)
    other.model.lm_head.weight.data += 1
    with pytest.raises(UsageError, match="weights was"):
        predict_rows(other, rows, path)
    assert path.read_bytes() == lines
    (tmp_path / "p.jsonl.settings.json").unlink()
    with pytest.raises(UsageError, match=r"p.jsonl.settings.json beside it"):
        predict_rows(predictor(model_dir), rows, path)


def test_two_runs_do_not_write_one_file(model, rows, tmp_path):
    path = tmp_path / "p.jsonl"
    predict_rows(model, rows[:1], path)
    with (tmp_path / ".p.jsonl.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run is writing it"):
            predict_rows(model, rows, path)


def test_parts_cover_every_row_once_and_the_last_one_merges(model, rows, tmp_path):
    predict_rows(model, rows, tmp_path / "one.jsonl")
    path = tmp_path / "p.jsonl"
    outcomes = [predict_rows(model, rows, path, Shard(number, 3)) for number in (2, 0, 1)]
    assert sum(outcome.answered for outcome in outcomes) == 8
    assert outcomes[-1].merged
    assert content(path) == content(tmp_path / "one.jsonl")
    assert [json.loads(line)["id"] for line in path.open()] == sorted(one["id"] for one in rows)


def test_parts_go_on_from_a_run_without_parts_and_lose_none_of_it(model, rows, tmp_path):
    path = tmp_path / "p.jsonl"
    predict_rows(model, rows[:3], path)
    outcomes = [predict_rows(model, rows[2:], path, Shard(number, 2)) for number in range(2)]
    assert sum(outcome.answered for outcome in outcomes) == 5
    assert set(content(path)) == {one["id"] for one in rows}


def test_a_part_in_the_middle_of_a_line_is_left_to_its_writer(model, rows, tmp_path):
    path = tmp_path / "p.jsonl"
    other = tmp_path / "p.rank1of2.jsonl"
    other.write_text('{"id": "0-0", "respon')
    assert not predict_rows(model, rows, path, Shard(0, 2)).merged
    other.unlink()
    assert predict_rows(model, rows, path, Shard(1, 2)).merged


@pytest.mark.parametrize(
    ("names", "said"), [(["a", "a"], "'a' first"), (["a", None], "1 of 2 have none"), ([3, "a"], "1 of 2")]
)
def test_rows_without_an_id_of_their_own_are_refused(model, tmp_path, names, said):
    with pytest.raises(UsageError, match=said):
        predict_rows(model, [row(name, QUESTIONS[0]) for name in names], tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_a_relative_store_is_looked_for_beside_the_folder_of_manifests(tmp_path):
    place = store(tmp_path / "out", "v1", 1)
    manifest = tmp_path / "out" / "manifests" / "test.jsonl"
    manifest.parent.mkdir()
    rows = [row("near", "?", "volumes/v1.ome.zarr"), row("far", "?", "s3://bucket/v1.ome.zarr"), row("text", "?")]
    put(manifest, rows)
    assert [one["videos"] for one in read_rows(manifest)] == [[place], ["s3://bucket/v1.ome.zarr"], []]

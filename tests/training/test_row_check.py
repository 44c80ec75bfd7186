"""Rows that would stop a run when their turn comes are named when it starts, all of them."""

from dataclasses import replace

import pytest
from answers import put
from askable import row
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_train.training import plan
from photon_train.training.config import TrainConfig
from photon_train.training.setup import start


@pytest.fixture
def faulty(stores):
    """{id: (row, what is said of it)}; the last row of each kind of text that no run can train on."""
    silent = row("loss", "Is it?", stores["c"], answer="yes")
    silent["messages"][-1]["loss"] = False
    untagged = row("untagged", "Is it?", stores["c"], answer="yes")
    untagged["messages"][0]["content"] = "Is it?"
    twice = row("twice", "<video>Is it?", stores["c"], answer="yes")
    return {
        "loss": (silent, "something to learn"),
        "untagged": (untagged, "1 volumes for 0 tags"),
        "twice": (twice, "1 volumes for 2 tags"),
        "marker": (row("marker", "Is it<|im_end|>?", stores["c"], answer="yes"), "found <|im_end|>"),
        "answer-marker": (row("answer-marker", "Is it?", stores["c"], answer="<|vision_end|>"), "found <|vision_end|>"),
        "padding": (row("padding", "Is it?<|endoftext|>", stores["c"], answer="yes"), "found <|endoftext|>"),
        "no-question": (row("no-question", "  ", stores["c"], answer="yes"), "expected a question"),
        "no-answer": (row("no-answer", "Is it?", stores["c"], answer=" "), "an answer, found an empty one"),
        "long": (row("long", "Is it?", stores["c"], answer="very " * 900), "at most 512 tokens, found"),
    }


@pytest.fixture
def config(models, tmp_path):
    return TrainConfig(
        stage="s1",
        model=str(models / "s1"),
        output=str(tmp_path / "run"),
        precision="fp32",
        max_length=512,
        workers=2,
        track=(),
    )


@pytest.mark.parametrize("workers", [False, True])
def test_every_row_that_cannot_be_trained_on_is_named_at_the_start(
    config, rows, faulty, tmp_path, caplog, monkeypatch, workers
):
    monkeypatch.setattr(plan, "FEW", 0 if workers else 10**6)
    bad = [one for one, _ in faulty.values()]
    data = put(tmp_path / "bad.jsonl", [*rows[:5], *bad, *rows[5:]])
    with pytest.raises(UsageError, match=f"found {len(bad)} of {len(bad) + len(rows)} that cannot") as refused:
        start(replace(config, data=(str(data),)), resume=False)
    lines = str(refused.value).splitlines()
    for id, (_, said) in faulty.items():
        assert any(line.startswith(f"  {id}: ") and said in line for line in lines), id
    run = start(replace(config, data=(str(data),), on_bad_row="skip"), resume=False)
    assert [one.id for one in run.rows] == [one["id"] for one in rows]
    assert all(id in caplog.text for id in faulty)


def test_a_dry_run_and_rows_to_evaluate_on_are_looked_at_too(config, rows, faulty, tmp_path):
    good, bad = put(tmp_path / "good.jsonl", rows), put(tmp_path / "bad.jsonl", [faulty["long"][0]])
    words = ["train", "s1", "--model", config.model, "--output", config.output, "--set", "max_length=512"]
    result = CliRunner().invoke(app, [*words, "--data", str(good), "--eval", str(bad), "--dry-run"])
    assert result.exit_code == 2
    assert "long: expected at most 512 tokens" in result.output


def test_a_row_with_an_image_is_no_row_of_text(config, rows, tmp_path):
    seen = {**rows[-3], "id": "seen", "images": ["a.png"]}
    with pytest.raises(UsageError, match="images, which Photon does not read"):
        start(replace(config, data=(str(put(tmp_path / "seen.jsonl", [seen])),)), resume=False)

"""photon bench: what is measured, what stands beside it, and what a failure costs."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from photon_cli import bench as command
from photon_cli.photon import app
from photon_data.errors import UsageError
from photon_train import bench, measuring
from photon_train.bench import BenchSettings, beside, cells_of
from photon_train.training import log

ROOT = Path(__file__).parents[2]
COARSE = (28, 56, 56)  # 8 visual tokens; 56 in patches of two slices
FEW = {"repeats": 1, "new_tokens": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return measuring.write_random_store(tmp_path_factory.mktemp("stores"), COARSE)


def counted_subject(store, scheduler):
    """Return a model, and a list to which every call of its vision tower adds the number of volumes."""
    subject, calls = measuring.random_subject("tiny", store, model_shape_zyx=COARSE), []
    subject.model.config.scheduler = scheduler
    hook = lambda module, args, kwargs: calls.append(len(kwargs.get("grid_thw", args[-1])))  # noqa: E731
    subject.model.model.visual.register_forward_pre_hook(hook, with_kwargs=True)
    return subject, calls


@pytest.mark.parametrize("scheduler", ["none", "its"])
@pytest.mark.parametrize("what", ["prefill", "decode", "predict"])
def test_questions_share_the_encoding_of_their_volume_where_the_way_says_so(store, what, scheduler):
    for shares, encodings in ((True, 1), (False, 3)):
        subject, calls = counted_subject(store, scheduler)
        measuring.measure_answers(subject, what, 3, shares=shares, **FEW)
        # once to see what is kept, then a warm-up and a repeat
        assert sum(calls) == 1 + 2 * encodings


@pytest.mark.parametrize("shares", [True, False])
def test_a_training_step_encodes_a_volume_once_or_for_each_question(store, shares, tmp_path):
    subject, calls = counted_subject(store, "its")
    found = bench.measure_training(subject, 3, tmp_path / "run", shares=shares, repeats=1)
    assert sum(calls) == 1 + 2 * (1 if shares else 3)
    assert not list((tmp_path / "run").rglob("*.safetensors"))  # the run was stopped before it would save
    assert found.seconds > 0


def test_its_keeps_390_of_1000_tokens_of_a_random_model(tmp_path):
    shape = (140, 280, 280)
    subject = measuring.random_subject("tiny", measuring.write_random_store(tmp_path, shape), model_shape_zyx=shape)
    answered = measuring.measure_answers(subject, "prefill", 2, shares=True, **FEW)
    trained = bench.measure_training(subject, 1, tmp_path / "run", shares=False, repeats=1)
    for found in (answered, trained):
        assert found.visual_tokens == 1000
        assert found.kept_tokens == pytest.approx(390, rel=0.01)


def test_the_baseline_reads_as_many_patches_as_qwen_and_gives_7000_tokens():
    _, processor = measuring.random_model("tiny", bench.WAYS["qwen"].slices)
    assert processor.visual_tokens() == 7000
    assert math.prod(processor.config.patches_thw) == 28_000


def test_sharing_is_measured_above_one_question_and_the_baseline_once():
    found = {(cell.way, cell.questions) for cell in cells_of(BenchSettings(what=("train",), questions=(1, 8)))}
    assert found == {
        ("qwen", 1),
        ("none", 1),
        ("none", 8),
        ("none-shared", 8),
        ("its", 1),
        ("its", 8),
        ("its-shared", 8),
    }


def test_published_figures_stand_beside_the_ways_they_are_of():
    cells = [replace(cell, questions_per_second=0.3) for cell in cells_of(BenchSettings(questions=(1, 8)))]
    its = next(i for i, cell in enumerate(cells) if (cell.way, cell.what, cell.questions) == ("its", "train", 1))
    cells[its] = replace(
        cells[its], iterations_per_second=1.7, questions_per_second=1.7, peak_memory_gib=17.4, tokens_per_second=9.0
    )
    found = {(c.way, c.what, c.questions): beside(c, cells, "3b") for c in cells}
    assert {key: one["published"] for key, one in found.items() if one["published"]} == {
        ("qwen", "train", 1): {"iterations_per_second": 0.15, "peak_memory_gib": 134.0},
        ("none", "train", 1): {"iterations_per_second": 0.64},
        ("its", "train", 1): {"iterations_per_second": 0.85, "peak_memory_gib": 34.8},
        ("qwen", "predict", 1): {"tokens_per_second": 2.3, "peak_memory_gib": 26.0},
        ("its", "predict", 1): {"tokens_per_second": 4.12, "peak_memory_gib": 9.2},
    }
    ours = found["its", "train", 1]
    assert ours["of_published"] == pytest.approx({"iterations_per_second": 2.0, "peak_memory_gib": 0.5})
    assert ours["speedup"] == pytest.approx(1.7 / 0.3)
    assert ours["published_speedup"] == pytest.approx(0.85 / 0.15)
    assert beside(cells[its], cells, "tiny")["of_published"] == {}  # a tiny model is no multiple of a large one


def test_a_cell_without_memory_costs_itself_alone(monkeypatch):
    def measure(subject, what, questions, *, shares, **how):
        if questions == 2 and not shares:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
        return measuring.Measured(2.0, None, 10.0, 1.0, 8.0, 8)

    monkeypatch.setattr(bench, "measure_answers", measure)
    settings = BenchSettings(what=("prefill",), questions=(1, 2), ways=("its", "its-shared"), model_shape_zyx=COARSE)
    report = bench.bench(settings)
    errors = {(cell["way"], cell["questions"]): cell["error"] for cell in report["cells"]}
    said = "out of memory: CUDA out of memory. Tried to allocate 20 GiB."
    assert errors == {("its", 1): "", ("its", 2): said, ("its-shared", 2): ""}
    rows = [command.cells_of_row(cell, report["ways"]) for cell in report["cells"]]
    assert [row[-1] for row in rows] == ["", said, ""]
    assert {len(row) for row in rows} == {len(command.HEADINGS)}


def test_the_table_shows_what_bench_json_holds(monkeypatch, tmp_path):
    monkeypatch.setitem(command.DEFAULTS, "tiny", {**FEW, "model_shape_zyx": COARSE})
    monkeypatch.setattr("photon_cli.terminal.console.width", 200)
    words = ["--size", "tiny", "--what", "prefill", "--questions", "2,1"]
    out = CliRunner().invoke(app, ["bench", *words, "--output", str(tmp_path / "b")])
    assert out.exit_code == 0, out.output
    report = json.loads((tmp_path / "b/bench.json").read_text())
    assert (tmp_path / "b/bench.png").read_bytes().startswith(b"\x89PNG")
    rows = [
        [part.strip() for part in line.split("│")[1:-1]] for line in out.output.splitlines() if line.startswith("│")
    ]
    assert len(rows) == len(report["cells"]) == 7
    for row, cell in zip(rows, report["cells"], strict=True):
        assert not cell["error"]
        assert row[:3] == [report["ways"][cell["way"]], str(cell["questions"]), f"{cell['kept_tokens']:.3g}"]
        for column, name in ((3, "seconds"), (4, "questions_per_second"), (5, "tokens_per_second")):
            assert float(row[column].replace(",", "")) == pytest.approx(cell[name], rel=6e-3)
        assert cell["questions_per_second"] == pytest.approx(cell["questions"] / cell["seconds"])
    assert "tiny model" in out.output
    assert "attention: sdpa" in out.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--questions", "1,a"], "expected numbers"),
        (["--questions", "0"], "from 1 on"),
        (["--what", "train,fly"], "found fly"),
        (["--size", "7b"], "one of 3b, tiny"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, said, tmp_path):
    out = CliRunner().invoke(app, ["bench", *options, "--output", str(tmp_path)])
    assert out.exit_code == 2
    assert said in out.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_published_size_needs_a_gpu():
    with pytest.raises(UsageError, match="without a GPU"):
        BenchSettings(size="3b")


def test_mfu_is_told_wherever_bfloat16_is_computed_with(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(log, "peak_memory_mib", lambda device: 1.0)
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=1)
    row = {"questions": 1.0, "volumes": 1.0, "tokens": 1.0}
    for precision, mfu in (("bf16", 0.5), ("autocast", 0.5), ("fp32", None)):
        found = log.rates({**row, "flops": 989e12}, 2.0, 0.0, accelerator, precision)
        assert found.get("mfu") == mfu


# The battery.


def numbers_of(found):
    """Yield every number in what JSON holds."""
    if isinstance(found, int | float):
        yield float(found)
    for value in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        yield from numbers_of(value)


@pytest.mark.slow
def test_every_step_of_the_battery_writes_finite_numbers(tmp_path):
    words = ["bash", "benchmarks/gpu/battery.sh", "--size", "tiny", "--device", "cpu", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = ("parity", "resume", "bench", "train", "prefix", "kernels")
    assert {path.name for path in tmp_path.iterdir()} == {*(f"{step}.json" for step in steps), "bench.png"}
    for step in steps:
        result = json.loads((tmp_path / f"{step}.json").read_text())
        assert result["ok"], result["error"]
        values = list(numbers_of(result))
        assert len(values) > 5
        assert all(map(math.isfinite, values)), step
    compared = json.loads((tmp_path / "parity.json").read_text())["found"]["float32"]
    assert compared["s2.logits"] < 2e-4
    trained = json.loads((tmp_path / "train.json").read_text())["found"]["cells"]
    assert {cell["questions"] for cell in trained} == {1, 4, 8}
    assert len(json.loads((tmp_path / "kernels.json").read_text())["found"]["train"]) == 10


def test_a_step_that_hangs_or_fails_costs_itself_alone(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/gpu")
    import battery

    def attempt(step, size, output):
        os.setsid()
        time.sleep(60 if step == "bench" else 0)
        if step == "train":
            os._exit(9)
        battery.write(output / f"{step}.json", step, 0.0, {"value": 1.0}, "")

    monkeypatch.setattr(battery, "attempt", attempt)
    monkeypatch.setattr(battery, "STEPS", dict.fromkeys(("parity", "bench", "train", "prefix"), 1))
    monkeypatch.setattr(battery, "SLOWER", 1)
    monkeypatch.setattr(sys, "argv", ["battery.py", "--size", "tiny", "--device", "cpu", "--output", str(tmp_path)])
    assert battery.main() == 1
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert {step: one["ok"] for step, one in found.items()} == {
        "parity": True,
        "bench": False,
        "train": False,
        "prefix": True,
    }
    assert "within 1 s" in found["bench"]["error"]
    assert "exit code 9" in found["train"]["error"]


def test_the_card_of_a_battery_makes_a_folder_name(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks/gpu")
    import battery

    found = SimpleNamespace(stdout="NVIDIA H100 80GB HBM3\nanother\n")
    monkeypatch.setattr(battery.subprocess, "run", lambda *words, **how: found)
    assert re.fullmatch(r"[\w-]+", battery.name_of_card("cuda"))
    assert battery.name_of_card("cuda") == "nvidia-h100-80gb-hbm3"

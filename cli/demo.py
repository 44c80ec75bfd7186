"""The body of `photon demo`: the whole product on scans that it makes itself, and a page about what came of it.

Two chains of commands run beside each other: of full-size scans that are prepared, and of a tiny model that is trained,
scored and asked. Each command is one that a person could type; what it prints is kept in DIR/logs.

    small scans, prepared        | a random model, scans of full size
    the model is trained, twice  | those are prepared, checked, drawn
    it is scored                 | it is asked
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from photon_cli.terminal import console, fail
from photon_data.files import write_whole
from photon_data.json_text import from_json
from photon_data.questions.table import read_values
from photon_data.report.page import Chart, ForestRow, ScatterPoint, data_url, forest_plot, render, scatter_plot
from photon_pipelines.child import ENVIRONMENT

ENTRIES = {"photon-data": "photon_cli.data", "photon": "photon_cli.photon"}
PAGE, DONE, LOGS = "index.html", "done.json", "logs"
LINES_OF_A_FAILURE = 15
# A process that has imported what commands of the model need, and waits for the words of one: on stdin, or none.
WAITING = """
import json, sys
import photon_cli.train, photon_train.answering.loading
line = sys.stdin.readline()
if line:
    sys.argv[1:] = json.loads(line)
    from photon_cli.photon import main
    main()
"""
# A scan of the test split, and what is asked about it.
ASKED_SCAN, QUESTIONS = "0002", ("Any lung consolidation?", "Any liver calcification?")
TOGETHER = "--set=groups_per_forward=8"  # all of a step
# Steps of the model after which another comes, and the name of the logs of what waits for that.
FOLLOWED, NEXT, SUFFIXES = ("init", "s1", "s2"), "next", ("txt", "err")
SCHEDULERS = "its,none,random,uniform,foreground"
EDITS = {
    "erase=asked": "organ asked about erased",
    "erase=other": "as much of others erased",
    "blind": "the mean of all volumes",
}
MODEL_SHAPE = "70,140,140"
GRID = ("spacing_mm=2,2,2", "shape_zyx=182,182,182", f"model_shape_zyx={MODEL_SHAPE}")


class Step(NamedTuple):
    """One command of the demo."""

    name: str
    does: str  # "prepare 4 scans"
    command: tuple[str, ...]

    @property
    def line(self) -> str:
        """The command as one types it."""
        return shlex.join(self.command)


class Size(NamedTuple):
    """How much of everything the demo makes."""

    scans: int  # of full size
    easy: int  # small ones, that the model learns from
    epochs: tuple[int, int]  # of the two stages


FULL, QUICK = Size(4, 120, (30, 12)), Size(3, 24, (2, 2))


class Demo:
    """A folder that the steps of the demo fill, each once: a second call goes on where the first was stopped."""

    def __init__(self, folder: Path, size: Size = FULL) -> None:
        self.folder, self.size = folder, size
        self._done: dict[str, str] = _read(folder / DONE) if (folder / DONE).exists() else {}
        self._lock, self._running, self._is_stopped = threading.Lock(), list[str](), False
        self._waiting: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Run all steps, then write the page; a step that fails ends the command with its exit code."""
        (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
        started_s = time.monotonic()
        with console.status("") if console.is_terminal else nullcontext() as status, ThreadPoolExecutor(2) as pool:
            try:
                for chains in (
                    (self._small_scans(), self._model_and_scans()),
                    (self._training(), self._preparing()),
                    (self._scoring(), self._asking()),
                ):
                    for failed in list(pool.map(lambda chain: self._run_chain(chain, status), chains)):
                        if failed:
                            self._fail(*failed)
            finally:
                self._is_stopped = True
                if self._waiting:
                    self._waiting.communicate("")
        page = write_page(self.folder)
        console.print(f"{_minutes(started_s)}  in all. Open {page}", soft_wrap=True)

    def _fail(self, step: Step, code: int) -> None:
        said = self._log(step.name, "err").read_text("utf-8", "replace").rstrip().split("\n")
        fail("\n".join([f"{step.line}: exit code {code}", *said[-LINES_OF_A_FAILURE:]]), code)

    def _small_scans(self) -> Iterator[Step]:
        """Yield what the model learns from: phantoms in which whole organs are affected, on a coarse grid."""
        raw, count = self.folder / "easy", self.size.easy
        yield _step("easy", f"made {count} small CTs", "photon-data phantom", raw, "--easy", n=count, size=128)
        grid, questions = [f"--set={setting}" for setting in GRID], raw / "questions.jsonl"
        words = (raw / "scans", self.folder / "easy-prepared", *grid)
        yield _step("easy-prepare", "prepared them", "photon-data prepare", *words, questions=questions)

    def _model_and_scans(self) -> Iterator[Step]:
        """Yield what else comes from nothing."""
        yield _step("init", "made a random model", "photon init", tiny=self.folder / "tiny", model_shape=MODEL_SHAPE)
        raw, count = self.folder / "phantoms", self.size.scans
        yield _step("phantoms", f"made {count} synthetic CTs of full size", "photon-data phantom", raw, n=count)

    def _preparing(self) -> Iterator[Step]:
        """Yield what shows how scans are prepared, in their full size."""
        raw, prepared = self.folder / "phantoms", self.folder / "prepared"
        more = {"questions": raw / "questions.jsonl", "workers": 1}
        yield _step("prepare", "prepared those of full size", "photon-data prepare", raw / "scans", prepared, **more)
        yield _step("verify", "checked every byte of them", "photon-data verify", prepared)
        first = min((prepared / "volumes").glob("*.ome.zarr"))
        yield _step("show", "drew one", "photon-data show", first, output=self.folder / "volume.png")

    def _training(self) -> Iterator[Step]:
        """Yield the two stages."""
        manifests, s1, s2 = self.folder / "easy-prepared" / "manifests", self.folder / "s1", self.folder / "s2"
        rows = {"data": manifests / "train.jsonl", "eval": manifests / "val.jsonl", "resume": "auto"}
        first, second = ((f"--set=epochs={epochs}", TOGETHER) for epochs in self.size.epochs)
        taught = (*first, f"--set=grounding={self.folder / 'easy' / 'masks'}")
        model = self.folder / "tiny"
        yield _step("s1", "trained it, stage 1", "photon train tiny-s1", *taught, model=model, output=s1, **rows)
        did = "trained it to drop tokens, stage 2"
        yield _step("s2", did, "photon train tiny-s2", *second, model=_last(s1), output=s2, **rows)

    def _scoring(self) -> Iterator[Step]:
        """Yield what scores the model, on scans that it was not trained on."""
        manifests = self.folder / "easy-prepared" / "manifests"
        scored = {
            "model": _last(self.folder / "s2"),
            "data": manifests / "test.jsonl",
            "train": manifests / "train.jsonl",
            "masks": self.folder / "easy" / "masks",
            "max_new_tokens": 8,
        }
        did, where = "scored it beside other ways to drop tokens", {"output": self.folder / "scores"}
        yield _step("eval", did, "photon eval vqa", **scored, schedulers=SCHEDULERS, **where)
        did, where = "asked it again about scans without the organ", {"output": self.folder / "looks"}
        edits = {"schedulers": "its", "counterfactual": "erase=asked,other"}
        yield _step("looks", did, "photon eval vqa", **scored, **edits, **where)

    def _asking(self) -> Iterator[Step]:
        """Yield what asks the model about one of those scans."""
        raw, overlay = self.folder / "easy", self.folder / "overlay"
        scan = next(iter((raw / "scans").glob(f"*-{ASKED_SCAN}.*")))
        shown = {"masks": raw / "masks" / scan.name.split(".")[0], "overlay": overlay, "max_new_tokens": 8}
        words = (scan, *QUESTIONS, "--json")
        model = _last(self.folder / "s2")
        yield _step("predict", "asked it about a scan", "photon predict", *words, model=model, **shown)

    def _run_chain(self, steps: Iterator[Step], status: Any) -> tuple[Step, int] | None:
        """Run steps one after the other; return the one that failed with its exit code."""
        for step in steps:
            if self._is_stopped:
                break
            if self._done.get(step.name) == step.line:
                continue
            self._show(status, [*self._running, step.does])
            started_s = time.monotonic()
            code = self._started(step).wait()
            self._show(status, [name for name in self._running if name != step.does])
            if code:
                self._is_stopped = True
                return step, code
            console.print(f"{_minutes(started_s)}  {step.does}", soft_wrap=True)
            with self._lock:
                self._done[step.name] = step.line
                with write_whole(self.folder / DONE) as temporary:
                    temporary.write_text(json.dumps(self._done, indent=1))
        return None

    def _started(self, step: Step) -> subprocess.Popen[str]:
        """Return the process of a step. Where it is the model's, another begins to wait, for the next."""
        entry, *words = step.command
        if entry != "photon":
            return self._process(step.name, f"from {ENTRIES[entry]} import main; main()", *words)
        with self._lock:
            process, self._waiting = self._waiting, None
            if process is None:
                process = self._process(step.name, WAITING)
            else:
                for suffix in SUFFIXES:
                    self._log(NEXT, suffix).replace(self._log(step.name, suffix))
            if step.name in FOLLOWED:
                self._waiting = self._process(NEXT, WAITING)
        assert process.stdin
        process.stdin.write(json.dumps(words) + "\n")
        process.stdin.close()
        return process

    def _process(self, name: str, code: str, *words: str) -> subprocess.Popen[str]:
        """Start Python with that code, in the environment that suits small jobs beside each other."""
        with self._log(name, "txt").open("w") as out, self._log(name, "err").open("w") as err:
            command, environment = [sys.executable, "-c", code, *words], {**ENVIRONMENT, **os.environ}
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment, text=True)

    def _show(self, status: Any, running: list[str]) -> None:
        with self._lock:
            self._running = running
            if status:
                status.update("; ".join(running))

    def _log(self, name: str, suffix: str) -> Path:
        return self.folder / LOGS / f"{name}.{suffix}"


def _step(name: str, does: str, command: str, *words: object, **options: object) -> Step:
    named = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    return Step(name, does, (*command.split(), *map(str, words), *named))


def _last(run: Path) -> Path:
    """Return the last checkpoint of a run, without the seconds that it takes to import what writes them."""
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _minutes(started_s: float) -> str:
    seconds = round(time.monotonic() - started_s)
    return f"{seconds // 60:2d} min {seconds % 60:2d} s"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = from_json(path.read_bytes())
    return found


def write_page(folder: Path) -> Path:
    """Write index.html, which holds its pictures and leads to the other pages; return its path."""
    prepared, scores = _read(folder / "prepared/dataset.json"), _read(folder / "scores/scores.json")
    looks = _read(folder / "looks/scores.json")
    asked, rows = _read(folder / LOGS / "predict.txt"), read_values(folder / "easy/questions.jsonl")
    of_scan = {row["lesion"].replace("_", " "): row for row in rows if row["volume"] == asked["volume_id"]}
    values = {
        "title": "What the demo made",
        "counts": prepared["counts"],
        "volume": _picture(folder / "volume.png"),
        "runs": [
            (name, _read(folder / name / "summary.json"), _picture(folder / name / "curves.png"))
            for name in ("s1", "s2")
        ],
        "trade_offs": [(trade["points"], _trade_off(trade["points"])) for trade in scores["trade_offs"]],
        "moved": _moved(looks["counterfactuals"]["moved"]),
        "blind": scores["predictions"][0]["scores"][0]["baselines"]["best_constant"],
        "questions": scores["questions"],
        "patients": scores["patients"],
        "answers": [
            (answer, row["answer"], row["organ_masks"], _picture(folder / "overlay" / answer["id"] / "planes.png"))
            for answer in asked["predictions"]
            for lesion, row in of_scan.items()
            if lesion in answer["question"]  # in other words, perhaps
        ],
        "commands": _read(folder / DONE),
    }
    with write_whole(folder / PAGE) as temporary:
        temporary.write_bytes(render(Path(__file__).with_name("demo.html.j2"), values, {}))
    return folder / PAGE


def _trade_off(points: Sequence[Mapping[str, Any]]) -> Chart:
    drawn = [ScatterPoint(one["name"], one["kept_share"], *_estimate(one["estimate"])) for one in points]
    words = "right answers of 100, against the share of visual tokens kept; line: 95 % interval"
    return scatter_plot(drawn, name="What dropping tokens costs", words=words, across="share of visual tokens kept")


def _moved(edits: Sequence[Mapping[str, Any]]) -> Chart:
    rows = [ForestRow(EDITS[one["edit"]], *_estimate(one["moved"]), {}) for one in edits]
    words = "answers of 100 that are others than before where the volume is edited; line: 95 % interval"
    return forest_plot(rows, name="Whether it looks", words=words)


def _estimate(found: Mapping[str, Any]) -> tuple[float, float | None, float | None]:
    low, high = found["interval"] or (None, None)
    return found["value"], low, high


def _picture(path: Path) -> str:
    return data_url(path.read_bytes(), "image/png")

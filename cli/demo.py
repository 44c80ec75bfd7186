"""The body of `photon demo`: the whole product on scans that it makes itself, and a page about what came of it.

Two chains of commands run beside each other: full-size scans are prepared, and a tiny model is trained, scored and
asked. Each command is one that a person could type; what it prints is kept in DIR/logs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from photon_cli.terminal import console, fail
from photon_data.files import write_whole
from photon_data.json_text import from_json
from photon_data.questions.table import read_values
from photon_data.report.page import data_url, render
from photon_train.checkpoint import checkpoints
from photon_train.overlay import PICTURE as PLANES
from photon_train.training.log import CURVES, SUMMARY

ENTRIES = {"photon-data": "photon_cli.data", "photon": "photon_cli.photon"}
PAGE, DONE, LOGS = "index.html", "done.json", "logs"
LINES_OF_A_FAILURE = 15
# A scan of the test split, and what is asked about it.
ASKED_SCAN, QUESTIONS = "0002", ("Any lung consolidation?", "Any liver calcification?")
SCHEDULERS = "its,none,random,uniform,foreground"
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


FULL, QUICK = Size(6, 120, (30, 12)), Size(3, 24, (2, 2))


class Demo:
    """A folder that the steps of the demo fill, each once: a second call goes on where the first was stopped."""

    def __init__(self, folder: Path, size: Size = FULL) -> None:
        self.folder, self.size = folder, size
        self._done: dict[str, str] = _read(folder / DONE) if (folder / DONE).exists() else {}
        self._lock, self._running, self._is_stopped = threading.Lock(), list[str](), False

    def run(self) -> None:
        """Run both chains, then write the page; a step that fails ends the command with its exit code."""
        (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
        started_s = time.monotonic()
        with console.status("") if console.is_terminal else nullcontext() as status, ThreadPoolExecutor(2) as pool:
            chains = [
                pool.submit(self._run_chain, chain, status) for chain in (self._data_steps(), self._model_steps())
            ]
            try:
                failed = [found for chain in chains if (found := chain.result())]
            finally:
                self._is_stopped = True
        for step, code in failed[:1]:
            said = self._log(step, "err").read_text("utf-8", "replace").rstrip().split("\n")
            fail("\n".join([f"{step.line}: exit code {code}", *said[-LINES_OF_A_FAILURE:]]), code)
        page = write_page(self.folder)
        console.print(f"{_minutes(started_s)}  in all. Open {page}", soft_wrap=True)

    def _data_steps(self) -> Iterator[Step]:
        """Yield what shows how scans are prepared, in their full size."""
        raw, prepared = self.folder / "phantoms", self.folder / "prepared"
        questions = raw / "questions.jsonl"
        count = self.size.scans
        yield _step("phantoms", f"made {count} synthetic CTs of full size", "photon-data phantom", raw, n=count)
        yield _step(
            "prepare", "prepared them", "photon-data prepare", raw / "scans", prepared, questions=questions, workers=1
        )
        yield _step("verify", "checked every byte of them", "photon-data verify", prepared)
        first = min((prepared / "volumes").glob("*.ome.zarr"))
        yield _step("show", "drew one", "photon-data show", first, output=self.folder / "volume.png")

    def _model_steps(self) -> Iterator[Step]:
        """Yield what shows a model: a tiny one, on a coarse grid, for phantoms in which whole organs are affected."""
        raw, prepared, tiny, s1, s2 = (self.folder / name for name in ("easy", "easy-prepared", "tiny", "s1", "s2"))
        train, val, test = (prepared / "manifests" / f"{split}.jsonl" for split in ("train", "val", "test"))
        masks, questions, count = raw / "masks", raw / "questions.jsonl", self.size.easy
        yield _step("easy", f"made {count} small CTs", "photon-data phantom", raw, "--easy", n=count, size=160)
        grid = [f"--set={setting}" for setting in GRID]
        yield _step(
            "easy-prepare", "prepared them", "photon-data prepare", raw / "scans", prepared, *grid, questions=questions
        )
        yield _step("init", "made a random model", "photon init", tiny=tiny, model_shape=MODEL_SHAPE)
        rows = {"data": train, "eval": val, "resume": "auto"}
        first, second = (f"--set=epochs={epochs}" for epochs in self.size.epochs)
        taught = (first, f"--set=grounding={masks}")
        yield _step("s1", "trained it, stage 1", "photon train tiny-s1", *taught, model=tiny, output=s1, **rows)
        start = _last(s1)
        yield _step(
            "s2", "trained it to drop tokens, stage 2", "photon train tiny-s2", second, model=start, output=s2, **rows
        )
        asks = {"model": _last(s2), "max_new_tokens": 8}
        scored = {
            "data": test,
            "train": train,
            "masks": masks,
            "schedulers": SCHEDULERS,
            "output": self.folder / "scores",
        }
        yield _step("eval", "scored it beside other ways to drop tokens", "photon eval vqa", **asks, **scored)
        scan = next(iter((raw / "scans").glob(f"*-{ASKED_SCAN}.*")))
        shown = {"masks": masks / scan.name.split(".")[0], "overlay": self.folder / "overlay"}
        yield _step("predict", "asked it about a scan", "photon predict", scan, *QUESTIONS, "--json", **asks, **shown)

    def _run_chain(self, steps: Iterator[Step], status: Any) -> tuple[Step, int] | None:
        """Run steps one after the other; return the one that failed with its exit code."""
        for step in steps:
            if self._is_stopped:
                break
            if self._done.get(step.name) == step.line:
                continue
            self._show(status, [*self._running, step.does])
            started_s = time.monotonic()
            words = ["-c", f"from {ENTRIES[step.command[0]]} import main; main()", *step.command[1:]]
            with self._log(step, "txt").open("w") as out, self._log(step, "err").open("w") as err:
                code = subprocess.run([sys.executable, *words], stdout=out, stderr=err, check=False).returncode
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

    def _show(self, status: Any, running: list[str]) -> None:
        with self._lock:
            self._running = running
            if status:
                status.update("; ".join(running))

    def _log(self, step: Step, suffix: str) -> Path:
        return self.folder / LOGS / f"{step.name}.{suffix}"


def _step(name: str, does: str, command: str, *words: object, **options: object) -> Step:
    named = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    return Step(name, does, (*command.split(), *map(str, words), *named))


def _last(run: Path) -> Path:
    """Return the last checkpoint of a run."""
    return checkpoints(run)[-1]


def _minutes(started_s: float) -> str:
    seconds = round(time.monotonic() - started_s)
    return f"{seconds // 60:2d} min {seconds % 60:2d} s"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = from_json(path.read_bytes())
    return found


def write_page(folder: Path) -> Path:
    """Write index.html, which holds its pictures and leads to the other pages; return its path."""
    prepared, scores = _read(folder / "prepared/dataset.json"), _read(folder / "scores/scores.json")
    asked, rows = _read(folder / LOGS / "predict.txt"), read_values(folder / "easy/questions.jsonl")
    truths = {row["question"]: row["answer"] for row in rows if row["volume"] == asked["volume_id"]}
    values = {
        "title": "What the demo made",
        "counts": prepared["counts"],
        "volume": _picture(folder / "volume.png"),
        "runs": [(name, _read(folder / name / SUMMARY), _picture(folder / name / CURVES)) for name in ("s1", "s2")],
        "trade_offs": scores["trade_offs"],
        "questions": scores["questions"],
        "patients": scores["patients"],
        "answers": [
            (answer, truths.get(answer["question"]), _picture(folder / "overlay" / answer["id"] / PLANES))
            for answer in asked["predictions"]
        ],
        "commands": _read(folder / DONE),
    }
    with write_whole(folder / PAGE) as temporary:
        temporary.write_bytes(render(Path(__file__).with_name("demo.html.j2"), values, {}))
    return folder / PAGE


def _picture(path: Path) -> str:
    return data_url(path.read_bytes(), "image/png")

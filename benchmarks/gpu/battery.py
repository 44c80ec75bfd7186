"""The steps of the battery, each in a process of its own with a time limit; what one of them meets costs itself alone.

    python benchmarks/gpu/battery.py [--size 3b|tiny] [--device cuda|cpu] [--output DIR] [--only parity,bench]

DIR/STEP.json    {"step", "ok", "seconds", "error", "found"}, of every step, also of one that failed
DIR/bench.png    the picture of `photon bench`

DIR is $OUT, else benchmarks/results/NAME-OF-CARD. battery.sh sets up what is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KILLED_S = 5  # after its time a step has so long to end
SLOWER = 3  # times as long on a CPU
STEPS = {"parity": 70, "resume": 60, "bench": 150, "train": 120, "prefix": 60, "kernels": 60}  # seconds at most


def main() -> int:
    """Run the steps; 0 if all of them went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("3b", "tiny"), default="3b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default=",".join(STEPS))
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    output = args.output or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / name_of_card(args.device))
    output.mkdir(parents=True, exist_ok=True)
    chosen = args.only.split(",")
    if unknown := set(chosen) - STEPS.keys():
        parser.error(f"--only: expected some of {', '.join(STEPS)}, found {', '.join(unknown)}")
    results = [run(step, args.size, args.device, output) for step in STEPS if step in chosen]
    print(f"{output}: {sum(result['ok'] for result in results)} of {len(results)} steps went well")
    return 0 if all(result["ok"] for result in results) else 1


def name_of_card(device: str) -> str:
    """Return the GPU's name, fit for a folder. Nothing here may start CUDA: the steps are other processes."""
    if device == "cpu":
        return "cpu"
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return re.sub(r"\W+", "-", found).strip("-").lower() or "gpu"


def run(step: str, size: str, device: str, output: Path) -> dict[str, Any]:
    """Return the result of a step, which it has written, or which is written for it."""
    path = output / f"{step}.json"
    path.unlink(missing_ok=True)
    print(f"--- {step}", flush=True)
    started = time.perf_counter()
    # A fork of what has imported torch already saves seconds; CUDA does not live through one.
    if device == "cpu":
        import photon_train.bench  # noqa: F401
    process = get_context("fork" if device == "cpu" else "spawn").Process(target=attempt, args=(step, size, output))
    process.start()
    limit_s = STEPS[step] * (SLOWER if device == "cpu" else 1)
    process.join(limit_s)
    if process.is_alive():
        end(process)
    if not path.exists():
        error = f"expected to end within {limit_s} s" if process.exitcode == -signal.SIGKILL else "ended"
        write(path, step, time.perf_counter() - started, {}, f"{error}, found exit code {process.exitcode}")
    result: dict[str, Any] = json.loads(path.read_text())
    print(f"{step}: {'ok' if result['ok'] else result['error']}, {time.perf_counter() - started:.0f} s", flush=True)
    return result


def end(process: Any) -> None:
    """Kill the step and what it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.join(KILLED_S)


def attempt(step: str, size: str, output: Path) -> None:
    """Make a step, in its own process, and write its result."""
    os.setsid()
    sys.path[:0] = [str(HERE), str(ROOT / "tests")]
    started, error, found = time.perf_counter(), "", dict[str, Any]()
    try:
        import steps  # late: it imports torch

        make: Callable[[str, Path], dict[str, Any]] = getattr(steps, step)
        found = make(size, output)
    except BaseException as problem:  # the edge of a work item, which records it
        error = "".join(traceback.format_exception(problem))[-3000:]
    write(output / f"{step}.json", step, time.perf_counter() - started, found, error)


def write(path: Path, step: str, seconds: float, found: dict[str, Any], error: str) -> None:
    """Write the result of a step."""
    wrong = found.get("wrong", [])
    error = error or "; ".join(wrong)
    result = {"step": step, "ok": not error, "seconds": round(seconds, 1), "error": error, "found": found}
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())

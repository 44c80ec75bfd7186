"""Answering volumes of one question each: one at a time, and so many in a batch.

    python benchmarks/predict.py                                   the tiny model on a CPU
    python benchmarks/predict.py --size 3b --device cuda           random weights of the published size
    python benchmarks/predict.py --model-shape 70,140,140          a smaller grid: less to compute, as much to start
    python benchmarks/predict.py --layers 36 --repeats 0           operations alone, of as many layers as 3b

The bound of small batches on a GPU is the number of operations that are started, so they are counted per question,
which a CPU can do as well. `wait` is the share of the time in which the model had no volume to go on with. Batch sizes
are interleaved; the median of --repeats. Nothing ends an answer before --tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tables import print_place, print_table
from torch.utils._python_dispatch import TorchDispatchMode

from photon_train.answering.generation import AnswerSettings
from photon_train.answering.loading import load_predictor
from photon_train.answering.manifest import predict_rows
from photon_train.measuring import question_rows, random_model, write_random_store
from photon_train.tiny import tiny


class Counted(TorchDispatchMode):
    """Counts the operations that torch starts."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one more."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def run(predictor: Any, rows: list[dict[str, Any]], folder: Path, batch: int) -> tuple[float, float, int]:
    """Return seconds, the share of them spent waiting, and the tokens of all answers."""
    path = folder / f"{batch}-{time.monotonic_ns()}.jsonl"
    predictor.batch = batch
    start = time.perf_counter()
    outcome = predict_rows(predictor, rows, path)
    seconds = time.perf_counter() - start
    assert not outcome.failed, outcome.failed
    return seconds, outcome.waited_s / seconds, outcome.answered


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "3b"), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model-shape", default="140,280,280")
    parser.add_argument("--volumes", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--layers", type=int, default=4, help="of the tiny model's decoder; 36 has as many as 3b")
    args = parser.parse_args()
    shape = tuple(int(n) for n in args.model_shape.split(","))
    print_place("torch", "transformers")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stores = [write_random_store(folder, shape, number) for number in range(args.volumes)]
        rows = [question_rows(store, 1, 1)[0] | {"id": f"v{number}"} for number, store in enumerate(stores)]
        if args.size == "tiny":
            layers = {"num_hidden_layers": args.layers, "its_layer": args.layers // 4 - (args.layers > 4)}
            tiny(folder / "model", stage=2, model_shape_zyx=shape, **layers)
        else:
            model, processor = random_model("3b", model_shape_zyx=shape)
            model.save_pretrained(folder / "model")
            processor.save_pretrained(folder / "model")
        settings = AnswerSettings(max_new_tokens=args.tokens)
        predictor = load_predictor(str(folder / "model"), settings, device=args.device)
        predictor.model.generation_config.eos_token_id = []
        sizes = [int(n) for n in args.batches.split(",")]
        found: dict[int, list[tuple[float, float, int]]] = {size: [] for size in sizes}
        for _ in range(args.repeats + 1):
            for size in sizes:
                found[size].append(run(replace(predictor), rows, folder, size))
        counts = {}
        for size in sizes:
            with Counted() as counted:
                run(replace(predictor), rows, folder, size)
            counts[size] = counted.count / len(rows)
        timed = {size: found[size][1:] or found[size] for size in sizes}
        first = statistics.median(len(rows) / seconds for seconds, _, _ in timed[sizes[0]])
        lines = []
        for size in sizes:
            rate = statistics.median(len(rows) / seconds for seconds, _, _ in timed[size])
            waited = statistics.median(share for _, share, _ in timed[size])
            fewer = counts[sizes[0]] / counts[size]
            cells = [f"{rate:.2f}", f"{rate / first:.1f}", f"{counts[size]:,.0f}", f"{fewer:.1f}", f"{waited:.1%}"]
            lines.append([str(size), *cells])
        header = ["batch", "questions/s", "times as many", "operations per question", "times fewer", "wait"]
        print_table(header, lines)


if __name__ == "__main__":
    main()

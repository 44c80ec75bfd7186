"""Damage files, kill runs, fill the disk, and count what is lost or wrong in silence.

    python benchmarks/faults.py                        # 1,000 trials; prints a table, exit code 1 where one was silent
    python benchmarks/faults.py --trials 60 --seed 7   # a short one
    python benchmarks/faults.py --what damage,swap     # some kinds: damage, swap, kill, disk

Ctrl-C ends it with the table of what was tried so far.

A small folder is prepared, a tiny model is trained for some steps, and questions are answered. Each trial damages a
copy of one file (a bit flipped; cut, emptied, grown, deleted, a folder in its place), exchanges files or stores of two
volumes, kills a command at a random moment, or leaves it a random rest of a disk. Then who would use the file is asked:

    damage, swap of OUT      `verify`, and what training and predict read
    damage of a checkpoint   `--resume`, and what loads weights
    kill, disk               the same command again: its end has to be that of a run that nobody disturbed

noticed   an error that says so. harmless   everything that is read is as it was. silent   neither: the fault was not
told, or a command ended well without its work. traceback   told by an exception that is no sentence of ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from same_results import sha256, without_times

from photon_data import open_masks, open_volume
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_pipelines.verify import verify_output

SMALL = "--set shape_zyx=56,56,56 --set spacing_mm=6,6,6 --set model_shape_zyx=28,56,56"
TRAIN = "--set max_steps=4 --set save_every=1 --set groups_per_step=1 --set workers=0 --set keep_checkpoints=2"
MEMORY_BYTES = 12 << 30
SENTENCES = (UsageError, OSError, ValueError)
OUTCOMES = ("noticed", "harmless", "silent", "traceback")
OUTPUTS = {"prepare": "out", "train": "run", "predict": "answers", "eval": "scores"}


# The folder that is damaged


def run(command: list[str], **options: object) -> int:
    """Run `photon-data ...` or `photon ...` in silence; return its exit code."""
    return subprocess.run(_process(command), capture_output=True, check=False, **options).returncode  # type: ignore[call-overload]


def _process(command: list[str]) -> list[str]:
    entry = {"photon-data": "photon_cli.data", "photon": "photon_cli.photon"}[command[0]]
    return [sys.executable, "-c", f"from {entry} import main; main()", *command[1:]]


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the commands that make everything, by what they make."""
    rows = str(folder / "out/manifests/train.jsonl")
    last = str(folder / "run/checkpoint-4")
    predictions = str(folder / "answers/predictions.jsonl")
    phantoms = str(folder / "phantoms")
    made = {
        "prepare": f"photon-data prepare {phantoms}/scans {folder}/out --questions {phantoms}/questions.jsonl"
        f" --masks {phantoms}/masks/{{name}}/*.nii.gz --split train=1 --workers 2 {SMALL}",
        "train": f"photon train tiny-s2 --model {folder}/tiny --data {rows} --output {folder}/run --resume auto"
        f" {TRAIN}",
        "predict": f"photon predict --model {last} --data {rows} --output {predictions} --max-new-tokens 4",
        "eval": f"photon eval vqa --predictions {predictions} --data {rows} --output {folder}/scores",
    }
    return {name: command.split() for name, command in made.items()}


def make(folder: Path) -> None:
    """Make phantoms, stores, a model, a run, predictions and scores."""
    tiny = ["photon", "init", "--tiny", str(folder / "tiny"), "--stage", "2", "--model-shape", "28,56,56"]
    phantom = ["photon-data", "phantom", str(folder / "phantoms"), "--n", "3", "--size", "64", "--easy"]
    for command in (phantom, tiny, *commands(folder).values()):
        if code := run(command):
            raise SystemExit(f"expected `{' '.join(command)}` to succeed, found exit code {code}")


# Damage and swap


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    """Keep a part from the start on."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def grow(path: Path, rng: random.Random) -> None:
    """Add some bytes at the end."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def folder_in_place(path: Path, rng: random.Random) -> None:
    """Have a folder where the file was."""
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "flip": flip,
    "cut": cut,
    "grow": grow,
    "empty": lambda path, rng: path.write_bytes(b""),
    "delete": lambda path, rng: path.unlink(),
    "folder": folder_in_place,
}


@contextmanager
def restored(*paths: Path) -> Iterator[None]:
    """Keep files or folders as they are: whatever the block does to them is undone."""
    with tempfile.TemporaryDirectory() as aside:
        for number, path in enumerate(paths):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, Path(aside, str(number)))
        yield
        for number, path in enumerate(paths):
            kept = Path(aside, str(number))
            if path.exists():
                (shutil.rmtree if path.is_dir() else Path.unlink)(path)  # type: ignore[operator]
            (shutil.copytree if kept.is_dir() else shutil.copy2)(kept, path)


def outcome(use: Callable[[], object], before: object = None) -> str:
    """Return how a user of the files fares: "noticed", "harmless", "silent" or "traceback"."""
    try:
        return "harmless" if use() == before else "silent"
    except (*SENTENCES, SafetensorError):
        return "noticed"
    except Exception as error:
        print(f"traceback: {type(error).__name__}: {str(error)[:200]}")
        return "traceback"


def damage(folder: Path, rng: random.Random, trials: int) -> Iterator[tuple[str, str]]:
    """Yield (what was damaged, outcome): files of OUT and of the last checkpoint, chosen at random, one at a time."""
    out, checkpoint = folder / "out", folder / "run/checkpoint-4"
    files = sorted(path for root in (out, checkpoint) for path in root.rglob("*") if is_kept(path))
    before = {"read": read(out), "load": load(checkpoint), "resume": resume(folder)}
    for _ in range(trials):
        path, how = rng.choice(files), rng.choice(list(DAMAGES))
        if not path.stat().st_size and how in ("flip", "cut", "empty"):
            continue
        with restored(path):
            DAMAGES[how](path, rng)
            if path.is_relative_to(out):
                yield f"OUT, {how}: verify", outcome(lambda: verify(out))
                if {"volumes", "masks"} & {*path.relative_to(out).parts}:
                    yield f"OUT, {how}: read", outcome(lambda: read(out), before["read"])
            else:
                yield f"checkpoint, {how}: load", outcome(lambda: load(checkpoint), before["load"])
                yield f"checkpoint, {how}: resume", outcome(lambda: resume(folder), before["resume"])


def swap(folder: Path, rng: random.Random, trials: int) -> Iterator[tuple[str, str]]:
    """Yield (what was exchanged, outcome): a file, or all of them, of the stores of two volumes."""
    out = folder / "out"
    before = read(out)
    for _ in range(trials):
        one, other = rng.sample(sorted((out / rng.choice(["volumes", "masks"])).iterdir()), 2)
        parts = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
        part = rng.choice([Path(), *parts])
        if part != Path() and (one / part).read_bytes() == (other / part).read_bytes():
            continue  # an exchange that changes nothing
        with restored(one, other):
            aside = one.with_name(".aside")
            (one / part).rename(aside)
            (other / part).rename(one / part)
            aside.rename(other / part)
            what = f"{one.parent.name} {'store' if part == Path() else 'file'}"
            yield f"OUT, swapped {what}: verify", outcome(lambda: verify(out))
            yield f"OUT, swapped {what}: read", outcome(lambda: read(out), before)


def is_kept(path: Path) -> bool:
    """Tell whether somebody reads this file again."""
    return path.is_file() and path.name != ".lock"


def verify(out: Path) -> bool:
    """Return True; ValueError where verify finds something."""
    if problems := list(verify_output(Location(str(out)))):
        raise ValueError(problems[0])
    return True


def read(out: Path) -> dict[str, str]:
    """Return the hashes of the volumes, and of their masks, that training, predict and eval would read."""
    from photon_train.rows import read_train_rows
    from photon_train.training.plan import rows_with_stores

    found = {}
    for row in rows_with_stores(read_train_rows([out / "manifests/train.jsonl"]), "stop"):
        for grid in ("volume", "model"):
            volume, masks = open_volume(row.videos[0], grid, id=row.volume_id), open_masks(row.videos[0], out, grid)
            hashes = [hashlib.sha256(array).hexdigest() for array in (volume.numpy(), masks.layers_lzyx[...])]
            found[f"{row.volume_id}/{grid}"] = f"{volume.geometry!r} {masks.geometry!r} {masks.labels} {hashes}"
    return found


def load(checkpoint: Path) -> dict[str, str]:
    """Return the hashes of the weights that predict and eval would use."""
    from photon_train import PhotonForConditionalGeneration

    model = PhotonForConditionalGeneration.from_pretrained(checkpoint)
    return {name: hashlib.sha256(weight.detach().numpy()).hexdigest() for name, weight in model.state_dict().items()}


def resume(folder: Path) -> object:
    """Return the weights, the moments and the position from which `photon train --resume` would go on."""
    from photon_train.training.config import TrainConfig, read_config, with_values
    from photon_train.training.setup import start

    config = with_values(TrainConfig(), read_config(folder / "run/config.json"))
    run = start(config, resume=True)
    moments = [float(value.double().sum()) for state in run.optimizer.state.values() for value in state.values()]
    return [float(weight.detach().double().sum()) for weight in run.model.parameters()], moments, run.state


# Kill and disk


def kill(folder: Path, rng: random.Random, trials: int) -> Iterator[tuple[str, str]]:
    """Yield (which command was killed, outcome): at a random moment, its whole group or its first process alone."""
    seconds: dict[str, float] = {}
    for _ in range(trials):
        name, alone = rng.choice(list(OUTPUTS)), rng.random() < 0.5
        before, command = result(folder, name), commands(folder)[name]
        if name not in seconds:
            with aside(folder, name):
                start = time.monotonic()
                run(command)
                seconds[name] = time.monotonic() - start
        with aside(folder, name):
            mark = f"FAULTS={rng.randrange(10**9)}"
            process = subprocess.Popen(
                _process(command),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "FAULTS": mark.partition("=")[2]},
            )
            time.sleep(rng.uniform(0, seconds[name]))
            process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            yield f"{name}, killed", goes_on(folder, name, command, before, mark)


def goes_on(folder: Path, name: str, command: list[str], before: object, mark: str = "") -> str:
    """Run a command that was stopped to its end; return "noticed" where all is as if nothing had happened."""
    time.sleep(1)
    if left := [pid for pid in Path("/proc").iterdir() if pid.name.isdecimal() and mark and mark in environment(pid)]:
        print(f"silent: {name} was killed, and {len(left)} of its processes live on")
        return "silent"
    if code := run(command):
        print(f"silent: {name} ends with exit code {code} after it was stopped")
        return "silent"
    if [path for path in folder.rglob("*") if path.name.endswith(".partial") or path.name.startswith(".partial")]:
        print(f"silent: {name} leaves unfinished files behind")
        return "silent"
    return "noticed" if result(folder, name) == before else "silent"


def environment(process: Path) -> str:
    """Return the environment of a process, "" of one that has ended."""
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""


def disk(folder: Path, rng: random.Random, trials: int) -> Iterator[tuple[str, str]]:
    """Yield (which command found the disk full, outcome): with a random rest of room, then with enough. Needs root."""
    for _ in range(trials):
        name = rng.choice(list(OUTPUTS))
        before, command, place = result(folder, name), commands(folder)[name], folder / OUTPUTS[name]
        needed = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        with aside(folder, name):
            place.mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={rng.randrange(4096, needed)}", "faults", str(place)]
            if subprocess.run(mount, check=False, capture_output=True).returncode:
                print("disk: not tried, since a small disk can be mounted by root alone")
                return
            try:
                code = run(command)
                if code not in (0, 3):
                    print(f"silent: {name} ends with exit code {code} on a full disk")
                    yield f"{name}, disk full", "silent"
                    continue
                subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
                yield f"{name}, disk full", goes_on(folder, name, command, before)
            finally:
                subprocess.run(["umount", "--lazy", str(place)], check=True)  # after Ctrl-C the command still ends


@contextmanager
def aside(folder: Path, name: str) -> Iterator[None]:
    """Have the output of a command out of the way while the block runs, and back afterwards."""
    place = folder / OUTPUTS[name]
    hidden = place.with_name(f"{place.name} aside")
    place.rename(hidden)
    yield
    shutil.rmtree(place, ignore_errors=True)
    hidden.rename(place)


def result(folder: Path, name: str) -> object:
    """Return what a command has to end with, however often it was stopped: everything but times."""
    place = folder / OUTPUTS[name]
    if name == "prepare":
        files = [path for part in ("volumes", "masks", "questions", "manifests") for path in (place / part).rglob("*")]
    elif name == "train":
        files = list((place / "checkpoint-4").iterdir())
    else:
        return {path.name: without_times(read_rows(path)) for path in (*place.glob("*.json"), *place.glob("*.jsonl"))}
    return {str(path): sha256(path) for path in sorted(files) if is_kept(path) and path.name != "zarr.json"}


def read_rows(path: Path) -> list[object]:
    """Return the rows of a JSON-lines file, in the order of their ids, or the one value of a JSON file."""
    text = path.read_text()
    return sorted(map(json.loads, text.splitlines()), key=str) if path.suffix == ".jsonl" else [json.loads(text)]


KINDS: dict[str, tuple[Callable[[Path, random.Random, int], Iterator[tuple[str, str]]], float]] = {
    "damage": (damage, 0.85),
    "swap": (swap, 0.09),
    "kill": (kill, 0.04),
    "disk": (disk, 0.02),
}


def main() -> None:
    """Print the table; exit code 1 where a trial was silent or ended in a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--what", default=",".join(KINDS), help="kinds of trials, with commas")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))  # damaged numbers may ask for any amount
    chosen = {name: KINDS[name] for name in options.what.split(",")}
    whole = sum(share for _, share in chosen.values())
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        with suppress(KeyboardInterrupt):  # what was tried so far counts
            for name, (trial, share) in chosen.items():
                rng, trials = random.Random(f"{options.seed}{name}"), round(options.trials * share / whole)
                for what, how in trial(folder, rng, trials):
                    table.setdefault(what, Counter())[how] += 1
    print(f"{'':40}" + "".join(f"{how:>10}" for how in ("tried", *OUTCOMES)))
    for what, counts in sorted(table.items()):
        print(f"{what:40}{counts.total():>10}" + "".join(f"{counts[how]:>10}" for how in OUTCOMES))
    total = sum(table.values(), Counter())
    print(f"{'all':40}{total.total():>10}" + "".join(f"{total[how]:>10}" for how in OUTCOMES))
    raise SystemExit(bool(total["silent"] or total["traceback"]))


if __name__ == "__main__":
    main()

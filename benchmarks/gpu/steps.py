"""What each step of the battery does: (size, folder for pictures) -> what was found, with `wrong`, a list of texts.

The tiny size is for machines without a GPU: a coarse grid, few repeats.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from golden import Golden, gradients
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from photon_cli import bench as command
from photon_data.files import jsonl_bytes
from photon_data.phantom import draw_phantom, write_phantom
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_one_scan
from photon_data.recipe import Recipe
from photon_data.resample import aligned_axes
from photon_train import measuring
from photon_train.attention import attends_to_packed
from photon_train.bench import BenchSettings, measure_training, place
from photon_train.bench import bench as measure
from photon_train.measuring import attention, device
from photon_train.scheduling import visual_mask
from photon_train.tiny import tiny
from photon_train.training.config import named_run
from photon_train.training.log import read_log
from photon_train.training.loop import run_steps
from photon_train.training.setup import start

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
PARITY = Path(__file__).parents[2] / "tests" / "parity"
COARSE_ZYX = (42, 84, 84)  # 27 tokens
LOGITS, LOSS, GRADIENT, PREDICTOR = 2e-4, 1e-5, 1e-4, 1e-3  # the parity tests' tolerances
STEPS, SAVED = 4, 2  # of the run that is broken off and goes on


def settings(size: str, **changes: Any) -> BenchSettings:
    """Return what is measured: a short bench of the published shapes, or a shorter one of a coarse grid."""
    few = {"repeats": 2, "new_tokens": 16} if size == "3b" else {"repeats": 1, "new_tokens": 2}
    shape = {} if size == "3b" else {"model_shape_zyx": COARSE_ZYX}
    return BenchSettings(**{"size": size, **few, **shape, **changes})


# Parity: golden numbers in float32, and how far bfloat16 is from them.


def parity(size: str, output: Path) -> dict[str, Any]:
    """Compare losses, logits, keep sets, answers and gradients with golden numbers; then bfloat16 with float32."""
    golden = Golden(PARITY)
    torch.backends.cuda.matmul.allow_tf32 = False
    eager = {"attn_implementation": "eager"}
    with torch.no_grad():
        found = _of_s1(golden, golden.model("s1", **eager).to(device()))
        found |= _of_s2(golden, golden.model("s2", **eager).to(device()))
    found |= _of_training(golden)
    limits = {"logits": LOGITS, "loss": LOSS, "other_tokens": 0, "other_keep_sets": 0}
    limits |= {"gradient": GRADIENT, "predictor_gradient": PREDICTOR}
    wrong = [
        f"{name}: expected at most {limit:g}, found {value:g}"
        for name, value in found.items()
        for kind, limit in limits.items()
        if name.partition(".")[2] == kind and not value <= limit
    ]
    has_kernel = attends_to_packed(device(), torch.bfloat16, 16, 2, 128)  # heads of the 3B model
    if device().type == "cuda" and not has_kernel:
        wrong.append("packed rows: expected a kernel of torch's that is right, found none; training pads them")
    return {
        **place(),
        "float32": found,
        "bfloat16": _bfloat16(golden),
        "attention_gap": _attention_gap(),
        "packed_rows_have_a_kernel": has_kernel,
        "wrong": wrong,
    }


def _on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device()) for name, tensor in tensors.items()}


def _run_of(golden: Golden, case: str, run: str) -> dict[str, Tensor]:
    own = {k.removeprefix(f"{run}."): v for k, v in golden.expected(case).items() if k.startswith(f"{run}.")}
    return _on_device(own)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().float() - theirs.float()).abs().max())


def _of_s1(golden: Golden, model: Any) -> dict[str, float]:
    logits, losses = [], []
    for run in golden.runs("s1_forward"):
        x, e = _on_device(golden.batch(run)), _run_of(golden, "s1_forward", run)
        out, present = model(**x), x["attention_mask"].bool()
        logits.append(_gap(out.logits[present], e["logits"][present]))
        losses.append(_gap(out.loss, e["loss"]))
    return {"s1.logits": max(logits), "s1.loss": max(losses)}


def _of_s2(golden: Golden, model: Any) -> dict[str, float]:
    logits, losses, others, tokens = [], [], 0, 0
    for run in golden.runs("s2_eval_forward"):
        theirs = golden.inputs(run)
        if not (theirs["vision_mask"].any() and theirs["question_mask"].any()):
            continue  # text alone; and text before the volume, of which the reference sees nothing
        e, out = _run_of(golden, "s2_eval_forward", run), model(**_on_device(golden.batch(run)))
        same = out.scheduled.keep_BL.equal(e["presence"])
        others += not same
        losses.append(_gap(out.loss, e["loss"]))
        logits += [_gap(out.logits, e["logits"])] if same else []
    for run in golden.runs("s2_generate"):
        x, e = _on_device(golden.batch(run, "labels")), _on_device(golden.expected("s2_generate"))
        expected = e["new_tokens"] if "new_tokens" in e else _run_of(golden, "s2_generate", run)["new_tokens"]
        ids = model.generate(**x, max_new_tokens=len(expected), do_sample=False, eos_token_id=None)
        tokens += int((ids[0, -len(expected) :] != expected).sum())
    found = {"s2.logits": max(logits), "s2.loss": max(losses), "s2.other_keep_sets": others, "s2.other_tokens": tokens}
    return {name: float(value) for name, value in found.items()}


def _of_training(golden: Golden) -> dict[str, float]:
    """Return the largest differences of losses, and of gradients' norms relative to them, in every phase."""
    meta, losses = golden.meta("s2_train_step"), []
    relative: dict[str, list[float]] = {"gradient": [], "predictor_gradient": []}
    for name, variant in meta["variants"].items():
        model = golden.model("s2", sgp_strict=variant["strict_rules"], attn_implementation="eager").train().to(device())
        predictor = model.model.language_model.layers[model.config.its_layer].atp.predictor
        with torch.no_grad():
            predictor.mlp[-1].bias += variant["predictor_bias_offset"]
        torch.manual_seed(variant["torch_manual_seed"])
        perturbed = torch.tensor([variant["augmentation"]], device=device())
        out = model(
            **_on_device(golden.batch(next(iter(meta["inputs"])))), step=variant["now_step"], perturbed=perturbed
        )
        out.loss.backward()
        losses.append(_gap(out.loss, _run_of(golden, "s2_train_step", name)["loss"]))
        ours = gradients(model)
        for key, norm in variant["grad_norms"].items():
            if norm:
                kind = "predictor_gradient" if ".atp." in key else "gradient"
                relative[kind].append(abs(float(ours[key].norm()) - norm) / norm)
    return {"training.loss": max(losses), **{f"training.{kind}": max(values) for kind, values in relative.items()}}


@torch.no_grad()
def _bfloat16(golden: Golden) -> dict[str, float]:
    """Return how bfloat16 with sdpa differs from float32: logits at the last position, visual tokens kept otherwise."""
    exact, rounded = (golden.model("s2", dtype=dtype).to(device()) for dtype in (torch.float32, torch.bfloat16))
    gaps, others, tokens = [], 0, 0
    for run in golden.runs("s2_eval_forward"):
        x = _on_device(golden.batch(run, "labels"))
        if not (visual_BL := visual_mask(x["input_ids"], exact.config)).any():
            continue
        first, second = (model(**x, logits_to_keep=1) for model in (exact, rounded))
        gaps.append(_gap(first.logits, second.logits) / float(first.logits.abs().max()))
        others += int((first.scheduled.keep_BL ^ second.scheduled.keep_BL)[visual_BL].sum())
        tokens += int(visual_BL.sum())
    return {"relative_logits": max(gaps), "share_kept_otherwise": others / tokens}


@torch.no_grad()
def _attention_gap() -> dict[str, float]:
    """Return how far FlashAttention is from sdpa, in logits relative to the largest; nothing where it is not there."""
    if attention() == "sdpa":
        return {}
    with tempfile.TemporaryDirectory() as name:
        store = measuring.write_random_store(Path(name), COARSE_ZYX)
        subject = measuring.random_subject("tiny", store, model_shape_zyx=COARSE_ZYX, scheduler="uniform")
        ids = [subject.processor.ids(row) for row in measuring.question_rows(store, 1, 1)]
        logits = []
        for name_of_kernel in ("sdpa", attention()):
            subject.model.set_attn_implementation(name_of_kernel)
            inputs = next(measuring.inputs_of(subject, ids, shares=False))
            logits.append(subject.model(**inputs, logits_to_keep=1).logits)
    return {"relative_logits": _gap(*logits) / float(logits[0].abs().max())}


# A run of stage 2 that is broken off and goes on.


def resume(size: str, output: Path) -> dict[str, Any]:
    """Train the tiny model on phantoms, break off after a checkpoint, go on; compare with a run that was not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny(folder / "model", 2, model_shape_zyx=COARSE_ZYX)
        precision = "bf16" if device().type == "cuda" else "fp32"
        common = {"model": str(folder / "model"), "data": (str(_phantoms(folder)),), "track": (), "workers": 0}
        common |= {"precision": precision, "max_steps": STEPS, "groups_per_step": 1, "save_every": SAVED}
        whole, broken = (
            replace(named_run("tiny-s2"), output=str(folder / run), **common) for run in ("whole", "broken")
        )
        run_steps(start(whole, resume=False))
        with suppress(_BrokenOffError):
            run_steps(start(broken, resume=False, callback=_break_off))
        run_steps(start(broken, resume=True))
        first, second = (read_log(Path(config.output)) for config in (whole, broken))
    losses = [(row["loss"], again["loss"]) for row, again in zip(first, second, strict=True)]
    gap = max(abs(a - b) for a, b in losses)
    # The kernels of a GPU add in any order, and bfloat16 rounds what they add up.
    allowed = 0.05 if device().type == "cuda" else 1e-6
    wrong = [] if gap <= allowed else [f"loss after going on: expected within {allowed} of the whole run, found {gap}"]
    return {**place(), "steps": len(second), "loss_gap": gap, "losses": [a for a, _ in losses], "wrong": wrong}


class _BrokenOffError(Exception):
    """Ends a run as a crash would."""


def _break_off(row: dict[str, Any]) -> None:
    if row["step"] == SAVED + 1:  # its checkpoint is behind, and this step is not in it
        raise _BrokenOffError


def _phantoms(folder: Path, count: int = 2) -> Path:
    """Write stores of phantoms whose axes are the grid's, which need no resampler, and their questions as rows."""
    recipe, rows = Recipe(model_shape_zyx=COARSE_ZYX), []
    drawn = (draw_phantom(0, index, 96, easy=True) for index in range(50))
    aligned = (phantom for phantom in drawn if aligned_axes(phantom.scan.geometry) is not None)
    for _, phantom in zip(range(count), aligned, strict=False):
        write_phantom(folder, phantom)
        record = prepare_file(Job(find_one_scan(phantom.scan_path(folder)), str(folder), recipe))
        for number, row in enumerate(phantom.questions[:4]):
            store = str(folder / str(record.store))
            messages = [
                {"role": "user", "content": f"<video>{row['question']}"},
                {"role": "assistant", "content": row["answer"]},
            ]
            rows.append({"id": f"{record.store}-{number}", "videos": [store], "messages": messages})
    manifest = folder / "train.jsonl"
    manifest.write_bytes(jsonl_bytes(rows))
    return manifest


# Times.


def bench(size: str, output: Path) -> dict[str, Any]:
    """`photon bench`, short: one question of every way, and its picture."""
    report = measure(settings(size, questions=(1,)), _say)
    command.draw(report, output / command.PICTURE)
    command.show(report)
    return _checked(report)


def train(size: str, output: Path) -> dict[str, Any]:
    """Optimizer steps of 1, 4 and 8 questions; with activations kept, of 1 and 4 on a shared prefix."""
    ways = ("none", "none-shared", "its", "its-shared") if size == "3b" else ("its", "its-shared")
    report = measure(settings(size, what=("train",), ways=ways, questions=(1, 4, 8)), _say)
    command.show(report)
    if size == "tiny":
        return _checked(report)
    kept = settings(size, what=("train",), ways=("its", "its-shared"), questions=(1, 4), checkpoints=False, repeats=1)
    report["activations_kept"] = measure(kept, _say)["cells"]  # may be out of memory
    return _checked(report)


def prefix(size: str, output: Path) -> dict[str, Any]:
    """Answers to 8 questions, shared or not."""
    ways = ("none", "none-shared", "its", "its-shared") if size == "3b" else ("its", "its-shared")
    what = ("prefill", "decode", "predict")
    report = measure(settings(size, what=what, ways=ways, questions=(8,)), _say)
    command.show(report)
    return _checked(report)


def _say(done: int, total: int, cell: Any) -> None:
    print(f"{done} of {total}: {cell.what}, {cell.way}, K = {cell.questions}: {cell.seconds or cell.error}", flush=True)


def _checked(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report, with what else than memory was wrong."""
    failed = [cell for cell in report["cells"] if cell["error"] and not cell["error"].startswith("out of memory")]
    return {**report, "wrong": [f"{c['what']}, {c['way']}, K = {c['questions']}: {c['error']}" for c in failed]}


def kernels(size: str, output: Path, count: int = 10) -> dict[str, Any]:
    """The ten longest kernels of two training steps with 8 questions on a volume, and of their prefill."""
    on_gpu = device().type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    shape = settings(size).model_shape_zyx
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        store = measuring.write_random_store(Path(name), shape)
        subject = measuring.random_subject(size, store, model_shape_zyx=shape)
        for what in ("prefill", "train"):  # training changes the subject
            with profile(activities=activities) as profiled:
                if what == "train":
                    measure_training(subject, 8, Path(name) / what, shares=True, repeats=1)
                else:
                    measuring.measure_answers(subject, what, 8, shares=True, repeats=1, new_tokens=2)
            found[what] = _longest(profiled, on_gpu, count)
    return {**place(), **found, "wrong": [f"{what}: no kernel was seen" for what, rows in found.items() if not rows]}


def _longest(profiled: Any, on_gpu: bool, count: int) -> list[dict[str, Any]]:
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU  # what launches a kernel counts its time too
    events = [event for event in profiled.key_averages() if event.device_type == kind]
    times_us = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    total, calls = sum(times_us.values()), {event.key: event.count for event in events}
    longest = sorted(times_us, key=times_us.__getitem__, reverse=True)[:count]
    rows = [
        {"kernel": key, "calls": calls[key], "ms": times_us[key] / 1e3, "share": times_us[key] / total}
        for key in longest
    ]
    for row in rows:
        print(f"{row['share']:6.1%} {row['ms']:10.2f} ms {row['calls']:7} {row['kernel'][:100]}")
    return rows

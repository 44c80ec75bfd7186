"""Does it matter which tokens are kept? The tiny model under each scheduler, on phantoms whose evidence is small.

    python benchmarks/phantom_study.py                                   about half an hour on a quiet core
    python benchmarks/phantom_study.py --volumes 960 --dense-steps 6000 --steps 1500 --keeps 0.5,0.25,0.12,0.04

A lesion fills about a sixth of one visual token of 125. The questions: is there one, on which side, how large is it,
and which of two is larger. For each seed a model learns them with all tokens (and, from masks, where organs are: it
starts from nothing). From there it goes on under every scheduler at every share of tokens, through the curriculum, on
the same batches. Then the choice that it holds most likely is scored on phantoms of other patients. Accuracy in points,
the mean over seeds; intervals by patient, with all seeds of a question together. Volumes are painted on the model grid.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tables import print_place, print_table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from photon_data.phantom import CROP_MM, Phantom, draw_phantom, paint
from photon_data.phantom.plan import seeded
from photon_data.phantom.questions import COMPARISONS
from photon_data.volume import Geometry
from photon_train.answering.predictor import score_choices
from photon_train.configuration_photon import IGNORED, SCHEDULER_NAMES
from photon_train.evaluation.metric import draw_patients, estimate_of
from photon_train.kept_tokens import token_boxes
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.scheduling import question_mask, visual_mask
from photon_train.tiny import byte_tokenizer, phantom_texts, tiny_config
from photon_train.training.config import TrainConfig, tiny_s1, tiny_s2
from photon_train.training.grounding import grounding_losses, question_scores
from photon_train.training.setup import choose_trained, parameter_groups, set_learning_rates

# Voxels of 10 x 5 x 5 mm in patches of 7: as many tokens as in the demo, for an eighth of the voxels.
SHAPE, PATCH, TOKENS_ZYX = (35, 70, 70), 7, (5, 5, 5)
KINDS = ("existence", "side", "size", "comparison")
ROWS_PER_STEP = 8


@dataclass(frozen=True)
class Question:
    """A row of a phantom: its volume's number, what is asked, and the share of its organs in each token."""

    volume: int
    patient: str
    kind: str
    row: dict[str, Any]
    answer: str
    choices: tuple[str, ...]
    share_V: Tensor


@dataclass(frozen=True)
class Data:
    """Patches float16[500, 343] of each volume, and the questions about them by split."""

    patches: list[Tensor]
    questions: dict[str, list[Question]]


def fresh_model(seed: int, tokenizer: Any) -> PhotonForConditionalGeneration:
    """Return the tiny model of these patches and no threshold predictor, with random weights as `tiny` draws them."""
    torch.manual_seed(seed)
    config = tiny_config(tokenizer, stage=1, model_shape_zyx=SHAPE)
    vision = config.vision_config
    vision.patch_size = vision.temporal_patch_size = PATCH
    vision.window_size = 4 * PATCH * vision.spatial_merge_size
    model = PhotonForConditionalGeneration(config)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.normal_(0, 0.03)
        for name, parameter in model.model.visual.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def make_data(volumes: int, processor: PhotonProcessor) -> Data:
    """Return so many phantoms, painted on the model grid, with their closed questions."""
    patches, questions = list[Tensor](), dict[str, list[Question]](train=[], val=[], test=[])
    for number in range(volumes):
        phantom = draw_phantom(0, number, small=True)
        hu_zyx, masks = painted(phantom)
        patches.append(processor.patches(hu_zyx)[0].half())
        for line in phantom.questions:
            if line["choices"]:
                message = {"role": "user", "content": f"<video>{line['question']}"}
                row = {"id": line["id"], "messages": [message], "videos": [None]}
                share_V = sum(masks[name] for name in line["organ_masks"])
                share_V = torch.from_numpy(share_V / share_V.sum()).float()
                about = (number, line["patient"], line["kind"], row)
                one = Question(*about, line["answer"], tuple(line["choices"]), share_V)
                questions[line["split"]].append(one)
    return Data(patches, questions)


def painted(phantom: Phantom) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return int16 HU on the model grid, and the voxels of each structure in each token."""
    spacing = tuple(CROP_MM / n for n in SHAPE)
    grid = Geometry.axis_aligned(SHAPE, spacing, phantom.scan.geometry.centre_lps)
    labels = paint(phantom.layers, grid)
    values = np.array([-1000, *(layer.hu for layer in phantom.layers)], np.float32)
    noise = seeded(phantom.slot.seed, "study", phantom.slot.index).standard_normal(SHAPE, np.float32)
    hu_zyx = (values[labels] + phantom.scan.noise_hu * noise).round().astype(np.int16)
    cells = Geometry.axis_aligned(TOKENS_ZYX, tuple(CROP_MM / n for n in TOKENS_ZYX), grid.centre_lps)
    boxes = [np.arange(n) * side // n for n, side in zip(SHAPE, TOKENS_ZYX, strict=True)]
    tokens = token_boxes(cells)[np.ix_(*boxes)]
    masks: dict[str, np.ndarray] = {}
    for value, layer in enumerate(phantom.layers, start=1):
        for name in {layer.structure, layer.within} - {""}:
            counts_V = np.bincount(tokens[labels == value], minlength=cells.shape_zyx[0] ** 3)
            masks[name] = masks.get(name, 0) + counts_V
    return hu_zyx, masks


def batch_of(data: Data, questions: Sequence[Question], processor: PhotonProcessor, answered: bool) -> dict[str, Any]:
    """Return model inputs of a row for each question, padded on the left; with labels where they are answered."""
    ids, labels = [], []
    for one in questions:
        if answered:
            said = {"role": "assistant", "content": one.answer}
            row_L, label_L = processor.training_ids({**one.row, "messages": [*one.row["messages"], said]})
            labels.append(label_L)
        else:
            row_L = processor.ids(one.row)
        ids.append(row_L)
    padded = {"input_ids": (ids, processor.tokenizer.pad_token_id), "labels": (labels, IGNORED)}
    padded["attention_mask"] = ([torch.ones_like(row_L) for row_L in ids], 0)
    inputs: dict[str, Any] = {
        name: pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")
        for name, (rows, value) in padded.items()
        if rows
    }
    inputs["pixel_values_videos"] = torch.cat([data.patches[one.volume] for one in questions]).float()
    inputs["video_grid_thw"] = torch.tensor([[5, 10, 10]] * len(questions))
    inputs["second_per_grid_ts"] = torch.full((len(questions),), 14.0)
    return inputs


def batches(questions: Sequence[Question], seed: int) -> Iterator[list[Question]]:
    """Yield rows for ever, every kind of question as often as the others."""
    draw, kinds = np.random.default_rng(seed), [[q for q in questions if q.kind == kind] for kind in KINDS]
    while True:
        yield [own[draw.integers(len(own))] for own in kinds for _ in range(ROWS_PER_STEP // len(KINDS))]


def train(model: nn.Module, data: Data, processor: PhotonProcessor, run: TrainConfig, steps: int, seed: int) -> float:
    """Train the model, with phases in stage 2, with grounding in stage 1; return its last losses' mean."""
    torch.manual_seed(seed)
    choose_trained(model, run)
    optimizer = torch.optim.AdamW(parameter_groups(model, run), lr=0.0, betas=(0.9, run.adam_beta2))
    layer, qk, losses = model.model.language_model.layers[model.config.its_layer], list[Any](), list[float]()

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        qk[:] = [module.rotated_qk(args[0], kwargs["position_embeddings"])]

    hook = layer.register_forward_pre_hook(record, with_kwargs=True) if run.stage == "s1" else None
    model.train()
    for step, questions in zip(range(steps), batches(data.questions["train"], seed), strict=False):
        inputs = batch_of(data, questions, processor, answered=True)
        phase = {"step": step, "total_steps": steps} if run.stage == "s2" else {}
        loss = model(**inputs, **phase).loss
        losses.append(loss.item())
        if hook:
            loss = loss + grounding(inputs, questions, model.config, qk[0])
        set_learning_rates(optimizer, run, step, steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if hook:
        hook.remove()
    return float(np.mean(losses[-20:]))


def grounding(inputs: dict[str, Any], questions: Sequence[Question], config: Any, qk: Any) -> Tensor:
    """Return the loss that teaches scores to point at the organs that are asked about."""
    ids_BL = inputs["input_ids"]
    visual_BL, question_BL = visual_mask(ids_BL, config), question_mask(ids_BL, config)
    score_BL = question_scores(*qk, question_BL & inputs["attention_mask"].bool(), visual_BL)
    share_BV = torch.stack([one.share_V for one in questions])
    return grounding_losses(score_BL, visual_BL, torch.zeros_like(score_BL).masked_scatter(visual_BL, share_BV)).mean()


@torch.no_grad()
def score(model: Any, data: Data, processor: PhotonProcessor) -> tuple[dict[str, float], float]:
    """Return 1 or 0 by question of the test split, and the mean share of tokens kept."""
    model.eval()
    right, kept, questions = dict[str, float](), list[float](), data.questions["test"]
    for start in range(0, len(questions), ROWS_PER_STEP):
        part = questions[start : start + ROWS_PER_STEP]
        ids = [[_answer_ids(one, choice, processor) for choice in one.choices] for one in part]
        values, scheduled = score_choices(model, batch_of(data, part, processor, answered=False), ids)
        for one, each in zip(part, values, strict=True):
            right[one.row["id"]] = float(one.choices[int(np.argmax(each))] == one.answer)
        share = (
            1.0 if scheduled is None else scheduled.selection.keep_BL.sum().item() / (math.prod(TOKENS_ZYX) * len(part))
        )
        kept += [share] * len(part)
    return right, float(np.mean(kept))


def _answer_ids(question: Question, choice: str, processor: PhotonProcessor) -> Tensor:
    said = {"role": "assistant", "content": choice}
    ids_L, label_L = processor.training_ids({**question.row, "messages": [*question.row["messages"], said]})
    return ids_L[label_L != IGNORED]


def under(scheduler: str, share: float) -> dict[str, Any]:
    """Return the settings that keep about this share: ITS by its band, nucleus by its mass, the others exactly."""
    settings: dict[str, Any] = {"scheduler": scheduler, "keep_ratio": share, "nucleus_mass": share}
    settings |= {"soft_start": 0.1, "hard_start": 0.3, "flip_start": 0.9}
    return settings | {"band_low": 0.6 * share, "band_high": share, "initial_threshold": 0.45}


def estimate(data: Data, by_seed: Sequence[dict[str, float]], kinds: Sequence[str]) -> str:
    """Return the accuracy with its interval by patient, all seeds of a question together."""
    questions = [one for one in data.questions["test"] if one.kind in kinds]
    means = [float(np.mean([right[one.row["id"]] for right in by_seed])) for one in questions]
    patients = draw_patients([one.patient for one in questions], 1000, seed=0)
    (mean_W,) = patients.means([(mean,) for mean in means], [one.patient for one in questions])
    value, low, high = estimate_of(mean_W)
    return f"{value:.0f} ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=240)
    parser.add_argument("--dense-steps", type=int, default=800, help="with all tokens, for each seed")
    parser.add_argument("--steps", type=int, default=150, help="under each scheduler, for each seed and share")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keeps", default="0.25,0.04")
    parser.add_argument("--schedulers", default=",".join(SCHEDULER_NAMES))
    args = parser.parse_args()
    set_verbosity_error()  # the fresh threshold predictor is no news
    disable_progress_bar()
    keeps, begun = [float(keep) for keep in args.keeps.split(",")], time.monotonic()
    found: dict[tuple[str, float], list[tuple[dict[str, float], float]]] = {}
    with TemporaryDirectory(prefix="photon-") as name:
        folder = Path(name)
        tokenizer = byte_tokenizer([*phantom_texts(), *COMPARISONS])
        processor = PhotonProcessor(tokenizer, fresh_model(0, tokenizer).config)
        data = make_data(args.volumes, processor)
        numbers = ", ".join(f"{len(own)} {split}" for split, own in data.questions.items())
        print(f"questions: {numbers}; {time.monotonic() - begun:.0f} s", flush=True)
        for seed in range(args.seeds):
            model = fresh_model(seed, tokenizer)
            loss = train(model, data, processor, tiny_s1(), args.dense_steps, seed)
            model.save_pretrained(folder / f"dense-{seed}")
            right, _ = score(model, data, processor)
            print(f"seed {seed}, dense: loss {loss:.3f}, {100 * np.mean([*right.values()]):.1f} points", flush=True)
            for scheduler in args.schedulers.split(","):
                for share in keeps if scheduler != "none" else [1.0]:
                    dense = folder / f"dense-{seed}"
                    pruned = PhotonForConditionalGeneration.from_pretrained(dense, stage=2, **under(scheduler, share))
                    train(pruned, data, processor, tiny_s2(), args.steps, seed)
                    found.setdefault((scheduler, share), []).append(score(pruned, data, processor))
                    right, kept = found[scheduler, share][-1]
                    points = 100 * np.mean([*right.values()])
                    took = f"{time.monotonic() - begun:.0f} s"
                    print(f"seed {seed}, {scheduler} {share}: {points:.1f} points, {kept:.1%} kept, {took}", flush=True)
    print_place("torch", "transformers")
    rows = []
    for (scheduler, share), results in found.items():
        rights, kepts = zip(*results, strict=True)
        cells = [estimate(data, rights, [kind]) for kind in KINDS] + [estimate(data, rights, KINDS)]
        rows.append([scheduler, f"{share:.0%}", f"{np.mean(kepts):.1%}", *cells])
    print_table(["scheduler", "asked to keep", "kept", *KINDS, "all"], rows)


if __name__ == "__main__":
    main()

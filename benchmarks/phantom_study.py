"""Does it matter which tokens are kept? The tiny model under each scheduler, on phantoms whose evidence is small.

    python benchmarks/phantom_study.py study           an hour of a quiet core; the same again goes on from there
    python benchmarks/phantom_study.py study --keeps 0.25,0.04 --seeds 2

A lesion fills about a sixth of one visual token of 125. The questions: is there one, on which side, how large is it,
and which of two is larger. For each seed a model learns them with all tokens. It starts from nothing, so it is shown
where lesions are: a linear probe on the visual tokens, thrown away afterwards, learns to point at them. No score that a
scheduler reads is taught (--teach-scores: those of `its` are, as grounding does, and there is no probe). From there it
goes on under every scheduler at every share of tokens, through the curriculum, on the same batches. Then the choice
that it holds most likely is scored on phantoms of other patients; val is for choosing settings. Accuracy in points, the
mean over seeds; intervals by patient, with all seeds of a question together.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tables import print_place, print_table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from photon_data.phantom import CROP_MM, Phantom, draw_phantom, paint
from photon_data.phantom.plan import SMALL_FINDINGS, seeded
from photon_data.phantom.questions import COMPARISONS
from photon_data.volume import Geometry
from photon_train.answering.generation import score_choices
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
# In the window of soft tissue and bone a patch of air is 0 and a lesion 1: with each volume's own minimum and maximum,
# every token would tell by its brightness whether there is a lesion anywhere.
WINDOW_HU = (0.0, 1000.0)
ROWS_PER_STEP = {"existence": 2, "side": 3, "size": 2, "comparison": 1}
KINDS, LESIONS = tuple(ROWS_PER_STEP), tuple(finding.name for finding in SMALL_FINDINGS)
ROWS_AT_ONCE = 16  # in scoring


@dataclass(frozen=True)
class Question:
    """A row of a phantom: its volume's number, what is asked, and the lesions whose evidence decides."""

    volume: int
    patient: str
    row: dict[str, Any]
    answer: str
    choices: tuple[str, ...]
    kind: str
    lesions: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """Patches float16[500, 343] and lesions of each volume, and the questions about them by split.

    lesions: of each that the volume shows, its voxels in each token, float32[V].
    """

    patches: list[Tensor]
    lesions: list[dict[str, Tensor]]
    questions: dict[str, list[Question]]


class Result(NamedTuple):
    """What a model got right (1 or 0), by question, and the mean share of tokens and of the asked lesions it kept."""

    right: dict[str, float]
    kept: float
    evidence: float


def fresh_model(seed: int, tokenizer: Any, its_layer: int) -> PhotonForConditionalGeneration:
    """Return the tiny model of these patches and no threshold predictor, with random weights as `tiny` draws them."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"model_shape_zyx": SHAPE, "intensity": "window", "window_hu": WINDOW_HU}
    config = tiny_config(tokenizer, stage=1, its_layer=its_layer, **settings)
    vision = config.vision_config
    vision.patch_size = vision.temporal_patch_size = PATCH
    vision.window_size = 4 * PATCH * vision.spatial_merge_size
    model = PhotonForConditionalGeneration(config)
    with torch.no_grad():
        model.model.visual.patch_embed.proj.weight.normal_(0, 0.06)
        for name, parameter in model.model.visual.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def make_data(volumes: int, processor: PhotonProcessor) -> Data:
    """Return so many phantoms, painted on the model grid, with their closed questions."""
    data = Data([], [], {"train": [], "val": [], "test": []})
    for number in range(volumes):
        phantom = draw_phantom(0, number, small=True)
        hu_zyx, lesions = painted(phantom)
        data.patches.append(processor.patches(hu_zyx)[0].half())
        data.lesions.append(lesions)
        for line in phantom.questions:
            if line["choices"]:
                message = {"role": "user", "content": f"<video>{line['question']}"}
                row = {"id": line["id"], "messages": [message], "videos": [None]}
                asked = tuple(lesions) if line["kind"] == "comparison" else (line["lesion"],)
                answers = (line["answer"], tuple(line["choices"]))
                one = Question(number, line["patient"], row, *answers, line["kind"], asked)
                data.questions[line["split"]].append(one)
    return data


def painted(phantom: Phantom) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Return int16 HU on the model grid, and how many voxels of each lesion lie in each token."""
    spacing = tuple(CROP_MM / n for n in SHAPE)
    grid = Geometry.axis_aligned(SHAPE, spacing, phantom.scan.geometry.centre_lps)
    labels = paint(phantom.layers, grid)
    values = np.array([-1000, *(layer.hu for layer in phantom.layers)], np.float32)
    noise = seeded(phantom.slot.seed, "study", phantom.slot.index).standard_normal(SHAPE, np.float32)
    hu_zyx = (values[labels] + phantom.scan.noise_hu * noise).round().astype(np.int16)
    cells = Geometry.axis_aligned(TOKENS_ZYX, tuple(CROP_MM / n for n in TOKENS_ZYX), grid.centre_lps)
    boxes = [np.arange(n) * side // n for n, side in zip(SHAPE, TOKENS_ZYX, strict=True)]
    tokens = token_boxes(cells)[np.ix_(*boxes)]
    lesions = {}
    for value, layer in enumerate(phantom.layers, start=1):
        if layer.within:
            counts_V = np.bincount(tokens[labels == value], minlength=math.prod(TOKENS_ZYX))
            lesions[layer.structure] = torch.from_numpy(counts_V).float()
    return hu_zyx, lesions


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
    """Yield rows for ever, of every kind of question its number."""
    draw, kinds = np.random.default_rng(seed), {kind: [q for q in questions if q.kind == kind] for kind in KINDS}
    while True:
        yield [
            kinds[kind][draw.integers(len(kinds[kind]))] for kind, rows in ROWS_PER_STEP.items() for _ in range(rows)
        ]


def train(
    model: Any, data: Data, processor: PhotonProcessor, run: TrainConfig, steps: int, seed: int, scores: bool = False
) -> float:
    """Train the model, with phases in stage 2, shown where lesions are in stage 1; return its last losses' mean."""
    torch.manual_seed(seed)
    choose_trained(model, run)
    groups, losses = parameter_groups(model, run), list[float]()
    teacher = Teacher(model, data, scores) if run.stage == "s1" else None
    if teacher:
        groups.append({"params": [*teacher.probe.parameters()], "module": "language_model", "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, run.adam_beta2))
    model.train()
    for step, questions in zip(range(steps), batches(data.questions["train"], seed), strict=False):
        inputs = batch_of(data, questions, processor, answered=True)
        phase = {"step": step, "total_steps": steps} if run.stage == "s2" else {}
        loss = model(**inputs, **phase).loss
        losses.append(loss.item())
        if teacher:
            loss = loss + teacher.loss(inputs, questions)
        set_learning_rates(optimizer, run, step, steps)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if teacher:
        teacher.hook.remove()
    return float(np.mean(losses[-20:]))


class Teacher:
    """Shows a model where all lesions are, by a probe on its visual tokens; or the asked ones, by the scores of its."""

    def __init__(self, model: Any, data: Data, scores: bool) -> None:
        self.config, self.data, self.scores = model.config, data, scores
        self.probe = nn.Linear(model.config.text_config.hidden_size, 1)
        self.layer = model.model.language_model.layers[model.config.its_layer if scores else 1]
        self.hook = self.layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training:
            self.hidden_BLD, self.positions = args[0], kwargs["position_embeddings"]

    def loss(self, inputs: dict[str, Any], questions: Sequence[Question]) -> Tensor:
        """Return the mean cross entropy of softmax over visual tokens with where the lesions are."""
        visual_BL = visual_mask(inputs["input_ids"], self.config)
        if self.scores:
            question_BL = question_mask(inputs["input_ids"], self.config) & inputs["attention_mask"].bool()
            q_BHLd, k_BKLd = self.layer.rotated_qk(self.hidden_BLD, self.positions)
            score_BL = question_scores(q_BHLd, k_BKLd, question_BL, visual_BL)
        else:
            score_BL = self.probe(self.hidden_BLD)[..., 0]
        shown = [evidence_of(self.data, one.volume, one.lesions if self.scores else LESIONS) for one in questions]
        lesions_BL = torch.zeros_like(score_BL).masked_scatter(visual_BL, torch.stack(shown))
        return grounding_losses(score_BL, visual_BL, lesions_BL).mean()


def evidence_of(data: Data, volume: int, names: Sequence[str] = LESIONS) -> Tensor:
    """Return float32[V], the share of these lesions of a volume that lies in each token; 0 where it shows none."""
    own = [voxels_V for name, voxels_V in data.lesions[volume].items() if name in names]
    total_V = sum(own, torch.zeros(math.prod(TOKENS_ZYX)))
    return total_V / total_V.sum().clamp_min(1)


@torch.no_grad()
def score(model: Any, data: Data, processor: PhotonProcessor, split: str) -> Result:
    """Return the result of the model on the questions of a split."""
    model.eval()
    right, kept, evidence, questions = dict[str, float](), list[float](), list[float](), data.questions[split]
    for start in range(0, len(questions), ROWS_AT_ONCE):
        part = questions[start : start + ROWS_AT_ONCE]
        inputs = batch_of(data, part, processor, answered=False)
        ids = [[_answer_ids(one, choice, processor) for choice in one.choices] for one in part]
        logs, scheduled = score_choices(model, inputs, ids)
        visual_BL = visual_mask(inputs["input_ids"], model.config)
        keep_BL = visual_BL if scheduled is None else scheduled.selection.keep_BL
        keep_BV = keep_BL[visual_BL].view(len(part), -1).float()
        for one, log_p, keep_V in zip(part, logs, keep_BV, strict=True):
            best = int(np.argmax([sum(each) for each in log_p]))
            right[one.row["id"]] = float(one.choices[best] == one.answer)
            kept.append(keep_V.mean().item())
            evidence_V = evidence_of(data, one.volume, one.lesions)
            evidence += [(keep_V * evidence_V).sum().item()] if evidence_V.any() else []
    return Result(right, float(np.mean(kept)), float(np.mean(evidence)))


def _answer_ids(question: Question, choice: str, processor: PhotonProcessor) -> Tensor:
    said = {"role": "assistant", "content": choice}
    ids_L, label_L = processor.training_ids({**question.row, "messages": [*question.row["messages"], said]})
    return ids_L[label_L != IGNORED]


def under(scheduler: str, share: float) -> dict[str, Any]:
    """Return the settings that keep about this share: ITS by its band, nucleus by its mass, the others exactly."""
    settings: dict[str, Any] = {"scheduler": scheduler, "keep_ratio": share, "nucleus_mass": share}
    settings["foreground_level"] = 0.01  # of the window: 10 HU, all tissue but lungs and fat
    settings |= {"soft_start": 0.1, "hard_start": 0.3, "flip_start": 0.9}
    return settings | {"band_low": 0.6 * share, "band_high": share, "initial_threshold": 0.45}


def estimate(questions: Sequence[Question], value_by_id: Mapping[str, float]) -> str:
    """Return the mean in points with its interval by patient."""
    patients = [one.patient for one in questions]
    values = [(value_by_id[one.row["id"]],) for one in questions]
    value, low, high = estimate_of(draw_patients(patients, 1000, seed=0).means(values, patients)[0])
    return f"{value:.0f} ({low:.0f} to {high:.0f})"


def print_results(data: Data, lines: Sequence[dict[str, Any]]) -> None:
    """Print accuracy by kind, and by how much `its` is better, question by question.

    That is the run of `its` that kept most nearly as many tokens, which it decides itself.
    """
    by_place: dict[tuple[str, float], list[Result]] = {}
    for line in lines:
        by_place.setdefault((line["scheduler"], line["share"]), []).append(Result(*line["result"]))
    means = {
        place: {id: float(np.mean([result.right[id] for result in results])) for id in results[0].right}
        for place, results in by_place.items()
    }
    kept = {place: float(np.mean([one.kept for one in own])) for place, own in by_place.items()}
    rows, test = [], data.questions["test"]
    for place, own in sorted(means.items(), key=lambda item: -item[0][1]):
        evidence = ", ".join(f"{one.evidence:.0%}" for one in by_place[place])
        cells = [estimate([one for one in test if one.kind == kind], own) for kind in KINDS]
        rivals = [other for other in means if other[0] == "its" != place[0]]
        nearest = min(rivals, key=lambda other: abs(math.log(kept[other] / kept[place])), default=None)
        less = estimate(test, {id: means[nearest][id] - own[id] for id in own}) if nearest else ""
        rows.append([place[0], f"{place[1]:.0%}", f"{kept[place]:.1%}", evidence, *cells, estimate(test, own), less])
    header = ["scheduler", "asked to keep", "kept", "lesion kept, by seed", *KINDS, "all", "its minus this"]
    print(f"seeds: {len({line['seed'] for line in lines})}, test questions: {len(test)}\n")
    print_table(header, rows)


def dense_model(seed: int, data: Data, processor: PhotonProcessor, args: argparse.Namespace) -> Path:
    """Return the folder of the model that has learned with all tokens; train it if it is not there."""
    taught = f"-layer-{args.its_layer}" if args.teach_scores else ""
    path = Path(args.folder) / f"dense-{args.volumes}-{args.dense_steps}{taught}-{seed}"
    if not path.exists():
        model, run = fresh_model(seed, processor.tokenizer, args.its_layer), replace(tiny_s1(), lr_patch_embedding=2e-4)
        loss = train(model, data, processor, run, args.dense_steps, seed, args.teach_scores)
        right = score(model, data, processor, "val").right
        each = [estimate([one for one in data.questions["val"] if one.kind == kind], right) for kind in KINDS]
        numbers = ", ".join(f"{kind} {one}" for kind, one in zip(KINDS, each, strict=True))
        print(f"seed {seed}, all tokens, val: {numbers}; loss {loss:.3f}", flush=True)
        model.save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of models and results; what is there is not made again")
    parser.add_argument("--volumes", type=int, default=1200)
    parser.add_argument("--dense-steps", type=int, default=2000, help="with all tokens, for each seed")
    parser.add_argument("--steps", type=int, default=250, help="under each scheduler, for each seed and share")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--its-layer", type=int, default=0, help="after which tokens are dropped")
    parser.add_argument("--teach-scores", action="store_true", help="of its, where the asked lesions are; no probe")
    parser.add_argument("--keeps", default="0.5,0.25,0.12,0.04")
    parser.add_argument("--schedulers", default=",".join(SCHEDULER_NAMES))
    args = parser.parse_args()
    set_verbosity_error()  # the fresh threshold predictor is no news
    disable_progress_bar()
    begun = time.monotonic()
    tokenizer = byte_tokenizer([*phantom_texts(), *COMPARISONS])
    processor = PhotonProcessor(tokenizer, fresh_model(0, tokenizer, args.its_layer).config)
    data = make_data(args.volumes, processor)
    args.folder.mkdir(parents=True, exist_ok=True)
    file = args.folder / "results.jsonl"
    settings = [args.volumes, args.dense_steps, args.steps, args.its_layer, args.teach_scores]
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    lines = [line for line in lines if line["settings"] == settings]
    print_place("torch", "transformers")
    for seed in range(args.seeds):
        dense = dense_model(seed, data, processor, args)
        for scheduler in args.schedulers.split(","):
            for share in [float(keep) for keep in args.keeps.split(",")] if scheduler != "none" else [1.0]:
                place = {"settings": settings, "seed": seed, "scheduler": scheduler, "share": share}
                if any(place.items() <= line.items() for line in lines):
                    continue
                chosen = under(scheduler, share) | {"its_layer": args.its_layer}
                model = PhotonForConditionalGeneration.from_pretrained(dense, stage=2, **chosen)
                train(model, data, processor, tiny_s2(), args.steps, seed)
                result = score(model, data, processor, "test")
                lines.append({**place, "result": result})
                with file.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
                points, took = 100 * np.mean([*result.right.values()]), time.monotonic() - begun
                print(f"seed {seed}, {scheduler} {share}: {points:.1f} points, {took:.0f} s", flush=True)
        print_results(data, lines)


if __name__ == "__main__":
    main()

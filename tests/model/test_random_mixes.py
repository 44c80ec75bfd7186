"""Rows of a random batch equal the rows alone: any layout of turns, 0 to 2 volumes of any grid, either padding."""

import itertools
import random
from typing import Any

import pytest
import torch
from batches import batch_of, prompts_of
from golden import Golden, gradients
from torch import Tensor
from torch.testing import assert_close

from photon_train.pruners import SCHEDULERS

LAYOUTS = ("after", "before", "around", "turns")


def random_row(golden: Golden, model: Any, rng: random.Random) -> dict[str, Tensor]:
    vision, tokens = model.config.vision_config, golden.tokens
    merge, start, end = vision.spatial_merge_size, tokens["im_start"], tokens["im_end"]
    grids = [
        (rng.randint(1, 3), merge * rng.randint(1, 4), merge * rng.randint(1, 4))
        for _ in range(rng.choice([0, 1, 1, 2]))
    ]
    volumes = [
        [tokens["vision_start"], *[tokens["video"]] * (t * h * w // merge**2), tokens["vision_end"]]
        for t, h, w in grids
    ]

    def words(low: int, high: int) -> list[int]:
        return [rng.randint(20, 100) for _ in range(rng.randint(low, high))]

    def user(*parts: list[int]) -> list[int]:
        return [start, 11, 7, *itertools.chain(*parts), end, 7]

    match rng.choice(LAYOUTS):
        case "after":
            ids = user(*volumes, words(0, 8))
        case "before":
            ids = user(words(1, 8), *volumes)
        case "around":
            ids = user(words(1, 4), *volumes, words(1, 4))
        case "turns":
            ids = [*user(words(2, 8)), *itertools.chain(*(user(volume, words(2, 8)) for volume in volumes))]
    prompt = [*ids, *(user(words(1, 4)) if rng.random() < 0.3 else []), start, 12, 7]
    answer = [*words(1, 5), end]
    row = {"input_ids": torch.tensor([prompt + answer]), "labels": torch.tensor([[-100] * len(prompt) + answer])}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    if grids:
        count = sum(t * h * w for t, h, w in grids)
        row["pixel_values_videos"] = torch.rand(count, vision.temporal_patch_size * vision.patch_size**2)
        row["video_grid_thw"] = torch.tensor(grids)
        row["second_per_grid_ts"] = torch.full((len(grids),), 14.0)
    return row


def prompt_of(row: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = row["input_ids"][:, : int((row["labels"] == -100).sum())]
    return {k: v for k, v in row.items() if k != "labels"} | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_random_mix_equals_its_rows(golden: Golden, scheduler: str) -> None:
    model = golden.model("s2", scheduler=scheduler, band_low=0.8, band_high=0.8)
    rng = random.Random(scheduler)
    torch.manual_seed(5)
    for side in ("left", "right", "left"):
        rows = [random_row(golden, model, rng) for _ in range(3)]
        check_logits(model.eval(), rows, batch_of(rows, side))
        check_generation(model, [prompt_of(row) for row in rows], side)
        check_gradients(model.train(), rows, batch_of(rows, side), rng)


@torch.no_grad()
def check_logits(model: Any, rows: list[dict[str, Tensor]], batch: dict[str, Tensor]) -> None:
    out = model(**batch)
    for i, row in enumerate(rows):
        alone, real = model(**row), batch["attention_mask"][i].bool()
        here = real if out.scheduled is None else out.scheduled.kept.mask_BM[i]
        assert_close(out.logits[i, here], alone.logits[0], rtol=0, atol=2e-5)
        if alone.scheduled is not None:
            assert out.scheduled.keep_BL[i, real].equal(alone.scheduled.keep_BL[0])


def check_generation(model: Any, prompts: list[dict[str, Tensor]], side: str) -> None:
    found = model.generate(**prompts_of(prompts, side), max_new_tokens=4, do_sample=False)
    for together, prompt in zip(found, prompts, strict=True):
        alone = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert together[-4:].tolist() == alone[0, -4:].tolist()


def check_gradients(model: Any, rows: list[dict[str, Tensor]], batch: dict[str, Tensor], rng: random.Random) -> None:
    step = rng.choice([0, 5000, 8500, 9500])
    perturbed, flip = (torch.tensor([rng.random() < 0.3 for _ in rows]) for _ in range(2))
    model.zero_grad()
    loss = model(**batch, step=step, perturbed=perturbed, flip=flip).loss
    loss.backward()
    found = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    counts = torch.tensor([float((row["labels"] != -100).sum()) for row in rows])
    share, alone = counts / counts.sum(), []
    for i, row in enumerate(rows):
        own = {"perturbed": perturbed[i : i + 1], "flip": flip[i : i + 1], "loss_scale": float(share[i])}
        alone.append(model(**row, step=step, **own).loss)
    expected = (share * torch.stack(alone)).sum()
    expected.backward()
    assert_close(loss, expected, rtol=0, atol=1e-5)
    for name, g in gradients(model).items():
        assert (found[name] - g).norm() <= 1e-5 * max(1.0, float(g.norm())), name

"""A second parity directory: other sizes, ids, grids and patches, its numbers from stock Qwen2.5-VL and slow_reference.

Not in it, for want of an independent source: gradients of stage 2 (`s2_train_step`), padded batches of the reference.
"""

import json
import math
from pathlib import Path
from typing import Any

import slow_reference as slow
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TOKENS = {
    "pad": 3,
    "im_start": 150,
    "im_end": 9,
    "vision_start": 77,
    "vision_end": 20,
    "vision_token": 21,
    "image": 22,
    "video": 140,
}
SLICES, PATCH, MERGE, PACE = 4, 7, 3, 3 * 5.0  # tokens_per_second x second_per_grid_ts
LAYERS, ITS = 13, 2
GRIDS = {
    "b1": [(3, 6, 9)],
    "two_vol": [(2, 3, 6), (1, 9, 3)],
    "text_only": [],
    "vision_windows": [(2, 9, 12), (1, 3, 15)],
}
TEXT = {
    "vocab_size": 160, "hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 5e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 6, 4]},
    "bos_token_id": 3, "eos_token_id": 9,
    **{f"{name}_token_id": TOKENS[name] for name in ("vision_start", "vision_end", "vision_token", "image", "video")},
}  # fmt: skip
VISION = {
    "depth": 3, "hidden_size": 48, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 96, "patch_size": PATCH,
    "spatial_patch_size": PATCH, "spatial_merge_size": MERGE, "window_size": 42, "fullatt_block_indexes": [2],
    "tokens_per_second": 3, "temporal_patch_size": SLICES,
}  # fmt: skip


def build(directory: Path) -> None:
    """Write the directory."""
    torch.manual_seed(11)
    stock = stock_model()
    mlp = {f"mlp.{k}": v for k, v in {"0.weight": torch.randn(12, 12), "0.bias": torch.randn(12)}.items()}
    mlp |= {"mlp.2.weight": torch.randn(1, 12) * 0.2, "mlp.2.bias": torch.zeros(1)}
    write_models(directory, stock, mlp)
    rows = {name: row_of(grids) for name, grids in GRIDS.items()}
    rows |= {
        f"{name}_prompt": {**rows[name], "input_ids": rows[name]["input_ids"][:, :-7]} for name in ("b1", "text_only")
    }
    write_inputs(directory, rows)
    cases = {**units(mlp), **stage1(stock, rows), **stage2(stock, mlp, rows)}
    for name, (meta, tensors) in cases.items():
        write(directory / name / "expected", meta, tensors)
    write(directory / "manifest", {"special_tokens": TOKENS, "cases": {name: {} for name in cases}}, {})


def write(path: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(meta))
    if tensors:
        save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path.with_suffix(".safetensors"))


def stock_model() -> Any:
    config = Qwen2_5_VLConfig(**TEXT, vision_config={**VISION, "in_channels": 1}, attn_implementation="eager")
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.08 if p.ndim > 1 else 0.1) + (1.0 if p.ndim == 1 else 0.0))
        for name in ("q_proj", "k_proj"):
            getattr(model.model.language_model.layers[ITS].self_attn, name).weight.mul_(2)
    return model


def write_models(directory: Path, stock: Any, mlp: dict[str, Tensor]) -> None:
    weights = {published(k): v for k, v in stock.state_dict().items()}
    atp = f"model.layers.{ITS}.atp"
    predictor = {f"{atp}.predictor.{k}": v for k, v in mlp.items()} | {f"{atp}.pos_proj.weight": torch.zeros(96, 1)}
    config = {
        **TEXT,
        "model_type": "qwen2_5_vl",
        "vision_config": {**VISION, "in_chans": 1},
        "use_sliding_window": False,
    }
    for stage, tensors in {"s1": weights, "s2": weights | predictor}.items():
        write(directory / "models" / stage / "model", {}, tensors)
        (directory / "models" / stage / "config.json").write_text(json.dumps(config))


def published(name: str) -> str:
    name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    return name.replace("visual.patch_embed.", "visual.vision_patch_embed.")


def row_of(grids: list[tuple[int, int, int]]) -> dict[str, Any]:
    words = iter(torch.randint(30, 70, (60,)).tolist())
    start, end = TOKENS["im_start"], TOKENS["im_end"]
    ids = [start, 5, 6, next(words), end, 6, start, 7, 6]
    for t, h, w in grids:
        ids += [TOKENS["vision_start"], *[TOKENS["video"]] * (t * h * w // MERGE**2), TOKENS["vision_end"], next(words)]
    ids += [next(words) for _ in range(13)] + [end, 6, start, 8, 6, *[next(words) for _ in range(5)], end, 6]
    row: dict[str, Any] = {"input_ids": torch.tensor([ids]), "grids": grids}
    row["labels"] = torch.tensor([[-100] * (len(ids) - 7) + ids[-7:]])
    row["pixel_values_videos"] = [torch.rand(t * h * w, SLICES * PATCH**2) for t, h, w in grids]
    return row


def write_inputs(directory: Path, rows: dict[str, dict[str, Any]]) -> None:
    volumes = {}
    for name, row in rows.items():
        ids = row["input_ids"]
        volumes |= {f"{name}{i}": patches for i, patches in enumerate(row["pixel_values_videos"])}
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "vision_mask": ids == TOKENS["video"]}
        found["question_mask"] = torch.tensor([slow.question_of(ids[0].tolist(), TOKENS)])
        if row["grids"]:
            found["video_grid_thw"] = torch.tensor(row["grids"])
            found["second_per_grid_ts"] = torch.full((len(row["grids"]),), 5.0)
        if not name.endswith("prompt"):
            found["labels"] = row["labels"]
        write(
            directory / "inputs" / name, {"volumes": [{"key": f"{name}{i}"} for i in range(len(row["grids"]))]}, found
        )
    write(directory / "inputs" / "volumes", {}, volumes)


def position_of(row: dict[str, Any]) -> Tensor:
    grids = row["grids"]
    return slow.positions_of(row["input_ids"][0].tolist(), TOKENS["video"], grids, [PACE] * len(grids), MERGE)[:, None]


def stock_inputs(row: dict[str, Any]) -> dict[str, Any]:
    inputs = {"input_ids": row["input_ids"], "position_ids": position_of(row)}
    if row["grids"]:
        inputs["pixel_values_videos"] = torch.cat(row["pixel_values_videos"])
        inputs["video_grid_thw"] = torch.tensor(row["grids"])
    return inputs


def flat(runs: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{run}.{k}": v for run, tensors in runs.items() for k, v in tensors.items()}


# --- cases: name -> (meta, tensors) -----------------------------------------------------------------------------------


def units(mlp: dict[str, Tensor]) -> dict[str, Any]:
    volume = torch.rand(8, 1, 42, 21)
    patches = slow.patches_of(volume[:, 0], SLICES, PATCH, MERGE)
    sums = patches.double().sum(1)
    grid = torch.tensor([[2, 6, 3]])
    patchify = {
        "volume": volume,
        "video_grid_thw": grid,
        "pixel_values_checksum_row_sums": sums,
        "pixel_values_rows": patches[::5],
    }
    score_runs, sgp = {}, {}
    for name, (heads, keys, asked) in {"wide": (6, 2, 9), "square": (3, 3, 4), "one": (5, 1, 1)}.items():
        q, k = torch.randn(1, heads, 41, 24), torch.randn(1, keys, 41, 24)
        visual, question = list(range(7, 26)), list(range(28, 28 + asked))
        masks = {n: torch.zeros(1, 41, dtype=torch.bool).index_fill(1, torch.tensor(i), True) for n, i in
                 {"vision_mask": visual, "question_mask": question}.items()}  # fmt: skip
        score_runs[name] = {"q": q, "k": k, **masks, "u_ttTrue": slow.scores_of(q[0], k[0], question, visual)[None]}
    scores = {"odd": torch.randn(3, 23) * 5, "even": torch.randn(2, 50)}
    features = {n: torch.stack([slow.features_of(u) for u in s]) for n, s in scores.items()}
    threshold = {f"threshold_mlp.{k}": v for k, v in mlp.items()}
    for n, s in scores.items():
        out = torch.stack([slow.threshold_of(f, mlp) for f in features[n]])[:, None]
        norm = torch.stack([slow.rho_of(u) for u in s])
        threshold |= flat({f"threshold_mlp.{n}": {"scores": s, "norm": norm, "features": features[n], "out": out}})
    x, g, visual = torch.randn(1, 33, 10), torch.randn(1, 33, 10), list(range(4, 27))
    presence = torch.rand(1, 33) > 0.4
    presence[:, :4] = True
    is_visual = torch.zeros(1, 33, dtype=torch.bool).index_fill(1, torch.tensor(visual), True)
    p = torch.rand(1, 33) * is_visual
    sgp = {"x": x, "presence_mask": presence, "vision_mask": is_visual, "p_full": p, "upstream_grad": g[presence][None]}
    whole = g * presence[..., None]
    for strict in (False, True):
        for name, where, scale in (
            ("", visual, 1.0),
            ("_vmNone", presence[0].nonzero().flatten().tolist(), 1.0),
            ("_tiny", visual, 1e-6),
        ):
            sgp[f"strict_{strict}{name}.grad_p"] = slow.surrogate_of(x[0], whole[0] * scale, p[0], where, strict)[None]
            sgp[f"strict_{strict}{name}.grad_x"] = whole
    constants = {
        "eps": 1e-6,
        "min_sigma": 3e-3,
        "z_clip": 1.5,
        "beta_const": 0.8,
        "smin": 0.5,
        "smax": 2.0,
        "sat_floor": 5e-3,
    }
    return {
        "patchify": ({}, patchify),
        "visual_score_unit": ({"runs": {key: {} for key in score_runs}}, flat(score_runs)),
        "units": ({"question_mask_errors": {}}, threshold | question_masks() | bands() | losses() | gathers()),
        "sgp_unit": ({"constants": constants}, sgp),
    }


def question_masks() -> dict[str, Tensor]:
    s, e, vs, ve, v = (TOKENS[n] for n in ("im_start", "im_end", "vision_start", "vision_end", "video"))
    runs = {
        "two_turns": [s, 7, 6, vs, v, ve, 40, 41, e, 6, s, 8, 6, 50, e, s, 7, 6, vs, v, v, ve, 42, e],
        "two_in_one": [3, 3, s, 7, 6, vs, v, ve, 40, vs, v, v, ve, 41, e, 6],
        "follow_up": [s, 7, 6, vs, v, v, ve, 40, e, 6, s, 8, 6, 44, e, 6, s, 7, 6, 45, 46, e],
        "text_first": [s, 7, 6, 40, 41, vs, v, v, ve, e, 6, s, 8, 6, 44, e],
    }
    found = {}
    for name, ids in runs.items():
        found[f"question_mask.{name}.input_ids"] = torch.tensor([ids])
        found[f"question_mask.{name}.question_mask"] = torch.tensor([slow.question_of(ids, TOKENS)])
    return found


def bands() -> dict[str, Tensor]:
    found = {}
    for name, shift in {"low": -1.0, "high": 1.0, "mid": 0.0}.items():
        u = (torch.randn(3, 17) * 0.1 + shift).requires_grad_()
        r = torch.sigmoid(u / 0.2).mean(1)
        loss = (torch.clamp(r - 0.8, min=0) + torch.clamp(0.3 - r, min=0)).mean()
        (grad,) = torch.autograd.grad(loss, u)
        found |= {f"band.{name}.u": u, f"band.{name}.loss": loss, f"band.{name}.grad_u": grad}
    return found


def losses() -> dict[str, Tensor]:
    logits, labels = torch.randn(3, 9, 31).requires_grad_(), torch.randint(0, 31, (3, 9))
    labels[:, ::3] = -100
    log_p = logits.log_softmax(-1)[labels != -100]
    y = labels[labels != -100]
    p_y = log_p.exp()[range(len(y)), y]
    values = {"ce": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "flip": -torch.log(1 - p_y + 1e-6).mean()}
    values["mismatch"] = -torch.distributions.Categorical(logits=log_p).entropy().mean()
    found = {
        "aug.logits": logits,
        "aug.labels": labels,
        "aug.mismatch_all_ignored": torch.tensor(0.0),
        "aug.flip_all_ignored": torch.tensor(0.0),
    }
    for name, loss in values.items():
        found |= {f"aug.{name}.loss": loss, f"aug.{name}.grad": torch.autograd.grad(loss, logits, retain_graph=True)[0]}
    return found


def gathers() -> dict[str, Tensor]:
    x, mask = torch.randn(3, 12, 5), torch.rand(3, 12) > 0.5
    out = torch.zeros(3, int(mask.sum(1).max()), 5)
    for row, own in enumerate(mask):
        out[row, : int(own.sum())] = x[row, own]
    return {"gather.x": x, "gather.mask": mask, "gather.out": out}


def stage1(stock: Any, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    forward, steps, norms, rope = {}, {}, {}, {}
    for name in ("b1", "two_vol", "text_only"):
        row = rows[name]
        out = stock(**stock_inputs(row), labels=row["labels"], output_hidden_states=True)
        stock.zero_grad()
        out.loss.backward()
        delta = position_of(row).max() + 1 - row["input_ids"].shape[1]
        forward[name] = {"loss": out.loss, "logits": out.logits, "rope_deltas": delta.view(1, 1)}
        forward[name] |= {"hidden_after_layer0": out.hidden_states[1], "hidden_last": out.hidden_states[-1]}
        rope[name] = {"input_ids": row["input_ids"], "position_ids": position_of(row), "rope_deltas": delta.view(1, 1)}
        if row["grids"]:
            rope[name]["video_grid_thw"] = torch.tensor(row["grids"])
            grads = {published(k): p.grad for k, p in stock.named_parameters()}
            norms[name] = {k: float(g.norm()) for k, g in grads.items()}
            steps[name] = {
                "loss": out.loss,
                "grad.visual.vision_patch_embed.proj.weight[:3]": grads["visual.vision_patch_embed.proj.weight"][:3],
            }
    seconds = {name: {"second_per_grid_ts": [5.0] * len(rows[name]["grids"]) or None} for name in rope}
    windows = torch.cat(rows["vision_windows"]["pixel_values_videos"])
    tower = stock.model.visual(windows, grid_thw=torch.tensor(GRIDS["vision_windows"])).pooler_output
    generated = greedy(stock, None, rows["b1_prompt"])
    return {
        "rope_index": ({"runs": seconds}, flat(rope)),
        "vision_tower": ({}, {"out": tower}),
        "s1_forward": ({"runs": {key: {} for key in forward}}, flat(forward)),
        "s1_generate": ({"inputs": {"b1_prompt": ""}}, {k: generated[k] for k in ("new_tokens", "step_logits")}),
        "s1_train_step": ({"inputs": dict.fromkeys(steps, ""), "grad_norms": norms}, flat(steps)),
    }


def prefill(stock: Any, mlp: dict[str, Tensor] | None, row: dict[str, Any]) -> slow.Pruned:
    ids = row["input_ids"]
    visual = (ids[0] == TOKENS["video"]).nonzero().flatten().tolist()
    with torch.no_grad():
        h = stock.get_input_embeddings()(ids)
        if visual:
            inputs = stock_inputs(row)
            tower = stock.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"]).pooler_output
            h[0, visual] = tower
    asked = torch.tensor(slow.question_of(ids[0].tolist(), TOKENS)).nonzero().flatten().tolist()
    question = [i for i in asked if i not in visual]
    return slow.stage2(stock, ITS, mlp or {}, h, position_of(row), question, [] if mlp is None else visual)


def greedy(stock: Any, mlp: dict[str, Tensor] | None, row: dict[str, Any], count: int = 5) -> dict[str, Tensor]:
    out, position = prefill(stock, mlp, row), position_of(row)
    after_prefill = [(layer.keys.clone(), layer.values.clone()) for layer in out.cache.layers]
    steps, start = [out.logits[0, -1]], int(position.max()) + 1
    while len(steps) < count:
        steps.append(slow.step(stock, int(steps[-1].argmax()), start + len(steps) - 1, out.cache))
    lengths = [torch.tensor([len_]) for len_ in (len(out.kept), len(out.kept) + count - 1)]
    return {
        "new_tokens": torch.stack(steps).argmax(-1),
        "step_logits": torch.stack(steps),
        "kv_len_after_prefill": lengths[0].repeat(LAYERS),
        "kv_len_after_last_step": lengths[1].repeat(LAYERS),
        "prefill_position_ids": position,
        "decode_position_ids": (start + torch.arange(count - 1)).expand(3, 1, -1),
        **{f"prefill_key.{i}": keys for i, (keys, _) in enumerate(after_prefill)},
        **{f"prefill_value.{i}": values for i, (_, values) in enumerate(after_prefill)},
    }


def stage2(stock: Any, mlp: dict[str, Tensor], rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    forward = {}
    for name in ("b1", "two_vol", "text_only"):
        row, out = rows[name], prefill(stock, mlp, rows[name])
        labels = row["labels"][:, out.kept]
        loss = F.cross_entropy(out.logits[0, :-1], labels[0, 1:])
        delta = position_of(row).max() + 1 - row["input_ids"].shape[1]
        forward[name] = {"loss": loss, "logits": out.logits, "rope_deltas": delta.view(1, 1), **out.scheduled}
        forward[name] |= {f"hidden.{i}": h for i, h in enumerate(out.hidden) if i == 0 or i > ITS + 1}
    generated = {name: greedy(stock, mlp, rows[name]) for name in ("b1_prompt", "text_only_prompt")}
    assert its_of(LAYERS) == ITS
    return {
        "s2_eval_forward": ({"runs": {key: {} for key in forward}, "its_layer": ITS}, flat(forward)),
        "s2_generate": ({"runs": {key: {} for key in generated}}, flat(generated)),
    }


def its_of(layers: int) -> int:
    return math.trunc(layers / 4 - 1)

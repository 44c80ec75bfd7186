"""The formulas of the method, one number at a time, and Photon stage 2 on stock Qwen2.5-VL layers. Slow and plain.

Nothing here comes from photon_train: it is what a second parity directory is made with.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb


def patches_of(volume: Tensor, slices: int, patch: int, merge: int) -> Tensor:
    t, h, w = volume.shape[0] // slices, volume.shape[1] // patch, volume.shape[2] // patch
    rows = []
    for z in range(t):
        for block_y in range(0, h, merge):
            for block_x in range(0, w, merge):
                for y in range(block_y, block_y + merge):
                    for x in range(block_x, block_x + merge):
                        cut = volume[
                            z * slices : (z + 1) * slices, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch
                        ]
                        rows.append(cut.flatten())
    return torch.stack(rows)


def positions_of(ids: list[int], video: int, grids: list[list[int]], paces: list[float], merge: int) -> Tensor:
    """int64[3, L]; after a volume text goes on at (max over t, h, w) + 1."""
    found: list[tuple[int, int, int]] = []
    at, volume = 0, 0
    while len(found) < len(ids):
        start = max((max(p) for p in found), default=-1) + 1
        if ids[at] != video:
            found.append((start,) * 3)
        else:
            t, h, w = grids[volume]
            for z in range(t):
                found += [
                    (start + int(z * paces[volume]), start + y, start + x)
                    for y in range(h // merge)
                    for x in range(w // merge)
                ]
            volume += 1
        at = len(found)
    return torch.tensor(found).T


def question_of(ids: list[int], tokens: dict[str, int]) -> list[bool]:
    """True strictly between a <|vision_end|> and the next <|im_end|>."""
    inside, found = False, []
    for token in ids:
        inside = inside and token != tokens["im_end"]
        found.append(inside)
        inside = inside or token == tokens["vision_end"]
    return found


def scores_of(q_HLd: Tensor, k_KLd: Tensor, question: list[int], visual: list[int]) -> Tensor:
    """u of each visual token."""
    heads, _, d = q_HLd.shape
    k_HLd = k_KLd.repeat_interleave(heads // len(k_KLd), dim=0)
    centrality = [
        sum(
            float((q_HLd[h, t] @ k_HLd[h, s] / math.sqrt(d)).clamp_min(0))
            for h in range(heads)
            for s in question
            if s != t
        )
        / heads
        for t in question
    ]
    total = max(sum(centrality), 1.0)
    return torch.tensor(
        [
            sum(
                c / total * float(q_HLd[h, t] @ k_HLd[h, j])
                for h in range(heads)
                for c, t in zip(centrality, question, strict=True)
            )
            / math.sqrt(d)
            / heads
            for j in visual
        ]
    )


def rho_of(u: Tensor) -> Tensor:
    return (u - u.min()) / (u.max() - u.min() + 1e-8)


def features_of(u: Tensor) -> Tensor:
    rho, log = rho_of(u), u.sign() * u.abs().log1p()
    found = [
        rho.mean(),
        rho.std(correction=0),
        rho.min(),
        rho.max(),
        rho.quantile(0.25),
        rho.median() if len(u) % 2 else rho.quantile(0.5),
    ]
    return torch.stack([*found, u.mean(), u.std(correction=0), u.min(), u.max(), log.mean(), log.max()])


def threshold_of(features: Tensor, mlp: dict[str, Tensor]) -> Tensor:
    hidden = torch.nn.functional.gelu(mlp["mlp.0.weight"] @ features + mlp["mlp.0.bias"])
    return torch.sigmoid(mlp["mlp.2.weight"] @ hidden + mlp["mlp.2.bias"])[0]


def surrogate_of(x: Tensor, g: Tensor, p: Tensor, visual: list[int], strict: bool) -> Tensor:
    """The gradient for p of one row; x, g float[L, D], g zero at dropped tokens."""
    eta = torch.stack([(x[j] * g[j]).sum() for j in visual]) * (-1 if strict else 1)
    z = ((eta - eta.mean()) / max(float(eta.std(correction=0)), 3e-3)).clamp(-1.5, 1.5)
    d = 0.5 - (0.5 + 0.5 * torch.tanh(z))
    d = d if strict else d - d.mean()
    s = torch.stack([(x[j] * g[j]).abs().sum() for j in visual])
    s = (s / max(float(s.mean()), 1e-6)).clamp(0.5, 2.0)
    own = p[visual]
    grad = torch.zeros_like(p)
    grad[visual] = 0.8 * d * s * (own * (1 - own)).clamp_min(5e-3)
    return grad


class Pruned(NamedTuple):
    """One row through stage 2."""

    logits: Tensor
    hidden: list[Tensor]  # before layer 0, after each layer; the last normed
    cache: DynamicCache
    kept: Tensor  # int64, kept positions
    scheduled: dict[str, Tensor]


@torch.no_grad()
def stage2(
    stock: Any, its: int, mlp: dict[str, Tensor], h: Tensor, position: Tensor, question: list[int], visual: list[int]
) -> Pruned:
    """Stock layers 0..its on all tokens, the rest on the kept ones. h float[1, L, D], position int64[3, 1, L]."""
    text, cache, hidden, seen = stock.model.language_model, DynamicCache(), [h], {}
    attention = text.layers[its].self_attn
    hooks = [
        getattr(attention, n).register_forward_hook(lambda _m, _i, out, n=n: seen.update({n: out}))
        for n in ("q_proj", "k_proj")
    ]
    h = through(text, range(its + 1), h, position, cache, hidden)
    for hook in hooks:
        hook.remove()
    q, k = (seen[n].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for n in ("q_proj", "k_proj"))
    q, k = apply_rotary_pos_emb(q, k, *text.rotary_emb(hidden[0], position))
    kept, scheduled = torch.arange(h.shape[1]), {}
    if visual:
        u = scores_of(q[0], k[0], question, visual)
        theta = 0.9 * threshold_of(features_of(u), mlp)
        p = torch.sigmoid((rho_of(u) - theta) / 0.2)
        kept = torch.tensor([i for i in kept.tolist() if i not in visual or p[visual.index(i)] > 0.5])
        p_full, presence = torch.ones(h.shape[1]), torch.zeros(h.shape[1], dtype=torch.bool)
        p_full[visual], presence[kept] = p, True
        scheduled = {"score_u": u[None], "saliency_norm": rho_of(u)[None], "threshold": theta[None, None]}
        scheduled |= {
            "soft_p_full": p_full[None],
            "presence": presence[None],
            "orig_idx": kept[None],
            "h_before_prune": h,
        }
    for layer in cache.layers[: its + 1]:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    h = through(text, range(its + 1, len(text.layers)), h[:, kept], position[..., kept], cache, hidden)
    hidden[-1] = text.norm(h)
    return Pruned(stock.lm_head(hidden[-1]), hidden, cache, kept, scheduled)


@torch.no_grad()
def step(stock: Any, token: int, position: int, cache: DynamicCache) -> Tensor:
    """Logits after one more token."""
    text = stock.model.language_model
    h = through(
        text,
        range(len(text.layers)),
        text.embed_tokens(torch.tensor([[token]])),
        torch.full((3, 1, 1), position),
        cache,
        [],
    )
    logits: Tensor = stock.lm_head(text.norm(h))[0, -1]
    return logits


def through(text: Any, layers: range, h: Tensor, position: Tensor, cache: DynamicCache, hidden: list[Tensor]) -> Tensor:
    rotary = text.rotary_emb(h, position)
    count = h.shape[1]
    mask = torch.full((count, count), torch.finfo(h.dtype).min).triu(1)[None, None] if count > 1 else None
    for i in layers:
        h = text.layers[i](h, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        hidden.append(h)
    return h

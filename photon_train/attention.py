"""Attention of the decoder: positions, rotation and norms, in fewer kernels than the stock ones, with the same weights.

Legend: B rows, L or M tokens of a padded row, X = B L, N tokens of all rows, D hidden size, H query heads, K key heads,
E = H + K, d head_dim; axis 3 is (t, h, w).
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    ALL_ATTENTION_FUNCTIONS,
    Qwen2_5_VLAttention,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    eager_attention_forward,
)

from photon_data.errors import UsageError
from photon_train.configuration_photon import PhotonConfig

logger = logging.getLogger(__name__)
# Torch 2.11 has no word for it.
FEWER_KEY_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
FAR = 0.02  # bfloat16 rounds by 0.004
WORTH_PACKING = 1 / 16  # of what is computed is padding; packing takes some kernels in each layer
Pair = tuple[Tensor, Tensor]  # keys and values of a layer, each [B or 1, K, L, d]


class LayerKeys:
    """One layer's part of SharedKeys: what is compiled is given this, for it must not look at the layer's number."""

    def __init__(self, before: Pair | None = None) -> None:
        self.before = before
        self.own: Pair | None = None

    def update(self, keys: Tensor, values: Tensor) -> Pair:
        """Return the keys and values of the prefix and, behind them, those given, which are noted the first time."""
        self.own = self.own or (keys, values)
        if self.before is None:
            return keys, values
        before = (x.expand(len(keys), -1, -1, -1) for x in self.before)
        both = [torch.cat(pair, dim=2) for pair in zip(before, (keys, values), strict=True)]
        return both[0], both[1]


class SharedKeys:
    """Stands in for a cache where none is kept: layers attend to the keys of a prefix too, and their own are noted.

    The same call gives the same keys again, so that a layer can be recomputed in the backward pass.
    is_prefix: someone asks for what was noted.
    """

    def __init__(self, before: tuple[Pair, ...] = (), is_prefix: bool = False) -> None:
        self.before, self.is_prefix = before, is_prefix
        self.length = before[0][0].shape[2] if before else 0
        self.layers: dict[int, LayerKeys] = {}

    def of(self, layer: int) -> LayerKeys:
        """Return the part of a layer, the same one for every call."""
        return self.layers.setdefault(layer, LayerKeys(self.before[layer] if self.before else None))

    def own(self) -> tuple[Pair, ...]:
        """Return the keys and values of the layers that have run, in their order."""
        return tuple(layer.own for layer in self.layers.values() if layer.own is not None)

    def get_query_offset(self, layer: int) -> int:
        """Return how many keys stand before the first query; for `create_causal_mask`."""
        return self.length

    def get_mask_sizes(self, queries: int, layer: int) -> tuple[int, int]:
        """Return the number of keys, and the index of the first; for `create_causal_mask`."""
        return self.length + queries, 0


def causal_mask(mask_BT: Tensor | None, h_BLD: Tensor, before: int, config: Any) -> Tensor | None:
    """Return what scores are masked by, float[B or 1, 1, L, T], for L queries behind `before` keys; T = before + L.

    mask_BT: False at padding. For sdpa, None where no more than the common triangle is masked: who knows that there is
    no padding gives no mask (transformers asks the device, for which the host has to wait). And where queries are few,
    L is that of all heads that share a key head, as `attend_in_groups` takes it. config: of the decoder.
    """
    length, is_sdpa = h_BLD.shape[1], config._attn_implementation == "sdpa"
    if is_sdpa and mask_BT is None and not before:
        return None
    seen = torch.ones(length, before + length, dtype=torch.bool, device=h_BLD.device).tril(before)[None, None]
    seen = seen if mask_BT is None else seen & mask_BT[:, None, None].bool()
    if is_sdpa and is_grouped(length, before + length, config):
        seen = in_groups(seen, config.num_attention_heads // config.num_key_value_heads)
    return torch.zeros_like(seen, dtype=h_BLD.dtype).masked_fill_(~seen, torch.finfo(h_BLD.dtype).min)


class Packed(NamedTuple):
    """Rows one behind the other, without padding: [a b -], [c d e] -> [a b c d e]. Each attends to itself alone."""

    slot_N: Tensor  # int64, where each token stands in the padded rows, which are counted through
    token_BM: Tensor  # int64, which token stands in each slot of the padded rows; in an empty slot, any
    bounds: Tensor  # int32[B + 1], where each row begins, and where the last one ends
    as_they_are: bool  # torch attends to such rows as they are; else they are padded for it

    def join(self, x_BMD: Tensor, dim: int = 0) -> Tensor:
        """Return x_1ND of padded rows; `dim` is that of B, which M follows."""
        return x_BMD.flatten(dim, dim + 1).unsqueeze(dim).index_select(dim + 1, self.slot_N)

    def part(self, x_1ND: Tensor) -> Tensor:
        """Return padded rows x_BMD; empty slots hold any value."""
        return x_1ND.flatten(0, 1).index_select(0, self.token_BM.flatten()).unflatten(0, self.token_BM.shape)

    def attend(self, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, scaling: float) -> Tensor:
        """Return [N, H, d] of causal attention within each row, by torch's kernel for rows of any length."""
        longest = self.token_BM.shape[1]
        how: Any = {"scale": scaling, "window_size": (-1, 0), **FEWER_KEY_HEADS}  # from all before it to itself
        out: Any = varlen_attn(q_NHd, k_NKd, v_NKd, self.bounds, self.bounds, longest, longest, **how)
        return cast(Tensor, out)


def pack(h_BMD: Tensor, mask_BM: Tensor, tokens: int | None, config: Any) -> Packed | None:
    """Return how rows at their left edges are packed that have `tokens` tokens in all; None if little is padding.

    None too where the host does not know `tokens`, and for attention with dropout or a mask. config: of the decoder.
    """
    if tokens is None or config._attn_implementation not in ("sdpa", "flash_attention_2") or config.attention_dropout:
        return None
    if mask_BM.numel() - tokens < WORTH_PACKING * mask_BM.numel():
        return None
    kind, heads = h_BMD.device.type, (config.num_attention_heads, config.num_key_value_heads)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h_BMD.dtype
    has_kernel = attends_to_packed(h_BMD.device, dtype, *heads, config.hidden_size // heads[0])
    return packed(mask_BM, tokens, has_kernel)


def packed(mask_BM: Tensor, tokens: int, as_they_are: bool = False) -> Packed:
    """Return how rows of `tokens` tokens in all are packed, of which mask_BM tells the places of tokens."""
    seen_BM = mask_BM.flatten().cumsum(0).view_as(mask_BM)
    slot_N = torch.searchsorted(seen_BM.flatten(), torch.arange(1, tokens + 1, device=mask_BM.device))
    return Packed(slot_N, (seen_BM - 1).clamp_min(0), F.pad(seen_BM[:, -1], (1, 0)).int(), as_they_are)


@cache
def attends_to_packed(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> bool:
    """Tell whether torch's kernel for rows of any length is there, and right: forwards and backwards, on three rows.

    If not, whatever the cause, rows are padded: nothing fails.
    """
    lengths, of_heads = (3, 1, 300), (heads, key_heads)
    mask_BM = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows, generator = packed(mask_BM.to(device), sum(lengths)), torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, head_dim) for n in (heads + key_heads, key_heads)]
    qk_v = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]

    def row_by_row(*qkv: Tensor) -> Tensor:
        each = zip(*(x.float().transpose(0, 1).split(lengths, dim=1) for x in qkv), strict=True)
        out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in each]
        return torch.cat(out, dim=1).transpose(0, 1)

    def outcome(attend: Callable[..., Tensor]) -> Tensor:
        out = attend(*qk_v[0].split(of_heads, dim=1), qk_v[1])  # as `PhotonAttention` has them
        gradients = torch.autograd.grad(out.float().square().sum(), qk_v)
        return torch.cat([x.detach().float().flatten() for x in (out, *gradients)])

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        try:
            found, expected = outcome(partial(rows.attend, scaling=head_dim**-0.5)), outcome(row_by_row)
        except Exception as error:  # of any version and kernel
            logger.info("attention pads rows: found %s", (str(error).splitlines() or [type(error).__name__])[0])
            return False
    far = float((found - expected).norm() / expected.norm())
    if far < FAR:
        logger.info("attention takes rows of any length as they are: torch's kernel is off by %.2g", far)
    else:
        logger.warning("attention pads rows: expected torch's kernel to be off by less than %g, found %.2g", FAR, far)
    return far < FAR


def attend_in_groups(
    module: nn.Module,
    q_BHLd: Tensor,
    k_BKTd: Tensor,
    v_BKTd: Tensor,
    mask_B1LT: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return [B, L, H, d] of attention with a mask; the heads that share a key head stand behind one another for it.

    So no key is copied for each of its heads, where keys are many and queries are few. mask_B1LT may be made for that,
    by `in_groups`, once for all layers.
    """
    rows, length = q_BHLd.shape[0], q_BHLd.shape[2]
    q_BKSd = q_BHLd.reshape(rows, k_BKTd.shape[1], -1, q_BHLd.shape[3])  # S = H / K L: head after head
    mask = mask_B1LT if mask_B1LT.shape[2] in (1, q_BKSd.shape[2]) else in_groups(mask_B1LT, q_BKSd.shape[2] // length)
    out_BKSd = F.scaled_dot_product_attention(q_BKSd, k_BKTd, v_BKTd, mask, dropout, scale=scaling)
    return out_BKSd.reshape(rows, -1, length, q_BHLd.shape[3]).transpose(1, 2), None


def is_grouped(queries: int, keys: int, config: Any) -> bool:
    """Tell whether masked attention is in groups: a mask for each head is less than copies of keys and values are.

    G L T < 2 G K T d values of a row, where G heads share each of K key heads; with G = 1 neither is made. config: of
    the decoder.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    return queries < keys and queries < 2 * config.num_key_value_heads * head_dim


def in_groups(mask_B1LT: Tensor, groups: int) -> Tensor:
    """Return the mask of L queries for so many heads of each key head, one behind the other."""
    return mask_B1LT.repeat(1, 1, groups, 1)


class PhotonAttention(Qwen2_5_VLAttention):
    """The stock attention in fewer calls; `shared` stands in for a cache, as may this layer's own part of one."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | CacheLayerMixin | None = None,
        shared: SharedKeys | LayerKeys | None = None,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return h_BLD and, of some back ends, the weights. With `packed`, h_BLD is the one row h_1ND."""
        rows = hidden_states.shape[:2]
        qk_BLEd = self._rotated(hidden_states, position_embeddings)
        v_BLKd = self.v_proj(hidden_states.flatten(0, 1)).view(*rows, -1, self.head_dim)
        if packed is not None and not packed.as_they_are:
            qk_BLEd, v_BLKd = packed.part(qk_BLEd), packed.part(v_BLKd)
        q_BLHd, k_BLKd = qk_BLEd.split([self.num_heads, self.num_key_value_heads], dim=2)
        if packed is not None and packed.as_they_are:
            q_NHd, k_NKd, v_NKd = (x.flatten(0, 1) for x in (q_BLHd, k_BLKd, v_BLKd))
            out_NHd = packed.attend(q_NHd, k_NKd, v_NKd, self.scaling)
            return self.o_proj(out_NHd.flatten(1))[None], None
        k_BKLd, v_BKLd = k_BLKd.transpose(1, 2), v_BLKd.transpose(1, 2)
        cache: Any = past_key_values if shared is None else shared
        if isinstance(shared, SharedKeys):
            cache = shared.of(cast(int, self.layer_idx))
        if isinstance(cache, CacheLayerMixin | LayerKeys):  # what is compiled must not look at its number
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd)
        elif cache is not None:
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd, self.layer_idx)
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        is_sdpa = self.config._attn_implementation == "sdpa" and attention_mask is not None
        if is_sdpa and is_grouped(rows[1], k_BKLd.shape[2], self.config):
            attend = attend_in_groups
        options: dict[str, Any] = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling}
        q_BHLd = q_BLHd.transpose(1, 2)
        out_BLHd, weights = attend(self, q_BHLd, k_BKLd, v_BKLd, attention_mask, **options, **kwargs)
        out_BLHd = out_BLHd if packed is None else packed.join(out_BLHd)
        return self.o_proj(out_BLHd.reshape(rows.numel(), -1)).view_as(hidden_states), weights

    def rotated_qk(self, normed_BLD: Tensor, rotation: Any) -> tuple[Tensor, Tensor]:
        """Return q[B, H, L, d] and k[B, K, L, d]."""
        qk_BELd = self._rotated(normed_BLD, rotation).transpose(1, 2)
        q_BHLd, k_BKLd = qk_BELd.split([self.num_heads, self.num_key_value_heads], dim=1)
        return q_BHLd, k_BKLd

    def _rotated(self, normed_BLD: Tensor, rotation: Any) -> Tensor:
        normed_XD = normed_BLD.flatten(0, 1)
        qk_XE = torch.cat([self.q_proj(normed_XD), self.k_proj(normed_XD)], dim=-1)
        qk_BLEd: Tensor = rotate(qk_XE.view(*normed_BLD.shape[:2], -1, self.head_dim), *rotation)
        return qk_BLEd


class PhotonRotaryEmbedding(Qwen2_5_VLRotaryEmbedding):
    """What `rotate` takes for queries and keys [B, L, H, d] at positions [3, B, L]."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, [B, L, 1, d] in the dtype of x."""
        cos_BLd, sin_BLd = super().forward(x, position_ids)
        return cos_BLd[:, :, None], signed(sin_BLd)[:, :, None]


def signed(sin: Tensor) -> Tensor:
    """Return the sines [..., d] with the first half negated."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Return x[..., d] rotated: (a, b) -> (a cos - b sin, b cos + a sin) for each pair of entries i and i + d / 2.

    cos and sin broadcast to x and are the same in both halves. They may be of a wider dtype, which is then computed
    in; the result has x's.
    """
    rotated: Tensor = _Rotate.apply(x, cos, signed_sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """Three kernels each way, of which the last one rounds to x's dtype; backwards it rotates by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        rolled = x.roll(x.shape[-1] // 2, -1)
        return torch.addcmul(x * cos, rolled, signed_sin, out=rolled)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        rolled = g.roll(g.shape[-1] // 2, -1)
        return torch.addcmul(g * cos, rolled, signed_sin, value=-1, out=rolled), None, None


def fuse_norms(module: nn.Module) -> None:
    """Replace the stock RMS norms within `module` by torch's, which are one kernel. Names of weights stay."""
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, Qwen2_5_VLRMSNorm):
                setattr(parent, name, nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon))


def check_compiler(device: torch.device) -> None:
    """Compile something small; UsageError where torch cannot compile for the device."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # of dynamo, of inductor, of the compiler's process
        found = f"found {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise UsageError(f"compile: expected a compiler that torch can use, {found}; leave compile out") from error


def rope_index(
    kind_BL: Tensor,
    mask_BL: Tensor,
    images: Iterable[list[int]],
    volumes: list[list[int]],
    seconds_per_slab: list[float],
    config: PhotonConfig,
) -> tuple[Tensor, Tensor]:
    """Return the positions int64[3, B, L], 1 at padding, and the deltas int64[B, 1]: next position minus L.

    kind_BL: 0 text, 1 image, 2 volume. All is on the CPU, as are images and volumes, the grids (t, h, w) in their
    order. After a volume, text resumes at (max over t, h, w) + 1, as the published weights were trained; transformers
    v5 resumes at start + max(h, w). t grows by tokens_per_second times seconds per slab in a volume, by 0 in an image.
    Raises ValueError for a run of visual tokens without a volume, or of another length than its volume's.
    """
    vision: Any = config.vision_config
    steps = [(grid, vision.tokens_per_second * s) for grid, s in zip(volumes, seconds_per_slab, strict=True)]
    left: dict[int, Any] = {1: zip(images, itertools.repeat(0.0)), 2: iter(steps)}
    position_3BL, delta_B1 = torch.ones((3, *kind_BL.shape), dtype=torch.int64), torch.zeros(len(kind_BL), 1).long()
    for row, (kind_L, mask_L) in enumerate(zip(kind_BL, mask_BL.bool(), strict=True)):
        pieces, start = [], 0
        for kind, run in itertools.groupby(kind_L[mask_L].tolist()):
            length = len(list(run))
            if kind == 0:
                piece_3L = torch.arange(length).expand(3, -1)
            elif (step := next(left[kind], None)) is not None:
                piece_3L = _grid_positions(step[0], step[1], vision.spatial_merge_size)
            else:
                raise ValueError(
                    f"expected a volume for every run of visual tokens, found {len(volumes)} for more runs; pass "
                    "all of them"
                )
            if piece_3L.shape[1] != length:
                raise ValueError(
                    f"expected {piece_3L.shape[1]} visual tokens for a volume, found {length}: was the prompt cut "
                    "off inside it? Shorten the text, not the volume"
                )
            pieces.append(piece_3L + start)
            start = int(pieces[-1].max()) + 1
        position_3BL[:, row, mask_L] = torch.cat(pieces, dim=1)
        delta_B1[row] = start - kind_BL.shape[1]
    return position_3BL, delta_B1


def _grid_positions(grid_thw: list[int], positions_per_slab: float, merge: int) -> Tensor:
    """Return int64[3, n] from 0: t grows by positions_per_slab (truncated), h and w by merged patch."""
    t, h, w = grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge
    slabs = (torch.arange(t, dtype=torch.float32) * positions_per_slab).long()
    axes = torch.meshgrid(slabs, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).reshape(3, -1)

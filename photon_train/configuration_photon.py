"""Every setting of Photon as a named field: the model, token scheduling, the surrogate, the losses, the curriculum.

Symbols are those of the paper (arXiv 2603.25155). Defaults are what the published weights were trained with; where
the paper's text says something else, the field's comment says how to reach it.
"""

from __future__ import annotations

import math
import os
import re
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
BEFORE_DECODER = ("visionzip", "divprune", "nucleus")  # schedulers that drop before it; the others after a layer
SCHEDULER_NAMES = ("its", "none", "random", "uniform", "foreground", "fastv", *BEFORE_DECODER)
IGNORED = -100  # the label of what is not to be learned
INTENSITIES = ("minmax", "window")
PERTURBATIONS = ("shuffle_patches", "shuffle_voxels", "keep_patches", "keep_voxels", "noise", "zeros")
MOST_LAYERS = 1000
ABOVE_0 = (
    *("centrality_floor", "saliency_epsilon", "threshold_max", "keep_temperature", "flip_epsilon"),
    *("sgp_sigma_floor", "sgp_z_clip", "sgp_beta", "sgp_scale_floor", "sgp_scale_max"),
)
FROM_0_TO_1 = (
    *("keep_probability", "robustness_probability", "flip_probability", "foreground_level", "band_low", "band_high"),
    *("sgp_saturation_floor", "perturb_kept_patches", "perturb_kept_voxels"),
    *(f"perturb_{kind}" for kind in PERTURBATIONS),
)


MODEL_TYPE = "photon"
NUMBERS = (*ABOVE_0, *FROM_0_TO_1, "keep_ratio", "initial_threshold", "sgp_scale_min")
STARTS = ("soft_start", "hard_start", "flip_start")


class PhotonVisionConfig(Qwen2_5_VLVisionConfig):
    """The 3D vision tower: one channel, cubes of 14 voxels a side.

    Published files say `in_chans`; some also carry a stale `in_channels: 3` beside it. `in_chans` wins.
    """

    in_channels: int = 1
    temporal_patch_size: int | list[int] | tuple[int, int] = 14
    tokens_per_second: int = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self.in_channels = kwargs.pop("in_chans", self.in_channels)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields with `in_chans` beside `in_channels`: the authors' code reads the former."""
        return {**super().to_dict(), "in_chans": self.in_channels}


class PhotonConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration and Photon's. Reads the published flat layout and writes it back.

    Published files say `model_type: qwen2_5_vl`, by which transformers' Auto classes build the stock model, with a
    fresh RGB patch embedding and no error. What is written says `photon`, and `in_channels: null` beside `in_chans`:
    neither those classes without this package, nor the stock class, make anything of it.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = [  # noqa: RUF012 - as in transformers
        *("past_key_values", "scheduled", "rope_deltas", "ce", "band", "robustness", "flip")
    ]
    # Both names: transformers renamed `sub_configs` to `sub_configs_defaults` after 5.17.
    sub_configs: ClassVar[Any] = {"vision_config": PhotonVisionConfig, "text_config": Qwen2_5_VLTextConfig}
    sub_configs_defaults: ClassVar[Any] = sub_configs

    text_config: Any = None
    vision_config: Any = None

    # What the checkpoint holds. 1: no threshold predictor. 2: with one. `from_pretrained` sets it from the keys.
    stage: int = 1
    im_start_token_id: int = 151644
    im_end_token_id: int = 151645

    # From a volume to what the vision tower reads.
    stored_shape_zyx: list[int] | tuple[int, ...] = (364, 364, 364)  # 1 mm voxels; resized to model_shape_zyx
    model_shape_zyx: list[int] | tuple[int, ...] = (140, 280, 280)
    intensity: str = "minmax"  # published weights: each volume's own min and max. "window": window_hu -> [0, 1]
    window_hu: list[float] | tuple[float, ...] = (-1000.0, 1000.0)

    # Which tokens stay. None: "its" in stage 2, "none" in stage 1.
    scheduler: str | None = None
    its_layer: Any = None  # int, l: tokens are dropped after this layer. None becomes int(n_layers / 4 - 1)
    keep_ratio: float = 0.39  # of the visual tokens (ITS kept about 390 of 1000); its, none, nucleus have their own
    keep_per_slab: bool = False  # random, visionzip: equally many of every z slab
    nucleus_mass: float = 0.9  # nucleus: the share of attention that the kept tokens receive, tau
    fastv_layer: int | None = None  # fastv drops after this layer; None: its_layer. 1 is the paper's K = 2
    scheduler_seed: int = 0  # random
    foreground_level: float = 0.25  # a voxel is foreground above this; 0.25 is -500 HU of [-1000, 1000]

    # Instruction-conditioned token scheduling (ITS).
    centrality_floor: float = 1.0  # w_t = c_t / max(sum of c, floor); no symbol
    saliency_epsilon: float = 1e-8  # rho = (u - min u) / (max u - min u + epsilon); no symbol. u within it: no contrast
    predictor_width: int | None = None  # rows of W1 in theta = ... W2 gelu(W1 z + b1) + b2. None: hidden_size // 8
    threshold_max: float = 0.9  # theta = threshold_max * sigmoid(...); no symbol
    keep_temperature: float = 0.2  # p = sigmoid((rho - theta) / temperature); no symbol
    keep_probability: float = 0.5  # token j stays iff p_j > this; no symbol
    # theta of a fresh predictor. Default: 0.9 sigmoid(-5), the bias the authors intended, which keeps nearly
    # everything. Their initialisation lost that bias and started at 0.45: say 0.45 to start as their runs did.
    initial_threshold: float = 0.9 / (1.0 + math.exp(5.0))

    # Surrogate gradient propagation (SGP).
    sgp_strict: bool = False  # the paper's text: eta with its sign reversed, direction d not made zero-mean
    sgp_sigma_floor: float = 3e-3  # sigma in z = (eta - mean) / sigma is at least this
    sgp_z_clip: float = 1.5  # |z| at most
    sgp_beta: float = 0.8  # factor of the whole gradient for p; no symbol in our source, `beta` in the authors' code
    sgp_scale_floor: float = 1e-6  # s = |x g| / mean |x g|, the mean being at least this; no symbol
    sgp_scale_min: float = 0.5  # s, the magnitude, at least
    sgp_scale_max: float = 2.0  # s at most
    sgp_saturation_floor: float = 5e-3  # p (1 - p) at least; no symbol

    # Losses.
    band_low: float = 0.3  # r, the mean p of a row's visual tokens, is penalised below this
    band_high: float = 0.8  # r is penalised above this
    flip_epsilon: float = 1e-6  # flip loss = -log(1 - p(y) + epsilon); no symbol

    # Perturbed volumes, for the robustness loss. No symbols. The six chances are of the kinds, given that one is drawn.
    robustness_probability: float = 0.15  # of a training volume being perturbed
    perturb_shuffle_patches: float = 0.16
    perturb_shuffle_voxels: float = 0.16
    perturb_keep_patches: float = 0.16
    perturb_keep_voxels: float = 0.16
    perturb_noise: float = 0.16
    perturb_zeros: float = 0.20
    perturb_kept_patches: float = 0.2  # share of patch rows that keep_patches leaves
    perturb_kept_voxels: float = 0.1  # share of voxel positions that keep_voxels leaves

    # Curriculum, in optimizer steps (int), or in fractions of the run (float in [0, 1]). No symbols.
    soft_start: int | float = 4000  # from here visual hidden states are weighted by p
    hard_start: int | float = 8000  # from here tokens are dropped
    flip_start: int | float = 9000  # from here some rows keep the complement
    flip_probability: float = 0.05  # of a row being flipped

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.scheduler is None:
            self.scheduler = "its" if self.stage == 2 else "none"
        if self.its_layer is None:
            self.its_layer = int(self.text_config.num_hidden_layers / 4 - 1)
        self._check()

    @property
    def drop_layer(self) -> int:
        """The layer after which the scheduler drops tokens, if it does so within the decoder."""
        return self.drop_layer_of(self.scheduler)

    def drops_before_decoder(self, scheduler: str | None) -> bool:
        """Tell whether a scheduler, by name, drops tokens before the decoder: the lower layers are saved too."""
        return scheduler in BEFORE_DECODER

    def drop_layer_of(self, scheduler: str | None) -> int:
        """Return the same of a scheduler by name."""
        own = self.fastv_layer if scheduler == "fastv" else None
        return self.its_layer if own is None else own

    @property
    def perturbation_chances(self) -> dict[str, float]:
        """The chance of each kind of perturbation, by its name in lower case."""
        return {kind: getattr(self, f"perturb_{kind}") for kind in PERTURBATIONS}

    @property
    def patches_thw(self) -> tuple[int, int, int]:
        """How many patches a volume is cut into along z, y and x."""
        vision, (z, y, x) = self.vision_config, self.model_shape_zyx
        return z // vision.temporal_patch_size, y // vision.patch_size, x // vision.patch_size

    @property
    def tokens_thw(self) -> tuple[int, int, int]:
        """How many tokens a volume becomes along z, y and x; they come in this order, x flipped, x fastest."""
        (t, h, w), merge = self.patches_thw, self.vision_config.spatial_merge_size
        return t, h // merge, w // merge

    def _check(self) -> None:
        """Raise ValueError for settings out of range or in contradiction."""

        def expect(name: str, holds: bool, expected: str) -> None:
            if not holds:
                found = getattr(self, name) if hasattr(self, name) else getattr(self.text_config, name)
                raise ValueError(f"{name}: expected {expected}, found {found!r}")

        for name in (*NUMBERS, *STARTS):
            value = getattr(self, name)
            expect(name, isinstance(value, int | float) and not isinstance(value, bool), "a number")
        for name in ("stage", "its_layer", "scheduler_seed"):
            expect(name, type(getattr(self, name)) is int, "a whole number")
        for name, length in (("window_hu", 2), ("model_shape_zyx", 3), ("stored_shape_zyx", 3)):
            value = getattr(self, name)
            are_numbers = isinstance(value, list | tuple) and all(isinstance(one, int | float) for one in value)
            expect(name, are_numbers and len(value) == length, f"{length} numbers")
        for name, choices in (("scheduler", SCHEDULER_NAMES), ("intensity", INTENSITIES)):
            expect(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        expect("stage", self.stage in (1, 2), "1 or 2")
        for where, name in ((self.text_config, "num_hidden_layers"), (self.vision_config, "depth")):
            if not getattr(where, name) <= MOST_LAYERS:  # they are made before there is a look at the weights
                raise ValueError(f"{name}: expected at most {MOST_LAYERS:,} layers, found {getattr(where, name):,}")
        slides, last = self.text_config.use_sliding_window, self.text_config.num_hidden_layers - 1
        expect("use_sliding_window", not slides, "False: every layer attends to all tokens that were kept")
        expect("its_layer", 0 <= self.its_layer < max(last, 1), f"a layer from 0 to {last - 1}")
        for name in ABOVE_0:
            expect(name, 0 < getattr(self, name) < math.inf, "a number above 0")
        for name in FROM_0_TO_1:
            expect(name, 0 <= getattr(self, name) <= 1, "a share from 0 to 1")
        expect("fastv_layer", 0 <= self.drop_layer < max(last, 1), f"a layer from 0 to {last - 1}, or None")
        for name in ("keep_ratio", "nucleus_mass"):
            expect(name, 0 < getattr(self, name) <= 1, "a ratio in (0, 1]")
        below_max = f"a value between 0 and {self.threshold_max}"
        expect("initial_threshold", 0 < self.initial_threshold < self.threshold_max, below_max)
        expect("predictor_width", (self.predictor_width or 1) > 0, "a width above 0, or None")
        expect("band_low", self.band_low <= self.band_high, f"at most band_high = {self.band_high}")
        expect("sgp_scale_min", 0 <= self.sgp_scale_min <= self.sgp_scale_max, "from 0 to sgp_scale_max")
        expect("window_hu", self.window_hu[0] < self.window_hu[1], "two rising HU values")
        for name in STARTS:
            start = getattr(self, name)
            fits = start >= 0 if isinstance(start, int) else 0.0 <= start <= 1.0
            expect(name, fits, "an optimizer step (int) or a fraction of the run (float from 0 to 1)")
        total = sum(self.perturbation_chances.values())
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ValueError(f"sum of perturb_{', '.join(PERTURBATIONS)}: expected 1, found {total!r}")
        if self.scheduler == "its" and self.stage == 1:
            why = "which has no threshold predictor; load with stage=2 to add a fresh one"
            raise ValueError(f"scheduler 'its': expected stage 2, found stage 1, {why}")

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what config.json says, and the keywords left over. ValueError without one.

        transformers takes its defaults for a file that is not there: those of a model of 72 billion weights.
        """
        check_place(pretrained_model_name_or_path)
        found, left_over = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "vision_config" not in found:
            place = pretrained_model_name_or_path
            raise ValueError(f"{place}: expected config.json of Qwen2.5-VL or Photon, found none; copy it again")
        return {**found, "model_type": cls.model_type}, left_over

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration of what config.json says."""
        if isinstance(vision := config_dict.get("vision_config"), dict):
            known = {name: value for name, value in vision.items() if (name, value) != ("in_channels", None)}
            config_dict = {**config_dict, "vision_config": known}
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what config.json holds: the published layout, text settings at the top level, not nested."""
        nested = super().to_diff_dict()
        text = self.text_config.to_diff_dict()
        rope = text.pop("rope_parameters", None) or {}
        flat = {
            **text,
            **{k: v for k, v in nested.items() if k != "text_config"},
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],  # the authors' class of that name
            "its_layer": self.its_layer,  # even where it is also the default of a configuration without settings
        }
        if "mrope_section" in rope:  # a configuration without it is no model's, but can be printed
            flat["rope_theta"] = rope["rope_theta"]
            flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        if "dtype" in flat:
            flat["torch_dtype"] = flat["dtype"]  # the name the authors' transformers reads
        channels = {"in_channels": None, "in_chans": self.vision_config.in_channels}
        flat["vision_config"] = {**flat["vision_config"], **channels}
        return flat


class Phase(Enum):
    """What happens to visual tokens after layer its. Evaluation is always HARD."""

    DENSE = "dense"  # nothing is weighted or dropped
    SOFT = "soft"  # hidden states are multiplied by p, nothing is dropped
    HARD = "hard"  # dropped for good, with surrogate gradients
    FLIP = "flip"  # as HARD, and some rows keep the complement


def phase_starts(config: PhotonConfig, total_steps: int | None = None) -> dict[Phase, int]:
    """Return the optimizer step, from 0, in which each phase after DENSE starts.

    Raises ValueError where fractions lack `total_steps`.
    """
    starts = {Phase.SOFT: config.soft_start, Phase.HARD: config.hard_start, Phase.FLIP: config.flip_start}
    found = {}
    for phase, start in starts.items():
        if isinstance(start, float):
            if total_steps is None:
                raise ValueError(f"expected total_steps, found None: a phase starts at the fraction {start}; pass it")
            start = math.ceil(start * total_steps)
        found[phase] = start
    return found


def phase_at(config: PhotonConfig, step: int, total_steps: int | None = None) -> Phase:
    """Return the phase of optimizer step `step`, from 0, which a trainer restores on resume.

    Raises ValueError where fractions lack `total_steps`.
    """
    begun = [phase for phase, start in phase_starts(config, total_steps).items() if step >= start]
    return begun[-1] if begun else Phase.DENSE


class Layout(Enum):
    """What a checkpoint was trained as."""

    STOCK = "Qwen2.5-VL"
    STAGE1 = "Photon stage 1"
    STAGE2 = "Photon stage 2"


def layout_of(keys: set[str]) -> Layout:
    """Return the layout that the tensor names show. Raises ValueError when they show none."""
    parts = {".atp.": Layout.STAGE2, "visual.vision_patch_embed.": Layout.STAGE1, "visual.patch_embed.": Layout.STOCK}
    for part, layout in parts.items():
        if any(part in key for key in keys):
            return layout
    raise ValueError(
        f"expected a Qwen2.5-VL or Photon checkpoint, found neither patch_embed nor vision_patch_embed "
        f"among {len(keys)} keys, such as {sorted(keys)[:3]}; check the path"
    )


def config_for(path: str, layout: Layout, stage: int | None, settings: dict[str, Any], **kwargs: Any) -> PhotonConfig:
    """Return the configuration to load a checkpoint for `stage` (default: its own; below it: ValueError)."""
    own_stage = 2 if layout is Layout.STAGE2 else 1
    stage = own_stage if stage is None else stage
    if stage < own_stage:
        raise ValueError(
            f"{layout.value} checkpoint: expected stage {own_stage}, found {stage}; for no pruning set scheduler='none'"
        )
    saved, _ = PhotonConfig.get_config_dict(path, **hub_options(kwargs))
    if layout is Layout.STOCK:
        # one channel and cubic patches in place of RGB frames
        rgb, fresh = saved["vision_config"], PhotonVisionConfig()
        cubic = {"in_channels": 1, "in_chans": 1, "temporal_patch_size": rgb.get("patch_size", fresh.patch_size)}
        settings = {"vision_config": {**rgb, **cubic, "tokens_per_second": fresh.tokens_per_second}, **settings}
    if stage == 2 and layout is not Layout.STAGE2:
        settings = {"scheduler": "its", **settings}
    return PhotonConfig.from_dict({**saved, **settings, "stage": stage})


def check_place(path_or_id: str | os.PathLike[str]) -> None:
    """Raise ValueError for what is neither a directory nor an id such as Qwen/Qwen2.5-VL-3B-Instruct."""
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path_or_id)) and not Path(path_or_id).is_file()
    if not is_id and not Path(path_or_id).is_dir():
        raise ValueError(f"expected a model directory or a hub id, found neither at {path_or_id}; check the path")


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where on the hub to look."""
    return {k: v for k, v in kwargs.items() if k in HUB_OPTIONS and v is not None}

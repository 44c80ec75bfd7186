"""Which weights a stage trains, and with which learning rate.

Everything that a step of a training run needs, in one value.

A config -> a run that is ready to make its next step, from the start or from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import TrainRow, read_train_rows, rows_with_stores
from photon_train.training import sharding as zero
from photon_train.training.batches import Augment, Batch, Group, GroupDataset, Reading, Turn, batches, steps_per_epoch
from photon_train.training.checkpoint import ADAPTER, checkpoints, load_adapter, read_moments, read_state
from photon_train.training.config import TrainConfig, with_values
from photon_train.training.grounding import ScoreRecorder, groundings
from photon_train.training.sharding import LANGUAGE_MODEL, Engine, module_of

LORA_TARGETS = r".*language_model\.layers\..*_proj"
UNUSED = ".atp.pos_proj."  # stored, never used


def with_lora(model: Any, config: TrainConfig) -> Any:
    """Return the model with trainable low-rank updates of the language model's linear layers (peft, an extra)."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=LORA_TARGETS)
    return get_peft_model(model, lora)


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Set requires_grad of every parameter. UsageError when nothing is left to train.

    A rate of 0 freezes a module. With LoRA the language model's own weights are frozen, its updates trained.
    """
    for name, parameter in model.named_parameters():
        module = module_of(name)
        frozen = config.rates[module] == 0 or UNUSED in name or any(fnmatch(name, pattern) for pattern in config.freeze)
        if config.lora_rank and module == LANGUAGE_MODEL and "lora_" not in name:
            frozen = True
        parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("a module with a learning rate above 0 wanted, got none: lr_* and freeze leave nothing to train")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return optimizer groups: a rate per module, weight decay for matrices only. `module` names the group in the log."""
    groups: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[module_of(name), parameter.ndim > 1].append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.rates[module],
            "weight_decay": config.weight_decay if decays else 0.0,
            "module": module,
        }
        for (module, decays), parameters in groups.items()
    ]


logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """The run cannot go on as it was asked to: a row that cannot be read, a loss that is not finite. Names the rows."""


@dataclass
class Run:
    """Everything a step needs. `state` is what a checkpoint restores."""

    config: TrainConfig
    engine: Engine
    processor: Any
    rows: Sequence[TrainRow]
    eval_rows: Sequence[TrainRow]
    total_steps: int
    state: dict[str, Any]
    watch: Callable[[dict[str, Any]], None]
    groundings: dict[str, Tensor] = field(default_factory=dict)
    recorder: ScoreRecorder | None = None

    @property
    def accelerator(self) -> Accelerator:
        """What this process is among the others."""
        return self.engine.accelerator

    @property
    def model(self) -> Any:
        """The model, as accelerate wrapped it."""
        return self.engine.model

    @property
    def photon(self) -> Any:
        """The model's PhotonConfig."""
        return self.processor.config

    @property
    def is_stage_2(self) -> bool:
        """Whether tokens are scheduled while training."""
        return bool(self.photon.scheduler == "its")

    @property
    def turn(self) -> Turn:
        """Which groups of a step are this process's."""
        return Turn(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def is_sharded(self) -> bool:
        """Whether processes share the weights module by module, and so must call the same ones."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.config.output)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of this process: one device, or what torchrun or `accelerate launch` set up.

    UsageError for groups that the processes cannot share evenly, FSDP 1, and settings of DeepSpeed that would be another run's.
    """
    # Early phases leave the threshold predictor, and text-only groups the vision tower, without gradient. Buffers are constants;
    # DDP would send them before every forward, and wait for a process that has a group less to evaluate.
    kwargs = [DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)]
    with_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, accelerate imports it, and it wonders
    precision = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(
        cpu=not (torch.cuda.is_available() or with_zero),  # else torchrun on CPUs gives so many runs of one process
        mixed_precision=precision,
        log_with=list(config.track) or None,
        project_dir=config.output,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # groups_per_step says it; a launcher must not
        kwargs_handlers=kwargs,
    )
    check_shares(config, accelerator.num_processes)
    if accelerator.distributed_type is DistributedType.FSDP:
        _configure_fsdp(accelerator)
    if with_zero:
        zero.configure(accelerator, config)
    return accelerator


def check_shares(config: TrainConfig, processes: int) -> None:
    """UsageError when so many processes, as accelerate sees them, cannot make the steps of the run together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:  # DeepSpeed without GPUs: each would train alone
        raise UsageError(f"{launched} processes were launched, accelerate sees {processes}; launch DDP where there are no GPUs")
    if config.groups_per_step % processes:
        raise UsageError(f"groups_per_step: a multiple of the {processes} processes wanted, got {config.groups_per_step}")


def make_engine(accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> Engine:
    """Return the model and its optimizer, spread over the processes."""
    is_zero = accelerator.distributed_type is DistributedType.DEEPSPEED
    model, prepared = accelerator.prepare(model, optimizer)
    return (zero.ZeroEngine if is_zero else Engine)(accelerator, model, prepared)


def _configure_fsdp(accelerator: Accelerator) -> None:
    """Refuse FSDP 1, and let FSDP 2 round to bfloat16 what layers compute with, not what they give back or add up."""
    if not accelerator.is_fsdp2:
        raise UsageError("FSDP2 wanted (fsdp_version: 2), got FSDP 1, which knows no weight by its name")
    accelerator.state.fsdp_plugin.activation_checkpointing = False  # the run's own, by half
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def _reading(run: Run, *, training: bool) -> Reading:
    """Return how groups are read: without anything random in evaluation."""
    config = run.config
    if not training:
        return Reading(config.share_prefix, config.max_length, same_calls=run.is_sharded, seed=config.seed)
    return Reading(
        config.share_prefix,
        config.max_length,
        robustness=run.photon.robustness_probability if run.is_stage_2 else 0.0,
        flip=run.photon.flip_probability if run.is_stage_2 else 0.0,
        augment=Augment(config.augment),
        groundings=run.groundings,
        same_calls=run.is_sharded,
        seed=config.seed,
    )


def read_ahead(run: Run, groups: Sequence[Group], *, training: bool, epoch: int = 0) -> Iterator[Batch]:
    """Yield the batches of groups in order, read by processes of their own while the device computes."""
    rows = run.rows if training else run.eval_rows
    dataset = GroupDataset(rows, groups, run.processor, _reading(run, training=training), epoch)
    pin = run.accelerator.device.type == "cuda"
    return batches(dataset, _worker_count(run.config), run.config.prefetch, pin)


def check_read(run: Run, batch: Batch) -> None:
    """Stop, or say so, when a group could not be read."""
    if not batch.error:
        return
    named = f"{len(batch.ids)} rows ({', '.join(batch.ids)}) cannot be read: {batch.error}"
    if run.config.on_bad_row == "stop":
        raise TrainingStopped(f"{named}. Repair the store, or leave such rows out with on_bad_row=skip")
    logger.warning("skipped: %s", named)


def _worker_count(config: TrainConfig) -> int:
    """Return how many processes read stores: as configured, or up to 8 of the CPUs that the compute leaves over."""
    if config.workers >= 0:
        return config.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = (os.cpu_count() or 1) // local - 1
    return max(min(spare, 8), 1)


logger_start = logging.getLogger(__name__)
CONFIG = "config.json"
# What may change when a run goes on: nothing that a step depends on.
FREE_TO_CHANGE = (
    *("output", "workers", "prefetch", "eval_every", "save_every", "keep_checkpoints", "track", "eval", "on_bad_row", "on_nan"),
)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a .json or .yaml file. UsageError when it holds no object."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: a file of settings wanted ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: settings by name wanted, got {type(found).__name__}")
    return found


def start(
    config: TrainConfig,
    *,
    resume: bool,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
    watch_masks: Callable[[int, int], object] = lambda done, total: None,
) -> Run:
    """Return the run. UsageError for what it cannot be made of; a folder that holds a run wants `resume`.

    `watch` is given each row of the log, `watch_masks` how many volumes' masks of how many are counted, if the run is grounded.
    """
    folder = Path(config.output)
    found = checkpoints(folder)
    if not resume and (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds a run; go on with it with --resume, or choose another output")
    last = found[-1] if resume and found else None
    rows, eval_rows = _rows(config)
    accelerator = make_accelerator(config)
    model, processor = load_model(config, last)
    _check_resumed(config, last, rows, folder)
    known = groundings(rows, Path(config.grounding), processor.config.tokens_thw, watch_masks) if config.grounding else {}
    choose_trained(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=1.0, betas=(0.9, config.adam_beta2))
    steps = steps_per_epoch(rows, config.questions_per_volume, config.groups_per_step) * config.epochs
    total = min(steps, config.max_steps) if config.max_steps else steps
    engine = make_engine(accelerator, model, optimizer)
    engine.model.train()
    state: dict[str, Any] = {"step": 0, "epoch": 0, "step_in_epoch": 0, "rows": _digest(rows), "settings": config.to_json()}
    if last:
        state |= {name: read_state(last)[name] for name in ("step", "epoch", "step_in_epoch")}
        engine.load_moments(read_moments(last))
    if accelerator.is_main_process:
        Location(str(folder)).write(CONFIG, json.dumps(config.to_json(), indent=1).encode())
        accelerator.init_trackers("photon", init_kwargs={})
    recorder = ScoreRecorder(engine.model) if known else None
    return Run(config, engine, processor, rows, eval_rows, total, state, watch, known, recorder)


def load_model(config: TrainConfig, last: Path | None) -> tuple[Any, PhotonProcessor]:
    """Return the model to train, whole and in float32, and its processor; from a checkpoint of the run if there is one."""
    torch.manual_seed(config.seed)  # fresh parts
    with_adapter = last is not None and (last / ADAPTER).is_file()
    source = config.model if last is None or with_adapter else str(last)
    if not source:
        raise UsageError("model: a checkpoint to start from wanted, got none; photon init makes one")
    options: dict[str, Any] = {"revision": config.revision or None} if source == config.model else {}
    settings = _photon_settings(config)
    wanted = 2 if config.stage == "s2" else None
    model: Any = PhotonForConditionalGeneration.from_pretrained(
        source, stage=wanted, dtype=torch.float32, attn_implementation=config.attention, **settings, **options
    )
    model.config.use_cache = False
    processor = PhotonProcessor(AutoTokenizer.from_pretrained(source, **options), model.config)
    _set_checkpointing(model, config)
    if config.lora_rank:
        model = with_lora(model, config)
    if last is not None and with_adapter:
        load_adapter(model, last)
    return model, processor


def _photon_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what of PhotonConfig the run sets: stages before the second train without dropping tokens."""
    scheduler = {"s1": "none", "s1c": "none", "s2": "its"}[config.stage]
    return {"scheduler": scheduler, **config.photon}


def _set_checkpointing(model: Any, config: TrainConfig) -> None:
    """Set it apart for the two halves, without reentry, which would lose the gradient of the threshold."""
    function = partial(checkpoint, use_reentrant=False)
    for part, wanted in (
        (model.model.language_model, config.gradient_checkpointing),
        (model.model.visual, config.vision_gradient_checkpointing),
    ):
        for module in part.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = wanted
                module._gradient_checkpointing_func = function


def _rows(config: TrainConfig) -> tuple[list[TrainRow], list[TrainRow]]:
    rows = rows_with_stores(read_train_rows(config.data), config.on_bad_row)
    return rows, rows_with_stores(read_train_rows(config.eval), config.on_bad_row) if config.eval else []


def _check_resumed(config: TrainConfig, last: Path | None, rows: list[TrainRow], folder: Path) -> None:
    """UsageError when the run that goes on would not be the one that was begun."""
    if last is None:
        return
    state = read_state(last)
    if state["rows"] != _digest(rows):
        raise UsageError(f"the rows that {folder} was begun with wanted, got others; start a new run on changed manifests")
    begun = with_values(TrainConfig(), state["settings"])
    same = replace(config, **{name: getattr(begun, name) for name in FREE_TO_CHANGE})
    changed = [
        f"{name}={getattr(same, name)!r} (was {value!r})" for name, value in vars(begun).items() if getattr(same, name) != value
    ]
    if changed:
        raise UsageError(
            f"the settings of {folder} wanted to go on with it, got {', '.join(changed)}; start a new run for others"
        )


def _digest(rows: list[TrainRow]) -> str:
    lines = [json.dumps([row.id, row.videos, row.messages], sort_keys=True) for row in rows]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()

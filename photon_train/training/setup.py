"""A config -> a run that is ready for its next step: its rows, the model, what of it is trained, and the optimizer.

The run starts from the beginning or from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import TrainRow, read_train_rows, rows_with_stores
from photon_train.training.batches import Batch, steps_per_epoch
from photon_train.training.checkpoint import ADAPTER, checkpoints, read_optimizer_state, read_state
from photon_train.training.config import TrainConfig, with_values
from photon_train.training.sharding import load_optimizer_state, make_accelerator

CONFIG = "config.json"
# What may change when a run goes on: settings that no step depends on.
FREE_TO_CHANGE = (
    *(
        "output",
        "workers",
        "prefetch",
        "eval",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "track",
        "on_bad_row",
        "on_nan",
    ),
)

# Module -> a part of its parameters' names; the first that fits counts. What fits none is the language model.
MODULES = {
    "patch_embedding": "visual.patch_embed.",
    "merger": "visual.merger.",
    "vision": "visual.",
    "threshold": ".atp.predictor.",
}
LANGUAGE_MODEL = "language_model"
LORA_TARGETS = r".*language_model\.layers\..*_proj"
UNUSED = ".atp.pos_proj."  # stored, never used

AddedLoss = Callable[[Batch], Tensor | None]  # called after each forward; None: nothing to add
LossFactory = Callable[[Any, Sequence[TrainRow]], AddedLoss]  # of the model, and the rows it is trained on


@dataclass
class Run:
    """Everything a step needs. Accelerate has prepared model and optimizer; a checkpoint restores `state`."""

    config: TrainConfig
    accelerator: Accelerator
    model: Any
    optimizer: Any
    processor: PhotonProcessor
    rows: Sequence[TrainRow]
    eval_rows: Sequence[TrainRow]
    total_steps: int
    state: dict[str, Any]
    callback: Callable[[dict[str, Any]], object]  # is given each row of the log
    grounding: AddedLoss | None = None

    @property
    def model_config(self) -> Any:
        """The model's PhotonConfig."""
        return self.processor.config

    @property
    def schedules(self) -> bool:
        """Whether tokens are scheduled while training."""
        return bool(self.model_config.scheduler == "its")

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.config.output)


def start(
    config: TrainConfig,
    *,
    resume: bool,
    callback: Callable[[dict[str, Any]], object] = lambda row: None,
    grounding: LossFactory | None = None,
) -> Run:
    """Return the run. UsageError for settings or rows that make no run; a folder that holds a run needs `resume`.

    `callback` is given each row of the log. `grounding` is what `grounding.grounding_of(config.grounding)` returns.
    """
    folder = Path(config.output)
    found = checkpoints(folder)
    if not resume and (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds a run; go on with it with --resume, or choose another output")
    if bool(config.grounding) != (grounding is not None):
        raise UsageError(
            "grounding: expected it in the config and as an argument, found one of them; see grounding.grounding_of"
        )
    last = found[-1] if resume and found else None
    rows = rows_with_stores(read_train_rows(config.data), config.on_bad_row)
    eval_rows = rows_with_stores(read_train_rows(config.eval), config.on_bad_row) if config.eval else []
    accelerator = make_accelerator(config)
    model, processor = load_model(config, last)
    state: dict[str, Any] = {"step": 0, "epoch": 0, "step_in_epoch": 0}
    state |= {"rows": _digest(rows), "settings": config.to_json()}
    if last:
        saved = read_state(last)
        _check_same_run(config, saved, state["rows"])
        state |= {name: saved[name] for name in ("step", "epoch", "step_in_epoch")}
    added = grounding(model, rows) if grounding else None

    choose_trained(model, config)
    steps = steps_per_epoch(rows, config.questions_per_volume, config.groups_per_step) * config.epochs
    total_steps = min(steps, config.max_steps) if config.max_steps else steps
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=1.0, betas=(0.9, config.adam_beta2))
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    if last:
        load_optimizer_state(model, accelerator.unwrap_model(model), optimizer.optimizer, read_optimizer_state(last))
    if accelerator.is_main_process:
        Location(str(folder)).write(CONFIG, json.dumps(config.to_json(), indent=1).encode())
        accelerator.init_trackers("photon", init_kwargs={})
    return Run(config, accelerator, model, optimizer, processor, rows, eval_rows, total_steps, state, callback, added)


def load_model(config: TrainConfig, last: Path | None) -> tuple[Any, PhotonProcessor]:
    """Return the model to train, whole and in float32, and its processor; of the checkpoint `last` if there is one."""
    torch.manual_seed(config.seed)  # for fresh parts
    with_adapter = last is not None and (last / ADAPTER).is_file()
    source = config.model if last is None or with_adapter else str(last)
    if not source:
        raise UsageError("model: expected a checkpoint to start from, found none; photon init makes one")
    options: dict[str, Any] = {"revision": config.revision or None} if source == config.model else {}
    model: Any = PhotonForConditionalGeneration.from_pretrained(
        source,
        stage=2 if config.stage == "s2" else None,
        dtype=torch.float32,
        attn_implementation=config.attention,
        **{"scheduler": "its" if config.stage == "s2" else "none", **config.photon},  # earlier stages drop no tokens
        **options,
    )
    model.config.use_cache = False
    processor = PhotonProcessor(AutoTokenizer.from_pretrained(source, **options), model.config)
    _set_gradient_checkpointing(model.model.language_model, config.gradient_checkpointing)
    _set_gradient_checkpointing(model.model.visual, config.vision_gradient_checkpointing)
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model  # an extra

        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=LORA_TARGETS)
        model = get_peft_model(model, lora)
    if last is not None and with_adapter:
        model.load_state_dict(load_file(last / ADAPTER), strict=False)
    return model, processor


def _set_gradient_checkpointing(part: Any, enabled: bool) -> None:
    """Set it for one half of the model, without reentry, which would lose the gradient of the threshold."""
    for module in part.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = enabled
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _digest(rows: Sequence[TrainRow]) -> str:
    lines = [json.dumps([row.id, row.videos, row.messages], sort_keys=True) for row in rows]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_same_run(config: TrainConfig, saved: dict[str, Any], rows_digest: str) -> None:
    """UsageError when the run that goes on would not be the one that was begun."""
    if saved["rows"] != rows_digest:
        raise UsageError(
            f"expected the rows that {config.output} was begun with, found others; start a new run on changed manifests"
        )
    begun = with_values(TrainConfig(), saved["settings"])
    same = vars(replace(config, **{name: getattr(begun, name) for name in FREE_TO_CHANGE}))
    changed = [f"{name}={same[name]!r} (was {value!r})" for name, value in vars(begun).items() if same[name] != value]
    if changed:
        raise UsageError(
            f"expected the settings that {config.output} was begun with, found {', '.join(changed)}; "
            "start a new run for others"
        )


def module_of(name: str) -> str:
    """Return the module that a parameter belongs to, by its name in the model."""
    return next((module for module, part in MODULES.items() if part in name), LANGUAGE_MODEL)


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Set requires_grad of every parameter. UsageError when nothing is left to train.

    A learning rate of 0 freezes a module. With LoRA the language model's own weights are frozen, its updates trained.
    """
    for name, parameter in model.named_parameters():
        module = module_of(name)
        frozen = config.learning_rates[module] == 0 or UNUSED in name
        frozen |= any(fnmatch(name, pattern) for pattern in config.freeze)
        frozen |= config.lora_rank > 0 and module == LANGUAGE_MODEL and "lora_" not in name
        parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(
            "expected a module with a learning rate above 0, found that lr_* and freeze leave nothing to train; "
            "set one of lr_*"
        )


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return optimizer groups: a learning rate per module, weight decay for matrices only. `module` is for the log."""
    groups: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[module_of(name), parameter.ndim > 1].append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.learning_rates[module],
            "weight_decay": config.weight_decay if is_matrix else 0.0,
            "module": module,
        }
        for (module, is_matrix), parameters in groups.items()
    ]

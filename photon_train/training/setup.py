"""A config -> a run that is ready for its next step: its rows, the model, what of it is trained and how fast.

The run starts from the beginning or from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_train.checkpoint import (
    ADAPTER,
    checkpoints,
    loading,
    newest_whole,
    read_state,
    remove_leftovers,
)
from photon_train.configuration_photon import PhotonConfig, phase_starts
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import TrainRow, read_train_rows
from photon_train.training.compiling import compile_layers
from photon_train.training.config import MADE_WITH, TrainConfig, made_with
from photon_train.training.optimizer import MasterAdamW, load_optimizer_state
from photon_train.training.plan import (
    check_length,
    check_same_run,
    check_shares,
    rows_digest,
    rows_with_stores,
    rows_with_texts,
    steps_per_epoch,
)
from photon_train.training.processes import casts, keep_float32, make_accelerator, share_apart

CONFIG = "config.json"

# Module -> a part of its parameters' names; the first that fits counts. What fits none is the language model.
MODULES = {
    "patch_embedding": "visual.patch_embed.",
    "merger": "visual.merger.",
    "vision": "visual.",
    "threshold": ".atp.predictor.",
}
LANGUAGE_MODEL = "language_model"

AddedLoss = Callable[[Any], Tensor | None]  # of the batch, after each forward; None: nothing to add
Answering = Callable[[Any, int], dict[str, float | None]]  # of the model and the step: scores of its answers
AnsweringFactory = Callable[[Sequence[TrainRow], PhotonProcessor, Accelerator], Answering]  # of the rows of eval
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
    answering: Answering | None = None

    @property
    def schedules(self) -> bool:
        """Whether training has phases, perturbed volumes and flips: in stage 2, whichever scheduler it is for."""
        return self.config.stage == "s2"

    @property
    def curriculum(self) -> str:
        """The steps in which the phases of stage 2 start, in words; "" for a run without phases."""
        if not self.schedules:
            return ""
        soft, hard, flip = phase_starts(self.processor.config, self.total_steps).values()
        return f"curriculum: soft from step {soft}, hard from {hard}, flip from {flip}, of {self.total_steps}"

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, a part of the run's state."""

    step: int = 0  # of its checkpoint; 0 for none
    value: float = 0.0
    waited: int = 0  # evaluations since then

    def after(self, step: int, value: float | None, mode: str) -> Best:
        """Return the best after one more evaluation. None or NaN is never better; nor is an equal value."""
        is_better = value is not None and value == value and (not self.step or self._is_below(value, mode))
        return Best(step, value) if is_better and value is not None else Best(self.step, self.value, self.waited + 1)

    def _is_below(self, value: float, mode: str) -> bool:
        return value > self.value if mode == "max" else value < self.value


def start(
    config: TrainConfig,
    *,
    resume: bool | Literal["auto"],
    callback: Callable[[dict[str, Any]], object] = lambda row: None,
    grounding: LossFactory | None = None,
    answering: AnsweringFactory | None = None,
    loaded: tuple[Any, PhotonProcessor] | None = None,
) -> Run:
    """Return the run. UsageError for settings or rows that make no run; a folder that holds a run needs `resume`.

    `resume` goes on with the run in `config.output`, from its last checkpoint; "auto" begins one where there is none.
    `callback` is given each row of the log. `grounding` is what `grounding.grounding_of(config.grounding)` returns,
    `answering` what `evaluation.answering_of(config)` does. `loaded` is a model in memory with its processor, and
    stands in for `config.model` and `config.photon`.
    """
    folder = Path(config.output)
    if not resume and (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds a run; go on with it with --resume, or choose another output")
    if resume is True and not (folder / CONFIG).exists():
        remedy = "check --output; to begin a run leave --resume out, or say --resume auto to do either"
        raise UsageError(f"expected a run to go on with, found none in {folder}; {remedy}")
    for name, needed, given in (
        ("grounding.grounding_of(config.grounding)", config.grounding, grounding),
        ("evaluation.answering_of(config)", config.eval_benchmark, answering),
    ):
        if bool(needed) != (given is not None):
            remedy = f"pass {name} exactly where the config has it"
            raise UsageError(f"expected it in the config and as an argument, found one of them; {remedy}")
    is_main = int(os.environ.get("RANK", "0")) == 0
    if is_main:
        remove_leftovers(folder)
    newest = newest_whole if is_main else lambda run: next(reversed(checkpoints(run)), None)
    last = newest(folder) if resume else None
    rows = rows_with_stores(read_train_rows(config.data), config.on_bad_row)
    eval_rows = rows_with_stores(read_train_rows(config.eval), config.on_bad_row) if config.eval else []
    accelerator = make_accelerator(config)
    dtype = torch.bfloat16 if config.precision == "bf16" and not casts(config) else torch.float32
    verify = accelerator.is_local_main_process
    model, processor = loaded or load_model(config, last, verify=verify, dtype=dtype)
    rows = rows_with_texts(rows, processor, config, accelerator)
    eval_rows = rows_with_texts(eval_rows, processor, config, accelerator)
    asked = answering(eval_rows, processor, accelerator) if answering else None
    state: dict[str, Any] = {"step": 0, "epoch": 0, "step_in_epoch": 0, "best": asdict(Best())}
    digests = {"rows": rows_digest(rows), "eval_rows": rows_digest(eval_rows)}
    if last:
        state |= read_state(last)
        check_same_run(config, state, digests)
    state |= digests | {"settings": config.to_json()}
    added = grounding(model, rows) if grounding else None

    choose_trained(model, config)
    steps = steps_per_epoch(rows, config)
    check_shares(config, rows, steps, accelerator.num_processes)
    total_steps = min(steps * config.epochs, config.max_steps or steps * config.epochs)
    check_length(config, state, total_steps)
    if config.stage == "s2":
        set_curriculum(processor.config, config, len(rows) / steps, total_steps, state)
    groups, betas = parameter_groups(model, config), (0.9, config.adam_beta2)
    fused = accelerator.device.type == "cuda" or not accelerator.is_fsdp2
    rounded = any(weight.dtype != torch.float32 for group in groups for weight in group["params"])
    optimizer = MasterAdamW(groups, betas) if rounded else torch.optim.AdamW(groups, lr=1.0, betas=betas, fused=fused)
    if config.compile:
        compile_layers(model, accelerator.device)
    if accelerator.is_fsdp2:
        share_apart(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    keep_float32(model)
    model.train()
    if last:
        load_optimizer_state(last, model, accelerator.unwrap_model(model), optimizer.optimizer)
    if accelerator.is_main_process:
        _announce(config, accelerator, state["step"])
    steps_of = (rows, eval_rows, total_steps, state)
    return Run(config, accelerator, model, optimizer, processor, *steps_of, callback, added, asked)


def _announce(config: TrainConfig, accelerator: Accelerator, step: int) -> None:
    """Write RUN/config.json, and tell the trackers what the run is: its settings, versions and commit."""
    folder, made = Path(config.output), made_with()
    content = json.dumps(config.to_json() | {MADE_WITH: made}, indent=1)
    Location(str(folder)).write(CONFIG, content.encode())
    options: dict[str, Any] = {"wandb": {"name": folder.name}}
    if step:
        options["tensorboard"] = {"purge_step": step + 1}  # steps that a killed run made
    accelerator.init_trackers("photon", config=config.flat() | made, init_kwargs=options)


def set_curriculum(
    photon: PhotonConfig, config: TrainConfig, questions_per_step: float, total_steps: int, state: dict[str, Any]
) -> None:
    """Set the steps in which phases start, from numbers of questions. UsageError where tokens would never be dropped.

    A start that `config.photon` gives stays as it is. What has begun, by the `state` of a run that goes on, has begun.
    """
    for phase in ("soft", "hard", "flip"):
        after = getattr(config, f"{phase}_after")
        if after and f"{phase}_start" not in config.photon:
            setattr(photon, f"{phase}_start", round(after / questions_per_step))
    _keep_begun_phases(photon, state, total_steps)
    starts = phase_starts(photon, total_steps)
    state["phases"] = {phase.value: start for phase, start in starts.items()}
    soft, hard, flip = starts.values()
    found = f"found soft from step {soft}, hard from {hard}, flip from {flip}, of {total_steps}"
    if not soft <= hard <= flip:
        raise UsageError(f"expected phases in the order soft, hard, flip, {found}; change photon.*_start or *_after")
    if photon.scheduler != "none" and hard >= total_steps:
        remedy = "set shares of the run: photon.soft_start=0.1, photon.hard_start=0.2, photon.flip_start=0.3"
        raise UsageError(f"expected a run that drops tokens before it ends, {found}; {remedy}, or train for longer")


def _keep_begun_phases(photon: PhotonConfig, state: dict[str, Any], total_steps: int) -> None:
    """Leave every phase where it began: shares of a longer run would move it behind steps that are made.

    A run of 10 steps with soft 0.2, hard 0.4 and flip 0.9 that goes on after step 5, to 20 steps: 2, 4, 18.
    """
    for phase, begun in state.get("phases", {}).items():
        now = {phase.value: start for phase, start in phase_starts(photon, total_steps).items()}
        if begun < state["step"] and now[phase] != begun:  # else no step was made in it
            setattr(photon, f"{phase}_start", begun)


def load_model(
    config: TrainConfig, last: Path | None, *, verify: bool, dtype: torch.dtype = torch.float32
) -> tuple[Any, PhotonProcessor]:
    """Return the model to train, whole, and its processor; of the checkpoint `last` if there is one.

    `verify`: compare the files of a model to start from with their digests; `last` was compared before.
    """
    torch.manual_seed(config.seed)  # for fresh parts
    adapter = last / ADAPTER if last and (last / ADAPTER).is_file() else None
    source = str(last) if last and not adapter else config.model
    if not source:
        raise UsageError("model: expected a checkpoint to start from, found none; photon init makes one")
    options: dict[str, Any] = {"revision": config.revision or None} if source == config.model else {}
    scheduler = "its" if config.stage == "s2" else "none"  # earlier stages drop no tokens
    with loading(source):
        model: Any = PhotonForConditionalGeneration.from_pretrained(
            source,
            stage=2 if config.stage == "s2" else None,
            dtype=dtype,
            attn_implementation=config.attention,
            verify=verify and source == config.model,
            **{"scheduler": scheduler, **config.photon},
            **options,
        )
        processor = PhotonProcessor(AutoTokenizer.from_pretrained(source, **options), model.config)
    checkpoint_activations(model, config)
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model  # an extra

        layers = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # not the scheduler's pos_proj
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=layers)
        model = get_peft_model(model, lora)
    if adapter:
        choose_trained(model, config)
        weights = load_file(adapter)
        wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if odd := sorted(wanted ^ weights.keys()):
            found = f"found {len(odd)} missing or unexpected, such as {odd[0]}"
            raise UsageError(f"{adapter}: expected the {len(wanted)} weights that are trained, {found}")
        model.load_state_dict(weights, strict=False)  # what is not trained is not in it
    return model, processor


def checkpoint_activations(model: Any, config: TrainConfig) -> None:
    """Have the halves of the model that the config says compute their activations again in the backward pass."""
    for part, enabled in (
        (model.model.language_model, config.gradient_checkpointing),
        (model.model.visual, config.vision_gradient_checkpointing),
    ):
        for module in part.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled
                # Reentry would lose the gradient of the threshold.
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def module_of(name: str) -> str:
    """Return the module that a parameter belongs to, by its name in the model."""
    return next((module for module, part in MODULES.items() if part in name), LANGUAGE_MODEL)


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Set requires_grad of every parameter. UsageError when nothing is left to train.

    A learning rate of 0 freezes a module. With LoRA the language model's own weights are frozen, its updates trained.
    """
    for name, parameter in model.named_parameters():
        module = module_of(name)
        frozen = config.learning_rates[module] == 0 or ".atp.pos_proj." in name  # stored, never used
        frozen |= any(fnmatch(name, pattern) for pattern in config.freeze)
        frozen |= config.lora_rank > 0 and module == LANGUAGE_MODEL and "lora_" not in name
        parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        found = "found that lr_* and freeze leave nothing to train; set one of lr_*"
        raise UsageError(f"expected a module with a learning rate above 0, {found}")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return optimizer groups: a learning rate per module, weight decay for matrices only. `module` is for the log."""
    groups: dict[tuple[str, float], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[module_of(name), config.weight_decay if parameter.ndim > 1 else 0.0].append(parameter)
    return [
        {"params": own, "lr": config.learning_rates[module], "weight_decay": decay, "module": module}
        for (module, decay), own in groups.items()
    ]


def learning_rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return what every peak learning rate is multiplied by in optimizer step `step`, counted from 0.

    Rises in a line over the warm-up (the last step of which has 1), then falls to 0 along a cosine or a line, or stays.
    """
    rising = math.ceil(config.warmup * total_steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(total_steps - rising, 1)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]


def set_learning_rates(optimizer: Any, config: TrainConfig, step: int, total_steps: int) -> dict[str, float]:
    """Set the optimizer's learning rates for a step and return them by module."""
    factor = learning_rate_factor(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rates[group["module"]] * factor
    return {group["module"]: group["lr"] for group in optimizer.param_groups}


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the norm of the gradients of each module that has any, of all processes."""
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    shared = False
    for name, parameter in model.named_parameters():
        if (gradient := parameter.grad) is not None:
            shared |= isinstance(gradient, DTensor)  # processes share the weight, and each has its part
            gradients[module_of(name)].append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    if not gradients:
        return {}
    of_each = (torch.stack(torch._foreach_norm(own, 2, torch.float32)) for own in gradients.values())
    squares = torch.stack([norms.square().sum() for norms in of_each])
    if shared:
        torch.distributed.all_reduce(squares)
    return dict(zip(gradients, squares.sqrt().tolist(), strict=True))

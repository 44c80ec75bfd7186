"""Checkpoints: folders that hold a model, published or ours, and a run's moments and position.

Published ones have names of weights and one of three layouts; what does not fit is said. Ours are complete or absent,
readable by from_pretrained, without pickles, made by any number of processes.

RUN/checkpoint-120/     config.json, model.safetensors, tokenizer files    what from_pretrained and photon predict read
                        adapter.safetensors      with LoRA: what is trained; then there is no model.safetensors
                        optimizer.safetensors    optimizer state of every trained weight, by its name
                        state.json               position of the run
                        digests.json             size and SHA-256 of each of these; written last

A run that goes on loads its model from there with from_pretrained, which is strict about names. With FSDP2 processes
share weights and optimizer state: they are gathered before they are written, and distributed after they were read.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils.hub import cached_file

from photon_data.errors import UsageError, is_out_of_memory, unforeseen
from photon_data.files import Location, fingerprint, write_whole
from photon_data.json_text import from_json
from photon_train.configuration_photon import Layout, check_place, hub_options

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DIGESTS = "digests.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
OF_RUN = (STATE, OPTIMIZER, ADAPTER)  # what from_pretrained does not read
PREFIX = "checkpoint-"
# What a run that was killed can leave in its folder: what it was writing, and what it was removing.
_FOLDER = r"(checkpoint-\d+|merged)"
LEFTOVER = re.compile(rf"\.(partial|removed)-{_FOLDER}|\.{_FOLDER}\.[0-9a-f]{{8}}\.partial")


PUBLISHED_NAMES = {  # what is replaced in the name of a weight in a file, and by what in the model
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
    r"visual\.vision_patch_embed": "visual.patch_embed",
}


def register_published_names(class_name: str) -> None:
    """Make transformers read and write the published key names for this class."""
    renamings: list[Any] = [WeightRenaming(*renaming) for renaming in PUBLISHED_NAMES.items()]
    register_checkpoint_conversion_mapping(class_name, renamings, overwrite=True)


def checkpoint_keys(path_or_id: str, verify: bool = True, **kwargs: Any) -> set[str]:
    """Return the tensor names of a local or hub checkpoint. Raises ValueError without whole safetensors files.

    With `verify` every file that its digests.json lists is read and compared; without, or where there is none, sizes
    and headers of the weights are.
    """
    check_place(path_or_id)
    options = _looking_in(kwargs)
    names = {WEIGHTS}
    if index := cached_file(path_or_id, INDEX, **options):
        names = _indexed_files(Path(index))
    files = {name: cached_file(path_or_id, name, **options) for name in sorted(names)}
    if missing := [name for name, file in files.items() if file is None]:
        _refuse_folder_of_run(Path(path_or_id))
        expected = f"the weights that {INDEX} names" if index else f"{WEIGHTS} or its index"
        raise ValueError(
            f"expected {expected}, found no {missing[0]} in {path_or_id}; pickled weights (.bin, .pt) can run code and "
            "are not read: convert them to safetensors on a machine you can lose"
        )
    if verify:
        check_digests(path_or_id, {*names, *([INDEX] if index else [])}, **kwargs)
    return {key for file in files.values() if file for key in _header_of(Path(file))}


def _refuse_folder_of_run(place: Path) -> None:
    """Raise ValueError that names the model where a run's folder, or the adapter of a LoRA run, was given for it."""
    if (place / ADAPTER).is_file():
        raise ValueError(
            f"expected a whole model, found {ADAPTER} in {place}, an update of the model that the run began with; "
            f"{place.parent / 'merged'} is the whole model once the run has ended"
        )
    if found := checkpoints(place):
        raise ValueError(f"expected a model, found a run with checkpoints in {place}; say {found[-1]}")


def _looking_in(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `cached_file` that make it return None for a file that is not there."""
    missing: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    return hub_options(kwargs) | missing


def _indexed_files(index: Path) -> set[str]:
    """Return the files that an index of shards names. Raises ValueError unless they are safetensors beside it."""
    try:
        names = set(from_json(index.read_bytes())["weight_map"].values())
        odd = [name for name in names if not re.fullmatch(r"[^/\\]+\.safetensors", name)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: expected JSON with a weight_map, found {error!r}; copy it again") from None
    if odd or not names:
        found = repr(odd[0]) if odd else "none"
        raise ValueError(f"{index}: expected names of .safetensors files beside it, found {found}; no other is read")
    return names


def _header_of(file: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file. Raises ValueError where its size is not what they take."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a complete safetensors file, found {error}; fetch it again") from error


@contextmanager
def loading(model: str) -> Iterator[None]:
    """Raise UsageError for whatever libraries raise over the files of a model, which may be somebody else's."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # what a damaged configuration or tokenizer raises has no end
        if is_out_of_memory(error):
            raise
        reason = str(error) if isinstance(error, ValueError | OSError) else unforeseen(error)
        raise UsageError(f"{model}: expected a model that can be loaded, found: {reason[:2000]}") from error


def check_loaded(info: dict[str, Any], layout: Layout, stage: int) -> None:
    """Raise ValueError listing every key that is missing, unexpected or of another shape, save fresh weights."""

    def is_fresh(key: str) -> bool:
        fresh_predictor = stage == 2 and layout is not Layout.STAGE2 and ".atp." in key
        return fresh_predictor or (layout is Layout.STOCK and key == "model.visual.patch_embed.proj.weight")

    problems = [f"missing {key}" for key in sorted(info["missing_keys"]) if not is_fresh(key)]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"{key}: expected shape {tuple(expected)}, found {tuple(found)}"
        for key, found, expected in sorted(info["mismatched_keys"])
        if not is_fresh(key)
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"expected a complete {layout.value} checkpoint, found {len(problems)} keys that do not fit:\n  {listed}\n"
            "Check that config.json belongs to these weights and that no shard is cut off."
        )


def check_finite(model: nn.Module) -> None:
    """Raise ValueError for a model that has a weight that is NaN or infinite: it would answer, and learn, nonsense."""
    for name, weight in model.named_parameters():
        if not weight.is_meta and weight.numel() and not torch.stack(weight.detach().aminmax()).isfinite().all():
            raise ValueError(f"expected finite weights, found NaN or infinity in {name}; take an earlier checkpoint")


def write_digests(folder: Path, files: Iterable[str | Path]) -> None:
    """Write digests.json of a folder whose `files` are finished; what it says of others that are there stays."""
    listed = {}
    with suppress(ValueError, OSError):  # none, or one that says nothing
        listed = _digests(folder / DIGESTS)
    names = {Path(file).name for file in files}
    kept = {name: entry for name, entry in listed.items() if name not in names and (folder / name).is_file()}
    found = kept | dict(_entries({name: folder / name for name in names if (folder / name).is_file()}))
    content = json.dumps({"files": dict(sorted(found.items()))}, indent=1) + "\n"
    Location(str(folder)).write(DIGESTS, content.encode())


def _entries(files: dict[str, Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, what digests.json says of the file). Several files are read at a time."""
    with ThreadPoolExecutor(4) as pool:
        for name, digest in zip(files, pool.map(lambda file: fingerprint([file]), files.values()), strict=True):
            yield name, {"size": files[name].stat().st_size, "sha256": digest.removeprefix("sha256:")}


def _digests(file: Path) -> dict[str, dict[str, Any]]:
    """Return {name: {"size", "sha256"}} of a digests.json. Raises ValueError for anything else."""
    try:
        listed = from_json(file.read_bytes())["files"]
        whole = all({*entry} == {"size", "sha256"} and Path(name).name == name for name, entry in listed.items())
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: expected sizes and digests of files beside it, found something else; {_RESTORE}")
    return dict(listed)


_RESTORE = f"copy the folder again, or, if you changed it yourself, remove {DIGESTS}"


def check_digests(path_or_id: str, needed: Collection[str] = (), *, of_run: bool = False, **kwargs: Any) -> bool:
    """Compare every file that digests.json lists with it, and return whether there is one.

    Raises ValueError for files that are missing or changed, and for those of `needed` that it does not list. What only
    a run reads is left out unless `of_run`.
    """
    options = _looking_in(kwargs)
    listing = cached_file(path_or_id, DIGESTS, **options)
    if listing is None:
        return False
    listed = _digests(Path(listing))
    names = [name for name in listed if of_run or name not in OF_RUN]
    files = {name: Path(file) for name in names if (file := cached_file(path_or_id, name, **options))}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    problems = [f"no {name}" for name in names if name not in files]
    problems += [f"{name}, which it does not list" for name in sorted({*needed} - listed.keys())]
    for name, size in sizes.items():
        if size != (expected := listed[name]["size"]):
            problems.append(f"{name} of {size:,} bytes instead of {expected:,}")
    as_long = {name: file for name, file in files.items() if sizes[name] == listed[name]["size"]}
    problems += [f"{name} with other content" for name, entry in _entries(as_long) if entry != listed[name]]
    if problems:
        raise ValueError(f"expected the files that {listing} lists, found {', '.join(problems)}; {_RESTORE}")
    return True


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    processor: Any,
    *,
    keep: int,
    best: int = 0,
) -> None:
    """Write RUN/checkpoint-STEP, then remove older ones but the last `keep` and that of step `best`.

    Every process calls this; the main one writes. `model` and `optimizer` are what accelerate prepared.
    """
    unwrapped: Any = accelerator.unwrap_model(model)
    weights = _gather_weights(model, unwrapped)
    optimizer_state = get_optimizer_state_dict(model, optimizer.optimizer, options=whole(cpu_offload=True))
    if accelerator.is_main_process:
        with _new_folder(run / f"{PREFIX}{state['step']}") as folder:
            if any("lora_" in name for name in weights):
                trained = [name for name, parameter in unwrapped.named_parameters() if parameter.requires_grad]
                save_file({name: weights[name].contiguous() for name in sorted(trained)}, folder / ADAPTER)
            else:
                unwrapped.save_pretrained(folder, state_dict=weights)
            processor.save_pretrained(folder)
            by_weight: Any = optimizer_state.get("state", {})  # {name of a weight: {"exp_avg": ..., "step": ...}}
            flat = {f"{name}|{key}": value for name, own in by_weight.items() for key, value in own.items()}
            save_file({key: value.contiguous().clone() for key, value in flat.items()}, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state, indent=1))
            write_digests(folder, OF_RUN)
        older = [path for path in checkpoints(run)[:-keep] if path.name != f"{PREFIX}{best}"]
        for old in older:  # renamed first: half of one must not be taken for it
            shutil.rmtree(old.rename(run / f".removed-{old.name}"))
    accelerator.wait_for_everyone()


def _gather_weights(model: nn.Module, unwrapped: nn.Module) -> dict[str, Tensor]:
    """Return all weights of a prepared model by name, whole, on the CPU. With FSDP2, {} but in the main process.

    A weight with two names is there once: copied from a device, it would become two weights.
    """
    names = {name for name, _ in unwrapped.named_parameters(remove_duplicate=False)}
    second_names = names - {name for name, _ in unwrapped.named_parameters()}
    weights: Any = get_model_state_dict(model, options=whole(cpu_offload=True))
    return {name: value for name, value in weights.items() if name not in second_names}


def whole(*, cpu_offload: bool = False, strict: bool = True) -> StateDictOptions:
    """Return that all processes have all of every tensor."""
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, strict=strict)


def float32_weights(checkpoint: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Return those of the weights, by their names in the model, that the checkpoint has in float32."""
    found = {}
    for file in {*checkpoint.glob("*.safetensors")} - {checkpoint / OPTIMIZER}:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dict
                name = key
                for published, own in PUBLISHED_NAMES.items():
                    name = re.sub(published, own, name)
                if name in names and (value := tensors.get_tensor(key)).dtype == torch.float32:
                    found[name] = value
    return found


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. A copy of one under another name ("-best") is none."""
    steps = {path: path.name.removeprefix(PREFIX) for path in run.glob(f"{PREFIX}*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def newest_whole(run: Path) -> Path | None:
    """Return the newest checkpoint of a run after reading all of it; None without any.

    UsageError where it is damaged, which names the newest of those before that is not: it is for people to decide
    whether to go on from there.
    """
    found = checkpoints(run)
    if not found:
        return None
    *older, newest = found
    try:
        _check_whole(newest)
    except (ValueError, OSError) as damage:
        remedy = "no checkpoint before it is whole: copy it again, or start a new run"
        for before in reversed(older):
            with suppress(ValueError, OSError):
                _check_whole(before)
                remedy = f"{before.name} before it is whole: to go on from there, move {newest.name} out of {run}"
                break
        raise UsageError(f"{newest} is damaged: {damage}\n{remedy}") from None
    return newest


def _check_whole(checkpoint: Path) -> None:
    """Raise ValueError or OSError for a checkpoint that lacks something or was changed."""
    weights = [path.name for path in checkpoint.glob("*.safetensors")]
    if not check_digests(str(checkpoint), [STATE, OPTIMIZER, *weights], of_run=True):
        logger.warning(
            "%s has no %s, as those of earlier versions: only the sizes and headers of its files are checked",
            *(checkpoint, DIGESTS),
        )
    read_state(checkpoint)
    for name in (OPTIMIZER, *weights):
        _header_of(checkpoint / name)
    if ADAPTER not in weights:
        checkpoint_keys(str(checkpoint), verify=False)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position of the run that a checkpoint was made at. Raises ValueError for anything else."""
    expected = ("step", "epoch", "step_in_epoch", "rows", "settings")
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        state = from_json((checkpoint / STATE).read_bytes())
        best, phases = {"step": 0, "value": 0.0, "waited": 0} | state.get("best", {}), state.get("phases", {})
        counts = [*(state[name] for name in expected[:3]), best["step"], best["waited"], *phases.values()]
        kinds = (state["rows"], str), (state["settings"], dict), (best["value"], int | float)
        is_sound = all(isinstance(*kind) for kind in kinds) and {*phases} <= {"soft", "hard", "flip"}
        if is_sound and all(type(count) is int and count >= 0 for count in counts):
            return dict(state)
    raise ValueError(f"{checkpoint / STATE}: expected {', '.join(expected)}, found something else; copy it again")


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run was writing or removing in its folder, which no other run may hold."""
    for path in run.iterdir() if run.is_dir() else ():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)


def save_merged(model: Any, processor: Any, run: Path) -> None:
    """Write RUN/merged, an ordinary model for from_pretrained: a whole model with LoRA, updates added to weights."""
    with _new_folder(run / "merged") as folder:
        model.merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes the target; its name is always the same, so that a killed run's is removed."""
    with write_whole(target, target.with_name(f".partial-{target.name}")) as folder, saving(target):
        folder.mkdir()
        yield folder


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Raise as an OSError what safetensors raises where it cannot write, as on a full disk."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(target)) from error

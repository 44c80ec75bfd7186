"""What a training group, a prefix, an answer and an optimizer step make the device do, counted: kernels, casts, syncs.

    python benchmarks/op_counts.py                  a table, a line for each kind of work
    python benchmarks/op_counts.py --where "s2, K=8"     and the lines of our code that wait for the device there

No GPU is needed and no time is measured. A model of tiny width has the depth of the 3B model (36 decoder layers, 32
vision blocks) and reads a volume of the published size, so that it makes as many calls as the 3B model would. They are
seen by a TorchDispatchMode on the CPU, after a warm-up: what is computed once for all volumes is not counted.

dispatches   calls into ATen, views included
kernels      those that compute: no views, no empty tensors
casts        copies into another floating-point dtype
sorts, index_put     sort, argsort, topk, unique; index_put and its kin, which sort on CUDA
syncs        places where the host waits for a value of the device: item, bool, nonzero, a boolean index, tolist, cpu;
             what the host asks of a tensor of its own counts too, so that it is an upper bound

With `compile=true`, dispatches and kernels are those around what is compiled, calls of ATen within it (products and
attention), and what inductor generated: each loop nest that it kept apart, which a GPU would launch by itself (a CPU
calls several of them in one function). A call of a compiled graph is one more dispatch. Which nests are merged is
decided for C++ here, for Triton on a GPU: some kernels of a layer may differ. Guards are not counted; syncs are those
that are dispatched.

The kernels of CUDA differ in two things that are put right here: rms_norm is one there, and a series of nine on a CPU;
and attention takes packed rows as they are in bfloat16, where a CPU, or float32, has to pad them. The grids of the
volumes are known to the host and are no syncs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor
from torch._inductor.codegen.cpp import CppScheduling
from torch._ops import OpOverload
from torch.nn import functional as F
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from photon_data.files import jsonl_bytes
from photon_train import attention
from photon_train.configuration_photon import Phase, PhotonConfig
from photon_train.measuring import ANSWER, question_rows, write_random_store
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.tiny import byte_tokenizer, tiny_config
from photon_train.training import loop
from photon_train.training.batches import Batch, MicroBatches, together
from photon_train.training.config import TrainConfig
from photon_train.training.plan import MicroBatch, group_rows
from photon_train.training.setup import Run, gradient_norms, start

DEPTH = {"num_hidden_layers": 36, "num_attention_heads": 4, "num_key_value_heads": 2, "its_layer": 8}
VISION_DEPTH, FULL = 32, [7, 15, 23, 31]
CURRICULUM = {"soft_start": 10, "hard_start": 20, "flip_start": 30, "initial_threshold": 0.45}
STEPS = {Phase.DENSE: 0, Phase.SOFT: 10, Phase.HARD: 20}
NO_KERNEL = (
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
)
SORTS = ("sort", "argsort", "topk", "unique_consecutive", "_unique2")
INDEX_PUTS = ("index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "masked_scatter_backward", "_unique2")
WAITING_METHODS = (Tensor.tolist, Tensor.cpu, Tensor.numpy)
COLUMNS = ("dispatches", "kernels", "casts", "sorts", "index_put", "syncs")


@dataclass
class Counts:
    """How often what was called, and from where the host waited."""

    found: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def sync(self) -> None:
        """Count a sync, and the innermost line of this project that it happened in (several syncs may stand there)."""
        self.found["syncs"] += 1
        own = [f for f in traceback.extract_stack() if "photon_train" in f.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}" if own else "torch or transformers"
        self.places[place] += 1


class _Dispatches(TorchDispatchMode):
    supports_higher_order_operators = True  # compiled attention is called by one, lest it drop others the second time

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else what is compiled would run as if it were not

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, found = kwargs or {}, self.counts.found
        op = func if isinstance(func, OpOverload) else next(x for x in args if isinstance(x, OpOverload))
        name = op.overloadpacket.__name__
        found["dispatches"] += 1
        self.counts.calls[name] += 1
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
        if not views and name not in NO_KERNEL:
            found["kernels"] += 1
            self.counts.names[name] += 1
        is_copy = name == "_to_copy" and kwargs.get("dtype") not in (None, args[0].dtype)
        is_copy |= name == "copy_" and args[0].dtype != args[1].dtype
        found["casts"] += is_copy and args[0].is_floating_point()
        found["sorts"] += name in SORTS
        found["index_put"] += name in INDEX_PUTS
        masks = name in ("index", *INDEX_PUTS) and any(i is not None and i.dtype == torch.bool for i in args[1])
        ragged = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or masks or ragged:
            self.counts.sync()
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    """Sees what a CPU does without a dispatch."""

    def __init__(self, counts: Counts, on_host: set[int]) -> None:
        super().__init__()
        self.counts, self.on_host = counts, on_host
        self.alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING_METHODS and id(args[0]) not in self.on_host:
            self.counts.sync()
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, Tensor)]
        if isinstance(found, Tensor) and tensors and all(id(x) in self.on_host for x in tensors):
            self.on_host.add(id(found))  # made of facts of the host's
            self.alive.append(found)
        return found


@torch.library.custom_op("count::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _plain_rms_norm(x, weight.shape, weight, eps)


@torch.library.custom_op("count::rms_norm_backward", mutates_args=())
def _rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    g, unit = g.float(), x.float() * (scale := x.float().square().mean(-1, keepdim=True).add(eps).rsqrt())
    along = (g * weight * unit).mean(-1, keepdim=True)
    return (scale * (g * weight - along * unit)).to(x.dtype), (g * unit).flatten(0, -2).sum(0).to(weight.dtype)


_plain_rms_norm = F.rms_norm
_rms_norm.register_autograd(
    lambda ctx, g: (*_rms_norm_backward(g, *ctx.saved_tensors, ctx.eps), None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(*inputs[:2]), setattr(ctx, "eps", inputs[2])),
)


@contextmanager
def _fused_rms_norm() -> Any:
    """Make rms_norm one call each way, as on CUDA where input and weight are of one dtype; compiled, it is fused."""

    def fused(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        if torch.compiler.is_compiling():
            return _plain_rms_norm(x, shape, weight, eps)
        if torch.is_autocast_enabled("cpu"):  # rms_norm is one of those that CUDA's autocast computes in float32
            x, weight = x.float(), weight.float()
        return _rms_norm(x, weight, eps)

    with patch.object(F, "rms_norm", fused):
        yield


@contextmanager
def _packed_attention() -> Any:
    """Give the CPU what CUDA has for packed rows: one call each way, here of zeros."""

    def forward(q: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.zeros_like(q), q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(g: Tensor, *qkv: Any) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in qkv[:3])

    ops = {varlen._varlen_attn: forward, varlen._varlen_attn_backward: backward}
    for op, kernel in ops.items():
        op.register_kernel("cpu", kernel)
    try:
        with patch.object(attention, "attends_to_packed", lambda *_: True):
            yield
    finally:
        for op in ops:
            op.register_kernel("cpu", op._init_fn)


def counted(call: Callable[[], Any], on_host: set[int] | None = None) -> Counts:
    """Return what `call` does the second time."""
    with _fused_rms_norm():
        call()
        counts = Counts()
        with _Methods(counts, on_host or set()), _Dispatches(counts):
            call()
    return counts


def compiled(call: Callable[[], Any], on_host: set[int]) -> Counts:
    """Return what `call` does once it is compiled; `graphs` and `generated` are parts of its dispatches."""
    options = {"cpp.enable_kernel_profile": True, "force_disable_caches": True}  # what lies in a cache has no profile
    apart = patch.object(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 0)  # each loop nest a function of its own
    with torch._inductor.config.patch(options), apart, _fused_rms_norm():
        call()
        counts = Counts()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, _Dispatches(counts):
            call()
    names = Counter(event.name for event in profiler.events() or ())
    found = counts.found
    found["graphs"] = sum(n for name, n in names.items() if "Call CompiledFxGraph" in name)
    found["generated"] = sum(n for name, n in names.items() if "_fused_" in name and not name.startswith("aten::"))
    found["kernels"] += found["generated"]
    found["dispatches"] += found["generated"] + found["graphs"]
    return counts


def write_model(folder: Path, stage: int) -> Path:
    """Write a random model of the 3B model's depth and its processor."""
    config = tiny_config(byte_tokenizer(), stage, **DEPTH, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = VISION_DEPTH, FULL
    torch.manual_seed(0)
    model = PhotonForConditionalGeneration(config)
    model.save_pretrained(folder)
    PhotonProcessor(byte_tokenizer(), config).save_pretrained(folder)
    return folder


def run_of(folder: Path, stage: str, questions: int, volumes: int = 1, **settings: Any) -> Run:
    """Return a run of `photon train STAGE` as published but for its learning rates; s1 trains the patch embedding."""
    place, shape = folder / f"{volumes} {questions}", PhotonConfig().model_shape_zyx
    stores = [write_random_store(place, shape, number) for number in range(volumes)]
    rows = [
        {**row, "id": f"{number}-{row['id']}"}
        for number, store in enumerate(stores)
        for row in question_rows(store, questions, questions, ANSWER)
    ]
    data = place / "train.jsonl"
    data.write_bytes(jsonl_bytes(rows))
    rates = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model"), 0.0) if stage == "s1" else {}
    config = TrainConfig(
        stage=stage,
        model=str(folder / "model"),
        data=(str(data),),
        output=str(folder / f"{stage}-{questions}-{len(list(folder.iterdir()))}"),
        questions_per_volume=questions,
        groups_per_step=1,
        epochs=100,
        workers=0,
        track=(),
        photon=CURRICULUM if stage == "s2" else {},
        **({"lr_threshold": 0.0} if stage != "s2" else {}),
        **rates,
        **settings,
    )
    return start(config, resume=False)


def training_group(run: Run, phase: Phase, count: Callable[[Callable[[], Any], set[int]], Counts] = counted) -> Counts:
    """Return the counts of forward and backward of the run's rows, as `photon train` runs them in one forward."""
    plan = [MicroBatch(rows, number) for number, rows in enumerate(group_rows(run.rows, run.config.group_size))]
    items = MicroBatches(run.rows, run.processor, run.config, training=True)
    read, *others = together([items[one] for one in plan], run.processor)
    assert not others and not read.error, read.error
    run.state["step"] = STEPS[phase]

    def call() -> None:
        run.model.zero_grad(set_to_none=True)  # the first group of a step: later ones add, a kernel for each weight
        loop._micro_batch(run, read.to("cpu", run.processor), phase, read.groups)

    return count(call, on_host_of(read))


def on_host_of(batch: Batch) -> set[int]:
    """Return the ids of the tensors that are small facts of the host's."""
    return {id(value) for name, value in batch.inputs.items() if name in ("video_grid_thw", "second_per_grid_ts")}


def optimizer_step(run: Run) -> Counts:
    """Return the counts of what follows a backward pass: norms, clipping, AdamW."""
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    def call() -> None:
        gradient_norms(run.model)
        run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
        run.optimizer.step()

    return counted(call)


def answering(folder: Path, scheduler: str, questions: int) -> dict[str, Counts]:
    """Return the counts of a prefix, of a prefill of questions on it, and of one more token, in bfloat16."""
    model = PhotonForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, scheduler=scheduler).eval()
    processor = PhotonProcessor.from_pretrained(folder)
    inputs = processor(torch.randint(-1000, 1000, processor.config.model_shape_zyx), "Is there a nodule?")
    on_host = {id(inputs["video_grid_thw"])}
    with torch.no_grad():
        prefix_counts = counted(lambda: model.encode_prefix(inputs), on_host)
        prefix = model.encode_prefix(inputs)
        rows = prefix.followed_by(processor.questions([f"Is there a nodule of {k} mm?" for k in range(questions)]))
        prefill = counted(lambda: model(**rows, use_cache=True, logits_to_keep=1), on_host)
        whole = model(**rows, use_cache=True, logits_to_keep=1)
        mask_BM = rows["attention_mask"] if whole.scheduled is None else whole.scheduled.kept.mask_BM
        position_31B = (rows["input_ids"].shape[1] + whole.rope_deltas).expand(3, -1, -1)

        def one_token() -> None:
            model(
                input_ids=rows["input_ids"][:, -1:],
                attention_mask=F.pad(mask_BM.long(), (0, 1), value=1),
                position_ids=position_31B,
                past_key_values=whole.past_key_values,
            )
            whole.past_key_values.crop(-1)

        one_token()
        token = counted(one_token)
    return {"prefix": prefix_counts, f"prefill, {questions} questions": prefill, "one more token": token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the lines to count")
    parser.add_argument("--where", default="", help="the line whose syncs and commonest kernels to show")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kinds: dict[str, tuple[str, int, int, Phase]] = {
        "s1, K=1": ("s1", 1, 1, Phase.DENSE),
        "s1c, K=8": ("s1c", 8, 1, Phase.DENSE),
        "s2 dense phase, K=8": ("s2", 8, 1, Phase.DENSE),
        "s2, K=1": ("s2", 1, 1, Phase.HARD),
        "s2, K=8": ("s2", 8, 1, Phase.HARD),
        "s2, K=1, 4 groups together": ("s2", 1, 4, Phase.HARD),
        "s2, K=1, 8 groups together": ("s2", 1, 8, Phase.HARD),
        "s2, K=4, 4 groups together": ("s2", 4, 4, Phase.HARD),
    }
    print(f"{'':38}" + "".join(f"{name:>12}" for name in COLUMNS))

    def show(name: str, counts: Counts) -> None:
        print(f"{name:38}" + "".join(f"{counts.found[column]:12,}" for column in COLUMNS), flush=True)
        if name == args.where:
            print("  kernels:", ", ".join(f"{n} {k}" for k, n in counts.names.most_common(20)), file=sys.stderr)
            print("  dispatches:", ", ".join(f"{n} {k}" for k, n in counts.calls.most_common(20)), file=sys.stderr)
            for place, number in counts.places.most_common():
                print(f"  sync x {number}: {place}", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="photon-") as name:
        folder = Path(name)
        write_model(folder / "model", stage=1)
        for kind, (stage, questions, volumes, phase) in kinds.items():
            if args.only in kind:
                with _packed_attention():
                    show(kind, training_group(run_of(folder, stage, questions, volumes), phase))
        for kind, kernel in {"bfloat16": _packed_attention(), "float32": nullcontext()}.items():
            if args.only in (kind := f"s2, K=8, packed, {kind}"):
                with kernel, patch.object(attention, "WORTH_PACKING", 0):
                    show(kind, training_group(run_of(folder, "s2", 8), Phase.HARD))
        if args.only in "s2, K=8, compile=true":
            counts = training_group(run_of(folder, "s2", 8, compile=True), Phase.HARD, compiled)
            show("s2, K=8, compile=true", counts)
            print("  of these: {graphs:,} calls of graphs, {generated:,} generated kernels".format(**counts.found))
        if args.only in "s2, optimizer step":
            show("s2, optimizer step", optimizer_step(run_of(folder, "s2", 1)))
        write_model(folder / "answering", stage=2)
        for scheduler in ("its", "none"):
            if args.only in f"{scheduler}: prefix":
                for kind, counts in answering(folder / "answering", scheduler, 8).items():
                    show(f"{scheduler}: {kind}", counts)


if __name__ == "__main__":
    main()

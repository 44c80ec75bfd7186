"""Run by torchrun: a training run of CPUs that accelerate takes for GPUs, since it shards nothing on CPUs."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from photon_train.scheduling import Float32Linear
from photon_train.training.config import TrainConfig, with_values
from photon_train.training.evaluation import answering_of
from photon_train.training.loop import run_steps
from photon_train.training.setup import start

PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
config = with_values(TrainConfig(), json.loads(Path(sys.argv[1]).read_text()))
run = start(config, resume="--resume" in sys.argv, answering=answering_of(config))
assert run.accelerator.is_fsdp2, run.accelerator.distributed_type


def check_dtype(module, args):
    assert module.weight.dtype == torch.float32, "gathered in another dtype"


parts = [module for module in run.model.modules() if isinstance(module, Float32Linear)]
assert len(parts) == 2
for module in parts:
    module.register_forward_pre_hook(check_dtype)
run_steps(run)
# All is written. Threads of gloo now and then abort a process that ends as usual ("terminate called without ...").
sys.stdout.flush()
os._exit(0)

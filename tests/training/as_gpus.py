"""Run by torchrun: a training run of CPUs that accelerate takes for GPUs, since it shards nothing on CPUs."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from photon_train.training.config import TrainConfig, with_values
from photon_train.training.loop import run_steps
from photon_train.training.setup import start

kind = DistributedType.MULTI_GPU
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # it would compile something for CPUs
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    kind = DistributedType.DEEPSPEED
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = kind
config = with_values(TrainConfig(), json.loads(Path(sys.argv[1]).read_text()))
run = start(config, resume="--resume" in sys.argv)
assert run.is_sharded, run.accelerator.distributed_type
run_steps(run)

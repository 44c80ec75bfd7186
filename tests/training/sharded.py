"""Run by torchrun: one batch through a model sharded by FSDP2 over all processes, against the same model whole."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from photon_train import PhotonForConditionalGeneration, PhotonProcessor
from photon_train.training.dataset import GroupDataset, Reading
from photon_train.training.plan import Group, group_indices
from photon_train.training.rows import read_train_rows


def main(checkpoint: str, manifest: str) -> None:
    dist.init_process_group("gloo")
    rows = read_train_rows([manifest])
    group = max(group_indices(rows, 8), key=len)
    batch = GroupDataset(rows, [Group(group, 0)], PhotonProcessor.from_pretrained(checkpoint), Reading())[0]
    assert not batch.error, batch.error
    whole, sharded = (PhotonForConditionalGeneration.from_pretrained(checkpoint).train() for _ in range(2))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*sharded.model.language_model.layers, *sharded.model.visual.blocks):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = []
    for model in (whole, sharded):
        out = model(**batch.inputs, step=8500, loss_scale=0.5)  # tokens are dropped
        out.loss.backward()
        losses.append(out.loss.item())
    assert abs(losses[0] - losses[1]) < 1e-6, losses
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    found = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert any(".atp." in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
    dist.destroy_process_group()


main(*sys.argv[1:])

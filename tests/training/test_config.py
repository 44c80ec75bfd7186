import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from photon_data.errors import UsageError
from photon_train import PhotonForConditionalGeneration
from photon_train.rows import read_train_rows
from photon_train.training.config import RUNS, TrainConfig, named_run, s2, with_values
from photon_train.training.setup import (
    choose_trained,
    learning_rate_factor,
    module_of,
    parameter_groups,
    set_learning_rates,
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_visoin": "1e-3"}, "did you mean 'lr_vision'"),
        ({"photon.soft_strat": "10"}, "did you mean 'soft_start'"),
        ({"groups_per_step": "two"}, "groups_per_step: expected a whole number, found 'two'"),
        ({"share_prefix": "perhaps"}, "share_prefix: expected true or false"),
        ({"stage": "s3"}, "expected one of s1, s1c, s2"),
        ({"on_nan": "ignore"}, "expected one of stop, skip"),
        ({"epochs": "0"}, "expected at least 1"),
        ({"warmup": "1.5"}, "from 0 to below 1, found"),
    ],
)
def test_a_setting_that_no_run_can_have_is_refused_with_what_is_wanted(values, message):
    with pytest.raises(UsageError, match=message):
        with_values(TrainConfig(), values)


def test_settings_of_a_command_line_become_values_of_their_types():
    texts = {"freeze": "*.bias,visual.*", "lr_vision": "2e-6", "share_prefix": "False"}
    config = with_values(s2(), {**texts, "photon.soft_start": "0.25", "photon.hard_start": "30"})
    assert (config.freeze, config.lr_vision, config.share_prefix) == (("*.bias", "visual.*"), 2e-6, False)
    assert config.photon == {"soft_start": 0.25, "hard_start": 30}


def test_a_saved_config_is_read_back_as_it_was():
    for name in RUNS:
        config = named_run(name)
        assert with_values(TrainConfig(), json.loads(json.dumps(config.to_json()))) == config


def test_the_ready_runs_train_what_the_paper_trains(models):
    expected = {
        "s1": {"patch_embedding": 1.25e-4},
        "s1c": {"patch_embedding": 5e-6, "vision": 5e-6, "merger": 5e-6, "language_model": 1e-5},
        "s2": {"patch_embedding": 5e-6, "vision": 5e-6, "merger": 5e-6, "language_model": 1e-5, "threshold": 1e-5},
    }
    for name, rates in expected.items():
        model = PhotonForConditionalGeneration.from_pretrained(models / "s2")
        choose_trained(model, named_run(name))
        groups = parameter_groups(model, named_run(name))
        assert {group["module"]: group["lr"] for group in groups} == rates
        trained = sum(p.numel() for group in groups for p in group["params"])
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_every_parameter_belongs_to_the_module_its_name_says(models):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2")
    found = {}
    for name, _ in model.named_parameters():
        found.setdefault(module_of(name), []).append(name)
    assert set(found) == {"patch_embedding", "merger", "vision", "threshold", "language_model"}
    assert found["patch_embedding"] == ["model.visual.patch_embed.proj.weight"]
    assert len(found["threshold"]) == 4  # two linear layers with biases
    assert all("visual.blocks." in name for name in found["vision"])
    assert not any("visual" in name for name in found["language_model"])


def test_biases_and_norms_do_not_decay(models):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s1")
    choose_trained(model, named_run("s1c"))
    for group in parameter_groups(model, named_run("s1c")):
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_nothing_left_to_train_is_refused(models):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s1")
    with pytest.raises(UsageError, match="leave nothing to train"):
        choose_trained(model, replace(named_run("s1"), freeze=("*",)))


def test_the_rate_rises_in_a_line_and_falls_along_half_a_cosine():
    config = TrainConfig(warmup=0.2)
    factors = [learning_rate_factor(config, step, 10) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
    assert factors[9] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 7 / 8)).item()))
    assert learning_rate_factor(replace(config, schedule="linear"), 6, 10) == 0.5
    assert learning_rate_factor(replace(config, schedule="constant"), 9, 10) == 1.0


def test_every_module_has_its_own_rate_at_every_step():
    config = TrainConfig(lr_vision=2.0, lr_merger=4.0, warmup=0.5)
    optimizer = SimpleNamespace(param_groups=[{"module": "vision"}, {"module": "merger"}])
    assert set_learning_rates(optimizer, config, 1, 8) == {"vision": 1.0, "merger": 2.0}
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"}', "expected a row with messages and videos"),
        ('{"id": "a", "messages": [{"role": "user", "content": null}]}', "expected a row with messages and videos"),
        ("{cut off", "expected one JSON object"),
        ('{"id": "a", "videos": ["../../x.zarr"], "messages": []}', "a path within"),
        ('{"id": "a", "messages": [{"role": "user", "content": "Where?"}]}', "1 of 1 have none: a"),
        ("", "expected rows, found none"),
    ],
)
def test_a_manifest_that_cannot_be_trained_on_is_refused_by_line_or_id(tmp_path, line, message):
    path = tmp_path / "out" / "manifests" / "train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=message):
        read_train_rows([path])


def test_a_manifest_given_twice_is_refused(manifest):
    with pytest.raises(UsageError, match="19 occur again: a0, a1"):
        read_train_rows([manifest, manifest])

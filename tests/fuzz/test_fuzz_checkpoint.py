"""A model's folder with a damaged file is refused; without digests.json, as of a stranger, it loads or is refused."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import budget, damaged_bytes, damaged_json, no_hang

from photon_data.errors import UsageError
from photon_train import processing_photon
from photon_train.answering.generation import AnswerSettings
from photon_train.answering.loading import load_predictor
from photon_train.tiny import tiny

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny(folder, stage=2, model_shape_zyx=(28, 56, 56))
    return folder


def _load(folder):
    with no_hang():
        try:
            return load_predictor(str(folder), AnswerSettings(), device="cpu")
        except UsageError as error:
            assert str(folder) in str(error) or "config" in str(error)
            return None


@budget(25)
@given(st.data(), st.sampled_from(FILES), st.booleans())
def test_a_model_with_a_damaged_file_is_refused_where_digests_tell_and_else_loads_or_is_refused(
    whole, tmp_path, data, name, has_digests
):
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    if not (folder / name).exists():
        return
    content = (folder / name).read_bytes()
    is_small_json = name.endswith("json") and name != "tokenizer.json"
    drawn = damaged_json(json.loads(content)) if is_small_json else damaged_bytes(content, within=3000)
    (folder / name).write_bytes(damaged := data.draw(drawn))
    if not has_digests:
        (folder / "digests.json").unlink()
    loaded = _load(folder)
    assert not (has_digests and loaded and damaged != content)


def test_a_chat_template_that_does_not_end_is_refused(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(processing_photon, "TEMPLATE_S", 0.3)
    shutil.copytree(whole, tmp_path / "model")
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(loops)
    (tmp_path / "model" / "digests.json").unlink()  # whoever made this template made the digests fit
    with pytest.raises(UsageError, match="a chat template that ends"):
        load_predictor(str(tmp_path / "model"), AnswerSettings(), device="cpu")

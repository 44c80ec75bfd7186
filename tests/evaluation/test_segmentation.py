"""`--masks auto`: a command on the PATH segments prepared volumes; what it made is kept beside the stores."""

import json
import os
import stat
import sys

import numpy as np
import pytest
from answers import put, row
from typer.testing import CliRunner

from photon_cli.eval import score
from photon_cli.photon import app
from photon_cli.segmentation import segment
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.mask_store import open_masks, verify_masks
from photon_data.phantom import make_phantoms
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_data.records import read_records, write_records
from photon_data.store import open_volume
from photon_train.evaluation.results import Settings
from photon_train.rows import Prediction, pack_mask

RECIPE = Recipe(spacing_mm=(3.0, 3.0, 3.0), shape_zyx=(120, 120, 120), model_shape_zyx=(14, 28, 28))
# Stands in for TotalSegmentator: "bone" is what is brighter than 250 HU, "nothing" is empty. It can be made to fail.
STAND_IN = """#!{python}
import os, sys
import nibabel, numpy
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if os.path.exists({broken!r}):
    sys.exit("CUDA error: no kernel image")
image = nibabel.load(words["-i"])
os.makedirs(words["-o"])
for name, mask in (("bone", image.get_fdata() > 250), ("nothing", image.get_fdata() > 9000)):
    nibabel.save(nibabel.Nifti1Image(mask.astype(numpy.uint8), image.affine), words["-o"] + "/" + name + ".nii.gz")
"""


@pytest.fixture
def prepared(tmp_path):
    """Two phantoms, prepared, the second one as in a folder of very many: {id: store}."""
    make_phantoms(tmp_path, 2, seed=0, size=64)
    out, sources = tmp_path / "out", find_scans(tmp_path / "scans").sources
    records = [prepare_file(Job(source, str(out), RECIPE, deep=bool(n))) for n, source in enumerate(sources)]
    write_records(Location(str(out)), records)
    return {record.id: str(out / record.store) for record in records}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The words of each call of the stand-in, which is on the PATH; it fails while `broken` is there."""
    log, command = tmp_path / "calls", tmp_path / "bin" / "TotalSegmentator"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable, log=str(log), broken=str(tmp_path / "broken")))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    return lambda: log.read_text().splitlines() if log.exists() else []


def test_masks_are_made_once_of_the_prepared_volume_and_lie_where_it_is_bright(prepared, calls, tmp_path):
    segment(prepared)
    assert len(calls()) == 2
    for place in prepared.values():
        masks = open_masks(place, tmp_path / "out")
        assert masks.names == ["bone", "nothing"]
        assert (masks.mask("bone").numpy() == (open_volume(place).numpy() > 250)).all()
        assert not masks.mask("nothing").numpy().any()
    out = Location(str(tmp_path / "out"))
    records = [json.loads(line) for line in (tmp_path / "out" / "masks.jsonl").read_text().splitlines()]
    assert {record["id"] for record in records} == set(prepared)
    assert not list(verify_masks(out, read_records(out)))
    segment(prepared)
    assert len(calls()) == 2


def test_a_volume_that_cannot_be_segmented_is_named_and_tried_again(prepared, calls, tmp_path, capsys):
    (tmp_path / "broken").touch()
    segment(prepared)
    said = capsys.readouterr().out
    assert said.count("CUDA error: no kernel image") == 2
    (tmp_path / "broken").unlink()
    segment(prepared)
    assert len(calls()) == 4
    assert all(open_masks(place, tmp_path / "out").names for place in prepared.values())


def test_without_the_command_a_sentence_says_how_to_install_it(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"expected the command TotalSegmentator on the PATH.*pipx install"):
        segment(prepared)
    with pytest.raises(UsageError, match="expected stores of one folder"):
        segment({"a": str(tmp_path / "scan.nii.gz")})


def test_the_recall_of_made_masks_is_on_the_page(prepared, calls, tmp_path):
    rows = []
    for id, place in prepared.items():
        extra = {"organ_masks": '["bone"]'}
        rows.append(row(id, "Yes", ("Yes", "No"), volume_id=id, videos=[place], extra=extra))
    put(tmp_path / "rows.jsonl", rows)
    said = [
        Prediction(id, "Yes", visual_tokens=1000, kept_tokens=1000, kept=pack_mask(np.ones(1000))) for id in prepared
    ]
    put(tmp_path / "preds.jsonl", said)
    words = ["eval", "vqa", "--data", tmp_path / "rows.jsonl", "--predictions", tmp_path / "preds.jsonl"]
    words += ["--output", tmp_path / "scores", "--masks", "auto", "--bootstrap", 10]
    result = CliRunner().invoke(app, [*map(str, words)])
    assert result.exit_code == 0, result.output
    (answers,) = json.loads((tmp_path / "scores" / "scores.json").read_text())["predictions"]
    (bone,) = answers["masks"]["by_mask"]
    assert (bone["name"], bone["recall"]["value"], bone["volumes"]) == ("bone", 100, 2)


def test_of_several_processes_the_first_alone_segments(prepared, calls, tmp_path, monkeypatch):
    rows = [row(id, "Yes", ("Yes", "No"), volume_id=id, videos=[place]) for id, place in prepared.items()]
    put(tmp_path / "rows.jsonl", rows)

    def answering(rows):  # what torchrun's others do
        raise SystemExit(0)

    data, out = [tmp_path / "rows.jsonl"], tmp_path / "scores"
    for rank, expected in (("1", 0), ("0", 2)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            score("vqa", answering, data, out, Settings(), [], "auto", 0, answers_now=True)
        assert len(calls()) == expected

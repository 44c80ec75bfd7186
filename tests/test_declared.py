"""data_manifest.yaml: errors by line, combination of data sets, weights and caps, and the command from end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import zarr
from published import cli, collected, declare
from raw import write_scan

from photon_data import open_volume
from photon_data.datasets.base import Share
from photon_data.datasets.combine import mixed, read_dataset
from photon_data.datasets.declare import read_data_manifest
from photon_data.errors import UsageError
from photon_data.questions.manifest import validate
from photon_data.questions.question import Question, with_prompt_style
from photon_data.questions.splits import count

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "datasets:\n  a:\n    adaptor: table\n",
            "data_manifest.yaml, line 3: expected one of adapter, .* did you mean 'adapter'",
        ),
        (
            "datasets:\n  a: {adapter: tabel, root: .}\n",
            "line 2, data set a: expected an adapter of ct-rate, .* did you mean 'table'",
        ),
        (
            "datasets:\n  a:\n    adapter: table\n    volumes: best\n",
            "line 4: expected one of all, first, thinnest, sharpest, found 'best'",
        ),
        ("datasets:\n  a: 1\n  a: 2\n", "line 3: expected every key once, found 'a' again"),
        ("datasets:\n  a: [\n", "line 3: expected YAML"),
        (
            "dataset: {}\n",
            "line 1: expected one of out, recipe, seed, datasets, found 'dataset'; did you mean 'datasets'",
        ),
        (
            "datasets:\n  a:\n    adapter: table\n    splits: {train: yes}\n",
            "line 4: expected a number above 0, found True",
        ),
        (
            "datasets:\n  a:\n    adapter: folder\n    root: .\n    mix: {train: {weight: -1}}\n",
            "line 5: expected a number above 0, found -1",
        ),
        (
            "datasets:\n  a:\n    adapter: folder\n    mix: {train: {cap: 0.5}}\n",
            "line 4: expected a whole number above 0, found 0.5",
        ),
        ("datasets:\n  a:\n    adapter: m3d\n    root: .\n", "8-bit slices .* without spacing"),
        ("datasets:\n  a:\n    adapter: folder\n    root: nowhere\n", "found 1 missing .*nowhere"),
        (
            "datasets:\n  a:\n    adapter: 3d-rad\n    root: .\n    annotations: {reports: .}\n",
            "annotations of 3d-rad .*'reports'",
        ),
    ],
)
def test_an_error_names_the_line_and_what_was_expected(tmp_path, text, message):
    path = tmp_path / "data_manifest.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        for entry in read_data_manifest(path).datasets:
            read_dataset(entry, instruction="?", seed=0)


def train_questions(dataset, n, split="train"):
    return [Question(f"{dataset}/{i}", "v", "Q?", "A", split, dataset=dataset) for i in range(n)]


@pytest.mark.parametrize(
    ("shares", "left"),
    [
        ({}, {"a": 100, "b": 30}),
        ({"a": Share(cap=7)}, {"a": 7, "b": 30}),
        ({"a": Share(weight=2), "b": Share(weight=1)}, {"a": 60, "b": 30}),
        ({"a": Share(weight=1), "b": Share(weight=3, cap=15)}, {"a": 5, "b": 15}),
    ],
)
def test_caps_and_weights_leave_as_many_questions_as_they_say_and_repeat_none(shares, left):
    questions = [*train_questions("a", 100), *train_questions("b", 30), *train_questions("a", 5, "test")]
    kept = mixed(questions, {name: {"train": share} for name, share in shares.items()}, seed=0)
    train = [question.id for question in kept if question.split == "train"]
    assert {name: sum(id_.startswith(name) for id_ in train) for name in "ab"} == left
    assert len(set(train)) == len(train)
    assert len(kept) - len(train) == 5


def test_who_stays_under_a_cap_is_only_displaced_by_rows_added_later():
    few, many = train_questions("a", 60), train_questions("a", 100)
    shares = {"a": {"train": Share(cap=20)}}
    before, after = (mixed(questions, shares, seed=0) for questions in (few, many))
    old = [question for question in after if question in few]
    assert len(before) == len(after) == 20
    assert 0 < len(old) < 20
    assert all(question in before for question in old)
    assert mixed(few, shares, seed=1) != before


def test_a_weight_for_some_data_sets_of_a_split_only_is_refused():
    with pytest.raises(UsageError, match="found none for b"):
        mixed([*train_questions("a", 3), *train_questions("b", 3)], {"a": {"train": Share(weight=1)}}, seed=0)


def test_published_prompts_are_met_to_the_letter():
    closed = Question("1", "v", "Does it?", "No", extra={"choices": ["Yes", "No"], "letter": "B"})
    opened = Question("2", "v", "Where?", "Upper lobes.")
    assert [(q.question, q.answer) for q in with_prompt_style([closed, opened], "3d-rad", "hidden")] == [
        ("Does it?\nChoices: A. Yes B. No C. - D. -\nAnswer:", "B. No"),
        ("Where?\nChoices: A. - B. - C. - D. -\nAnswer:", "-. Upper lobes."),
    ]
    assert with_prompt_style([closed, opened], "plain", "hidden") == [closed, opened]
    (shown, _) = with_prompt_style([closed, opened], "plain", "shown")
    assert (shown.question, shown.answer) == ("Does it?\nA. Yes\nB. No", "No")
    assert [q.answer for q in with_prompt_style([closed, opened], "letters", "shown")] == ["B", "Upper lobes."]
    for kind in (
        "measurement",
        "choice",
        "text",
        None,
    ):  # types that DeepTumorVQA's own tables do not have, and its own
        (put_,) = with_prompt_style(
            [replace(opened, extra={"answer_type": kind} if kind else {})], "deeptumorvqa", "hidden"
        )
        assert put_.question.endswith("Where?\nAnswer with the most appropriate short phrase.")


def test_a_letter_that_no_column_gives_is_that_of_the_answers_place_among_the_choices():
    closed = Question("1", "v", "Is there?", "no", extra={"choices": ["yes", "no"]})
    for style, expected in (("3d-rad", "B. no"), ("letters", "B"), ("plain", "no")):
        assert [q.answer for q in with_prompt_style([closed], style, "shown")] == [expected]
    many = replace(closed, answer="30", extra={"choices": [str(number) for number in range(40)]})
    assert with_prompt_style([many], "letters", "hidden")[0].answer == "30"  # there is no 31st letter


def test_counts_tell_the_constant_answer_that_is_right_most_often_also_per_subtask():
    answers = {"x": ["No", "No", "No", "Yes"], "y": ["Yes", "Yes", "No", "Yes"], "z": ["No", "No"]}
    rows = [
        {"channel": "d/t", "task": "t", "split": "test", "volume_id": f"v{i}", "patient": "", "answer": answer}
        | {"extra": {"subtask": subtask}}
        for subtask, given in answers.items()
        for i, answer in enumerate(given)
    ]
    (found,) = count(rows)
    assert (found.questions, found.volumes, found.per_volume) == (10, 4, (2, 2.5, 3))
    assert (found.constant_answer, found.constant_accuracy) == ("No", 0.6)
    assert found.constant_macro == pytest.approx((0.75 + 0.25 + 1) / 3, abs=1e-4)
    assert found.majority_macro == pytest.approx((0.75 + 0.75 + 1) / 3, abs=1e-4)


@pytest.fixture
def two(tmp_path):
    """Two data sets with tables of their own, in which the same patient's name means two people, and unicode."""
    for name in ("a", "b"):
        write_scan(tmp_path / name / "one scan.nii.gz", seed=ord(name))
        write_scan(tmp_path / name / "idle.nii", seed=1 + ord(name))
    header = "volume,question,answer,split,patient\n"
    (tmp_path / "a.csv").write_text(
        header + "one scan,Größe?,3 mm.,train,p1\none scan,Where?,left,train,p1\n", encoding="utf-8"
    )
    (tmp_path / "b.csv").write_text(header + "one scan,Is it?,Yes,test,p1\nnowhere,Is it?,Yes,test,p2\n")
    entries = {
        name: {"adapter": "table", "root": name, "annotations": f"{name}.csv", "options": {"id_prefix": f"{name}-"}}
        for name in ("a", "b")
    }
    return tmp_path, entries


def test_data_sets_are_combined_into_one_folder_with_only_the_volumes_they_need(two):
    folder, entries = two
    path = declare(folder, **entries)
    code, text = cli("prepare", "--manifest", path, "--workers", "1", "--pictures", "0")
    assert code == 1, text
    assert "b: 1 of 2 volumes have no question and are not prepared, b-idle first" in text
    assert "1 questions have no row" in text
    assert "(volume nowhere): no such volume" in text
    out = folder / "out"
    stores = sorted(store.name for store in (out / "volumes").iterdir())
    assert [name[:9] for name in stores] == ["a-one-sca", "b-one-sca"]
    train = [json.loads(line) for line in (out / "manifests" / "train.jsonl").read_text().splitlines()]
    assert {row["channel"] for row in train} == {"a"}
    assert {row["patient"] for row in train} == {"a:p1"}
    assert ["<video>Größe?", "3 mm."] in [[m["content"] for m in row["messages"]] for row in train]
    assert validate(out / "manifests" / "train.jsonl") == validate(out / "manifests" / "test.jsonl") == []
    counts = json.loads((out / "questions.json").read_text())
    assert [(c["dataset"], c["split"], c["questions"], c["volumes"]) for c in counts] == [
        ("a", "train", 2, 1),
        ("b", "test", 1, 1),
    ]
    assert cli("verify", out)[0] == 0


def test_one_person_of_two_data_sets_in_two_splits_is_a_leak_where_they_share_a_cohort(two):
    folder, entries = two
    for entry in entries.values():
        entry["options"]["cohort"] = "hospital"
    code, text = cli("prepare", "--manifest", declare(folder, **entries))
    assert code == 2
    assert "patient hospital:p1 in test and train" in text
    assert not (folder / "out").exists()


def test_data_sets_that_mean_two_files_by_one_id_are_refused(two):
    folder, entries = two
    for entry in entries.values():
        del entry["options"]
    code, text = cli("prepare", "--manifest", declare(folder, **entries))
    assert code == 2
    assert "expected one file per volume id, but data sets a and b differ in 1" in text


def test_only_the_named_data_set_is_prepared_and_inspect_says_what_is_missing(two):
    folder, entries = two
    entries["c"] = {"adapter": "3d-rad", "root": "not-yet", "annotations": {"questions": "3DRAD"}}
    path = declare(folder, **entries)
    code, text = cli("inspect", "--manifest", path)
    assert code == 1
    assert "2 files or folders" in text
    assert "missing: nowhere" in text
    assert "to prepare │ 2 scans" in text
    assert not (folder / "out").exists()
    assert (
        cli("prepare", "--manifest", path, folder / "other", "--only", "a", "--workers", "1", "--pictures", "0")[0] == 0
    )
    assert [path.name for path in (folder / "other" / "manifests").iterdir()] == ["train.jsonl"]
    assert "expected one of a, b, c, found 'd'" in cli("prepare", "--manifest", path, "--only", "d")[1]
    assert "say it in the manifest" in cli("prepare", "--manifest", path, "--recipe", "wide_ct")[1]
    assert cli("prepare")[0] == 2


@pytest.mark.parametrize(
    ("splits", "message"),
    [({"train": 0.5, "test": 0.5}, "names like"), ({"dev": "test"}, r"splits of the data set \(train\)")],
)
def test_splits_that_the_data_set_does_not_have_are_refused(two, splits, message):
    folder, entries = two
    with pytest.raises(UsageError, match=message):
        collected(folder, **{**entries["a"], "splits": splits})


def test_splits_are_renamed_and_others_left_out_with_a_note(two):
    folder, entries = two
    with (folder / "a.csv").open("a") as file:
        file.write("one scan,Is it?,Yes,test,p1\n")
    part = collected(folder, **{**entries["a"], "splits": {"train": "fit"}})
    assert [question.split for question in part.questions] == ["fit", "fit"]
    assert "1 questions of split 'test' are left out, since `splits` does not name it" in part.notes


def test_exports_hold_the_same_voxels_at_the_same_places(two):
    folder, entries = two
    path = declare(folder, a=entries["a"])
    assert cli("prepare", "--manifest", path, "--workers", "1", "--pictures", "0")[0] == 0
    out = folder / "out"
    (store,) = (out / "volumes").iterdir()
    volume, name = open_volume(store), store.name.removesuffix(".ome.zarr")
    assert cli("export", out, "--format", "nifti")[0] == 0
    file = out / "nifti" / "volumes" / f"{name}.nii.gz"
    image = nibabel.load(file)
    assert np.array_equal(np.asarray(image.dataobj), volume.numpy().transpose(2, 1, 0))
    assert image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.allclose(image.affine, volume.geometry.affine_ras)
    rows = [json.loads(line) for line in (out / "nifti" / "manifests" / "train.jsonl").read_text().splitlines()]
    assert {video for row in rows for video in row["videos"]} == {str(file)}
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert "1 of them there before" in cli("export", out, "--format", "nifti")[1]
    assert file.stat().st_mtime_ns == before[1]
    cli("export", out, "--format", "nifti", "--overwrite")
    assert file.read_bytes() == before[0]
    assert file.stat().st_mtime_ns > before[1]
    assert cli("export", out, "--format", "ome-zarr-0.4", "--to", folder / "fiji")[0] == 0
    group = zarr.open_group(folder / "fiji" / "volumes" / store.name, mode="r", zarr_format=2)
    assert np.array_equal(group["0"][...], volume.numpy())
    (scale, shift) = group.attrs["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == list(volume.geometry.spacing_zyx_mm)
    assert shift["translation"] == list(volume.geometry.origin_lps[::-1])
    assert "expected one of nifti, ome-zarr-0.4" in cli("export", out, "--format", "dicom")[1]


def test_parquet_is_read_like_any_table_and_refused_politely_without_pyarrow(two, monkeypatch):
    folder, entries = two
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = {"volume": ["one scan"], "question": ["Is it?"], "answer": ["Yes"], "split": ["train"]}
    parquet.write_table(pyarrow.table(table), folder / "a.parquet")
    entry = {**entries["a"], "annotations": "a.parquet"}
    assert [question.answer for question in collected(folder, **entry).questions] == ["Yes"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'photon-ct\[parquet\]'"):
        collected(folder, **entry)


def test_the_manifest_in_the_repository_can_be_read_also_with_every_entry_uncommented(tmp_path):
    text = (ROOT / "data_manifest.yaml").read_text()
    assert [entry.adapter for entry in read_data_manifest(ROOT / "data_manifest.yaml").datasets] == ["phantom"]
    path = tmp_path / "data_manifest.yaml"
    path.write_text(text.replace("\n#  ", "\n  "))
    adapters = [entry.adapter for entry in read_data_manifest(path).datasets]
    assert adapters == ["phantom", "ct-rate", "3d-rad", "deeptumorvqa", "abdomenatlas3", "table"]


def test_declaring_imports_neither_torch_nor_dask():
    script = (
        "import photon_data.datasets.combine, sys; print([n for n in ('torch', 'dask', 'pyarrow') if n in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )

"""CT-RATE: two versions of a file under one name, reconstructions of a scan, reports, labels and conversations."""

import json

import numpy as np
import pytest
from published import SPACING, collected, declare, place, write_csv, write_json, write_metadata, write_v1, write_v2
from scans import ct_like

from photon_data import open_volume
from photon_data.datasets.ct_rate import LABELS, REPORT_COLUMNS
from photon_data.datasets.declare import read_data_manifest
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job, prepare_file
from photon_pipelines.plan import gather
from photon_pipelines.request import Request, one_recipe

REPORT = ("VolumeName", *REPORT_COLUMNS)


def prepared(folder, **entry):
    """{id: record} of the volumes of a CT-RATE tree, each prepared in this process."""
    manifest = read_data_manifest(declare(folder, ct_rate={"adapter": "ct-rate", "root": "dataset", **entry}))
    order = Request(folder, Location(str(folder / "out")), one_recipe(manifest.datasets), datasets=manifest.datasets)
    return {job.source.id: prepare_file(Job.from_json(job.to_json())) for job in gather(order).jobs}


def states(records):
    return {name: record.code or record.state for name, record in records.items()}


def test_v1_and_v2_of_one_tree_give_the_same_hounsfield_units_and_the_same_grid(tmp_path):
    root = tmp_path / "dataset"
    write_v1(place(root, "train_1_a_1", "v1"), seed=5)
    write_v1(place(root, "valid_2_b_1", "v1"), seed=5, intercept=-8192)
    write_v2(place(root, "train_3_a_1", "v2"), seed=5)
    table = write_metadata(
        tmp_path / "metadata.csv",
        train_1_a_1={},
        valid_2_b_1={"RescaleIntercept": -8192},
        train_3_a_1={"RescaleIntercept": -8192},
    )
    records = prepared(tmp_path, annotations={"metadata": str(table)})
    assert states(records) == dict.fromkeys(("train_1_a_1", "train_3_a_1", "valid_2_b_1"), "prepared")
    facts = {name: record.facts for name, record in records.items()}
    assert [facts[n]["rescale"] for n in ("train_1_a_1", "valid_2_b_1", "train_3_a_1")] == [
        "metadata",
        "metadata",
        "header",
    ]
    assert all(f["geometry"]["spacing_zyx_mm"] == list(SPACING) for f in facts.values())
    assert all(f["geometry"]["orientation_zyx"] == "SPL" for f in facts.values())
    arrays = [open_volume(tmp_path / "out" / record.store).numpy() for record in records.values()]
    # Their origins differ, so that the grid's centre is rounded otherwise: an exact .5 may fall to either side.
    assert all(np.abs(arrays[0].astype(int) - other).max() <= 1 for other in arrays[1:])
    assert facts["train_1_a_1"]["hu_before"]["min"] == ct_like((16, 24, 28), 5).min()


def test_a_file_in_the_folder_of_the_other_version_is_never_scaled_twice_or_not_at_all(tmp_path):
    root = tmp_path / "dataset"
    write_v2(place(root, "train_1_a_1", "v1"))  # v2, header and all
    write_v2(place(root, "train_2_a_1", "v1"), blank=True)  # HU under a blank header
    write_v1(place(root, "train_3_a_1", "v2"))  # v1, header and all
    write_v2(place(root, "train_4_a_1", "v2"), raw=1024)  # raw under a good header
    write_v2(place(root, "train_5_a_1", "v2"), spacing=(1.0, 1.0, 1.0))  # another file's header
    write_v1(place(root, "train_6_a_1", "v1"), intercept=-8192)  # a wrong intercept in the table
    table = write_metadata(tmp_path / "metadata.csv", **{f"train_{n}_a_1": {} for n in range(1, 7)})
    assert states(prepared(tmp_path, annotations={"metadata": str(table)})) == {
        "train_1_a_1": "not-blank",
        "train_2_a_1": "scaled-before",
        "train_3_a_1": "no-geometry",
        "train_4_a_1": "hu-implausible",
        "train_5_a_1": "table-conflict",
        "train_6_a_1": "hu-implausible",
    }


def test_v1_without_a_row_lying_feet_first_or_with_nan_is_refused_by_itself(tmp_path):
    root = tmp_path / "dataset"
    for n in (1, 2, 3, 4):
        write_v1(place(root, f"valid_{n}_a_1", "v1"), seed=n)
    import nibabel

    path = place(root, "valid_4_a_1", "v1")
    image = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array[3, 3, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(array, None, image.header), path)
    table = write_metadata(
        tmp_path / "metadata.csv", valid_1_a_1={}, valid_2_a_1={"PatientPosition": "FFS"}, valid_4_a_1={}
    )
    records = prepared(tmp_path, annotations={"metadata": str(table)})
    assert states(records) == {
        "valid_1_a_1": "prepared",
        "valid_2_a_1": "ct-rate-v1",
        "valid_3_a_1": "ct-rate-v1",
        "valid_4_a_1": "non-finite",
    }
    assert "head first" in records["valid_2_a_1"].reason
    assert "expected a row in CT-RATE's metadata" in records["valid_3_a_1"].reason


def test_a_path_that_names_no_version_is_refused_until_a_person_says_it(tmp_path):
    write_v2(tmp_path / "dataset" / "flat" / "train_1_a_1.nii.gz")
    with pytest.raises(UsageError, match=r"in 1, flat/train_1_a_1.nii.gz first; .* `version: v1`"):
        prepared(tmp_path)
    assert states(prepared(tmp_path, options={"version": "v2"})) == {"train_1_a_1": "prepared"}


def reports(path, **texts):
    rows = [{"VolumeName": f"{name}.nii.gz", "Technique_EN": "CT", **text} for name, text in texts.items()]
    return str(write_csv(path, REPORT, rows))


@pytest.fixture
def reconstructions(tmp_path):
    """Three reconstructions of train_1_a (2 as v1 and v2), one of train_2_a, a brain and a report without volume."""
    for name in ("train_1_a_1", "train_1_a_2", "train_1_a_10", "train_2_a_1", "train_3_a_1"):
        write_v2(place(tmp_path / "dataset", name, "v2"))
    write_v1(place(tmp_path / "dataset", "train_1_a_2", "v1"))
    write_metadata(
        tmp_path / "metadata.csv",
        train_1_a_1={"ConvolutionKernel": "['Br40f', '3']", "ZSpacing": 1.5},
        train_1_a_2={"ConvolutionKernel": "['Bl57d', '3']", "ZSpacing": 1.5},
        train_1_a_10={"ConvolutionKernel": "B", "ZSpacing": 0.75},
        train_2_a_1={},
        train_3_a_1={},
    )
    (tmp_path / "no_chest.txt").write_text("dataset/train/train_3/train_3_a/train_3_a_1.nii.gz\n\ntrain_9_a_1\n")
    both = {"Findings_EN": "Trachea “open”, no nodule.", "Impressions_EN": "Not given."}
    reports(
        tmp_path / "reports.csv",
        **dict.fromkeys(("train_1_a_1", "train_1_a_2", "train_1_a_10", "train_3_a_1", "train_4_a_1"), both),
        train_2_a_1={"Findings_EN": "Not given.", "Impressions_EN": "Normal."},
    )
    return tmp_path


@pytest.mark.parametrize(
    ("reconstruction", "expected"),
    [
        ("all", ["train_1_a_1", "train_1_a_10", "train_1_a_2", "train_2_a_1"]),
        ("first", ["train_1_a_1", "train_2_a_1"]),
        ("thinnest", ["train_1_a_10", "train_2_a_1"]),
        ("sharpest", ["train_1_a_2", "train_2_a_1"]),
    ],
)
def test_of_a_scan_the_reconstruction_that_is_asked_for_makes_the_questions(reconstructions, reconstruction, expected):
    part = collected(
        reconstructions,
        adapter="ct-rate",
        root="dataset",
        volumes=reconstruction,
        annotations={"metadata": "metadata.csv", "no_chest": "no_chest.txt", "reports": "reports.csv"},
        questions={"report": ["Findings_EN", "Impressions_EN"], "instruction": "Write the report."},
    )
    assert sorted(question.volume for question in part.questions) == expected
    assert [missing.volume for missing in part.unmatched] == ["train_4_a_1"]
    answers = {question.volume: question.answer for question in part.questions}
    assert answers["train_2_a_1"] == "Normal."
    assert answers[expected[0]] == "Trachea “open”, no nodule."
    assert {question.patient for question in part.questions} == {"ct-rate:train_1", "ct-rate:train_2"}
    assert {question.question for question in part.questions} == {"Write the report."}
    assert "1 volumes are there as v1 and as v2, train_1_a_2 first; v2 is taken" in part.notes
    assert "1 questions are left out: no chest CT (no_chest list)" in part.notes


def test_empty_reports_make_no_question_and_are_counted(reconstructions):
    part = collected(reconstructions, adapter="ct-rate", root="dataset", annotations={"reports": "reports.csv"})
    assert "1 reports are empty or 'Not given.' and make no question, train_2_a_1 first" in part.notes
    assert "1 of 5 volumes have no question and are not prepared, train_2_a_1 first" in part.notes


def test_a_table_whose_cells_are_no_texts_says_the_same(reconstructions):
    rows = [
        {"VolumeName": "train_1_a_1.nii.gz", "Findings_EN": None},
        {"VolumeName": "train_2_a_1.nii.gz", "Findings_EN": "Calm."},
    ]
    (reconstructions / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [{"VolumeName": "train_2_a_1", **dict.fromkeys(LABELS, 0), "Emphysema": 1.0}]
    write_json(reconstructions / "labels.json", labels)
    files = {"reports": "reports.jsonl", "labels": "labels.json"}
    part = collected(reconstructions, adapter="ct-rate", root="dataset", annotations=files)
    assert [question.answer for question in part.questions if question.task == "report"] == ["Calm."]
    assert [question.extra["subtask"] for question in part.questions if question.answer == "Yes"] == ["Emphysema"]


def test_a_kernel_nobody_knows_is_not_ranked(reconstructions):
    write_metadata(
        reconstructions / "metadata.csv",
        **{name: {"ConvolutionKernel": "Q!"} for name in ("train_1_a_1", "train_1_a_10", "train_1_a_2")},
    )
    with pytest.raises(UsageError, match=r"expected kernels of known sharpness, found 'Q!' \(3\)"):
        collected(
            reconstructions,
            adapter="ct-rate",
            root="dataset",
            volumes="sharpest",
            annotations={"metadata": "metadata.csv", "reports": "reports.csv"},
        )


def test_labels_make_eighteen_questions_and_conversations_one_per_turn(tmp_path):
    write_v2(place(tmp_path / "dataset", "valid_1_a_1", "v2"))
    row = {"VolumeName": "valid_1_a_1.nii.gz", **dict.fromkeys(LABELS, 0), "Lung nodule": 1}
    write_csv(tmp_path / "labels.csv", ("VolumeName", *LABELS), [row])
    turns = [
        {"from": "human", "value": "<image>\nIs there a nodule?<short_answer>", "type": "short_answer"},
        {"from": "gpt", "value": "Yes, in segment 6 – “small”."},
        {"from": "human", "value": "Where?<long_answer>", "type": "long_answer"},
        {"from": "gpt", "value": "On the right."},
    ]
    text_only = {"id": 2, "conversations": turns[:2]}
    write_json(tmp_path / "vqa.json", [{"id": 1, "image": "valid_1_a_1.nii.gz", "conversations": turns}, text_only])
    part = collected(
        tmp_path, adapter="ct-rate", root="dataset", annotations={"labels": "labels.csv", "vqa": "vqa.json"}
    )
    labels = [question for question in part.questions if question.task == "abnormality"]
    assert len(labels) == 18
    assert [question.extra["subtask"] for question in labels if question.answer == "Yes"] == ["Lung nodule"]
    vqa = [(question.question, question.answer) for question in part.questions if question.task == "vqa"]
    assert vqa == [("Is there a nodule?", "Yes, in segment 6 – “small”."), ("Where?", "On the right.")]
    assert "1 conversations are about no volume and make no question" in part.notes


def test_a_conversation_file_that_is_cut_off_is_refused_and_not_read_half(tmp_path):
    write_v2(place(tmp_path / "dataset", "valid_1_a_1", "v2"))
    whole = write_json(tmp_path / "vqa.json", [{"id": 1}, {"id": 2}])
    whole.write_text(whole.read_text()[:-4])
    with pytest.raises(UsageError, match=r"vqa.json, item 2: .* cut off"):
        collected(tmp_path, adapter="ct-rate", root="dataset", annotations={"vqa": "vqa.json"})


def test_a_renamed_column_is_named_with_the_one_that_may_be_meant(tmp_path):
    write_v2(place(tmp_path / "dataset", "valid_1_a_1", "v2"))
    write_csv(
        tmp_path / "r.csv", ("VolumeName", "Finding_EN"), [{"VolumeName": "valid_1_a_1.nii.gz", "Finding_EN": "x"}]
    )
    with pytest.raises(UsageError, match="expected a column 'Findings_EN', found none; did you mean 'Finding_EN'"):
        collected(tmp_path, adapter="ct-rate", root="dataset", annotations={"reports": "r.csv"})

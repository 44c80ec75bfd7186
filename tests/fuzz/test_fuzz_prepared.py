"""A prepared folder from elsewhere, damaged or made to mislead: what reads it says so, and writes nowhere else."""

import contextlib
import hashlib
import json
import shutil
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import budget, damaged_bytes, damaged_json, damaged_value, no_hang
from raw import write_scan

from photon_data import Recipe, open_masks, open_volume
from photon_data.dataset_lock import read_lock
from photon_data.errors import UsageError
from photon_data.files import Location, from_jsonl, jsonl_bytes
from photon_data.mask_store import problems_of, read_rows, write_rows
from photon_data.prepare_file import prepare_file
from photon_data.prepare_masks import prepare_masks
from photon_data.questions.kept import collect, keep_questions
from photon_data.records import read_records, write_records
from photon_data.scan import MaskPattern
from photon_data.store import OWN_DIGEST, own_digest
from photon_pipelines import collection
from photon_pipelines.export import export_all
from photon_pipelines.mask_plan import find_masks, plan_masks
from photon_pipelines.plan import gather, plan
from photon_pipelines.prepare import finish
from photon_pipelines.request import Request
from photon_pipelines.verify import verify_output

RECIPE = Recipe(shape_zyx=(20, 24, 24), model_shape_zyx=(14, 28, 28))
TEXTS = ["dataset.json", "dataset.lock", "questions/table.jsonl", "manifests/train.jsonl", "volumes.jsonl"]
TEXTS += ["masks.jsonl"]


def collected(gathered, out):
    return collect(gathered.questions, gathered.jobs, out, gathered.rows, allow_leaks=False)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two volumes with masks, a refused scan, and questions about them."""
    folder = tmp_path_factory.mktemp("whole")
    for seed in range(2):
        write_scan(folder / "raw" / f"s{seed}.nii.gz", seed, shape_zyx=(8, 12, 12), spacing_mm=(3, 2, 2))
        labels = np.random.default_rng(seed).integers(0, 3, (8, 12, 12)).astype(np.uint8)
        write_scan(folder / "raw" / f"s{seed}_seg.nii.gz", spacing_mm=(3, 2, 2), array=labels)
    (folder / "raw" / "broken.nii.gz").write_bytes(b"\x1f\x8b")
    rows = [{"id": f"q{i}", "volume": f"s{i}", "question": "?", "answer": "yes", "split": "train"} for i in range(2)]
    (folder / "table.jsonl").write_bytes(jsonl_bytes(rows))
    request = _request(folder)
    gathered = gather(request)
    records, asked = [prepare_file(job) for job in gathered.jobs], collected(gathered, request.out)
    write_records(request.out, records)
    masks = plan_masks(find_masks(request, gathered.jobs), request, records)
    write_rows(request.out, map(prepare_masks, masks.jobs))
    for name, questions in asked.items():
        keep_questions(request.out, name, questions)
    finish(request, records, [], asked)
    assert [record.state for record in records] == ["refused", "prepared", "prepared"]
    assert not [*verify_output(request.out)]
    return folder


def _request(folder):
    out, masks = Location(str(folder / "out")), MaskPattern("{name}_seg.nii.gz")
    return Request(folder / "raw", out, RECIPE, questions=folder / "table.jsonl", pictures=1, masks=masks)


def _copy(prepared, folder):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared, folder)
    return Location(str(folder / "out"))


def _files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _use_all(folder, out):
    """Do everything with a prepared folder that reads what it holds."""
    request, before = _request(folder), _files(folder)
    uses = [
        partial(read_records, out),
        partial(collection.status, out),
        partial(collection.to_prune, out),
        lambda: [*verify_output(out)],
        partial(export_all, out, "nifti", folder / "exported"),
        lambda: plan(gather(request).jobs, request),
        partial(read_lock, out.path / "dataset.lock"),
        lambda: collected(gather(request), out),
        lambda: [problems_of(row) for row in read_rows(out)],
        lambda: plan_masks(find_masks(request, gather(request).jobs), request, read_records(out)),
    ]
    for use in uses:
        try:
            use()
        except UsageError as error:
            assert str(error)
    made = _files(folder) - before
    assert all(name == "exported" or name.startswith("exported/") for name in made), made


@budget(60)
@given(st.data(), st.sampled_from(TEXTS))
def test_damaged_lists_of_a_prepared_folder_are_told_and_nothing_is_written_elsewhere(prepared, tmp_path, data, name):
    out = _copy(prepared, tmp_path / "copy")
    content = out.read(name)
    if data.draw(st.integers(0, 2)) == 0:
        content = data.draw(damaged_bytes(content))
    elif name.endswith(".jsonl"):
        rows = from_jsonl(content.decode())
        rows = [data.draw(damaged_value(row)) if data.draw(st.booleans()) else row for row in rows]
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        content = data.draw(damaged_json(json.loads(content)))
    (out.path / name).write_bytes(content)
    with no_hang():
        _use_all(tmp_path / "copy", out)


METADATA = ["zarr.json", "0/zarr.json", "model/zarr.json", "model/0/zarr.json"]
PARTS = [*METADATA, "0/c.0.0.0", "model/0/c.0.0.0"]


@budget(80)
@given(st.data(), st.sampled_from(PARTS))
def test_a_store_with_a_damaged_file_is_read_as_it_was_or_refused(prepared, tmp_path, data, part):
    whole = prepared / "out" / "volumes" / "s0.ome.zarr"
    store = tmp_path / "s0.ome.zarr"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(whole, store)
    content = (store / part).read_bytes()
    damaged = data.draw(damaged_json(json.loads(content)) if part in METADATA else damaged_bytes(content))
    (store / part).write_bytes(damaged)
    for grid in ("volume", "model"):
        if (found := _or_sentence(open_volume, store, grid)) and (array := _or_sentence(found.numpy)) is not None:
            before = open_volume(whole, grid)
            assert found.geometry == before.geometry and np.array_equal(array, before.numpy())


def _or_sentence(read, *parts):
    """What a reader returns, or None where it refuses in a sentence; any other exception is a fault."""
    with no_hang():
        try:
            return read(*parts)
        except UsageError as error:
            assert str(error)
            return None


@budget(80)
@given(st.data(), st.sampled_from(METADATA), st.sampled_from(["volumes", "masks"]))
def test_a_strangers_store_whose_digests_fit_is_a_sane_volume_or_refused(prepared, tmp_path, data, part, folder):
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("volumes", "masks"):
        shutil.copytree(prepared / "out" / name / "s0.ome.zarr", copy / name / "s0.ome.zarr")
    volume, store = copy / "volumes" / "s0.ome.zarr", copy / folder / "s0.ome.zarr"
    value = data.draw(damaged_value(json.loads((store / part).read_bytes())))
    (store / part).write_bytes(content := json.dumps(value).encode())
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):  # no place for digests is left
        root = json.loads((store / "zarr.json").read_bytes())
        ours = root["attributes"]["photon"]
        if part != "zarr.json":
            ours["files"][part] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        ours[OWN_DIGEST] = own_digest(root["attributes"])
        (store / "zarr.json").write_text(json.dumps(root))
    for grid in ("volume", "model"):
        if (found := _or_sentence(open_volume, volume, grid)) and (array := _or_sentence(found.numpy)) is not None:
            assert array.shape == found.geometry.shape_zyx and np.isfinite(found.geometry.affine_ras).all()
        if masks := _or_sentence(open_masks, volume, None, grid):
            for name in masks.names:
                mask = _or_sentence(masks.mask, name)
                assert mask is None or mask.numpy().shape == masks.geometry.shape_zyx


@pytest.mark.parametrize(
    "id", ["../../x", "/x", "a/b", "a\\b", "", ".a", "a\0", "a\x1b[31m", "x" * 250, "C:a", None, 7]
)
def test_a_row_whose_id_is_no_name_of_a_file_is_refused_with_its_number(prepared, tmp_path, id):
    out = _copy(prepared, tmp_path / "copy")
    rows = from_jsonl(out.read("volumes.jsonl").decode())
    (out.path / "volumes.jsonl").write_text("".join(json.dumps(row | {"id": id}) + "\n" for row in rows))
    with pytest.raises(UsageError, match=r"volumes\.jsonl is damaged: row 1: expected "):
        read_records(out)
    _use_all(tmp_path / "copy", out)


def test_a_row_whose_store_is_anothers_is_refused(prepared, tmp_path):
    out = _copy(prepared, tmp_path / "copy")
    rows = from_jsonl(out.read("volumes.jsonl").decode())
    stores = [row["store"] for row in rows]
    swapped = [row | {"store": store} for row, store in zip(rows, reversed(stores), strict=True)]
    (out.path / "volumes.jsonl").write_bytes(jsonl_bytes(swapped))
    with pytest.raises(UsageError, match="as the store of"):
        export_all(out, "nifti", tmp_path / "e")


@pytest.mark.parametrize("link", ["volumes", "manifests", "export.json"])
def test_nothing_is_written_behind_a_link_that_leads_out_of_the_target_of_an_export(prepared, tmp_path, link):
    out, target, elsewhere = _copy(prepared, tmp_path / "copy"), tmp_path / "e", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    (elsewhere / "export.json").write_text("{}")
    (target / link).symlink_to(elsewhere / link if link.endswith("json") else elsewhere)
    if link.endswith("json"):  # a link to a file is replaced
        export_all(out, "nifti", target)
        assert not (target / link).is_symlink()
    else:
        with pytest.raises(UsageError, match="a link that leads to"):
            export_all(out, "nifti", target)
    assert (elsewhere / "export.json").read_text() == "{}"
    assert _files(elsewhere) == {"export.json"}

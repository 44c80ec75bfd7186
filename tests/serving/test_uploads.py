"""Files of strangers, without a server: where they are put, what archives may hold, what goes when the server goes."""

import asyncio
import io
import itertools
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
from askable import store
from hypothesis import given, settings
from hypothesis import strategies as st
from live import live
from raw import write_scan
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.errors import Refused, UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_one_scan
from photon_data.recipe import Policy, Recipe
from photon_data.records import PREPARED, VolumeRecord, store_name, write_records
from photon_pipelines.serving.intake import take_in, unpack_all
from photon_pipelines.serving.upload import place_for, receive
from photon_pipelines.serving.volumes import Limits, private_folder

SMALL = Limits(1_000_000, 50, 10)


def packed(*members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(max_size=300), max_size=12),
    st.lists(st.sampled_from(["1", "2", "-2", "3/2", "../2", ".", "é" * 150]), max_size=12),
)
def test_every_file_has_a_new_place_in_its_folder_whatever_its_name(tmp_path_factory, names, more):
    folder = tmp_path_factory.mktemp("in")
    for number, name in enumerate([*names, *more], start=1):
        place = place_for(folder, name, number)
        with place.open("xb"):
            pass
        assert place.resolve().is_relative_to(folder.resolve()) and len(place.relative_to(folder).parts) <= 2
    assert sum(path.is_file() for path in folder.rglob("*")) == len(names) + len(more)


def test_slices_of_two_folders_with_one_set_of_names_all_have_a_place(tmp_path):
    for number, name in enumerate([f"{study}/{n}" for study in "ab" for n in range(1, 151)], start=1):
        place_for(tmp_path, name, number).write_bytes(name.encode())
    assert len({path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}) == 300


def test_archives_share_one_limit_and_archives_in_archives_stay_packed(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.zip").write_bytes(packed(("x.bin", b"\0" * 400_000), ("y.zip", packed(("z", b"z")))))
    with pytest.raises(Refused, match="at most"):
        unpack_all(tmp_path, SMALL)
    (tmp_path / "c.zip").unlink()
    for left in tmp_path.glob("-zip-*"):
        for file in left.iterdir():
            file.unlink()
        left.rmdir()
    for name in "ab":
        (tmp_path / f"{name}.zip").write_bytes(packed(("x.bin", b"\0" * 400_000), ("y.zip", packed(("z", b"z")))))
    unpack_all(tmp_path, SMALL)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["x.bin", "x.bin", "y.zip", "y.zip"]


def test_the_files_of_all_archives_together_are_counted(tmp_path):
    for name, counts in {"one": (51,), "two": (30, 21), "few": (30, 20)}.items():
        folder = tmp_path / name
        folder.mkdir()
        for count in counts:
            (folder / f"{count}.zip").write_bytes(packed(*((str(n), b"") for n in range(count))))
        if name == "few":
            unpack_all(folder, SMALL)
            assert sum(path.is_file() for path in folder.rglob("*")) == 50
            continue
        with pytest.raises(Refused) as refused:
            unpack_all(folder, SMALL)
        assert refused.value.code == "too-many-files"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_archive_of_any_method_is_refused_or_gives_the_bytes_that_were_packed(tmp_path, method):
    content, refusals = os.urandom(3000), 0
    whole = packed(("a.nii", content), method=method)
    for at in range(30, len(whole), 97):
        damaged = bytearray(whole)
        damaged[at : at + 8] = b"\xff" * 8
        folder = tmp_path / f"{at}"
        folder.mkdir()
        (folder / "a.zip").write_bytes(damaged)
        try:
            unpack_all(folder, SMALL)
        except Refused as refused:
            refusals += 1
            assert refused.code in ("damaged-zip", "encrypted", "too-large")
        else:
            assert [path.read_bytes() for path in folder.rglob("*") if path.is_file()] == [content]
    assert refusals >= 25  # of 31 or more places, those in the bytes of the file


def test_a_record_names_no_file_of_the_upload(tmp_path):
    job = {"out": str(tmp_path / "out"), "id": "vol_1", "series": "", "recipe": Recipe().to_json()}
    job |= {"policy": vars(Policy()), "limits": list(SMALL)}
    for number, files in enumerate(
        [
            {"Doe.nii.gz": b"\x1f\x8b"},
            {"Doe.mhd": b"NDims = 3\nElementDataFile = Doe.raw"},
            {"Doe.nii": b"x", "DoeB.nii": b"y"},
            {"Doe.zip": packed(("Doe.txt", b"Doe"))},
            {"Doe": b"Doe"},
            {},
        ]
    ):
        folder = tmp_path / f"Roe{number}"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        record = take_in({**job, "folder": str(folder)})
        assert record["state"] == "refused" and record["code"], record
        assert "Doe" not in record["reason"] and "Roe" not in record["reason"], record["reason"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_body_in_any_pieces_is_the_files_that_were_sent(tmp_path_factory, data):
    files = data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="f%d.dcm"\r\n\r\n%s\r\n' % (n, content)
        for n, content in enumerate(files)
    )
    body += b'--x\r\nContent-Disposition: form-data; name="series"\r\n\r\nabc\r\n--x--\r\n'
    if any(b"--x" in content for content in files):
        return
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)), max_size=8)) | {0, len(body)})

    async def pieces():
        for start, end in itertools.pairwise(cuts):
            yield body[start:end]

    folder = tmp_path_factory.mktemp("in")
    fields = asyncio.run(receive(pieces(), "multipart/form-data; boundary=x", folder, SMALL))
    assert fields == {"series": "abc"}
    assert [(folder / f"f{n}.dcm").read_bytes() for n in range(len(files))] == files


def test_uploads_stay_with_keep_and_are_known_again(model_dir, tmp_path):
    scan = write_scan(tmp_path / "a.nii.gz")
    with live(model_dir, keep=tmp_path / "kept") as served:
        id = served.uploaded(scan)
        answer = served.answer(id)["choices"][0]["message"]["content"]
        with pytest.raises(UsageError, match="another run"), private_folder(tmp_path / "kept"):
            pass
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
    with live(model_dir, keep=tmp_path / "kept") as served:
        assert [one["id"] for one in served.http.get("/v1/volumes").json()["data"]] == [id]
        assert served.answer(id)["choices"][0]["message"]["content"] == answer


def test_what_a_killed_server_left_is_removed_and_what_a_running_one_has_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "photon-serve-left"
    (left / "volumes").mkdir(parents=True)
    os.utime(left, (time.time() - 3600,) * 2)
    with private_folder(None) as running:
        os.utime(running, (time.time() - 3600,) * 2)
        assert not left.exists()
        with private_folder(None) as another:
            assert running.exists() and another != running
    assert not list(tmp_path.glob("photon-serve-*"))


def test_a_server_that_cannot_start_says_why(model_dir, tmp_path):
    def run(*words):
        result = CliRunner().invoke(app, ["serve", "--model", str(model_dir), "--device", "cpu", *words])
        return result.exit_code, " ".join(result.output.split())

    (tmp_path / "key").write_text("short")
    for words, said in (
        (["--host", "0.0.0.0"], "--api-key-file beside it"),
        (["--api-key-file", str(tmp_path / "key")], "at least 16 letters"),
        (["--data", str(tmp_path), "--port", "0"], "has no volumes.jsonl"),
        (["--host", "203.0.113.9", "--api-key-file", str(tmp_path / "key")], "at least 16"),
        (["--recipe", "none", "--port", "0"], "expected one of chest_ct"),
        (["--adapter", str(tmp_path), "--port", "0"], "expected a checkpoint of a LoRA run"),
    ):
        code, text = run(*words)
        assert code == 2 and said in text, text
    with live(model_dir) as served:
        code, text = run("--port", served.base.rpartition(":")[2])
        assert code == 2 and "expected one that is free" in text


def test_without_the_extra_a_sentence_says_what_to_install():
    script = "import sys; sys.modules['uvicorn'] = None; from photon_cli.photon import main; main()"
    found = subprocess.run([sys.executable, "-c", script, "serve", "--model", "m"], capture_output=True, text=True)
    assert found.returncode == 2 and "pip install 'photon-ct[serve]'" in " ".join(found.stderr.split())


def test_a_store_that_is_made_again_under_its_name_is_encoded_anew_and_one_for_another_model_is_refused(
    model_dir, tmp_path
):
    def remade(seed):
        store(tmp_path, "ready", seed)
        write_records(
            Location(str(tmp_path)),
            [VolumeRecord(n, n, PREPARED, 0, 0, store=store_name(n)) for n in ("ready", "small")],
        )

    remade(1)
    scan = write_scan(tmp_path / "a.nii.gz")
    recipe = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
    prepare_file(Job(replace(find_one_scan(scan), id="small"), str(tmp_path), recipe))
    with live(model_dir, data=str(tmp_path)) as served:
        first = served.answer("ready")
        assert served.answer("ready")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        remade(2)
        second = served.answer("ready")
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        saliencies = [served.http.get(one["photon"]["kept"][0]).json()["saliency"] for one in (first, second)]
        assert saliencies[0] != saliencies[1]
        found = served.ask("small")
        assert found.status_code == 400 and "(14, 28, 28)" in found.json()["error"]["message"]
        assert str(tmp_path) not in found.text

"""The command line as a person meets it: exit codes, sentences, and how little it imports."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import typer
from dicom_files import CORONAL, stored_values, write_series
from raw import write_scan
from scans import ct_like
from typer.testing import CliRunner

from photon_cli.data import app
from photon_cli.terminal import errors_as_exit_codes
from photon_pipelines.child import Child, ChildError

SMALL = ["--set", "shape_zyx=40,32,32", "--set", "model_shape_zyx=14,28,28", "--workers", "1"]


def cli(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@pytest.fixture
def raw(tmp_path):
    write_scan(tmp_path / "raw" / "one.nii.gz")
    return tmp_path / "raw"


def test_exit_codes_tell_success_partial_failure_and_misuse_apart(raw, tmp_path):
    out = tmp_path / "out"
    assert cli("prepare", raw, out, *SMALL)[0] == 0
    assert cli("verify", out) == (0, "1 stores checked, 0 problems\n")
    (raw / "two.nii.gz").write_bytes(b"nothing")
    code, text = cli("prepare", raw, out, *SMALL)
    assert code == 1
    assert "refused two.nii.gz: expected gzip data" in text
    (out / "volumes" / "one.ome.zarr" / "model" / "zarr.json").unlink()
    code, text = cli("verify", out)
    assert code == 1
    assert "one.ome.zarr/model/zarr.json: missing" in text


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory: you")],
)
def test_memory_that_does_not_suffice_stops_a_command_with_a_sentence(capsys, error):
    with pytest.raises(typer.Exit) as ended, errors_as_exit_codes():
        raise error
    assert ended.value.exit_code == 3
    assert capsys.readouterr().err.startswith("Stopped: memory did not suffice.")
    with pytest.raises(RuntimeError, match="another"), errors_as_exit_codes():
        raise RuntimeError("another")


def test_a_scan_that_took_too_long_is_told_as_known_by_the_next_run_only(raw, tmp_path, monkeypatch):
    def take_too_long(self, job, timeout_s):
        raise ChildError("timeout", "expected it to be done, found that it is not; raise --timeout")

    monkeypatch.setattr(Child, "ask", take_too_long)
    for is_known in (False, True):
        code, text = cli("prepare", raw, tmp_path / "out", *SMALL)
        assert (code, "1 x timeout" in text) == (1, True)
        assert ("1 of them were not read again" in text) == is_known


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "spacing=1,1,1"], "did you mean 'spacing_mm'"),
        (["--recipe", "chest"], "one of chest_ct"),
        (["--hu-source", "nowhere.csv"], "expected header, stored or a table"),
        (["--columns", "volume"], "expected name=value"),
        (["--split", "train=most"], "expected numbers like train=0.8"),
        (["--questions", "nowhere.csv"], "nowhere.csv"),
        (["--memory", "0.1"], "expected at least 1.0 GB"),
    ],
)
def test_a_command_that_cannot_be_followed_writes_nothing_and_says_what_was_wanted(raw, tmp_path, words, said):
    code, text = cli("prepare", raw, tmp_path / "out", *SMALL, *words)
    assert code == 2
    assert said in text
    assert not (tmp_path / "out" / "volumes").exists()


def test_a_source_that_is_not_there_or_holds_no_scans_is_misuse(tmp_path):
    (tmp_path / "empty").mkdir()
    assert cli("prepare", tmp_path / "nowhere", tmp_path / "out")[0] == 2
    code, text = cli("prepare", tmp_path / "empty", tmp_path / "out")
    assert code == 2
    assert "expected scans" in text


def test_scouts_beside_a_scan_are_reported_and_are_no_failure_and_alone_they_are_no_source(tmp_path):
    def scout(ds, z):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    raw, out, values = tmp_path / "study", tmp_path / "out", ct_like((9, 20, 22))
    write_series(raw / "scout", ct_like((2, 30, 20)), orientation=CORONAL, edit=scout)
    code, text = cli("prepare", raw, out, *SMALL)
    assert code == 2
    assert f"expected scans (NIfTI, NRRD, MetaImage, DICOM), found 2 (DICOM scout, no CT volume) in {raw}" in text
    write_series(raw / "axial", values, rescale=(1, 0))
    for words in (
        ("prepare", raw, out, *SMALL),
        ("inspect", raw, "--workers", "1"),
        ("prepare", raw, out, "--dry-run", *SMALL),
    ):
        code, text = cli(*words)
        assert code == 0, text
        assert "2 (DICOM scout, no CT volume)" in text


@pytest.mark.parametrize("out", ["nonsense://bucket/out", "memory://bucket/out", "raw/one.nii.gz"])
def test_an_output_that_cannot_be_written_to_is_misuse(raw, tmp_path, out):
    place = out if "://" in out else str(tmp_path / out)
    code, text = cli("prepare", raw, place, *SMALL)
    assert code == 2
    assert "expected" in text and place in text


def test_a_run_that_nobody_reads_any_more_goes_on_and_says_by_its_exit_code_how_it_ended(raw, tmp_path):
    command = [sys.executable, "-m", "photon_cli.data", "prepare", str(raw), str(tmp_path / "out"), *SMALL]
    for code, name in enumerate(["two.nii.gz", "bad.nii.gz"]):
        (raw / name).write_bytes((raw / "one.nii.gz").read_bytes() if not code else b"bad")
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (code, b"")
    assert cli("verify", tmp_path / "out") == (0, "2 stores checked, 0 problems\n")


def test_names_with_brackets_are_printed_as_they_are(raw, tmp_path):
    out = tmp_path / "a[/2024][bold]"
    code, text = cli("prepare", raw, out, *SMALL)
    assert code == 0
    assert f"{out}: see report.html" in text


@pytest.mark.parametrize("command", ["photon_cli.data", "photon_cli.photon"])
def test_both_commands_list_what_they_can_do(command):
    script = f"import sys, {command} as c; sys.argv = ['x', '--help']; c.main()"
    assert (
        "Commands" in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    )


def test_a_dry_run_writes_nothing_and_counts_what_there_is_to_do(raw, tmp_path):
    code, text = cli("prepare", raw, tmp_path / "out", "--dry-run", *SMALL)
    assert code == 0
    assert "1 scans" in text
    write_series(raw / "series", stored_values())  # headers of which a run keeps
    assert "2 scans" in cli("prepare", raw, tmp_path / "out", "--dry-run", *SMALL)[1]
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_inspect_finds_duplicates_and_refusals_and_writes_no_store(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (raw / "copy.nii.gz").write_bytes((raw / "one.nii.gz").read_bytes())
    (raw / "bad.nii").write_text("bad")
    code, text = cli("inspect", raw, "--json", tmp_path / "found.jsonl", "--workers", "1")
    assert code == 1
    assert "the same content: copy.nii.gz, one.nii.gz" in text
    rows = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {row["id"]: row["state"] for row in rows} == {"bad": "refused", "copy": "ready", "one": "ready"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.jsonl", "raw"]


def test_show_takes_one_of_several_series_by_the_name_that_it_lists(tmp_path):
    for seed in range(2):
        names = [f"{seed}{z:02}.dcm" for z in range(16)]
        write_series(tmp_path / "raw/study", ct_like((16, 24, 28), seed), names=names, rescale=(1, 0))
    code, text = cli("show", tmp_path / "raw")
    assert code == 2 and "expected one scan, found 2" in text and "--series" in text
    name = re.search("#[0-9a-f]{8}", text).group()
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    assert cli("show", tmp_path / "raw", "--series", name, "-o", pictures[0])[0] == 0
    assert cli("show", f"{tmp_path}/raw/{name}", "-o", pictures[1])[0] == 0
    assert all(picture.stat().st_size > 1000 for picture in pictures)


def test_globs_and_links_of_the_command_line_choose_what_is_prepared(tmp_path):
    write_scan(tmp_path / "raw/a/one.nii.gz")
    write_scan(tmp_path / "raw/old/two.nii.gz")
    write_scan(tmp_path / "else/three.nii.gz")
    (tmp_path / "raw/three.nii.gz").symlink_to(tmp_path / "else/three.nii.gz")
    dry = ("prepare", tmp_path / "raw", tmp_path / "out", "--dry-run", *SMALL)
    for options, scans, left in [
        ((), 3, "nothing"),
        (("--no-follow-links",), 2, "1 (link)"),
        (("--exclude", "old", "--exclude", "a/*"), 1, "2 (in --exclude)"),
        (("--include", "*/one.nii.gz"), 1, "2 (not in --include)"),
    ]:
        code, text = cli(*dry, *options)
        assert code == 0 and f"{scans} scans" in text and left in text
    code, text = cli(*dry, "--include", "labels")
    assert code == 2 and "3 (not in --include)" in text


@pytest.mark.parametrize("what", ["scan", "store"])
def test_show_writes_a_picture_of_a_store_and_of_a_raw_scan(raw, tmp_path, what):
    place = raw / "one.nii.gz"
    if what == "store":
        cli("prepare", raw, tmp_path / "out", *SMALL)
        place = tmp_path / "out" / "volumes" / "one.ome.zarr"
    code, text = cli("show", place, "--output", tmp_path / "picture.png", "--window", "-160,240")
    assert (code, text.strip()) == (0, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_phantoms_can_be_prepared_with_their_questions(tmp_path):
    assert cli("phantom", tmp_path / "p", "--n", "1", "--seed", "3")[0] == 0
    words = ["--questions", tmp_path / "p" / "questions.jsonl", *SMALL]
    code, text = cli("prepare", tmp_path / "p" / "scans", tmp_path / "out", *words)
    assert code == 0, text
    assert list((tmp_path / "out" / "manifests").glob("*.jsonl"))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import photon_cli.data", ("numpy", "zarr", "SimpleITK", "distributed", "torch")),
        (
            "import photon_pipelines.prepare, photon_pipelines.scan_job",
            ("torch", "transformers", "torchio", "photon_train"),
        ),
        ("import photon_data.prepare_file", ("torch", "dask", "distributed")),
        ("import photon_cli.train", ("nltk", "rouge_score", "sacrebleu", "peft")),
    ],
)
def test_heavy_libraries_are_not_imported_where_they_are_not_needed(code, absent):
    if "photon_cli.train" in code:
        pytest.importorskip("torch")
    script = f"{code}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("command", ["prepare", "inspect"])
def test_other_numbers_of_paths_than_the_command_takes_are_misuse_that_says_which_it_takes(raw, tmp_path, command):
    (tmp_path / "data_manifest.yaml").write_text("datasets: {}\n")
    for words in ((), (raw, raw, raw), (raw, raw, "--manifest", tmp_path / "data_manifest.yaml")):
        code, text = cli(command, *words)
        assert code == 2
        assert "expected SOURCE" in text and "or --manifest data_manifest.yaml [OUT], found" in text
    assert list(tmp_path.rglob("volumes.jsonl")) == []


def test_a_run_that_goes_on_counts_what_it_had_to_do_itself(raw, tmp_path, monkeypatch):
    assert cli("prepare", raw, tmp_path / "out", *SMALL)[0] == 0
    for seed in (1, 2):
        write_scan(raw / f"{seed}.nii.gz", seed)
    monkeypatch.setattr("photon_cli.terminal.LINE_S", 0)
    code, text = cli("prepare", raw, tmp_path / "out", *SMALL)
    assert code == 0
    assert "3 scans found, 1 of them done before" in text
    assert "1 of 2 done: 1 unchanged, 1 prepared" in text
    assert "2 of 2 done: 1 unchanged, 2 prepared" in text


INTERRUPTS = [
    (signal.SIGINT, ()),
    (signal.SIGTERM, ()),
    (signal.SIGUSR1, ()),
    (signal.SIGTERM, (signal.SIGINT,)),
]


class Interrupting:
    """Raises a signal while it is destroyed, where Python drops the exception of the handler."""

    def __init__(self, sign):
        self.sign = sign

    def __del__(self):
        signal.raise_signal(self.sign)


@pytest.mark.parametrize(("sign", "ignored"), INTERRUPTS)
def test_an_interrupt_that_arrives_while_an_object_is_destroyed_ends_the_command_all_the_same(sign, ignored, capsys):
    before = {one: signal.signal(one, signal.SIG_IGN) for one in ignored}  # as in a background job of a shell
    try:
        with pytest.raises(typer.Exit) as ended, errors_as_exit_codes():
            Interrupting(sign)
            time.sleep(30)
            pytest.fail("the interrupt was lost")
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert ended.value.exit_code == 130
    assert "Interrupted" in capsys.readouterr().err


def test_no_interrupt_comes_after_the_end_of_a_command():
    with errors_as_exit_codes():
        Interrupting(signal.SIGTERM)
    time.sleep(0.2)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_another_error_of_an_object_that_is_destroyed_is_reported_as_ever(monkeypatch):
    class Destroyed:
        def __del__(self):
            raise ValueError("not closed")

    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with errors_as_exit_codes():
        Destroyed()
    assert [str(found.exc_value) for found in lost] == ["not closed"]
    assert sys.unraisablehook == lost.append

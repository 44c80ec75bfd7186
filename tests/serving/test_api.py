"""The API as its clients meet it: OpenAI's own client, uploads of every format, what was kept."""

import gzip
import io
import json
import zipfile
from dataclasses import replace

import nibabel
import numpy as np
import openai
import pytest
import SimpleITK as sitk
from askable import QUESTIONS, TOKENS
from dicom_files import write_series
from live import COARSE, body, code_of, events_of, live
from raw import write_scan
from scans import ct_like
from typer.testing import CliRunner

from photon_cli.photon import app
from photon_data.files import Location
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import named_recipe
from photon_data.records import write_records
from photon_data.store import open_volume

MODEL = "served-model"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A prepared folder of one scan, as "ready" and, with the model grid alone, as "lean"."""
    folder = tmp_path_factory.mktemp("prepared")
    write_scan(folder / "raw" / "ready.nii.gz", 5, (30, 40, 44), (9.0, 7.0, 6.5))
    (source,) = find_scans(folder / "raw").sources
    recipe, _ = named_recipe("chest_ct", [*COARSE, "model_shape_zyx=70,140,140"])
    jobs = [Job(source, str(folder / "out"), recipe)]
    jobs.append(Job(replace(source, id="lean"), str(folder / "out"), recipe, grids="model"))
    write_records(Location(str(folder / "out")), [prepare_file(job) for job in jobs])
    return folder / "out"


@pytest.fixture(scope="module")
def served(model_dir, out):
    with live(model_dir, data=str(out)) as server:
        yield server


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scan")
    return write_scan(folder / "Doe_John.nii.gz", 1, (30, 40, 44), (9.0, 7.0, 6.5))


@pytest.fixture(scope="module")
def uploaded(served, scan):
    return served.uploaded(scan)


@pytest.fixture(scope="module")
def predicted(model_dir, scan, tmp_path_factory):
    """What `photon predict` says of the scan, by question, and the folder of its overlays."""
    folder = tmp_path_factory.mktemp("overlays")
    words = ["predict", "--model", str(model_dir), str(scan), *QUESTIONS, "--max-new-tokens", "30", "--device", "cpu"]
    words += ["--json", "--overlay", str(folder), *(word for each in COARSE for word in ("--set", each))]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return {one["question"]: one for one in json.loads(result.output)["predictions"]}, folder


def messages(id, question):
    return [{"role": "user", "content": [{"type": "volume", "volume": id}, {"type": "text", "text": question}]}]


def nifti(content):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content))


def test_openais_client_lists_chats_and_streams_what_predict_answers(client, uploaded, predicted):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    for question, same in predicted[0].items():
        asked = {"model": MODEL, "messages": messages(uploaded, question), "max_tokens": 30}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == same["response"]
        assert (whole.usage.visual_tokens, whole.usage.kept_tokens) == (TOKENS, same["kept_tokens"])
        assert whole.usage.prompt_tokens == TOKENS + same["text_tokens"]
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == same["response"]
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage.kept_tokens == same["kept_tokens"] and not chunks[-1].choices
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens > TOKENS
    assert len(chunks) > 5
    with pytest.raises(openai.NotFoundError, match="found another name"):
        client.chat.completions.create(model="gpt-4o", messages=messages(uploaded, "?"))
    with pytest.raises(openai.BadRequestError, match="expected a question"):
        client.chat.completions.create(model=MODEL, messages=messages(uploaded, " "))


def test_n_seed_stop_and_log_probabilities_are_those_of_openais_api(client, uploaded, predicted):
    asked = {"model": MODEL, "messages": messages(uploaded, QUESTIONS[1]), "max_tokens": 30}
    drawn = [client.chat.completions.create(**asked, temperature=1.5, top_p=0.9, n=3, seed=s) for s in (4, 4, 5)]
    texts = [[choice.message.content for choice in one.choices] for one in drawn]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    assert [choice.index for choice in drawn[0].choices] == [0, 1, 2]
    assert drawn[0].usage.completion_tokens > max(len(c.message.content) // 20 for c in drawn[0].choices)
    unseeded = [client.chat.completions.create(**asked, temperature=1.5) for _ in range(2)]
    assert unseeded[0].choices[0].message.content != unseeded[1].choices[0].message.content
    again = client.chat.completions.create(**asked, temperature=1.5, seed=unseeded[0].photon["seed"])
    assert again.choices[0].message.content == unseeded[0].choices[0].message.content
    same = client.chat.completions.create(**asked, n=2)
    whole = predicted[0][QUESTIONS[1]]["response"]
    assert [choice.message.content for choice in same.choices] == [whole, whole]
    stop = whole[4:7]
    cut = client.chat.completions.create(**asked, stop=[stop], logprobs=True, top_logprobs=2).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert all(
        len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob == one.logprob <= 0 for one in cut.logprobs.content
    )
    streamed = client.chat.completions.create(**asked, stream=True, n=2, temperature=1.5, seed=4, logprobs=True)
    pieces = [chunk.choices[0] for chunk in streamed]
    for number in (0, 1):
        own = [piece for piece in pieces if piece.index == number]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason
        text = "".join(piece.delta.content or "" for piece in own)
        assert (
            text
            == client.chat.completions.create(**asked, temperature=1.5, seed=4, n=2).choices[number].message.content
        )


def test_a_volume_is_named_in_three_ways_and_stands_before_the_text(served, uploaded):
    text = {"type": "text", "text": QUESTIONS[0]}
    ways = [
        {"type": "volume", "volume": uploaded},
        {"type": "volume", "volume": {"id": uploaded}},
        {"type": "video_url", "video_url": {"url": uploaded}},
    ]
    bodies = [
        {**body(""), "messages": [{"role": "user", "content": parts}]}
        for way in ways
        for parts in ([way, text], [text, way])
    ]
    answers = [served.http.post("/v1/chat/completions", json=one).json() for one in bodies]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert len({answer["usage"]["prompt_tokens"] for answer in answers}) == 1


def test_a_conversation_goes_on_about_the_volume_of_its_first_turn(served, uploaded):
    first = served.answer(uploaded)
    turns = body(uploaded)["messages"]
    turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Where?"}]
    found = served.http.post("/v1/chat/completions", json={**body(""), "messages": turns}).json()
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] > TOKENS
    assert found["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    plain = {**body(""), "messages": [{"role": "user", "content": "What is a nodule?"}]}
    found = served.http.post("/v1/chat/completions", json=plain).json()
    assert found["usage"]["visual_tokens"] == 0 and found["photon"]["kept"] == []


def test_what_was_kept_is_on_the_scans_own_grid_as_predict_writes_it(served, uploaded, predicted):
    for question, same in predicted[0].items():
        place = served.answer(uploaded, question, max_tokens=30)["photon"]["kept"][0]
        mask = served.http.get(place).json()
        assert np.packbits(np.array(mask["kept"], bool)).tobytes().hex() == same["kept"]
        assert len(mask["saliency"]) == mask["tokens"] == TOKENS
        for kind, name in (("nifti", "kept.nii.gz"), ("saliency", "saliency.nii.gz"), ("png", "planes.png")):
            found = served.http.get(place, params={"format": kind})
            expected = (predicted[1] / same["id"] / name).read_bytes()
            if kind == "saliency":  # in a batch of another size its last digits are others
                assert np.allclose(*(np.asarray(nifti(one).dataobj) for one in (found.content, expected)), atol=1e-6)
            else:
                assert found.content == expected
            assert name in found.headers["content-disposition"]
    assert code_of(served.http.get(place, params={"format": "exe"})) == "invalid_request"
    assert code_of(served.http.get(f"/v1/volumes/ready/kept/{place.rpartition('/')[2]}")) == "unknown_answer"


def test_the_prepared_volume_and_where_its_tokens_lie_are_there(served, uploaded):
    facts = served.http.get(f"/v1/volumes/{uploaded}").json()
    assert facts["tokens"]["shape_zyx"] == [5, 5, 5] and facts["tokens"]["spacing_zyx_mm"] == [72.8] * 3  # 91 x 4 mm
    corner = np.array(facts["prepared"]["origin_lps"]) - 2
    assert np.allclose(np.array(facts["tokens"]["origin_lps"]) - 36.4, corner)
    content = served.http.get(f"/v1/volumes/{uploaded}/grid?of=volume&format=nifti").content
    fine = nibabel.Nifti1Image.from_bytes(content)
    assert fine.shape == (91, 91, 91) and fine.header.get_zooms() == (4, 4, 4)
    assert np.allclose(fine.affine[:3, 3], np.array([-1, -1, 1]) * (corner + 2))
    assert served.http.get(f"/v1/volumes/{uploaded}/grid?of=full").status_code == 400


def test_volumes_of_a_prepared_folder_are_asked_about_and_not_deleted(served, out):
    assert "ready" in [one["id"] for one in served.http.get("/v1/volumes").json()["data"]]
    assert served.answer("ready")["usage"]["visual_tokens"] == TOKENS
    store = out / "volumes" / "ready.ome.zarr"
    expected = open_volume(store, "model").numpy()
    assert served.http.get("/v1/volumes/ready/grid").content == expected.astype("<i2").tobytes()
    image = nibabel.Nifti1Image.from_bytes(served.http.get("/v1/volumes/ready/grid?format=nifti").content)
    assert (np.asarray(image.dataobj).transpose(2, 1, 0) == expected).all()
    assert np.allclose(image.affine, open_volume(store, "model").geometry.affine_ras)
    shown = served.http.get("/v1/volumes/ready").json()
    assert shown["native"]["shape_zyx"] == [30, 40, 44] and shown["grid"]["shape_zyx"] == [70, 140, 140]
    assert served.http.delete("/v1/volumes/ready").status_code == 403 and store.exists()


def test_what_was_kept_of_a_store_of_the_model_grid_alone_is_drawn_as_that_of_a_whole_one(served, out):
    assert not (out / "volumes" / "lean.ome.zarr" / "0").exists()
    places = [served.answer(id)["photon"]["kept"][0] for id in ("ready", "lean")]
    for kind in ("nifti", "saliency"):
        found = [served.http.get(place, params={"format": kind}) for place in places]
        assert [one.status_code for one in found] == [200, 200], found[1].text
        whole, lean = (np.asarray(nifti(one.content).dataobj) for one in found)
        assert lean.shape == (44, 40, 30) and lean.any() and np.allclose(lean, whole, atol=1e-6)
    picture = served.http.get(places[1], params={"format": "png"})
    assert picture.status_code == 200 and picture.content[:4] == b"\x89PNG"


def test_a_deleted_upload_is_gone_with_its_prefix_its_answers_and_its_files(served, scan):
    id = served.uploaded(scan)
    place = served.answer(id)["photon"]["kept"][0]
    before = served.figures["prefixes"]
    assert served.http.delete(f"/v1/volumes/{id}").json()["deleted"]
    assert served.figures["prefixes"] == before - 1
    assert [served.http.get(p).status_code for p in (place, f"/v1/volumes/{id}", f"/v1/volumes/{id}/grid")] == [404] * 3
    assert served.ask(id).status_code == 404
    assert served.http.delete(f"/v1/volumes/{id}").status_code == 404


def itk(path):
    image = sitk.GetImageFromArray(ct_like((16, 24, 28)))
    image.SetSpacing((8.0, 7.1, 11.0))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, path)
    return sorted(path.parent.iterdir())


def series(folder, seed=0):
    write_series(folder, ct_like((16, 24, 28), seed), rescale=(1, 0))
    return sorted(folder.iterdir())


def zipped(files, flat=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("study/readme.txt", "nothing")
        for number, path in enumerate(files):
            archive.write(path, path.name if flat else f"study/../DOE^JOHN/{number}/IM")  # one name for all
    return ("scan.zip", buffer.getvalue())


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: [write_scan(folder / "a.nii", 2)],
        lambda folder: itk(folder / "a.nrrd"),
        lambda folder: itk(folder / "a.mha"),
        lambda folder: itk(folder / "a.mhd"),  # and its .raw
        lambda folder: series(folder / "s"),
        lambda folder: [zipped(series(folder / "s"))],
        lambda folder: [zipped([write_scan(folder / "a.nii.gz", 3)], flat=True)],
    ],
    ids=["nii", "nrrd", "mha", "mhd", "dicom", "dicom.zip", "nii.zip"],
)
def test_an_upload_is_prepared_to_the_bytes_of_photon_data(served, tmp_path, make):
    files = make(tmp_path / "raw")
    id = served.uploaded(*files)
    (source,) = find_scans(tmp_path / "raw").sources
    recipe, _ = named_recipe("chest_ct", [*COARSE, "model_shape_zyx=70,140,140"])
    record = prepare_file(Job(source, str(tmp_path / "out"), recipe))
    expected = open_volume(tmp_path / "out" / record.store, "model").numpy()
    assert served.http.get(f"/v1/volumes/{id}/grid").content == expected.tobytes()
    assert served.http.get(f"/v1/volumes/{id}").json()["native"] == record.facts["geometry"]
    served.http.delete(f"/v1/volumes/{id}")


def cut(folder):
    path = write_scan(folder / "Doe.nii.gz")
    path.write_bytes(path.read_bytes()[:-200])
    return path


def no_ct(folder):
    array = np.random.default_rng(0).integers(0, 255, (16, 24, 28)).astype(np.uint8)
    return write_scan(folder / "Doe.nii", array=array)


def placeholder(folder):
    folder.mkdir()
    (folder / "Doe.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid Doe\n")
    return folder / "Doe.nii.gz"


@pytest.mark.parametrize("make", [cut, no_ct, placeholder])
def test_what_prepare_refuses_is_refused_with_its_code_and_sentence(served, tmp_path, make):
    path = make(tmp_path / "raw")
    (source,) = find_scans(path).sources
    recipe, _ = named_recipe("chest_ct", COARSE)
    record = prepare_file(Job(source, str(tmp_path / "out"), recipe))
    before = served.http.get("/v1/volumes").json()["data"]
    found = served.upload(path)
    assert (found.status_code, code_of(found)) == (422, record.code)
    assert found.json()["error"]["message"] == record.reason
    assert served.http.get("/v1/volumes").json()["data"] == before


def test_of_several_series_one_is_named_by_the_key_that_the_refusal_lists(served, tmp_path):
    files = []
    for seed in range(2):
        names = [f"{seed}{z:02}.dcm" for z in range(16)]
        write_series(tmp_path / "raw", ct_like((16, 24, 28), seed), names=names, rescale=(1, 0))
    files = sorted((tmp_path / "raw").iterdir())
    found = served.upload(*files)
    assert (found.status_code, code_of(found)) == (422, "several-scans")
    sources = find_scans(tmp_path / "raw").sources
    keys = [source.path.rpartition("#")[2] for source in sources]
    assert all(f"{key} (16 files)" in found.json()["error"]["message"] for key in keys)
    ids = [served.upload(*files, series=key).json()["id"] for key in keys]
    grids = {served.http.get(f"/v1/volumes/{id}/grid").content for id in ids}
    assert len(grids) == 2
    assert code_of(served.upload(("a.txt", b"text"), ("b.txt", b"text"))) == "no-scan"
    for id in ids:
        served.http.delete(f"/v1/volumes/{id}")


def test_a_stream_tells_where_to_see_what_was_kept(served, uploaded):
    found = served.ask(uploaded, stream=True)
    assert found.headers["content-type"].startswith("text/event-stream")
    last = events_of(found.text)[-1]
    assert served.http.get(last["photon"]["kept"][0]).json()["answer"] == last["id"]


def test_figures_are_prometheus_text(served, uploaded):
    served.answer(uploaded)
    text = served.http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["photon_answered_total"]) >= 1 and float(values["photon_prefix_hits_total"]) >= 1
    assert float(values['photon_uploads_total{outcome="prepared"}']) >= 1
    assert served.http.get(f"/v1/volumes/{uploaded}").status_code == 200
    assert served.http.get(f"/nowhere/{uploaded}").status_code == 404
    text = served.http.get("/metrics").text
    assert 'route="/v1/volumes/{id}"' in text and 'route="other",status="404"' in text and uploaded not in text
    assert [served.http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]

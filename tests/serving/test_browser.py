"""The page in a real browser: what a person does with it, and what strangers' names and answers do to it."""

import io
import json
import os
import subprocess
import sys
import threading

import numpy as np
import PIL.Image
import pytest
from askable import store
from browser import Tab, chromium
from dicom_files import write_series
from live import live, wait_until
from raw import write_scan
from scans import ct_like

from photon_data.files import Location
from photon_data.records import PREPARED, VolumeRecord, store_name, write_records
from photon_data.store import open_volume
from photon_pipelines.serving.app import FOLDER
from photon_train.kept_tokens import token_centres
from photon_train.serving.question import Draft, Question

pytestmark = pytest.mark.slow
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>'\"`$(touch x)"
EVIL_ID = "<img src=x onerror=alert(3)>"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def served(model_dir, tmp_path_factory):
    """A server with two prepared volumes, one of which has markup as its id, and short answers."""
    out = tmp_path_factory.mktemp("prepared")
    for seed, name in enumerate(("v0", EVIL_ID)):
        store(out, name, seed)
    write_records(
        Location(str(out)), [VolumeRecord(n, n, PREPARED, 0, 0, store=store_name(n)) for n in ("v0", EVIL_ID)]
    )
    with pytest.MonkeyPatch.context() as patch, live(model_dir, data=str(out)) as server:
        patch.setattr(Question, "max_tokens", NEW_TOKENS)
        yield server


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture
def context(browser):
    one = browser.new_context(viewport={"width": 1400, "height": 900})
    one.grant_permissions(["clipboard-read", "clipboard-write"])
    yield one
    one.close()


@pytest.fixture
def tab(context, served):
    one = Tab(context, served.base, has_3d=False)
    yield one
    one.problems = [text for text in one.problems if "status of 4" not in text]  # a refusal, in the browser's words
    assert not one.problems


def test_a_scan_is_sent_asked_about_and_its_answer_can_be_asked_again_elsewhere(tab, served, tmp_path):
    scan = write_scan(tmp_path / "Doe scan.nii.gz", 1, (30, 40, 44), (9.0, 7.0, 6.5))
    tab.open().page.set_input_files("#files", scan)
    tab.page.wait_for_url("**/?volume=vol_*")
    id = tab.page.input_value("#volume")
    tab.see("#viewer.has-scan")
    question = 'Where\'s the nodule, "if any"? $(touch x)'
    text = tab.ask(question)
    reply = served.answer(id, question, max_tokens=NEW_TOKENS)
    assert text == reply["choices"][0]["message"]["content"]
    facts = tab.see(".answer dl")
    assert f"{reply['usage']['kept_tokens']} of 125" in facts and "computed for this question" in facts
    tab.ask("And where?")
    assert "cache hit" in tab.see(".answer dl")
    for summary in tab.page.locator(".answer summary").all():
        summary.click()
    for name, command in (("Copy curl", ["bash", "-c"]), ("Copy Python", [sys.executable, "-c"])):
        tab.page.locator(".answer").nth(1).get_by_text(name).click()
        copied = tab.page.evaluate("navigator.clipboard.readText()")
        run = subprocess.run([*command, copied], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert text in (json.loads(run.stdout)["choices"][0]["message"]["content"] if "curl" in name else run.stdout)
    assert not (tmp_path / "x").exists()
    with tab.page.expect_download() as download:
        tab.page.get_by_text("kept.nii.gz", exact=True).first.click()
    assert download.value.path().read_bytes()[:2] == b"\x1f\x8b"


def test_the_overlay_is_on_the_voxels_of_the_tokens_that_were_kept(tab, served):
    """Every token of v0 has a grey of its own, so a pixel says which token is drawn there."""
    tab.open_volume("v0").ask("Is there a nodule?")
    kept = served.http.get(served.answer("v0", max_tokens=NEW_TOKENS)["photon"]["kept"][0]).json()
    keep_V, saliency_V = np.array(kept["kept"], bool), np.array(kept["saliency"])
    volume = open_volume(served.server.volumes.find("v0").place, "model")
    facts = served.http.get("/v1/volumes/v0").json()["tokens"]
    centres = token_centres(type(volume.geometry).from_json(facts))
    low = volume.geometry.corners_lps().min(0)
    shares = (centres - low) / (volume.geometry.corners_lps().max(0) - low)
    voxels = volume.numpy()
    grey_V = np.array([voxels[tuple(np.floor(volume.geometry.index(at) + 0.5).astype(int))] for at in centres])
    expected_V = (grey_V + 1000) / 2000 * 255
    tab.page.fill("#width", "2000")
    tab.page.fill("#level", "0")
    tab.page.press("#level", "Enter")
    tab.page.click("text=Rest dimmed")

    def pixels(token):
        x, y, z = shares[token]
        tab.go_to(centres[token])
        return [tab.pixel("axial", x, y), tab.pixel("coronal", x, 1 - z), tab.pixel("sagittal", y, 1 - z)]

    bright = [token for token in np.argsort(-saliency_V) if expected_V[token] > 60]
    shown, others = [t for t in bright if keep_V[t]][:6], [t for t in bright if not keep_V[t]][:6]
    assert shown and others
    for token in shown:
        assert pixels(token) == pytest.approx([expected_V[token]] * 3, abs=3)
        assert (
            f"{grey_V[token]} HU" in (words := tab.see("#here")) and f"shown, saliency {saliency_V[token]:.3f}" in words
        )
    for token in others:
        assert pixels(token) == pytest.approx([0.28 * expected_V[token]] * 3, abs=8)
        assert "not shown" in tab.see("#here")
    tab.page.fill("#most", "1")  # of the most salient token alone
    best = int(np.argmax(np.where(keep_V, saliency_V, -1)))
    pixels(best)
    assert "HU   shown" in tab.see("#here")
    rest = next(token for token in shown if token != best)
    assert pixels(rest) == pytest.approx([0.28 * expected_V[rest]] * 3, abs=8)
    tab.page.click("text=Hidden")
    assert pixels(rest) == pytest.approx([expected_V[rest]] * 3, abs=3)


def test_two_answers_are_compared_by_the_regions_that_both_kept(tab, served):
    tab.open_volume("v0")
    sets = []
    for question in ("Any fluid? Say yes or no.", "Is there a nodule?"):
        tab.ask(question)
        path = tab.page.locator(".answer a").first.get_attribute("href").partition("?")[0]
        sets.append({n for n, is_kept in enumerate(served.http.get(path).json()["kept"]) if is_kept})
    tab.page.locator(".answer .beside").nth(1).click()
    tab.see("#legend", f"{len(sets[1])} regions for")
    assert f"{len(sets[0] & sets[1])} of them for both" in tab.see("#legend")
    tab.page.locator(".answer .show").nth(0).click()  # off again: the other is left
    tab.see("#legend", f"{len(sets[0])} regions were kept")


def test_what_is_refused_is_said_in_the_words_of_the_api_and_a_series_can_be_named(tab, served, tmp_path):
    (tmp_path / "Doe.nii.gz").write_bytes(b"\x1f\x8bno")
    tab.open_volume("v0").page.set_input_files("#files", tmp_path / "Doe.nii.gz")
    said = served.upload(tmp_path / "Doe.nii.gz").json()["error"]["message"]
    assert tab.see("#problem[role=alert] p") == said and "Doe" not in said
    for seed in range(2):
        names = [f"{seed}{z:02}.dcm" for z in range(16)]
        write_series(tmp_path / "two", ct_like((16, 24, 28), seed), names=names, rescale=(1, 0))
    tab.page.set_input_files("#folder", tmp_path / "two")
    tab.see("#series")
    key = tab.see("#problem p", "(16 files)").split(" (16 files)")[0].split()[-1]
    tab.page.fill("#series input", key)
    tab.page.click("#series button")
    tab.page.wait_for_url("**/?volume=vol_*")
    tab.see("#viewer.has-scan")
    assert tab.page.locator("#problem").is_hidden()
    assert tab.ask("Is there a nodule?")


def test_a_reload_keeps_the_scan_and_its_answers_and_a_second_tab_has_its_own(tab, context, served, tmp_path):
    id = served.uploaded(write_scan(tmp_path / "a.nii.gz", 4))
    text = tab.open_volume(id).ask("Is there a nodule?")
    tab.page.reload()
    tab.see("#viewer.has-scan")
    assert tab.page.input_value("#volume") == id and tab.see(".answer .text") == text.strip()
    tab.page.locator(".answer").click(position={"x": 40, "y": 10})
    tab.see("#legend", "regions were kept")
    second = Tab(context, served.base, has_3d=False).open()
    second.see("#viewer.has-scan")
    second.page.select_option("#volume", id)
    second.page.wait_for_url(f"**/?volume={id}")
    assert second.page.locator(".answer").count() == 0
    assert second.ask("Is there a nodule?") == text
    served.http.delete(f"/v1/volumes/{id}")
    second.ask("Is there a nodule?")
    assert "/v1/volumes lists them" in second.see(".answer .failed")


def test_the_scan_in_full_detail_is_the_one_that_was_chosen_last_though_another_is_still_shown(tab, served):
    tab.open_volume("v0")
    slow = []
    tab.page.route("**/grid*", lambda route: slow.append(route), times=1)
    tab.page.select_option("#volume", EVIL_ID)
    while not slow:
        tab.page.wait_for_timeout(20)
    tab.page.check("#fine")
    tab.see("#viewer.has-scan")
    assert tab.page.evaluate("new URLSearchParams(location.search).get('volume')") == EVIL_ID
    assert tab.page.input_value("#volume") == EVIL_ID


def test_names_questions_and_answers_that_are_markup_are_shown_as_they_are(tab, served, tmp_path, monkeypatch):
    monkeypatch.setattr(Draft, "_decoded", lambda self, tokens: EVIL)
    (tmp_path / "<img src=x onerror=alert(4)>.nii").write_bytes(b"")
    scan = write_scan(tmp_path / "<b onclick=alert(5)>.nii.gz", 5)
    tab.open().page.select_option("#volume", EVIL_ID)
    tab.see("#viewer.has-scan")
    assert tab.ask(EVIL) == EVIL
    assert tab.see(".answer h2") == EVIL and EVIL in tab.page.locator("#legend").text_content()
    tab.page.set_input_files("#files", tmp_path / "<img src=x onerror=alert(4)>.nii")
    tab.see("#problem p")
    tab.page.set_input_files("#files", scan)
    tab.page.wait_for_url("**/?volume=vol_*")
    assert "<b onclick=alert(5)>.nii.gz" in tab.page.locator("#volume option:checked").text_content()
    tab.open(f"/?volume={EVIL_ID}<script>alert(6)")
    assert "/v1/volumes lists them" in tab.see("#problem p")
    tab.page.select_option("#volume", EVIL_ID)
    tab.see(".answer h2", EVIL)  # from the session's storage
    assert tab.page.locator("img, main script, b").count() == 0


def test_the_keyboard_does_what_the_mouse_does(tab):
    tab.open_volume("v0").page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.textContent") == "To the question"

    def where():
        return np.array([float(mm) for mm in tab.page.input_value("#place input").split(",")])

    tab.go_to((1.3, 1.3, 2.6))  # the centre of a voxel
    for plane, key, moved in (
        ("axial", "ArrowRight", (2.6, 0, 0)),
        ("axial", "ArrowDown", (0, 2.6, 0)),
        ("axial", "PageUp", (0, 0, 5.2)),
        ("coronal", "ArrowUp", (0, 0, 5.2)),
        ("sagittal", "ArrowLeft", (0, -2.6, 0)),
        ("sagittal", "PageDown", (-2.6, 0, 0)),
    ):
        tab.page.focus(f"[data-plane={plane}]")
        before = where()
        tab.page.keyboard.press(key)
        assert where() - before == pytest.approx(moved, abs=0.11), (plane, key)
    tab.page.keyboard.press("1")
    assert (
        tab.page.input_value("#width") == "1500" and tab.page.get_attribute("#windows button", "aria-pressed") == "true"
    )
    tab.page.keyboard.press("/")
    assert tab.page.evaluate("document.activeElement.id") == "question"
    unnamed = """[...document.querySelectorAll("button, input, select, textarea, canvas")].filter(one =>
        one.checkVisibility() && !one.textContent.trim() && !one.ariaLabel && !one.labels?.length)
        .map(one => one.outerHTML)"""
    assert tab.page.evaluate(unnamed) == []


def test_a_file_that_is_dropped_is_sent_and_an_answer_can_be_stopped(tab, served, tmp_path, monkeypatch):
    content = write_scan(tmp_path / "a.nii.gz", 6).read_bytes()
    drop = """bytes => { const dropped = new DataTransfer();
        dropped.items.add(new File([new Uint8Array(bytes)], "a.nii.gz"));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped })) }"""
    tab.open().see("#viewer.has-scan")
    tab.page.evaluate(drop, list(content))
    tab.page.locator("#news", has_text="The scan is ready.").wait_for(state="attached")
    monkeypatch.setattr(Question, "max_tokens", 4000)
    before = served.figures
    seen = threading.Event()
    held = served.engine.predictor.model.register_forward_pre_hook(lambda *_: seen.wait(120) and None)
    try:
        tab.page.fill("#question", "Is there a nodule?")
        tab.page.press("#question", "Enter")
        tab.page.click("#stop")
        assert tab.see(".answer .failed") == "stopped"
        wait_until(lambda: served.figures["left"] == before["left"] + 1)
    finally:
        held.remove()
        seen.set()
    wait_until(lambda: served.figures["waiting"] == 0)


@pytest.mark.parametrize("width", [1400, 700, 360])
def test_nothing_is_cut_off_in_a_narrow_window(tab, width):
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.open_volume("v0").ask("Is there a nodule?")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_3d_view_draws_the_scan_and_breaks_no_rule_of_the_page(context, served):
    if not (FOLDER / "niivue.js").exists():
        assert not os.environ.get("CI"), "expected the 3D viewer in CI, found none; make viewer"
        pytest.skip("the 3D viewer is not built; make viewer does it")
    tab = Tab(context, served.base, has_3d=True).open_volume("v0")
    tab.page.set_viewport_size({"width": 900, "height": 600})
    tab.see("#licences")

    def colours():
        picture = PIL.Image.open(io.BytesIO(tab.page.locator("#space").screenshot()))
        return len(picture.convert("RGB").resize((40, 40)).getcolors(1600))

    assert any(colours() > 100 or tab.page.wait_for_timeout(1000) for _ in range(30))
    assert tab.page.locator("#space .message").is_hidden() and not tab.problems

"""The report: one page, offline, where counts add up and nothing from a file is taken for markup."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from photon_data import report
from photon_data.recipe import Recipe
from photon_data.records import FAILED, PREPARED, REFUSED, UNCHANGED, VolumeRecord
from photon_data.report import fair_shares, render_report
from photon_data.report.page import Chart, Mark, ScatterPoint, binned, histogram, render, scatter_plot, without_folders
from photon_data.resample import margins_mm, model_grid, target_grid
from photon_data.volume import Geometry, Volume

RECIPE = Recipe()
NASTY = '<script>alert("1")</script>&'


def there(name: str, extent_mm: float = 300.0, **changes) -> VolumeRecord:
    """Return the record of a prepared volume of `extent_mm` from foot to head."""
    native = Geometry.axis_aligned((int(extent_mm), 400, 420), (1, 0.8, 0.8), (0, 0, 0))
    grid = target_grid(native, RECIPE)
    cut, pad = margins_mm(native, grid)
    hu = {"min": -1024.0, "max": 1500.0, "mean": -400.0, "p01": -1010.0, "p50": -300.0, "p99": 400.0, "non_finite": 0}
    facts = {"format": "nifti", "dtype": "int16", "slope": 1.0, "intercept": 0.0, "rescale": "header"}
    facts |= {"geometry": native.to_json(), "grid": grid.to_json(), "cut_mm": cut, "pad_mm": pad}
    facts |= {"hu_before": {**hu, "histogram": [1, 2] * 32}, "hu_after": hu}
    values = {"state": PREPARED, "bytes_in": 10, "mtime_ns": 1, "store_bytes": 5, "facts": facts, **changes}
    return VolumeRecord(name, f"{name}.nii.gz", **values)


def lost(name: str, code: str = "truncated", reason: str = "cut short", state: str = REFUSED) -> VolumeRecord:
    return VolumeRecord(name, f"{name}.nii.gz", state, 10, 1, code=code, reason=reason)


def open_volume(record: VolumeRecord) -> Volume:
    grid = model_grid(target_grid(Geometry.axis_aligned((9, 9, 9), (1, 1, 1), (0, 0, 0)), RECIPE), (14, 28, 28))
    return Volume(np.zeros(grid.shape_zyx, np.int16), grid)


def page_of(records: list[VolumeRecord], **options) -> str:
    options = {"recipe": RECIPE, "open_volume": open_volume, "title": "Report", "source": "scans", **options}
    return render_report(records, **options).decode()


class Reader(HTMLParser):
    """Collects tags with their attributes and the visible text; fails where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_counts_add_up():
    records = [
        there("a"),
        there("b"),
        there("c", state=UNCHANGED),
        lost("d"),
        lost("e", state=FAILED, code="MemoryError"),
    ]
    text = Reader(page_of(records)).text
    assert "5 inputs = 2 prepared + 1 unchanged + 1 refused + 1 failed. 50 bytes read, 15 bytes of stores." in text


def test_nothing_from_a_file_is_taken_for_markup():
    records = [there(NASTY), lost(NASTY + "2", code=NASTY, reason=NASTY)]
    page = page_of(records, title=NASTY, source=NASTY, tools={NASTY: NASTY})
    reader = Reader(page)
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(NASTY) > 5


def test_the_page_loads_nothing():
    page = page_of([there("a"), lost("b", reason="see https://example.org/x.js")], source="s3://bucket/scans")
    for tag, attributes in Reader(page).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert re.match(r"(data:image/|#)", attributes.get(name, "#"))
    assert not re.search(r"url\(|@import", page)


@pytest.mark.parametrize("records", [[], [lost("a"), lost("b")], [there("a", facts=None)], [there("a")]])
def test_there_is_a_page_whatever_became_of_the_inputs(records):
    text = Reader(page_of(records)).text
    assert f"{len(records)} inputs" in text and RECIPE.digest in text


def test_a_store_that_is_gone_costs_its_picture_only():
    def gone(record: VolumeRecord) -> Volume:
        raise FileNotFoundError(2, "No such file or directory", f"/home/someone/out/{record.id}.ome.zarr")

    text = Reader(page_of([there("a"), there("b")], open_volume=gone)).text
    assert text.count("No picture could be made") == 2 and "a.ome.zarr" in text and "someone" not in text


def test_pictures_are_images_with_words_and_no_more_than_asked_for():
    images = [
        attributes for tag, attributes in Reader(page_of([there(n) for n in "abc"], pictures=2)).tags if tag == "img"
    ]
    assert [image["alt"][-1] for image in images] == ["a", "b"]
    data = base64.b64decode(images[0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).width == int(images[0]["width"])


def test_volumes_that_lose_most_come_first():
    text = Reader(page_of([there("fits"), there("longest", 600), there("long", 500)], pictures=1)).text
    assert text.index("longest.nii.gz") < text.index("long.nii.gz") < text.index("fits.nii.gz")
    assert "I 118 · S 118" in text


def test_long_lists_say_how_much_is_left_out(monkeypatch):
    monkeypatch.setattr(report, "MOST_REFUSED_LINES", 5)
    monkeypatch.setattr(report, "MOST_VOLUME_LINES", 3)
    many = [lost(f"r{i}") for i in range(9)] + [lost("f", "hung", state=FAILED)] + [there(f"v{i}") for i in range(8)]
    text = Reader(page_of(many, pictures=1)).text
    assert "truncated: 9 refused" in text and "5 more with this code are not listed here" in text
    assert "hung: 1 failed" in text and "4 more volumes are not listed here" in text


@pytest.mark.parametrize(
    ("counts", "total", "shares"), [([1, 20, 30], 10, [1, 4, 5]), ([3, 2], 10, [3, 2]), ([], 5, []), ([9], 4, [4])]
)
def test_small_groups_are_listed_whole(counts, total, shares):
    assert fair_shares(counts, total) == shares


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot read '/home/me/My Scans/a.nii'", "cannot read 'a.nii'"),
        ("cannot read /home/me/scans/a.nii: truncated", "cannot read a.nii: truncated"),
        (r'no "C:\Users\me\a.nii"', 'no "a.nii"'),
        ("file:///home/me/a.nii is gone", "a.nii is gone"),
        ("part1/case/a.nii and s3://bucket/case/a.nii", "part1/case/a.nii and s3://bucket/case/a.nii"),
        ("10 mm/voxel, 3/4 and / or", "10 mm/voxel, 3/4 and / or"),
    ],
)
def test_absolute_paths_lose_their_folders(text, shown):
    assert without_folders(text) == shown


def test_the_source_is_shown_without_the_way_to_it():
    text = Reader(page_of([], source="/home/someone/raw scans")).text
    assert "from raw scans" in text and "someone" not in text
    assert "key" not in Reader(page_of([], source="s3://key:secret@bucket/scans")).text


def test_the_same_records_give_the_same_bytes():
    records = [there(name) for name in "abcd"]
    assert page_of(records) == page_of(records[::-1])


def test_a_file_name_that_is_no_text_and_one_that_turns_the_line_are_shown():
    page = page_of([lost("bad\udcff"), lost("turned\u202egpj")])
    assert "bad\\udcff" in page and "\u202e" not in page


@pytest.mark.parametrize("sign", ["\0", "\x08", "\x0b", "\x1f", "\x7f", "\x9f", "\u202a", "\u202e", "\u2066", "\u2069"])
def test_a_sign_that_controls_is_shown_as_no_sign_and_its_neighbours_stay(sign):
    page = page_of([lost(f"a{sign}b\xa0c\u2029d\u206ae")])
    assert "a\ufffdb\xa0c\u2029d\u206ae" in page and sign not in page


def test_duplicates_are_listed():
    text = Reader(page_of([there("a", fingerprint="x"), there("b", fingerprint="x"), there("c", fingerprint="y")])).text
    assert "Same content more than once" in text and "a, b" in text


def rendered(folder: Path, template: str, **values) -> str:
    (folder / "page.html.j2").write_text(template)
    return render(folder / "page.html.j2", values, {}).decode()


def test_texts_and_attributes_are_escaped(tmp_path):
    page = rendered(tmp_path, '<p title="{{ words }}">{{ words }}</p>', words='"><b>')
    assert page == '<p title="&#34;&gt;&lt;b&gt;">&#34;&gt;&lt;b&gt;</p>'


def test_a_value_that_the_template_lacks_is_an_error(tmp_path):
    with pytest.raises(UndefinedError, match="words"):
        rendered(tmp_path, "<p>{{ words }}</p>", word="")


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [0.7, 0.75, 5.0], [-650, -3, 70], list(np.linspace(0.3, 9, 50)), [1] * 99 + [9000]]
)
def test_every_value_is_in_a_bin(values):
    bins = binned(values)
    assert bins.counts.sum() == len(values) and 1 <= len(bins.counts) <= 26
    assert len(bins.edges) == len(bins.counts) + 1 and np.allclose(np.diff(bins.edges), bins.edges[1] - bins.edges[0])


def test_an_outlier_does_not_flatten_a_chart():
    bins = binned([1, 1.1, 1.2, 1.3] * 25 + [9000])
    assert bins.is_open and bins.edges[-1] < 10


def drawn_figure(folder: Path, chart: Chart) -> str:
    return rendered(folder, '{% from "macros.html.j2" import figure %}{{ figure(chart) }}', chart=chart)


def test_a_chart_reaches_to_its_mark_and_says_what_it_shows(tmp_path):
    drawn = drawn_figure(tmp_path, histogram([100, 120, 150], name="z", unit="mm", mark=Mark(364, "grid 364 mm")))
    assert binned([100, 120, 150], include=[364]).edges[-1] >= 364
    assert "grid 364 mm" in drawn and 'aria-label="Histogram, z: 100 to 150 mm, middle 120"' in drawn


def test_points_of_equal_shares_stand_side_by_side_and_the_highest_is_named_first(tmp_path):
    points = [
        ScatterPoint("low", 0.4, 20, 10, 30),
        ScatterPoint("<high>", 0.4, 80, None, None),
        ScatterPoint("all", 1.0, 50, 40, 60),
    ]
    drawn = drawn_figure(tmp_path, scatter_plot(points, name="score", words="against share kept", across="share kept"))
    places = [float(found) for found in re.findall(r'<circle cx="([\d.]+)"', drawn)]
    assert len(set(places)) == 3
    assert drawn.index("&lt;high&gt; 80.0") < drawn.index("all 50.0") < drawn.index("low 20.0")
    assert "low: 20.00 at 40.0%" in drawn


@pytest.mark.parametrize(
    ("count", "label"),
    [(1, "1"), (9_999, "9999"), (20_000, "20k"), (123_456, "123k"), (999_999, "999k"), (1_250_000, "1.2M")],
)
def test_a_large_count_has_room_beside_its_histogram_and_is_exact_in_the_bars_words(count, label):
    """The room is 29 px: five digits of 6 px were cut, and read as another number."""
    chart = histogram(np.zeros(count), name="x", unit="mm")
    (number,) = [shape for shape in chart.shapes if shape.tag == "text" and shape.attributes["text-anchor"] == "end"]
    assert number.words == label
    assert [shape.words.endswith(f": {count:,}") for shape in chart.shapes if shape.tag == "rect"] == [True]

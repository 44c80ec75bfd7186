"""Tables as spreadsheets, pandas and parquet write them: read right, or refused before a scan is read."""

import datetime
from decimal import Decimal

import pytest
from raw import write_scan

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.questions.question import read_questions
from photon_data.questions.table import number, read_table
from photon_data.recipe import Recipe
from photon_pipelines.plan import Callback, gather
from photon_pipelines.request import Request

HEAD, ROW = ("id", "volume", "question", "answer"), ("1", "a", "Is it 1,5; or 2?", 'Yes, "big"')
SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


def cells_of(tmp_path, text, name="q.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [tuple(row.values.values()) for row in read_table(path).rows]


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("first", ["", "sep={}", '"SEP={}"'])
def test_any_usual_delimiter_is_read_whatever_the_quoted_cells_hold(tmp_path, bom, end, delimiter, first):
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in ROW]
    lines = [first.format(delimiter)] if first else []
    lines += [delimiter.join(HEAD), delimiter.join(quoted), delimiter * 3, ""]
    assert cells_of(tmp_path, bom + end.join(lines)) == [ROW]


def test_the_delimiter_of_a_header_that_holds_two_is_the_one_that_all_rows_have(tmp_path):
    assert cells_of(tmp_path, "volume;Question, in full;n\na;Why?;1,5\n") == [("a", "Why?", "1,5")]
    assert cells_of(tmp_path, "volume,Size; in mm,n\na,3;4,1\n") == [("a", "3;4", "1")]
    assert cells_of(tmp_path, "volume;question\na;b, c\n", "q.tsv") == [("a", "b, c")]
    assert cells_of(tmp_path, "sep=;\nvolume,a;question\nx;y\n") == [("x", "y")]
    assert cells_of(tmp_path, "sep=^\nvolume^question\nx^y\n") == [("x", "y")]
    assert cells_of(tmp_path, "sep=,\nvolume;question\nx;y\n") == [("x", "y")]


def test_a_table_of_one_column_is_told_what_is_between_cells(tmp_path):
    (tmp_path / "q.csv").write_text("volume^question\na^Why?\n")
    with pytest.raises(UsageError, match=r"found one, 'volume\^question'; put ',' or ';' between .*, as sep=\^"):
        read_questions(tmp_path / "q.csv")


def test_lines_are_counted_as_an_editor_shows_them_below_a_separator_line(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text('sep=;\r\nvolume;question\r\na;"two\r\nlines"\r\nb;Why?;surplus\r\n')
    (problem,) = read_table(path).problems
    assert str(problem).startswith("line 5: expected 2 cells, found 3: 'b;Why?;surplus'")


@pytest.mark.parametrize(
    ("cell", "expected"),
    [("0,5", 0.5), ("-1024,0", -1024), (" 1.0 ", 1), ("1e-3", 0.001), (7, 7), ("0,976", 0.976), ("+12,25", 12.25)],
)
def test_a_number_may_have_a_decimal_comma(cell, expected):
    assert number(cell) == expected


@pytest.mark.parametrize("cell", ["1,024", "-1,024", "1.024,5", "1,2,3", "nan", "inf", "", None, True, "one", [1]])
def test_what_is_no_number_or_one_of_two_is_refused(cell):
    with pytest.raises(ValueError, match="expected a number, found"):
        number(cell)


def parquet_file(tmp_path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), tmp_path / "q.parquet")
    return tmp_path / "q.parquet"


def test_values_of_parquet_become_text_and_what_is_missing_is_missing(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    noon = datetime.datetime(2020, 1, 2, 12, 0, tzinfo=datetime.UTC)
    path = parquet_file(
        tmp_path,
        id=[b"one", "zw\u00f6lf".encode()],
        volume=[10004.0, 7.0],  # whole numbers of a column with gaps
        question=["How many?", "When?"],
        answer=[2.5, float("nan")],
        choices=[["1", "2.5"], None],
        study_date=[datetime.date(2020, 1, 2), None],
        time=pyarrow.array([noon, None], pyarrow.timestamp("ns", "UTC")),
        dose=[Decimal("1.50"), None],
        half=pyarrow.array([0.5, float("nan")], pyarrow.float16()),
        length=pyarrow.array([datetime.timedelta(days=1, seconds=90), None], pyarrow.duration("ns")),
        nested=[{"when": datetime.date(2020, 1, 2), "n": float("nan"), "raw": [b"x"]}, None],
    )
    first, second = read_questions(path)
    assert (first.id, first.volume, first.answer) == ("one", "10004", "2.5")
    assert (second.id, second.volume, second.answer) == ("zw\u00f6lf", "7", None)
    assert first.extra == {
        "choices": ["1", "2.5"],
        "study_date": "2020-01-02",
        "time": "2020-01-02T12:00:00+00:00",
        "dose": "1.50",
        "half": 0.5,
        "length": "1 day, 0:01:30",
        "nested": {"when": "2020-01-02", "n": None, "raw": ["x"]},
    }
    assert second.extra == dict.fromkeys(first.extra) | {"choices": []}


def test_what_json_cannot_hold_is_told_by_row_and_column(tmp_path):
    columns = {"volume": ["a", "b"], "question": ["Q?", "Q?"]}
    path = parquet_file(tmp_path, **columns, image=[None, b"\xff\xd8\xff"], size=[float("inf"), 1.0])
    with pytest.raises(UsageError) as caught:
        read_questions(path)
    message = str(caught.value)
    assert "2 problems" in message
    assert "row 2: column 'image': expected text, found 3 bytes that are no UTF-8; save it as text or" in message
    assert "row 1: column 'size': expected a finite number, found inf" in message


def test_nanoseconds_that_python_cannot_hold_are_read_or_refused_with_a_sentence(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    times = pyarrow.array([1], pyarrow.timestamp("ns"))
    path = parquet_file(tmp_path, volume=["a"], question=["Q?"], time=times)
    try:
        (question,) = read_questions(path)
    except UsageError as error:  # without pandas
        assert "expected a readable column 'time', found timestamp[ns]" in str(error)
    else:
        assert question.extra["time"] == "1970-01-01T00:00:00.000000001"


@pytest.fixture
def scans(tmp_path):
    for seed, name in enumerate(["a.nii.gz", "b.nii.gz"]):
        write_scan(tmp_path / "raw" / name, seed)
    return tmp_path / "raw"


def gathered(scans, callback=None, **options):
    return gather(Request(scans, Location(str(scans.parent / "out")), SMALL, **options), callback)


def test_a_rescale_table_of_a_spreadsheet_with_decimal_commas_is_followed(scans, tmp_path):
    table = tmp_path / "hu.csv"
    table.write_text("sep=;\nvolume;slope;intercept\na.nii.gz;0,5;-1024,0\nelsewhere;1;0\n", encoding="utf-8-sig")
    rescales = [job.rescale for job in gathered(scans, hu_source=str(table)).jobs]
    assert rescales[0] == (0.5, -1024.0, "table")
    assert rescales[1].slope != rescales[1].slope  # not in the table: refused on its own


def test_all_that_is_wrong_with_a_rescale_table_is_told_together(scans, tmp_path):
    table = tmp_path / "hu.csv"
    rows = ["a,1,0", "a.nii.gz,1,0", 'b,"1,024",0', "b,0,0", "b,nan,0", ",1,0", "b,1,0,5", "b,1,none"]
    table.write_text("\n".join(["volume,slope,intercept", *rows]))
    with pytest.raises(UsageError) as caught:
        gathered(scans, hu_source=str(table))
    message = str(caught.value)
    assert "7 problems" in message
    for part in (
        "line 3: expected one row per scan, found a second one for a",
        "line 4: expected a number, found '1,024' (1024 or 1.024?); write it with a point",
        "line 5: expected a slope, found '0'",
        "line 6: expected a number, found 'nan'",
        "line 7: expected the name of one scan, found '': empty",
        "line 8: expected 3 cells, found 4",
        "line 9: expected a number, found 'none'",
    ):
        assert part in message


def test_a_rescale_table_of_other_scans_or_columns_is_refused(scans, tmp_path):
    table = tmp_path / "hu.csv"
    table.write_text("volume,slope,intercept\nx,1,0\n")
    with pytest.raises(UsageError, match=r"expected rows for scans like 'a.nii.gz', found none of 1 \('x' first\)"):
        gathered(scans, hu_source=str(table))
    table.write_text("Volume,slope,intercept\na,1,0\n")
    with pytest.raises(UsageError, match="expected columns volume, slope, intercept, found Volume, slope, intercept"):
        gathered(scans, hu_source=str(table))


def test_questions_that_name_no_scan_are_told_before_scans_are_read(scans, tmp_path):
    table = tmp_path / "q.csv"
    table.write_text("volume;question\na;Is it?\nc.nii.gz;Is it?\n")
    note = gathered(scans, questions=table).notes[0]
    assert note.startswith("1 of 2 questions do not name one scan of this source: 'c.nii.gz': no such volume (a name")
    assert "'a.nii.gz'" in note or "'b.nii.gz'" in note


def test_rows_that_would_be_refused_after_hours_are_refused_before_scans_are_read(scans, tmp_path):
    table, started = tmp_path / "q.csv", []
    table.write_text("volume,question,answer,letter,mc_question\na,Side?,left,A,A <video> or B\n")
    callback = Callback()
    callback.on_plan = lambda *plan: started.append(plan)
    with pytest.raises(UsageError, match=r"question 1: id 'q\w+': expected one <video> in a user turn per video"):
        gathered(scans, callback, questions=table, prompt="letters")
    assert not started
    assert not (tmp_path / "out").exists()

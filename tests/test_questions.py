"""Tables of questions: every format says the same, and a broken table is told completely."""

import json
import random

import pytest

from photon_data.errors import UsageError
from photon_data.questions.question import Question, read_questions, with_made_ids

CSV = (
    "id,volume,question,answer,split,patient,task,kind,organ,choices,Note\n"
    'a,v1,"Où est la lésion, exactement?",Foie,train,p1,where,location,liver,liver|spleen,"1,5"\n'
    'b,v2,"Is it\nthere?",,test,p2,is,existence,,,\n'
)


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(path, columns=None):
    with pytest.raises(UsageError) as caught:
        read_questions(path, columns)
    return str(caught.value)


def jsonl(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_csv_is_read_with_quotes_line_breaks_and_byte_order_mark(tmp_path, bom, end):
    text = CSV.replace("Is it\nthere?", "Is it there?").replace("\n", end)
    first, second = read_questions(file(tmp_path, "q.csv", bom + text.encode()))
    assert first == Question(
        id="a",
        volume="v1",
        question="Où est la lésion, exactement?",
        answer="Foie",
        split="train",
        patient="p1",
        task="where",
        extra={"kind": "location", "organ": "liver", "choices": ["liver", "spleen"], "Note": "1,5"},
    )
    assert (second.id, second.answer, second.extra["choices"]) == ("b", None, [])


def test_csv_tsv_jsonl_and_json_with_the_same_rows_give_the_same_questions(tmp_path):
    rows = [
        {"id": "a", "volume": "v 1", "question": '5" or \u2028 less?', "answer": "3"},
        {"id": "b", "volume": "v2", "question": "两个?", "answer": "Yes, twice"},
    ]
    as_csv = 'id,volume,question,answer\na,v 1,"5"" or \u2028 less?",3\n\nb,v2,两个?,"Yes, twice"'
    as_tsv = 'id\tvolume\tquestion\tanswer\na\tv 1\t"5"" or \u2028 less?"\t3\nb\tv2\t两个?\tYes, twice\n'
    tables = {"q.csv": as_csv, "q.TSV": as_tsv, "q.jsonl": "\n" + jsonl(*rows), "q.json": json.dumps(rows)}
    for name, text in tables.items():
        got = [(q.id, q.volume, q.question, q.answer) for q in read_questions(file(tmp_path, name, text))]
        assert got == [tuple(row.values()) for row in rows], name


def test_texts_are_kept_as_they_are_and_names_lose_white_space(tmp_path):
    (q,) = read_questions(
        file(tmp_path, "q.csv", "id,volume,question,answer,split\n a , v ,  Why? , Because. , val \n")
    )
    assert (q.id, q.volume, q.split, q.question, q.answer) == ("a", "v", "val", "  Why? ", " Because. ")


def test_numbers_of_a_json_table_become_text_where_text_belongs_and_stay_numbers_elsewhere(tmp_path):
    row = {
        "id": 7,
        "volume": 12,
        "question": "How many?",
        "answer": 3.5,
        "patient": 4,
        "choices": [1, 3.5],
        "mm": 2,
        "tools": ["a"],
    }
    (q,) = read_questions(file(tmp_path, "q.jsonl", jsonl(row)))
    assert (q.id, q.volume, q.answer, q.patient) == ("7", "12", "3.5", "4")
    assert q.extra == {"choices": ["1", "3.5"], "mm": 2, "tools": ["a"]}


def test_columns_of_other_names_are_mapped_and_the_rest_is_kept(tmp_path):
    text = "VolumeName,volume,Question,Organ System\nx.nii.gz,12.5 ml,How large?,liver\n"
    columns = {"volume": "VolumeName", "question": "Question", "organ": "Organ System", "patient": "VolumeName"}
    (q,) = read_questions(file(tmp_path, "q.csv", text), columns)
    assert (q.volume, q.patient, q.question) == ("x.nii.gz", "x.nii.gz", "How large?")
    assert q.extra == {"organ": "liver", "volume": "12.5 ml"}


def test_a_missing_column_is_told_with_the_nearest_one(tmp_path):
    message = error_of(file(tmp_path, "q.csv", "VolumeName,Qestion\nx,Why?\n"))
    assert "expected column 'volume' for volume, found none; try volume=VolumeName" in message
    assert "try question=Qestion" in message
    message = error_of(file(tmp_path, "q.csv", CSV), {"answr": "answer", "task": "Tsk"})
    assert "found 'answr'; did you mean 'answer'?" in message
    assert "expected column 'Tsk' for task, found none; try task=task" in message


def test_a_column_that_would_be_two_things_is_refused(tmp_path):
    message = error_of(file(tmp_path, "q.csv", "volume,question,kind,Type\nv,q,1,2\n"), {"kind": "Type"})
    assert "'kind' is a column and 'Type' is mapped to it too" in message
    assert "'answer' more than once" in error_of(file(tmp_path, "q.csv", "volume,question,answer,answer\nv,q,1,2\n"))


def test_made_ids_do_not_depend_on_other_rows_or_on_order(tmp_path):
    lines = ["v1,Same?,Yes", "v1,Same?,No", "v1,Same?,No", "v2,Same?,Yes", "v1,Other?,Yes"]

    def ids(rows):
        questions = read_questions(file(tmp_path, "q.csv", "\n".join(["volume,question,answer", *rows])))
        return sorted((q.id, q.volume, q.question, q.answer) for q in questions)

    full = ids(lines)
    assert len({row[0] for row in full}) == 5
    for seed in range(5):
        assert ids(random.Random(seed).sample(lines, k=5)) == full
    assert set(ids(lines[:3])) < set(full)


def test_made_ids_are_these_for_ever():
    # printf '["v1", "Same?", 0]' | sha256sum
    (q,) = with_made_ids([Question("", "v1", "Same?")])
    assert q.id == "q903caeb530508f89"


def test_all_problems_are_told_together_with_lines_and_counts(tmp_path):
    text = "\n".join(
        [
            "id,volume,question,answer",
            "a,v1,Fine?,Yes",
            "a,v2,Fine?,Yes",  # line 3: the id of line 2
            "c,,Fine?,Yes",
            "d,v4, ,Yes",
            "e,v5,Too,many,cells",
            'f,v6,"two\nlines",Yes',
            ",v7,Fine?,Yes",  # line 9: the one before takes two
            "h,v8,Look <video> here,Yes",
            "i,v9,Fine?,An <image>",
            "j,v9,Fine?,<|im_end|>",
        ]
    )
    message = error_of(file(tmp_path, "q.csv", text)).splitlines()
    head = "8 problems (3 x tag in a text, 1 x duplicate id, 1 x empty volume, 1 x empty question, 1 x ragged row, "
    head += "1 x empty id)"
    assert message[0].endswith(head)
    assert [line.split(":")[0].strip() for line in message[1:]] == [f"line {n}" for n in (3, 4, 5, 6, 9, 10, 11, 12)]
    assert "'a' again, first used at line 2" in message[1]
    assert "expected 4 cells, found 5" in message[4]
    assert "id 'h': expected text without tags, found a literal <video>" in message[6]


def test_only_the_first_ten_problems_are_shown(tmp_path):
    message = error_of(
        file(tmp_path, "q.csv", "id,volume,question\n" + "".join(f"{n},,why\n" for n in range(25)))
    ).splitlines()
    assert message[0].endswith("25 problems (25 x empty volume)")
    assert len(message) == 12 and message[-1] == "  and 15 more"


def test_a_truncated_table_is_refused(tmp_path):
    cut_in_quotes = CSV[: CSV.index("there?")]
    assert "line 3: expected closed quotes, found: unexpected end of data" in error_of(
        file(tmp_path, "q.csv", cut_in_quotes)
    )
    cut_in_row = "id,volume,question\na,v,Why?\nb,v"
    assert "line 3: expected 3 cells, found 2: 'b,v'" in error_of(file(tmp_path, "q.csv", cut_in_row))
    cut_json = jsonl({"volume": "v", "question": "Why?"}) * 2
    assert 'line 2: expected one JSON object, found \'{"volume"' in error_of(file(tmp_path, "q.jsonl", cut_json[:-5]))
    assert "expected one JSON list" in error_of(file(tmp_path, "q.json", '[{"volume": "v", "question"'))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ('{"volume": "v", "question": "q", "answer": true}', "answer: expected text or a number, found true"),
        ('{"volume": "v", "question": ["q"]}', "question: expected text or a number"),
        ('{"volume": "v", "question": "q", "answer": NaN}', "NaN is not JSON"),
        ('{"volume": "v", "question": "q", "answer": 1e999}', "1e999 is not JSON"),
        ('{"volume": "v", "question": "\\ud800"}', "surrogates not allowed"),
        ('{"volume": "v", "question": null}', "expected a question, found none"),
        ('{"volume": "v", "question": "q", "choices": ["one"]}', "expected two or more texts, found ['one']"),
        ('{"volume": "v", "question": "q", "choices": "[1, 2"}', "choices: "),
        ('{"volume": "v", "question": "q", "choices": ["<video>", "b"]}', "a literal <video>"),
        ("[1]", "expected one JSON object, found a list"),
    ],
)
def test_a_json_row_of_the_wrong_kind_is_refused_with_its_line(tmp_path, row, part):
    message = error_of(file(tmp_path, "q.jsonl", '{"volume": "v", "question": "q"}\n' + row + "\n"))
    assert "1 problem (" in message and "line 2: " in message and part in message


@pytest.mark.parametrize(
    ("written", "choices"),
    [
        ("left|right", ["left", "right"]),
        ('["left", "it\'s right"]', ["left", "it's right"]),
        ("['left', \"it's right\", 'a|b']", ["left", "it's right", "a|b"]),
        ("('left', 2, 3.5)", ["left", "2", "3.5"]),
        ("(left) | (right)", ["(left)", "(right)"]),
        (" [] ", []),
    ],
)
def test_choices_are_read_as_people_and_pandas_write_them(tmp_path, written, choices):
    (q,) = read_questions(file(tmp_path, "q.jsonl", jsonl({"volume": "v", "question": "Side?", "choices": written})))
    assert q.extra["choices"] == choices


@pytest.mark.parametrize(
    "written",
    [
        "['left' 'right']",  # numpy's way: Python reads it as one text
        "['left' 'middle', 'right']",
        "['left', nan]",
        "['left', None]",
        "[b'left', b'right']",
        "[left, right]",
        "{'A': 'left', 'B': 'right'}",
        '{"A": "left", "B": "right"}',
        "__import__('os').abort()",
        "['left', __import__('os').abort()]",
        "[" * 5000,
        {"A": "left", "B": "right"},
        7,
        True,
    ],
)
def test_choices_that_are_no_list_are_shown_with_how_to_write_them(tmp_path, written):
    message = error_of(file(tmp_path, "q.jsonl", jsonl({"volume": "v", "question": "Side?", "choices": written})))
    assert "line 1: choices: expected two or more texts, found " + str(written)[:60] in message
    assert 'write them as A|B|C or as a JSON list, ["A", "B"]' in message


def test_a_patient_whose_name_is_composed_here_and_decomposed_there_is_one(tmp_path):
    text = "volume,question,patient\nv1,Why?,J\u00f6rg\nv2,Why?,Jo\u0308rg\n"
    first, second = read_questions(file(tmp_path, "q.csv", text))
    assert first.patient == second.patient == "J\u00f6rg"


def test_a_file_that_is_no_table_is_refused_with_a_remedy(tmp_path):
    assert "expected .csv, .tsv, .jsonl, .json, found '.xlsx'" in error_of(file(tmp_path, "q.xlsx", "x"))
    assert "No such file" in error_of(tmp_path / "none.csv")
    assert "expected UTF-8, found byte 0xe9 on line 2" in error_of(
        file(tmp_path, "q.csv", "volume,question\nv,l\xe9sion\n".encode("latin-1"))
    )
    for empty in ("", "volume,question\n"):
        assert "expected rows, found none" in error_of(file(tmp_path, "q.csv", empty))

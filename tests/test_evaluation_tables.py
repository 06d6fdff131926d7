"""Tables and data rows."""

import json

import pytest

from fgattn_jax.evaluation import tables

HEADER, LINES = ["name", "ms"], [["short", 1.23456], ["a longer one", None]]


def test_text_columns_line_up():
    assert tables.format_text(HEADER, LINES).splitlines() == [
        "name             ms",
        "------------  -----",
        "short         1.235",
        "a longer one      -",
    ]


def test_markdown_aligns_numbers_to_the_right():
    assert tables.format_markdown(HEADER, LINES).splitlines() == [
        "| name | ms |",
        "| --- | ---: |",
        "| short | 1.235 |",
        "| a longer one | - |",
    ]


def test_a_line_with_a_cell_too_many_is_refused():
    with pytest.raises(ValueError, match=r"expected 2 cells.*got 3"):
        tables.format_text(HEADER, [[1, 2, 3]])


def test_rows_come_back_as_written_one_per_line(tmp_path):
    path = tmp_path / "results" / "rows.json"
    rows = [{"section": "a", "x": 1.5, "y": None}, {"section": "b", "ok": True}]
    assert tables.read_rows(path) == []
    tables.write_rows(path, rows)
    assert tables.read_rows(path) == rows
    assert len(path.read_text().splitlines()) == 4
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_a_row_with_nan_is_not_written_and_the_old_file_stays(tmp_path):
    path = tmp_path / "rows.json"
    tables.write_rows(path, [{"x": 1}])
    with pytest.raises(ValueError, match="JSON"):
        tables.write_rows(path, [{"x": float("nan")}])
    assert tables.read_rows(path) == [{"x": 1}]


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[1, 2]"])
def test_another_file_is_no_data_rows(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json.*JSON list of objects|JSON list of objects.*rows\.json"):
        tables.read_rows(path)


def test_provenance_names_device_versions_and_command():
    source = tables.provenance("fgattn study")
    assert set(source) == {"device", "jax", "python", "commit", "date", "command"}
    assert source["command"] == "fgattn study"
    assert source["device"].endswith("CPU")
    json.dumps(dict(source))

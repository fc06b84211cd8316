from __future__ import annotations

from pathlib import Path

from fedlora.callbacks.records import CLIENTS, read_rows


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "clients.csv"
    whole = "1,0,,57,2,0.5,0.8,10,10,0.1\n"
    path.write_text(",".join(CLIENTS) + "\n" + whole + "1,1,,4")
    assert [row["id"] for row in read_rows(path)] == ["0"]


def test_a_missing_table_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "clients.csv") == []

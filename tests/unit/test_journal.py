from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path

import pytest

from mnemo.errors import ConfigError
from mnemo.recovery import journal
from mnemo.recovery.journal import Journal


class FixedClock:
    def monotonic(self) -> float:
        return 1.0

    def time(self) -> float:
        return 1700000000.25


def test_a_record_has_version_time_writer_and_fields(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.jsonl"
    Journal(path, clock=FixedClock()).write("failure", rank=1, signal="SIGKILL", where=tmp_path)
    assert journal.read(path) == [
        {
            "v": 1,
            "time": 1700000000.25,
            "pid": os.getpid(),
            "event": "failure",
            "rank": 1,
            "signal": "SIGKILL",
            "where": str(tmp_path),
        }
    ]
    assert path.stat().st_mode & 0o077 == 0


def test_the_head_cannot_be_forged(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    Journal(path, clock=FixedClock()).write("x", time=0, v=99, pid=-1)
    (record,) = journal.read(path)
    assert (record["v"], record["time"], record["pid"]) == (1, 1700000000.25, os.getpid())


def test_a_torn_last_line_is_skipped_silently_and_does_not_swallow_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    book = Journal(path)
    book.write("one")
    with path.open("ab") as file:
        file.write(b'{"v":1,"event":"to')
    assert [r["event"] for r in journal.read(path)] == ["one"]
    assert not caplog.records
    book.write("three")
    assert [r["event"] for r in journal.read(path)] == ["one", "three"]
    assert "line" in caplog.text
    assert "2" in caplog.text


@pytest.mark.parametrize("junk", [b"[]", b"3", b"{}", b'{"v":"1"}', b"\xff\xfe", b"null"])
def test_lines_that_are_no_records_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(junk + b"\n")
    Journal(path).write("after")
    assert [r["event"] for r in journal.read(path)] == ["after"]
    assert "lines that are not whole: 1" in caplog.text


def test_lines_of_a_newer_version_are_reported_and_unknown_fields_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    newer = [json.dumps({"v": 2, "event": "dream"})] * 7
    older = json.dumps({"v": 1, "event": "start", "later_field": {"a": 1}})
    path.write_text("\n".join([*newer, older]) + "\n")
    assert journal.read(path) == [{"v": 1, "event": "start", "later_field": {"a": 1}}]
    assert "newer mnemo" in caplog.text
    assert "1, 2, 3, 4, 5 and 2 more" in caplog.text


def test_an_unwritable_path_warns_once_and_goes_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    book = Journal(blocker / "run.jsonl")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            book.write("start")
    assert len(caplog.records) == 1
    assert "run.journal" in caplog.text


def test_a_full_disk_turns_the_journal_off(caplog: pytest.LogCaptureFixture) -> None:
    book = Journal("/dev/full")
    book.write("start")
    book.write("start")
    assert len(caplog.records) == 1


def test_a_record_that_json_cannot_hold_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.jsonl"
    book = Journal(path)
    loop: list[object] = []
    loop.append(loop)
    book.write("bad", field=loop)
    book.write("good", ratio=float("nan"))
    assert [(r["event"], r["ratio"]) for r in journal.read(path)] == [("good", None)]
    assert "'bad'" in caplog.text


def _write_many(path: Path, writer: int) -> None:
    book = Journal(path)
    for i in range(200):
        book.write("line", writer=writer, i=i, pad="x" * 700)


def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
        writer.close()
    records = journal.read(path)
    assert len(records) == 800
    for n in range(4):
        assert [r["i"] for r in records if r["writer"] == n] == list(range(200))


def test_a_missing_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        journal.read(tmp_path / "absent.jsonl")


def test_the_path_is_made_of_the_run_id() -> None:
    assert journal.journal_path(".mnemo", "gpt-7b_8412.1") == Path(".mnemo/gpt-7b_8412.1.jsonl")


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "a b", "x" * 129, "a\n"])
def test_a_run_id_that_is_no_file_name_is_refused(run_id: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.id"):
        journal.journal_path(".mnemo", run_id)

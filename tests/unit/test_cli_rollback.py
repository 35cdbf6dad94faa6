"""`mnemo rollback`: what goes and what stays, and what it refuses, where nothing lives."""

from __future__ import annotations

import pytest
from commands import mnemo

from mnemo.cli.rollback import FitPlan


def test_a_plan_says_what_goes_and_what_stays() -> None:
    plan = FitPlan(fit=0, in_memory=(12, 11), stored=(12, 8, 4), to=11)
    assert (plan.memory_goes, plan.storage_goes) == ([12], [12])
    assert plan.resumes_at == (11, "memory")


@pytest.mark.parametrize(
    ("memory", "stored", "to", "resumes"),
    [
        ((12, 11), (8, 4), 11, (11, "memory")),
        ((12, 11), (8, 4), 10, (8, "storage")),
        ((12,), (12,), 12, (12, "memory")),
        ((12, 4), (8,), 9, (8, "storage")),
        ((), (8, 4), 7, (4, "storage")),
        ((12, 11), (8, 4), 3, None),
        ((12, 11), (), 3, None),
    ],
)
def test_where_the_next_start_resumes(
    memory: tuple[int, ...], stored: tuple[int, ...], to: int, resumes: tuple[int, str] | None
) -> None:
    assert FitPlan(0, memory, stored, to).resumes_at == resumes


def test_a_run_that_is_nowhere(tmp_path) -> None:
    answer = mnemo("rollback", "gpt", "--to", 5, "--dir", tmp_path)
    assert answer.code == 1
    assert "no run gpt" in answer.err


def test_a_run_of_which_nothing_is_stored(tmp_path) -> None:
    answer = mnemo("rollback", "gpt", "--to", 5, "--persist-to", tmp_path)
    assert answer.code == 1
    assert "no snapshot in memory and no checkpoint" in answer.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "5", "--persist-to", "s3://user:secret@bucket/x"), "persist.to"),
        (("--to", "5", "--config", "absent.yaml"), "absent.yaml"),
        (("--to", "-1"), "--to"),
        (("--to", "five"), "--to"),
        ((), "--to"),
    ],
)
def test_wrong_words(words: tuple[str, ...], said: str) -> None:
    answer = mnemo("rollback", "gpt", *words)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "secret" not in answer.err


def test_storage_that_cannot_be_read(tmp_path) -> None:
    (tmp_path / "file").touch()
    answer = mnemo("rollback", "gpt", "--to", 5, "--persist-to", "nosuch://bucket/x")
    assert answer.code == 1
    assert "nosuch" in answer.err

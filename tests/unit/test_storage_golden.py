"""A checkpoint stored by the first version, which every later one must read.

The files were written once, with the key and content below, and are never written again: a change
of the format gets a new version and a directory of its own.
"""

from __future__ import annotations

from pathlib import Path

from mnemo.storage import Checkpoint, CheckpointStore, Part

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint-v1"
KEY = bytes(range(32))
CHECKPOINT = Checkpoint(
    step=1841,
    parts=(
        Part("rank-0.bin", 256, "f1f8a93f50849ac39408a4433b952d71"),
        Part("rank-1.bin", 0, "99aa06d3014798d86001c324468d497f"),
    ),
    created=1_700_000_000.25,
    meta={"clean": True, "epoch": 3, "loss": 0.125, "note": "é", "nothing": None},
)


def test_version_1_is_read() -> None:
    for key in (KEY, None):
        store = CheckpointStore(str(GOLDEN), run_id="golden-run", key=key)
        assert store.checkpoints() == [CHECKPOINT]
        buffer = bytearray(256)
        store.read_into(CHECKPOINT, "rank-0.bin", buffer)
        assert buffer == bytes(range(256))
        store.read_into(CHECKPOINT, "rank-1.bin", bytearray())


class GoldenClock:
    """The instant at which the golden files were written."""

    def monotonic(self) -> float:
        return 0.0

    def time(self) -> float:
        return CHECKPOINT.created


def test_the_writer_still_writes_version_1(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), run_id="golden-run", key=KEY, clock=GoldenClock())
    written = store.write(
        1841,
        {"rank-0.bin": lambda: [bytes(range(256))], "rank-1.bin": list},
        CHECKPOINT.meta,
    )
    assert written == CHECKPOINT
    files = {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for name in files:
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()

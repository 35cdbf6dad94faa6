"""The store on a real S3 server on the loopback: slow, dead, without bucket or credentials."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from s3fs import S3FileSystem
from storage_suite import (
    Place,
    StoreSuite,
    content,
    read,
    read_while_pruning,
    source,
    steps,
    write,
)

from mnemo.errors import StorageError, WriteCancelledError
from mnemo.storage import CheckpointStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self

BUCKET = "ckpt"
MULTIPART = 5 << 20
"""Smallest piece that S3 takes, so that a few MB already make a multipart upload."""


SERVER = """
import sys
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """An S3 server in a process of its own, ended by closing its input; it has one bucket."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()
        Place(f"s3://{BUCKET}", options(port)).names()  # starts the threads that s3fs never ends
        yield port


@pytest.fixture(autouse=True)
def _no_other_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")


@pytest.fixture(autouse=True)
def _connections_closed() -> Iterator[None]:
    yield
    for fs in list(S3FileSystem._cache.values()):
        if fs._s3 is not None:
            fs.close_session(fs.loop, fs._s3)
    S3FileSystem.clear_instance_cache()


def options(port: int, **more: Any) -> dict[str, Any]:
    return {
        "key": "test",
        "secret": "test",
        "endpoint_url": f"http://127.0.0.1:{port}",
        "client_kwargs": {"region_name": "us-east-1"},
        "config_kwargs": {"retries": {"max_attempts": 1}},
        "default_block_size": MULTIPART,
        **more,
    }


@pytest.fixture
def place(port: int) -> Place:
    return Place(f"s3://{BUCKET}/{uuid.uuid4().hex}", options(port))


class TestS3(StoreSuite):
    def test_a_reader_while_the_writer_prunes(self, place: Place) -> None:
        read_while_pruning(place, rounds=15)

    def test_a_multipart_upload(self, place: Place) -> None:
        store = place.open()
        checkpoint = write(store, 10, size=3 * MULTIPART + 5)
        assert read(store, checkpoint) == content(10, 3 * MULTIPART + 5)

    def test_cancelling_a_multipart_upload_discards_it(self, place: Place) -> None:
        cancel = threading.Event()

        def chunks() -> Iterator[bytes]:
            yield b"x" * (2 * MULTIPART)
            cancel.set()
            yield b"never stored"

        with pytest.raises(WriteCancelledError):
            place.open().write(20, {"rank-0.bin": chunks}, cancel=cancel)
        assert place.names() == []
        assert "Uploads" not in place.fs.call_s3("list_multipart_uploads", Bucket=BUCKET)


WRITER = """
import json, os, signal, sys
from mnemo.storage import CheckpointStore

url, options, size = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])

def chunks():
    yield b"x" * size
    os.kill(os.getpid(), signal.SIGKILL)

store = CheckpointStore(url, run_id="run-7", storage_options=options)
store.write(20, {"a.bin": lambda: [b"whole"], "b.bin": chunks})
"""


@pytest.mark.parametrize("size", [100, 2 * MULTIPART])
def test_a_writer_killed_in_mid_write(place: Place, size: int) -> None:
    store = place.open(keep=2)
    write(store, 10)
    arguments = [place.url, json.dumps(place.options), str(size)]
    killed = subprocess.run(
        [sys.executable, "-c", WRITER, *arguments], capture_output=True, text=True, timeout=180
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [name for name in place.names() if "20" in name] == [f"step-{20:012d}/a.bin"]
    assert steps(store) == [10]
    assert read(store, store.get(10)) == content(10)
    write(store, 30)
    assert steps(store) == [30, 10]
    assert not [name for name in place.names() if "20" in name], "leftovers were not removed"


def test_a_missing_bucket_is_not_made(place: Place) -> None:
    store = CheckpointStore("s3://absent/x", run_id="r", storage_options=place.options)
    assert store.checkpoints() == []
    with pytest.raises(StorageError, match=r"could not write absent/x/.*/trial.*create the bucket"):
        store.try_write()
    with pytest.raises(StorageError, match=r"could not write absent/x.*create the bucket"):
        write(store, 10)
    assert not place.fs.exists("absent")


def test_a_dead_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        store = CheckpointStore(
            "s3://b/x", run_id="r", storage_options=options(unused.getsockname()[1])
        )
        for call in (store.checkpoints, lambda: write(store, 10), lambda: store.get(10)):
            with pytest.raises(StorageError, match=r"check the address in persist\.to"):
                call()


def test_missing_credentials(port: int) -> None:
    store = CheckpointStore(
        "s3://b/x", run_id="r", storage_options=options(port, key=None, secret=None)
    )
    with pytest.raises(StorageError, match="give credentials"):
        write(store, 10)


class SlowLine:
    """A TCP relay to a server that lets so many bytes a second through, all connections together.

    ``cut`` drops every connection and refuses new ones.
    """

    def __init__(self, port: int, bytes_per_s: int) -> None:
        self._target, self._rate = port, bytes_per_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._tasks: set[asyncio.Task[None]] = set()
        self.sent = 0

    def __enter__(self) -> Self:
        self._thread.start()
        listen = asyncio.start_server(self._relay, "127.0.0.1", 0, limit=1 << 16)
        self._server = asyncio.run_coroutine_threadsafe(listen, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    async def _cut(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await asyncio.gather(self._pump(reader, up_writer, True), self._pump(up_reader, writer))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            up_writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, slow: bool = False
    ) -> None:
        while data := await reader.read(1 << 16):
            if slow:
                self.sent += len(data)
                await asyncio.sleep(len(data) / self._rate)
            writer.write(data)
            await writer.drain()
        writer.write_eof()


def test_a_slow_store_gets_everything(port: int, place: Place) -> None:
    size = 2 * MULTIPART
    with SlowLine(port, bytes_per_s=10_000_000) as line:
        store = CheckpointStore(place.url, run_id="run-7", storage_options=options(line.port))
        began = time.monotonic()
        write(store, 10, size=size)
        assert time.monotonic() - began > size / 10_000_000
        assert line.sent > size
    assert read(place.open(), place.open().get(10)) == content(10, size)


def test_a_slow_write_is_cancelled_within_a_piece(port: int, place: Place) -> None:
    write(place.open(), 10)
    cancel = threading.Event()
    with SlowLine(port, bytes_per_s=10_000_000) as line:
        store = CheckpointStore(place.url, run_id="run-7", storage_options=options(line.port))

        def chunks() -> Iterator[bytes]:
            while True:  # without the cancellation this would never end
                yield b"x" * MULTIPART
                if line.sent > MULTIPART:
                    cancel.set()

        with pytest.raises(WriteCancelledError):
            store.write(20, {"rank-0.bin": chunks}, cancel=cancel)
        assert line.sent < 4 * MULTIPART
    assert steps(place.open()) == [10]
    assert not [name for name in place.names() if "20" in name]


def test_a_store_lost_in_mid_write(port: int, place: Place) -> None:
    write(place.open(), 10)
    with SlowLine(port, bytes_per_s=100_000_000) as line:
        store = CheckpointStore(place.url, run_id="run-7", storage_options=options(line.port))

        def chunks() -> Iterator[bytes]:
            yield b"x" * (2 * MULTIPART)
            line.cut()
            yield b"x" * (2 * MULTIPART)

        with pytest.raises(StorageError, match="could not write"):
            store.write(20, {"rank-0.bin": chunks, "later": source(b"")})
    assert steps(place.open()) == [10]
    assert read(place.open(), place.open().get(10)) == content(10)

"""A Store in etcd, which survives every node: through its JSON gateway (v3, etcd 3.4 or newer)."""

from __future__ import annotations

import asyncio
import base64
import http.client
from collections import deque
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec

from mnemo.errors import StoreLostError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_KEYS: Final = 100
"""Read in one transaction, of which etcd takes 128 by default."""


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()


class EtcdStore:
    """A connection to etcd: to one of its members, and to the next one when that does not answer.

    Args:
        urls: Of the members' client ports, such as ``http://etcd:2379``.
        prefix: Of all keys.
        patience_s: Seconds that an answer may take.
    """

    def __init__(self, urls: Sequence[str], prefix: str, patience_s: float = 1.0) -> None:
        self._prefix = prefix
        self._members = deque((url, _connection(url, patience_s)) for url in urls)
        """First the one that is asked."""
        self._cluster = ""
        self._lock = asyncio.Lock()

    async def get(self, keys: tuple[str, ...]) -> tuple[bytes | None, ...]:
        """See `mnemo.membership.Store.get`."""
        found: list[bytes | None] = []
        for begin in range(0, len(keys), _MOST_KEYS):
            reads = [self._read(key) for key in keys[begin : begin + _MOST_KEYS]]
            answer = await self._ask("txn", {"success": reads})
            found.extend(_values(answer))
        return tuple(found)

    async def set(self, key: str, value: bytes) -> None:
        """See `mnemo.membership.Store.set`."""
        await self._ask("put", {"key": self._key(key), "value": _text(value)})

    async def compare_set(self, key: str, expected: bytes | None, value: bytes) -> bytes | None:
        """See `mnemo.membership.Store.compare_set`."""
        done, there = await self._exchange_if(key, expected, value)
        return value if done else there

    async def add(self, key: str) -> int:
        """See `mnemo.membership.Store.add`."""
        (there,) = await self.get((key,))
        while True:
            number = int(there or 0) + 1
            done, there = await self._exchange_if(key, there, str(number).encode())
            if done:
                return number

    async def _exchange_if(
        self, key: str, expected: bytes | None, value: bytes
    ) -> tuple[bool, bytes | None]:
        """Set ``key`` if it is ``expected``; whether it was, and what stands there if not."""
        name = self._key(key)
        if expected is None:
            compare = {"target": "CREATE", "result": "EQUAL", "key": name, "create_revision": "0"}
        else:
            compare = {"target": "VALUE", "result": "EQUAL", "key": name, "value": _text(expected)}
        put = {"request_put": {"key": name, "value": _text(value)}}
        wanted = {"compare": [compare], "success": [put], "failure": [self._read(key)]}
        answer = await self._ask("txn", wanted)
        done = bool(answer.get("succeeded"))
        return done, None if done else _values(answer)[0]

    async def clear(self, key: str, expected: bytes) -> None:
        """Remove all keys of the prefix, if ``key`` is ``expected``, as one operation."""
        first = self._prefix.encode()
        everything = {"key": _text(first), "range_end": _text(first[:-1] + bytes([first[-1] + 1]))}
        compare = {
            "target": "VALUE",
            "result": "EQUAL",
            "key": self._key(key),
            "value": _text(expected),
        }
        remove = {"request_delete_range": everything}
        await self._ask("txn", {"compare": [compare], "success": [remove]})

    def close(self) -> None:
        """Hang up."""
        for _, connection in self._members:
            connection.close()

    def _key(self, key: str) -> str:
        return _text(f"{self._prefix}{key}".encode())

    def _read(self, key: str) -> dict[str, Any]:
        return {"request_range": {"key": self._key(key)}}

    async def _ask(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            return await asyncio.to_thread(self._exchange, what, msgspec.json.encode(request))

    def _exchange(self, what: str, request: bytes) -> dict[str, Any]:
        url, connection = self._members[0]
        try:
            connection.request("POST", f"/v3/kv/{what}", request)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status == http.client.OK:
                return self._of_one_cluster(msgspec.json.decode(content, type=dict[str, Any]))
            why = f"HTTP {answer.status}: {content[:200].decode(errors='replace')}"
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as error:
            why = str(error) or type(error).__name__
        connection.close()
        self._members.rotate(-1)
        raise StoreLostError(f"etcd at {url} gives no answer: {why}")

    def _of_one_cluster(self, answer: dict[str, Any]) -> dict[str, Any]:
        """An answer of any member of the cluster that the first came from.

        Raises:
            OSError: It is of another, where other nodes might meet.
        """
        cluster = str(answer.get("header", {}).get("cluster_id", ""))
        self._cluster = self._cluster or cluster
        if cluster != self._cluster:
            msg = f"it belongs to cluster {cluster}, and those before to {self._cluster}"
            raise OSError(msg)
        return answer


def _connection(url: str, patience_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port or 2379, timeout=patience_s)


def _values(answer: dict[str, Any]) -> list[bytes | None]:
    """What the reads of a transaction found."""
    found = [each["response_range"].get("kvs") for each in answer.get("responses", ())]
    return [base64.b64decode(kvs[0].get("value", "")) if kvs else None for kvs in found]


class EtcdStores:
    """etcd, for one agent.

    Args:
        run_id: Of the run; part of all keys.
        patience_s: Seconds that an answer may take.
    """

    def __init__(self, run_id: str, patience_s: float = 1.0) -> None:
        self._prefix = f"mnemo/{run_id}/"
        self._patience_s = patience_s
        self._stores: dict[str, EtcdStore] = {}

    async def store(self, place: str) -> EtcdStore:
        """See `mnemo.membership.Stores`; a place is URLs with commas between."""
        if place not in self._stores:
            urls = place.split(",")
            self._stores[place] = EtcdStore(urls, self._prefix, self._patience_s)
        return self._stores[place]

    async def warm_up(self) -> None:
        """Nothing is hosted here."""

    async def host(self, place: str) -> None:
        """See `mnemo.membership.Stores`: nobody hosts etcd."""
        raise StoreLostError(f"{place} is not hosted by a node")

    async def forget(self, place: str, joined: str, count: int) -> None:
        """See `mnemo.launcher.stores.AgentStores`."""
        await (await self.store(place)).clear(joined, str(count).encode())

    async def close(self) -> None:
        """Hang up."""
        for store in self._stores.values():
            store.close()

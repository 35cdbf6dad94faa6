"""Framed, authenticated sockets between mnemo's own processes.

Within a node:

`local`: datagram-framed unix sockets that also pass file descriptors (trainer ↔ SMP).
`auth`: the run's secret, and the proof of it that comes before anything else.

Between nodes (`docs/network.md`):

`address`: where this node listens. `endpoints`: `connect` and `Listener`. `peer`: `Peer`, one
connection with messages and payloads. `rate`: `RateLimit`, which senders share. `reach`: the check
at the start. Below them `frames` and `handshake`, which read and write nothing, and `wire`.
"""

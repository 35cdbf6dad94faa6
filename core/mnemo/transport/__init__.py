"""Framed, authenticated sockets between mnemo's own processes.

`local`: datagram-framed unix sockets that also pass file descriptors (trainer ↔ SMP).
`auth`: mutual proof of the run's secret, done before anything else is said.
"""

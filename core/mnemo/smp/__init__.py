"""Snapshot management process (SMP): one per node, without torch, outlives the trainer.

It owns the memory that snapshots lie in, decides when a generation is committed, and hands the
newest one to whoever resumes. `client` is the trainer's side, `lifecycle` starts and finds it.
"""

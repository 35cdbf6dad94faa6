"""Capture, copy and restore of training state (REFT).

`tree` tells tensors from the small rest, `layout` gives every tensor a place, `copier` moves the
bytes and checksums them, `engine` does that in the background while the next step runs, `restore`
puts a generation together again, `frequency` chooses how often.
"""

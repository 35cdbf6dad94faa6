"""What the project claims about speed and memory, measured: ``python -m benchmarks NAME``.

A benchmark is a module here with ``run(quick, report)`` and a docstring, whose first line is
shown by ``--list``. Other modules are helpers.
"""

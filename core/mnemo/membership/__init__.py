"""Which nodes belong to a run: membership epochs, agreed on through a Store.

`Driver` takes part for one agent, `Machine` is what it decides by. ``docs/membership.md`` says
what is promised, and why it holds.
"""

from __future__ import annotations

from mnemo.membership.driver import Driver, Stores, Workers
from mnemo.membership.machine import Machine
from mnemo.membership.records import Epoch, Member, Seal
from mnemo.membership.rules import Rules
from mnemo.membership.store import Store

__all__ = ["Driver", "Epoch", "Machine", "Member", "Rules", "Seal", "Store", "Stores", "Workers"]

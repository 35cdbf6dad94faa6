"""``mnemo run``: starts the ranks of one node, notices their deaths and restarts them."""

from __future__ import annotations

from mnemo.launcher.agent import Agent
from mnemo.launcher.hooks import Hooks
from mnemo.launcher.options import LaunchOptions
from mnemo.launcher.restarts import Position

__all__ = ["Agent", "Hooks", "LaunchOptions", "Position"]

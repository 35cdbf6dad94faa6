"""What went wrong, what is done about it, and what is told of it."""

from mnemo.recovery.ladder import Inventory, Policy, RecoveryPlan, Rung, plan

__all__ = ["Inventory", "Policy", "RecoveryPlan", "Rung", "plan"]

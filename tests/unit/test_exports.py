"""The public surface is what is listed here, and every public thing says what it is.

A new public name is added to `PUBLIC` in the same change that makes it.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mnemo

if TYPE_CHECKING:
    from types import ModuleType

PUBLIC: dict[str, set[str]] = {
    "mnemo": {"Session", "__version__", "errors"},
    "mnemo.cli": {"app", "main"},
    "mnemo.clock": {"Clock", "SystemClock"},
    "mnemo.comm": {
        "Changes",
        "Group",
        "check",
        "give_up",
        "handover",
        "hold",
        "keep_nothing",
        "links",
        "mark",
        "mark_broken",
        "mode",
        "pass_update",
        "reconfigure",
        "unrecorded",
    },
    "mnemo.config": {
        "CONFIG_VARIABLE",
        "InProcess",
        "MnemoConfig",
        "Overrun",
        "PersistConfig",
        "RecoverConfig",
        "ResolvedConfig",
        "Resume",
        "RunConfig",
        "SnapshotConfig",
        "Then",
        "format_duration",
        "format_fraction",
        "format_size",
        "load_config",
        "overrides_to_environ",
        "parse_duration",
        "parse_fraction",
        "parse_size",
        "settings",
    },
    "mnemo.errors": {
        "AuthenticationError",
        "CodeError",
        "CommError",
        "ConfigError",
        "CrashLoopError",
        "EngineError",
        "ErasureError",
        "FaultNotFiredError",
        "FragmentError",
        "FrameError",
        "GroupBrokenError",
        "HostMemoryError",
        "IdentityError",
        "IntegrityError",
        "LaunchError",
        "MissingExtraError",
        "MnemoError",
        "ModelChangedError",
        "NothingToResumeError",
        "MembershipError",
        "MembershipRecordError",
        "PeerError",
        "PeerLostError",
        "PeerTimeoutError",
        "ProtectionError",
        "ProtocolError",
        "ReplayError",
        "RunInUseError",
        "SalvageError",
        "ShardsLostError",
        "SmpError",
        "SnapshotError",
        "StorageError",
        "StoreLostError",
        "TooFewFragmentsError",
        "WriteCancelledError",
    },
    "mnemo.erasure": {"Code", "CodeKind", "Codec", "codec"},
    "mnemo.faults": {
        "Declaration",
        "ENV",
        "Fault",
        "Fired",
        "Hook",
        "Kind",
        "PHASES",
        "arm",
        "identify",
        "random_faults",
        "random_instants",
        "reach",
    },
    "mnemo.launcher": {"Agent", "Hooks", "LaunchOptions", "Position"},
    "mnemo.membership": {
        "Driver",
        "Epoch",
        "Machine",
        "Member",
        "Rules",
        "Seal",
        "Store",
        "Stores",
        "Workers",
    },
    "mnemo.protect": {
        "Holdings",
        "Neighbours",
        "Piece",
        "Protector",
        "Shard",
        "Standing",
    },
    "mnemo.recovery": {"Inventory", "Policy", "RecoveryPlan", "Rung", "plan"},
    "mnemo.session": {"Keeper", "Place", "Restored", "Session"},
    "mnemo.storage": {
        "Checkpoint",
        "CheckpointStore",
        "JsonScalar",
        "Part",
        "stored_ids",
    },
    "mnemo.types": {"EXIT_OK", "EXIT_STATE_LOST", "EXIT_STATE_SAVED", "GenerationState"},
}


def _surface(module: ModuleType) -> set[str]:
    """Return ``__all__``, or what the module's own source defines without an underscore."""
    if hasattr(module, "__all__"):
        return set(module.__all__)
    names: set[str] = set()
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def _undocumented(name: str, thing: object) -> list[str]:
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return []
    missing = [] if thing.__doc__ and not thing.__doc__.startswith(f"{thing.__name__}(") else [name]
    if inspect.isclass(thing):
        for attribute, member in vars(thing).items():
            member = member.fget if isinstance(member, property) else member
            member = getattr(member, "__func__", member)  # class and static methods
            if inspect.isfunction(member) and not attribute.startswith("_"):
                documented = inspect.getdoc(getattr(thing, attribute))
                missing += [] if documented else [f"{name}.{attribute}"]
    return missing


@pytest.mark.parametrize("name", PUBLIC)
def test_surface_is_the_listed_one(name: str) -> None:
    assert _surface(importlib.import_module(name)) == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_thing_exists_and_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    things = {export: getattr(module, export) for export in PUBLIC[name]}
    assert module.__doc__
    assert [
        missing for export, thing in things.items() for missing in _undocumented(export, thing)
    ] == []


def test_every_package_that_exports_something_is_listed() -> None:
    exporting = {
        module.name
        for module in pkgutil.iter_modules(mnemo.__path__, "mnemo.")
        if _surface(importlib.import_module(module.name))
    }
    assert exporting <= PUBLIC.keys()


def test_errors_are_one_tree() -> None:
    from mnemo import errors

    classes = [getattr(errors, name) for name in PUBLIC["mnemo.errors"]]
    assert all(issubclass(error, errors.MnemoError) for error in classes)
    drawn = {
        line.split("── ")[1].split()[0] for line in errors.__doc__.splitlines() if "──" in line
    }
    assert drawn == PUBLIC["mnemo.errors"] - {"MnemoError"}


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mnemo' has no attribute 'Sesion'"):
        mnemo.Sesion  # noqa: B018

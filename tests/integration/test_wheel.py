"""The built wheel, installed and used outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("mnemo", "lightning_mnemo", "accelerate_mnemo")


def _run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _build(kind: str, source: Path, into: Path) -> Path:
    _run(sys.executable, "-m", "build", kind, "--no-isolation", "-o", into, source, cwd=into)
    (built,) = into.glob("*.whl" if kind == "--wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("--wheel", REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the ``bin`` of an environment with the wheel and, behind it, what it depends on."""
    home = tmp_path_factory.mktemp("outside") / "venv"
    venv.create(home, symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    into = ("--prefix", home, "--no-deps", "--no-index", "--ignore-installed", "--quiet")
    _run(sys.executable, "-m", "pip", "install", *into, wheel, cwd=home)
    # Appended to sys.path after the environment's own, without reading the editable
    # installation's .pth file, which would bring the repository back.
    Path(paths["purelib"], "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    bin_dir = home / "bin"
    # pip wrote the interpreter that it ran under into the scripts.
    script = (bin_dir / "mnemo").read_text().partition("\n")[2]
    (bin_dir / "mnemo").write_text(f"#!{bin_dir / 'python'}\n{script}")
    return bin_dir


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert not [name for name in names if name.endswith((".pyc", ".yaml~", ".orig"))]


def test_wheel_names_licence_and_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert {"lightning", "accelerate", "all"} <= {
        line.split(": ")[1] for line in text.splitlines() if line.startswith("Provides-Extra")
    }


def test_sdist_builds_the_same_wheel(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    sdist = _build("--sdist", REPOSITORY, tmp_path)
    _run("tar", "xzf", sdist, cwd=tmp_path)
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    (tmp_path / "again").mkdir()
    again = _build("--wheel", unpacked, tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert {i.filename: i.CRC for i in one.infolist()} == {
            i.filename: i.CRC for i in two.infolist()
        }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_come_from_the_wheel(bin_dir: Path, package: str, tmp_path: Path) -> None:
    printed = _run(
        bin_dir / "python", "-c", f"import {package}; print({package}.__file__)", cwd=tmp_path
    )
    assert Path(printed.strip()).is_relative_to(bin_dir.parent)


def test_command_runs(bin_dir: Path, tmp_path: Path) -> None:
    printed = _run(bin_dir / "mnemo", "--help", cwd=tmp_path)
    assert "run" in printed
    assert "config" in printed

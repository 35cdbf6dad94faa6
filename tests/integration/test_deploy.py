"""The files of examples/deploy do what they are there for.

Slurm is its environment variables and four commands that do here what they do there, on nodes
that are directories of one machine. Kubernetes is its schema, and the commands of the manifest.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import kubernetes_validate
import msgspec
import psutil
import pytest
import yaml
from launching import MNEMO
from nodes_lab import SCRIPTS, until
from ports import held_port

from mnemo.config import parse_duration
from mnemo.errors import SmpError
from mnemo.smp import lifecycle
from mnemo.smp.client import SmpClient
from mnemo.smp.paths import RunPaths, SmpRecord
from mnemo.types import EXIT_STATE_SAVED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DEPLOY: Final = Path(__file__).parents[2] / "examples" / "deploy"
SBATCH: Final = DEPLOY / "slurm.sbatch"
PATIENCE_S: Final = 180.0
STEPS: Final = 200

SRUN: Final = """
# A step: its tasks, one a node; their greatest exit code. What they leave behind is killed.
overlaps=
while [[ $1 == --* ]]; do
    [[ $1 == --overlap ]] && overlaps=yes
    shift
done
step=0
until mkdir "$SLURM_STUB/step-$step" 2>/dev/null; do step=$((step + 1)); done
echo $$ >"$SLURM_STUB/srun-$step"
export SLURM_STEP_ID=$step
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    if [[ -z $overlaps ]] && ((node)); then  # all have one address: the first has to have its port
        until : 2>/dev/null >"/dev/tcp/${SLURM_STUB_HOST/://}"; do sleep 0.05; done
    fi
    SLURM_NODEID=$node SLURM_PROCID=$node SLURMD_NODENAME=node-$node \
        MNEMO_RUN__DIR=$MNEMO_RUN__DIR/node-$node SLURM_STUB_STEP=$SLURM_STUB/$step \
        setsid "$@" &
    tasks+=($!)
    echo $! >"$SLURM_STUB/step-$step/$node"
done
trap 'kill -KILL "${tasks[@]}"' TERM  # "forcing job termination", says the real one
code=0
for task in "${tasks[@]}"; do
    wait "$task"
    ended=$?
    ((ended > code)) && code=$ended
done
while left=$(grep -lszx "SLURM_STUB_STEP=$SLURM_STUB/$step" /proc/[0-9]*/environ); do
    for process in $left; do kill -KILL "$(cut -d/ -f3 <<<"$process")" 2>/dev/null; done
done
exit $code
"""
SCANCEL: Final = """
# To a step's first processes alone, as Slurm does that tracks processes by cgroups.
[[ $1 == --signal=* ]] || exit 1
kill -"${1#--signal=}" $(cat "$SLURM_STUB/step-${2#*.}"/*)
"""
SCONTROL: Final = """
if [[ "$1 $2" == "show hostnames" ]]; then
    echo "$SLURM_STUB_HOST"
else
    echo "$@" >>"$SLURM_STUB/told"
fi
"""


def processes(files: Iterable[Path]) -> list[psutil.Process]:
    """Those that still run of the ones whose ids were written to ``files``."""
    found = []
    for file in files:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(file.read_text())))
    return found


@dataclass
class Slurm:
    """One job, run after run."""

    directory: Path
    environ: Mapping[str, str]
    runs: int = 0
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.directory / "out"
        self.out.mkdir()
        commands = self.directory / "bin"
        commands.mkdir()
        for name, text in {
            "srun": SRUN,
            "scancel": SCANCEL,
            "scontrol": SCONTROL,
            "python": f'exec {sys.executable} "$@"',
            "mnemo": f'exec {shlex.join(MNEMO)} "$@"',
        }.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}")
            (commands / name).chmod(0o700)

    @property
    def stub(self) -> Path:
        """What the commands of the current run have written."""
        return self.directory / f"run-{self.runs}"

    @contextlib.contextmanager
    def run(self) -> Iterator[subprocess.Popen[bytes]]:
        """The batch script, started; once it has ended, so do all steps, as with Slurm."""
        self.runs += 1
        self.stub.mkdir()
        with (self.directory / "log").open("ab") as log:
            script = subprocess.Popen(
                ["bash", str(SBATCH), str(SCRIPTS / "nodes_train.py"), self.out, str(STEPS)],
                cwd=self.directory,
                env={**os.environ, **self.environ, "SLURM_STUB": str(self.stub)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        with script:
            try:
                yield script
            except BaseException:
                print(self.said())
                script.kill()
                raise
            finally:
                self._end_steps()

    def _end_steps(self) -> None:
        """SIGTERM to all, and after a while SIGKILL."""
        sruns = processes(self.stub.glob("srun-*"))
        tasks = processes(self.stub.glob("step-*/*"))
        for task in tasks:
            task.terminate()
        _, late = psutil.wait_procs(tasks, PATIENCE_S)
        for task in late:
            task.kill()
        _, left = psutil.wait_procs(sruns, PATIENCE_S)
        assert not late
        assert not left

    def said(self) -> str:
        return (self.directory / "log").read_text()

    def told(self) -> list[str]:
        """What ``scontrol`` was told in the current run."""
        file = self.stub / "told"
        return file.read_text().splitlines() if file.exists() else []

    def protected_step(self) -> int:
        """Step that both nodes keep protected, -1 for none."""
        secret = Path(self.environ["MNEMO_SECRET_FILE"]).read_bytes()
        found = []
        for home in ("node-0", "node-1"):
            paths = RunPaths.of("4711", self.directory / "run" / home)
            try:
                with SmpClient.connect(paths, secret, PATIENCE_S) as client:
                    fits = client.status()["fits"]
            except (SmpError, OSError):
                return -1
            found.append(fits[0]["protect"]["step"] if fits and fits[0]["protect"] else -1)
        return min(found)

    def kill_ranks(self) -> None:
        """All processes of the step that they are in."""
        step = (self.directory / ".mnemo" / "4711" / "step").read_text().strip()
        for task in processes((self.stub / f"step-{step}").iterdir()):
            os.killpg(task.pid, signal.SIGKILL)

    def steps_done(self) -> int:
        """Of rank 0. A step that was done again has had the same loss."""
        found: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.out / "losses-0").read_text().splitlines():
                if match := re.fullmatch(r"(\d+) (\S+)", line):
                    assert found.setdefault(match[1], match[2]) == match[2], line
        return len(found)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    secret.chmod(0o600)
    with held_port() as port:
        yield Slurm(
            tmp_path,
            {
                "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "TRAIN_NODES": "2",
                "RANKS_PER_NODE": "1",
                "SLURM_JOB_ID": "4711",
                "SLURM_JOB_NUM_NODES": "2",
                "SLURM_JOB_NODELIST": "node-[0-1]",
                "SLURM_STUB_HOST": f"127.0.0.1:{port}",
                "MNEMO_RUN__DIR": str(tmp_path / "run"),
                "MNEMO_SECRET_FILE": str(secret),
                "MNEMO_PERSIST__TO": str(tmp_path / "store"),
                "MNEMO_PROTECT__NODES": "1+1",
                "MNEMO_PROTECT__RATE": "1GB/s",
                "MNEMO_NETWORK__INTERFACE": "lo",
                "MNEMO_SNAPSHOT__EVERY": "1",
            },
        )


def test_slurm(slurm: Slurm) -> None:
    """The step of the ranks is killed; then the time is over; then it runs to its end."""
    with slurm.run() as job:
        until("nothing is protected", lambda: slurm.protected_step() >= 5)
        slurm.kill_ranks()
        resumed = "run 4711 · an earlier life ended → resumed from memory at step"
        until("it does not go on", lambda: resumed in slurm.said())
        assert "the step of the ranks was killed (exit code 137); once more" in slurm.said()
        reached = slurm.steps_done()
        until("it does not go on", lambda: slurm.steps_done() > reached)
        job.send_signal(signal.SIGTERM)  # --signal=B:TERM@120
        assert job.wait(PATIENCE_S) == EXIT_STATE_SAVED, slurm.said()
    assert slurm.told() == ["requeue 4711"]
    assert "is requeued by this script (exit code 75), not by Lightning" in slurm.said()
    saved = slurm.steps_done()
    assert saved < STEPS
    with slurm.run() as job:
        assert job.wait(PATIENCE_S) == 0, slurm.said()
    assert slurm.told() == []
    assert f"resumed from storage at step {saved}" in slurm.said()
    assert slurm.steps_done() == STEPS
    hashes = [(slurm.out / f"hash-{rank}").read_text() for rank in range(2)]
    assert hashes[0] == hashes[1]


def test_lightning_leaves_the_requeue_to_the_script(
    monkeypatch: pytest.MonkeyPatch, slurm: Slurm
) -> None:
    """Under `mnemo run` it does not see that this is Slurm; README.md says so."""
    import lightning.pytorch as pl
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    ranks = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ranks |= {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "4711", "SLURM_NTASKS": "1"}
    for name, value in {**slurm.environ, **ranks}.items():
        monkeypatch.setenv(name, value)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert isinstance(trainer._accelerator_connector.cluster_environment, TorchElasticEnvironment)


@dataclass
class Pod:
    """What the manifest says of each pod."""

    service: dict[str, Any]
    job: dict[str, Any]

    @property
    def spec(self) -> dict[str, Any]:
        found: dict[str, Any] = self.job["spec"]["template"]["spec"]
        return found

    def container(self, name: str) -> dict[str, Any]:
        every = (*self.spec["initContainers"], *self.spec["containers"])
        return next(each for each in every if each["name"] == name)

    def settings(self, name: str) -> dict[str, str]:
        return {each["name"]: each["value"] for each in self.container(name)["env"]}

    def mount(self, container: str, volume: str) -> Path:
        mounts = self.container(container)["volumeMounts"]
        return Path(next(m["mountPath"] for m in mounts if m["name"] == volume))


@pytest.fixture
def pod() -> Pod:
    return Pod(*yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_kubernetes_takes_the_manifest(pod: Pod, version: str) -> None:
    for resource in (pod.service, pod.job):
        kubernetes_validate.validate(resource, version, strict=True)


def test_ranks_and_snapshots_find_each_other(pod: Pod) -> None:
    settings = pod.settings("snapshots")
    assert pod.settings("train") == settings
    volume = pod.mount("snapshots", "mnemo")
    assert pod.mount("train", "mnemo") == pod.mount("prepare", "mnemo") == volume
    assert volume in Path(settings["MNEMO_RUN__DIR"]).parents
    assert Path(settings["MNEMO_SECRET_FILE"]).parent == volume
    assert pod.spec["securityContext"]["runAsUser"] == 1000
    for each in (*pod.spec["initContainers"], *pod.spec["containers"]):
        assert "securityContext" not in each
    names = [each["name"] for each in pod.spec["initContainers"]]
    assert names == ["prepare", "snapshots"]
    assert pod.container("snapshots")["restartPolicy"] == "Always"


def test_the_grace_period_is_long_enough(pod: Pod) -> None:
    grace = parse_duration(pod.settings("train")["MNEMO_RECOVER__GRACE"])
    assert pod.spec["terminationGracePeriodSeconds"] >= grace + 30
    tells = re.search(r"--signal=B:TERM@(\d+)", SBATCH.read_text())
    default = re.search(r"MNEMO_RECOVER__GRACE:-(\w+)", SBATCH.read_text())
    assert tells
    assert default
    assert int(tells[1]) >= parse_duration(default[1]) + 30


def test_pods_are_as_many_as_nodes(pod: Pod) -> None:
    job, script = pod.job["spec"], pod.container("train")["command"][2]
    name = pod.job["metadata"]["name"]
    assert job["completionMode"] == "Indexed"
    assert pod.spec["subdomain"] == pod.service["metadata"]["name"]
    assert pod.service["spec"]["clusterIP"] == "None"
    assert pod.service["spec"]["selector"] == {"job-name": name}
    assert job["completions"] == job["parallelism"] == 5
    assert "--nnodes=4:5 " in script
    hosts = ",".join(f"{name}-{i}.{pod.spec['subdomain']}" for i in range(5))
    assert f"--rdzv-endpoint={hosts} " in script


def test_the_sidecar_serves_in_a_volume_as_kubernetes_makes_it(
    pod: Pod, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2777)  # with fsGroup
    environ = {**os.environ, **pod.settings("snapshots")}
    environ |= {"PATH": slurm.environ["PATH"], "MNEMO_RUN__DIR": str(volume / "run")}
    environ["MNEMO_SECRET_FILE"] = slurm.environ["MNEMO_SECRET_FILE"]
    monkeypatch.setenv("MNEMO_SECRET_FILE", environ["MNEMO_SECRET_FILE"])
    paths = RunPaths.of("gpt-7b", volume / "run")
    with subprocess.Popen(pod.container("snapshots")["command"], env=environ) as sidecar:
        try:
            until("nobody listens", paths.record.exists)
            with lifecycle.ensure(paths) as client:  # as the agent of the other container does
                assert client.pid == sidecar.pid
            sidecar.terminate()
            assert sidecar.wait(PATIENCE_S) == 0
        finally:
            sidecar.kill()
    assert not paths.directory.exists()


def test_the_container_of_the_ranks_passes_on_sigterm_and_exit_code(
    pod: Pod, tmp_path: Path
) -> None:
    """At 75 the snapshot process is told to store the state."""
    told = tmp_path / "told"
    stub = tmp_path / "mnemo"
    stub.write_text(f"""#!/bin/bash
trap 'exit 75' TERM
echo "$@" >>{told}
while :; do sleep 0.05; done
""")
    stub.chmod(0o700)
    directory = tmp_path / "run" / "gpt-7b"
    directory.mkdir(parents=True)
    environ = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environ |= {"MNEMO_RUN__DIR": str(tmp_path / "run"), "MNEMO_RUN__ID": "gpt-7b"}
    with (
        socket.socket(socket.AF_UNIX) as listener,
        subprocess.Popen(["sleep", "60"]) as snapshots,
        subprocess.Popen(pod.container("train")["command"], env=environ) as container,
    ):
        record = SmpRecord(snapshots.pid, str(directory / "smp.sock"), 0.0)
        (directory / "smp.json").write_bytes(msgspec.json.encode(record))
        listener.bind(record.socket)
        try:
            until("mnemo run is not started", told.exists)
            container.terminate()
            assert container.wait(PATIENCE_S) == EXIT_STATE_SAVED
            assert snapshots.wait(PATIENCE_S) == -signal.SIGTERM
        finally:
            container.kill()
            snapshots.kill()
    (run,) = told.read_text().splitlines()
    assert run.startswith("run --nnodes=4:5 ")
    assert run.endswith(" train.py")

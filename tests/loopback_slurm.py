"""Slurm's own daemons on the loopback, for tests: a controller and two nodes on this machine.

    python tests/loopback_slurm.py DIR       # unpacks Debian's packages into DIR, installs nothing
    SLURM_ROOT=DIR python -m pytest -m full tests/test_sweep_full.py

Without authentication, accounting or cgroups: for isolated tests on one machine, nothing else.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libhwloc15"]
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
MinJobAge=60
PluginDir={plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000
PartitionName=tests Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def fetch(folder: Path) -> None:
    """Downloads Debian's packages and unpacks them, as any user."""
    debs = folder / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, check=True)
    for package in debs.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)


def root() -> Path | None:
    """Where Slurm's programs are: SLURM_ROOT, else the system; None where there are none."""
    given = Path(os.environ.get("SLURM_ROOT", "/"))
    return given if program(given, "slurmctld") else None


def program(root: Path, name: str) -> str | None:
    for candidate in (f"usr/sbin/{name}", f"usr/sbin/{name}-wlm", f"usr/bin/{name}"):
        if (root / candidate).is_file():
            return str((root / candidate).absolute())
    return None


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the daemons; yields the environment in which sbatch, squeue and scancel find them."""
    where = root()
    (libraries,) = (where / "usr/lib").glob("*-linux-gnu")
    (folder / "state").mkdir(parents=True)
    conf = folder / "slurm.conf"
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    plugins, ports = (libraries / "slurm-wlm").absolute(), free_ports(3)
    conf.write_text(CONF.format(host=host, user=user, ports=ports, plugins=plugins, folder=folder))
    environment = dict(os.environ, SLURM_CONF=str(conf))
    if where != Path("/"):  # the system's own are found; named here, they would shadow Python's
        environment["LD_LIBRARY_PATH"] = f"{plugins}:{libraries.absolute()}"
    bin_ = folder / "bin"
    bin_.mkdir()
    environment["PATH"] = f"{bin_}:{where.absolute()}/usr/bin:{os.environ['PATH']}"
    for node in ("n1", "n2"):
        (folder / f"spool-{node}").mkdir()
    stepd = ["-d", program(where, "slurmstepd")]
    commands = [[program(where, "slurmctld"), "-D", "-i"]]
    commands += [[program(where, "slurmd"), "-D", "-N", node, *stepd] for node in ("n1", "n2")]
    daemons = []
    try:
        for i, command in enumerate(commands):
            with open(folder / f"daemon{i}.log", "w") as log:
                daemons.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
                )
            time.sleep(1)
        for _ in range(60):
            said = subprocess.run(
                ["sinfo", "-h", "-o", "%D %t"], env=environment, capture_output=True, text=True
            )
            if said.stdout.strip() == "2 idle":
                break
            time.sleep(1)
        else:
            raise RuntimeError(f"Slurm did not start: {said.stdout} {said.stderr}, see {folder}")
        yield environment
    finally:
        if shutil.which("scancel", path=environment["PATH"]):
            subprocess.run(["scancel", "-u", user], env=environment, check=False)
            time.sleep(2)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))

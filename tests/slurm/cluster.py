"""A real Slurm for tests: slurmctld and several slurmd on this machine, for as long as a test needs them.

No systemd, no cgroups, no accounting. Each slurmd has a host name and a /etc/hosts of its own (UTS and mount
namespaces); with `networks` also a network of its own, which can be cut. Needs Debian's slurmctld, slurmd, slurm-client
and munge, and root or user namespaces; networks need root.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

CPUS, GPUS = 8, 8  # that each node pretends to have
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PATIENCE_S = 240.0  # the machine may be slow

# slurmd starts a cgroup plugin even if nothing uses it, and of those only v1 starts without a cgroup mount. A requeued
# job may run again after cred_expire, and 5 s is the least. A node that was set down stays so (ReturnToService=1).
CONFIG = """\
ClusterName={name}
SlurmctldHost={host}({controller})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1000
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmctldTimeout=30
SlurmdTimeout=10
MessageTimeout=10
KillWait={kill_wait_s}
BatchStartTimeout=10
CompleteWait=0
InactiveLimit=0
MinJobAge=3600
ReturnToService=1
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP OverSubscribe=NO
"""
NODE = (
    "NodeName=node{k} NodeHostname=node{k} NodeAddr={address} Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN\n"
)


def missing() -> str | None:
    """Why there can be no Slurm here, and what to do; None where there can be one."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"no {', '.join(absent)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    if subprocess.run([*_namespaces(), "true"], capture_output=True, check=False).returncode:
        return "no namespaces for the nodes: needs root, or a kernel that gives them to users"
    return None


def _namespaces() -> list[str]:
    mine = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return ["unshare", *mine, "--uts", "--mount"]


class Cluster:
    """A Slurm of so many nodes, node1 to nodeN, that keeps everything below a folder (of a short path: it holds a
    socket). Use as a context manager.

    kill_wait_s: how long a job that is told to end may take. What jobs log below `watched` is shown where something
    that was waited for does not happen.
    """

    def __init__(self, folder: Path, nodes: int = 2, networks: bool = False, kill_wait_s: int = 30):
        self.folder, self.nodes, self._networks = folder, range(1, nodes + 1), networks
        self.watched: list[Path] = []
        self._kill_wait_s = kill_wait_s
        self._own = os.getpid() % 250  # several clusters may be on one machine
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            if self._networks:
                self._make_networks()
            files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            munge = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
            self._begin("munged", "munged", "--foreground", "--force", *munge)
            wait_for(lambda: (self.folder / "munge.sock").is_socket(), self.report)
            self._begin("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
            wait_for(lambda: "is UP" in self.run("scontrol", "ping", check=False), self.report)
            for k in self.nodes:
                self.start_node(k)
            wait_for(lambda: self.idle() == len(self.nodes), self.report)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user", _user(), check=False)
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not self.run("squeue", "-h", "-t", "running,completing", check=False), patience_s=10)
        for k in self.nodes:
            self.kill_node(k)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self._networks:
            for k in self.nodes:
                _ip("link", "del", self._link(k), check=False)
                _ip("netns", "del", self._network(k), check=False)
            _ip("link", "del", self._bridge, check=False)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def start_node(self, k: int) -> None:
        """Start the slurmd of a node."""
        own = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        slurmd = ["slurmd", "-D", "-N", f"node{k}", "-f", str(self.folder / "slurm.conf")]
        network = ["ip", "netns", "exec", self._network(k)] if self._networks else []
        hosts = str(self.folder / "hosts")
        self._begin(f"node{k}", *network, *_namespaces(), "sh", "-c", own, "sh", hosts, f"node{k}", *slurmd)

    def kill_node(self, k: int, *, tasks: bool = True) -> None:
        """kill -9 of a node's slurmd and, as a pulled plug does, of everything that runs there.

        Without `tasks` they run on, unknown to Slurm from now on.
        """
        if tasks:
            for pid in self.processes(k):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        daemon = self._daemons.pop(f"node{k}", None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    def processes(self, k: int) -> list[int]:
        """Of the jobs on a node: slurmstepd and all below."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # ended meanwhile
                parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        found = [pid for pid in parents if self._is_stepd(pid, k)]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid and child not in found]
        return found

    def ranks(self) -> list[int]:
        """Of the jobs on all nodes."""
        found = []
        for pid in (pid for k in self.nodes for pid in self.processes(k)):
            with contextlib.suppress(OSError):  # ended meanwhile
                if b"fdscale.cli" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:5]:
                    found.append(pid)
        return found

    def _is_stepd(self, pid: int, k: int) -> bool:
        """slurmstepd becomes a child of process 1 and does not say whose it is, but it has its node's log open."""
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"slurmstepd: "):
                log = str(self.folder / f"slurmd.node{k}.log")
                return any(os.readlink(file) == log for file in Path(f"/proc/{pid}/fd").iterdir())
        return False

    def cut(self, k: int) -> None:
        """Cut the network of a node; its processes live on."""
        _ip("link", "set", self._link(k), "down")

    def heal(self, k: int) -> None:
        """Undo `cut`."""
        _ip("link", "set", self._link(k), "up")

    def idle(self) -> int:
        """How many nodes are idle."""
        return self.run("sinfo", "-h", "-N", "-o", "%t", check=False).split().count("idle")

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or not done.returncode, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of one job: JobState, Restarts, Reason, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job)))

    def wait(self, job: str, *states: str, restarts: int = 0, patience_s: float = PATIENCE_S) -> dict[str, str]:
        """Wait until a job is in one of these states after at least so many restarts."""

        def there() -> bool:
            found = self.job(job)
            return found["JobState"] in states and int(found["Restarts"]) >= restarts

        wait_for(there, lambda: f"{self.job(job)}\n{self.report()}", patience_s)
        return self.job(job)

    def report(self) -> str:
        """What everybody logged, at the end of it where each rank was: it ends them."""
        for pid in self.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # for Python's faulthandler, which slurm/env.sh asks for
        time.sleep(1.0)
        files = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        files += [file for folder in self.watched for file in sorted(folder.glob("**/slurm/**/*.log"))]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-4000:]}" for file in files)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _begin(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def _configure(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = _free_ports(1 + len(self.nodes))
        text = CONFIG.format(
            name=f"fdscale{ports[0]}",
            host=socket.gethostname().split(".")[0],
            controller=self._address(254) if self._networks else "127.0.0.1",
            kill_wait_s=self._kill_wait_s,
            ports=ports,
            user=_user(),
            folder=self.folder,
        )
        for k, port in zip(self.nodes, ports[1:], strict=True):
            (self.folder / f"spool.node{k}").mkdir()
            text += NODE.format(k=k, address=self._address(k), port=port, cpus=CPUS, gpus=GPUS)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in range(GPUS):
            (self.folder / f"gpu{gpu}").touch()
        nodes = f"node[1-{len(self.nodes)}]"
        gres = f"AutoDetect=off\nNodeName={nodes} Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gres)
        names = "".join(f"{self._address(k)} node{k}\n" for k in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + names)

    def _address(self, k: int) -> str:
        return f"10.77.{self._own}.{k}" if self._networks else f"127.0.1.{k}"

    @property
    def _bridge(self) -> str:
        return f"fd{self._own}"

    def _network(self, k: int) -> str:
        return f"fd{self._own}n{k}"

    def _link(self, k: int) -> str:
        return f"fd{self._own}v{k}"

    def _make_networks(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self._address(254)}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for k in self.nodes:
            _ip("netns", "add", self._network(k))
            _ip("link", "add", self._link(k), "type", "veth", "peer", "name", "eth0", "netns", self._network(k))
            _ip("link", "set", self._link(k), "master", self._bridge, "up")
            _ip("-n", self._network(k), "addr", "add", f"{self._address(k)}/24", "dev", "eth0")
            _ip("-n", self._network(k), "link", "set", "eth0", "up")
            _ip("-n", self._network(k), "link", "set", "lo", "up")


def wait_for(
    happens: Callable[[], object], report: Callable[[], str] = lambda: "", patience_s: float = PATIENCE_S
) -> None:
    """Look again and again until something happens. Raises TimeoutError with a report."""
    deadline = time.monotonic() + patience_s
    while not happens():
        if time.monotonic() > deadline:
            raise TimeoutError(report())
        time.sleep(0.1)


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=check)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]

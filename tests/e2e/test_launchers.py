"""The same run as two ranks, started by --nproc 2, and by torchrun on two nodes: the same bytes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from rdm_fast.run.folder import read_status
from tests import forks
from tests.forks import PATIENCE, ROOT, environment
from tests.processes import FLAGS, Run, final_bytes
from tests.tiny import command

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

LOOPBACK = "0100007F"
EPOCHS = 2  # of four steps


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two forked ranks end with."""
    out = tmp_path_factory.mktemp("two") / "run"
    Run(out, EPOCHS, 2).finish()
    return final_bytes(out)


def assert_same_bytes(out: Path, expected: dict[str, bytes]) -> None:
    found = final_bytes(out)
    assert [name for name in expected if found.get(name) != expected[name]] == []


def listening(pids: list[int]) -> list[str]:
    """The addresses on which these processes listen, in /proc's hexadecimal."""
    owned = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                owned.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    rows = [
        row.split()
        for table in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in owned]


@pytest.mark.slow
def test_nproc_stops_saved_on_ctrl_c_and_its_run_ends_with_the_bytes_of_two_ranks(
    two_ranks: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = Run(out, EPOCHS, 2, "nproc")
    (launcher,) = run.processes
    try:
        run.wait_for_step(3)
        found = listening([launcher.pid, *run.ranks])
        assert set(found) == {LOOPBACK}, found  # gloo's own connections, and nothing else
        launcher.send_signal(signal.SIGINT)
        assert run.wait() == [75], run.log.read_text()
    finally:
        run.kill()
    status = read_status(out)
    assert (status["state"], status["code"]) == ("interrupted", 75)
    assert status["step"] >= 3 and (out / "checkpoints" / status["checkpoint"]).is_dir()
    text = run.log.read_text()
    assert text.count("error:") == 1 and "Traceback" not in text

    Run(out, EPOCHS, 2).finish()
    assert_same_bytes(out, two_ranks)


# ---- two nodes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """Where a node's launcher runs: a prefix to its command, its network interface, address."""

    prefix: tuple[str, ...]
    interface: str
    address: str


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two network namespaces joined by a cable, or, where none can be made, this machine twice."""
    names = [f"rdm-{os.getpid()}-{i}" for i in range(2)]
    addresses = [f"10.213.7.{i + 1}" for i in range(2)]
    try:
        if shutil.which("ip") is None:
            raise FileNotFoundError
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "node0", "netns", names[0], "type", "veth",
           "peer", "name", "node1", "netns", names[1])  # fmt: skip
        for i, (name, address) in enumerate(zip(names, addresses, strict=True)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"node{i}")
            ip("-n", name, "link", "set", f"node{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("netns", "exec", name, "true")
        made = [
            Node(("ip", "netns", "exec", name), f"node{i}", address)
            for i, (name, address) in enumerate(zip(names, addresses, strict=True))
        ]
    except (OSError, subprocess.SubprocessError):
        made = [Node((), "lo", "127.0.0.1")] * 2
    yield made
    for name in names:
        with suppress(OSError, subprocess.SubprocessError):
            ip("netns", "del", name)


def start(number: int, node: Node, master: str, port: int, out: Path) -> subprocess.Popen[bytes]:
    recipe, *words = command(f"--optim.epochs {EPOCHS} {FLAGS}")
    settings = {
        "NNODES": "2", "NODE_RANK": str(number), "NPROC": "1", "OUT": str(out),
        "MASTER_ADDR": master, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": node.interface,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    return subprocess.Popen(
        [*node.prefix, "bash", str(ROOT / "docs/scaling/torchrun.sh"), recipe, *words],
        env=environment() | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_ranks_that_meet_at_a_port_end_with_the_bytes_of_two_ranks_on_one(
    two_ranks: dict[str, bytes], tmp_path: Path
) -> None:
    """With the variables that torchrun sets on two nodes."""
    out = tmp_path / "run"
    words = command(f"--optim.epochs {EPOCHS} {FLAGS} --out {out}")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        forks.start("train.py", *words, out=tmp_path / "log", env=environment() | meeting | {
            "RANK": f"{rank}", "LOCAL_RANK": "0", "GROUP_RANK": f"{rank}",
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
        })
        for rank in range(2)
    ]  # fmt: skip
    assert [rank.wait() for rank in ranks] == [0, 0], (tmp_path / "log").read_text()
    assert_same_bytes(out, two_ranks)


@pytest.mark.slow
def test_two_nodes_end_with_the_bytes_of_two_ranks_on_one(
    nodes: list[Node], two_ranks: dict[str, bytes], tmp_path: Path
) -> None:
    """By docs/scaling/torchrun.sh, one rank on each. Both nodes see the same run folder."""
    out = tmp_path / "run"
    port = free_port()
    print(f"nodes: {'two network namespaces' if nodes[0].prefix else 'this machine twice'}")
    processes = [start(i, node, nodes[0].address, port, out) for i, node in enumerate(nodes)]
    try:
        printed = [process.communicate(timeout=PATIENCE)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert_same_bytes(out, two_ranks)

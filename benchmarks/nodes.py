"""Two nodes on one machine: two network namespaces, joined by a link that can be cut or slow.

    python -m benchmarks.nodes [--delays-ms 0,50] [--updates 30] [key=value ...]   the quickstart, trained on two nodes

Needs Linux, iproute2, and the right to make namespaces, which most kernels give to every user.  The namespaces have no
names: they end with the processes in them, however those end.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import machine
from benchmarks.slow_link import DEVICE, MTU

ADDRESSES = ("10.0.0.1", "10.0.0.2")
PORT = 29500  # torchrun's default; each namespace has its own ports
REPOSITORY = Path(__file__).resolve().parent.parent
SLOW_LINK = str(REPOSITORY / "benchmarks" / "slow_link.py")


class NoNamespaces(OSError):
    """This machine, or this user, cannot make network namespaces."""


class Nodes:
    """Two namespaces, each with one address; a context manager."""

    def __init__(self, delay_s: float = 0.0) -> None:
        """delay_s: how long a packet takes in each direction; 0: a veth pair, which takes microseconds."""
        self._delay_s, self._holders, self._stack = delay_s, list[int](), ExitStack()

    def __enter__(self) -> "Nodes":
        with ExitStack() as stack:
            self._hold(stack, ["unshare", "--user", "--map-root-user", "--net"])
            self._hold(stack, [*self.command(0), "unshare", "--net"])
            if self._delay_s:
                self._join_slowly(stack)
            else:
                self._ip(
                    0, "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", str(self._holders[1])
                )
            for node in (0, 1):
                self._ip(node, "address", "add", f"{ADDRESSES[node]}/24", "dev", DEVICE)
                self._ip(node, "link", "set", "lo", "up")
                self._ip(node, "link", "set", "dev", DEVICE, "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def command(self, node: int, *words: str) -> list[str]:
        """Return the command that runs a command on a node."""
        return ["nsenter", "--target", str(self._holders[node]), "--user", "--preserve-credentials", "--net", *words]

    def torchrun(self, node: int, *words: str) -> list[str]:
        """Return the command that runs torchrun on a node, with one rank."""
        meeting = [f"--node-rank={node}", f"--master-addr={ADDRESSES[0]}", f"--master-port={PORT}"]
        run = [sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *meeting]
        return self.command(node, *run, *words)

    def cut(self) -> None:
        """Cut the link: packets are lost, connections stay."""
        self._ip(1, "link", "set", "dev", DEVICE, "down")

    def mend(self) -> None:
        """Restore the link."""
        self._ip(1, "link", "set", "dev", DEVICE, "up")

    def sent_bytes(self, node: int) -> int:
        """Return the bytes that a node has sent over the link, headers included."""
        return int(self._ip(node, "-json", "-statistics", "link", "show", "dev", DEVICE)[0]["stats64"]["tx"]["bytes"])

    def _hold(self, stack: ExitStack, unshare: Sequence[str]) -> None:
        """Make a namespace, held by a process that ends with this context or with this process."""
        words = [*unshare, "sh", "-c", "echo && exec cat"]
        try:
            holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except FileNotFoundError as error:
            raise NoNamespaces(f"no command {error.filename}") from error
        stack.callback(_end, holder)
        assert holder.stdout and holder.stderr
        if holder.stdout.readline() != b"\n":
            raise NoNamespaces(holder.stderr.read().decode().strip())
        self._holders.append(holder.pid)

    def _ip(self, node: int, *words: str) -> Any:
        """Run the command `ip` on a node.  Returns what it prints with -json."""
        try:
            done = subprocess.run(self.command(node, "ip", *words), check=True, capture_output=True, text=True)
            return json.loads(done.stdout or "null")
        except subprocess.CalledProcessError as error:
            raise NoNamespaces(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error

    def _join_slowly(self, stack: ExitStack) -> None:
        """Give each node a device whose packets a process of this node hands to that of the other, with the delay."""
        for node, end in enumerate(socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)):
            words = [sys.executable, "-P", SLOW_LINK, str(end.fileno()), str(self._delay_s)]
            process = subprocess.Popen(
                self.command(node, *words), pass_fds=[end.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, cwd=REPOSITORY,
            )  # fmt: skip
            end.close()
            stack.callback(_end, process)
            assert process.stdout and process.stderr
            if process.stdout.readline() != b"\n":
                raise NoNamespaces(process.stderr.read().decode().strip())
            self._ip(node, "link", "set", "dev", DEVICE, "mtu", str(MTU))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that runs until its standard input is closed."""
    process.kill()
    process.communicate()


def train(delay_s: float, updates: int, overrides: Sequence[str]) -> tuple[list[float], float]:
    """Train the quickstart on two nodes, one rank of one thread each.

    Returns images/s of each update after the first, and the bytes that node 1, which sends no weights, sent per update.
    """
    words = (
        "--module", "gndet.cli", "train", "configs/quickstart.yaml", "device=cpu", "train.images_per_gpu=1",
        f"train.schedule.updates={updates}", "train.log_every=1", "train.eval_every=0", "train.checkpoint_every=0",
        "train.report=false", "data.val.count=2",
    )  # fmt: skip
    with Nodes(delay_s) as nodes, tempfile.TemporaryDirectory() as folder:
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        runs = [
            subprocess.Popen(
                nodes.torchrun(node, *words, f"out={folder}/run", *overrides), env=variables, cwd=REPOSITORY,
                stdout=subprocess.DEVNULL,
            )
            for node in (0, 1)
        ]  # fmt: skip
        try:
            statuses = [run.wait() for run in runs]
        finally:
            for run in runs:
                run.terminate()  # after an interrupt; torchrun ends its ranks
        if any(statuses):
            raise SystemExit("the training failed, see above")
        sent = nodes.sent_bytes(1) / updates
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [line["images_per_s"] for line in lines if line["kind"] == "train"][1:], sent


def main() -> None:
    """Parse the command line and time the training for each delay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays-ms", default="0,50")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    print(f"quickstart, two nodes, one rank each; {machine(1)}")
    for delay in map(float, options.delays_ms.split(",")):
        speeds, sent = train(delay / 1e3, options.updates, options.overrides)
        print(
            f"{delay:4g} ms in each direction: {median(speeds):.2f} images/s (from {min(speeds):.2f} to "
            f"{max(speeds):.2f}), {sent / 1e6:.1f} MB sent per update",
            flush=True,
        )


if __name__ == "__main__":
    main()

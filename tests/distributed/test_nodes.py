"""Two nodes, as two network namespaces under torchrun: what they train, and what happens if the link is cut."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faults.host import environment
from faults.launch import POLL, Started, cleared, prepare, unbroken
from faults.tiny import check_same, newest_update

from benchmarks.nodes import Nodes, NoNamespaces

pytestmark = [pytest.mark.faults, pytest.mark.slow]
OPTIONS = ("train.checkpoint_every=1", "train.schedule.updates=6")  # 2 images per update: one on each node
CUT_S, TIMEOUT_S = 5.0, 10.0
GATE = 3  # the update after which a run waits for the link to be cut
WITHIN_S = 150.0  # for the end of both nodes: less than the default train.timeout_s, and enough on a busy machine


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two joined nodes, or a skip where they cannot be made."""
    with ExitStack() as stack:
        try:
            nodes = stack.enter_context(Nodes())
        except NoNamespaces as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield nodes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of all runs; no process of a run outlives it."""
    folder = tmp_path_factory.mktemp("nodes")
    with cleared(folder):
        yield folder


def torchrun(nodes: Nodes, folder: Path, *overrides: str, gate: bool) -> Started:
    """Start `gndet train` into folder/run on both nodes; the pids are those of the two torchruns."""
    home, log, words = prepare(folder, "run", (*OPTIONS, *overrides), {"gate": [GATE]} if gate else None)
    variables = {name: value for name, value in environment().items() if name != "GLOO_SOCKET_IFNAME"}
    processes = []
    with log.open("ab") as file:
        for node in (0, 1):
            command = nodes.torchrun(node, "--module", "faults.inject", *words)
            processes.append(subprocess.Popen(command, cwd=home, env=variables, stdout=file, stderr=file))
    return Started(
        home, folder / "run", log, [process.pid for process in processes], [process.poll for process in processes]
    )


def cut_at_the_gate(nodes: Nodes, run: Started) -> float:
    """Cut the link once both ranks have made GATE updates, then let them go on.  Returns the time."""
    while run.text.count(f"fault: gate {GATE}") < 2:
        assert None in run.statuses(), run.tail()
        time.sleep(POLL)
    nodes.cut()
    run.open_gate(GATE)
    return time.monotonic()


def test_two_nodes_train_what_one_process_trains_though_the_link_is_cut_for_5_s(nodes: Nodes, runs: Path) -> None:
    """Bit for bit: weights, optimizer, averaged weights, losses and metrics, in float32.

    The sum of two images' gradients does not depend on the order.  With more images per update, the order of the sum
    and so its rounding would.
    """
    folder = runs / "short"
    folder.mkdir()
    run = torchrun(nodes, folder, "train.timeout_s=120", gate=True)
    began = cut_at_the_gate(nodes, run)
    time.sleep(CUT_S)
    assert f"update {GATE + 1}/" not in run.text and None in run.statuses()  # both wait
    nodes.mend()
    run.expect(0, 0)
    assert time.monotonic() - began > CUT_S
    check_same(run.out, unbroken(folder, *OPTIONS), "two nodes")


def test_both_nodes_end_when_the_link_stays_cut_and_the_same_command_goes_on(nodes: Nodes, runs: Path) -> None:
    folder = runs / "long"
    folder.mkdir()
    run = torchrun(nodes, folder, f"train.timeout_s={TIMEOUT_S}", gate=True)
    seconds = run.wait(cut_at_the_gate(nodes, run), within=WITHIN_S)
    assert run.statuses() == [1, 1], f"{seconds}: {run.tail()}"  # torchrun's own status
    said = [line for line in run.text.splitlines() if line.startswith("gndet train: ")]
    assert len(said) == 2 and all("the network is down" in line for line in said), run.tail()
    assert all(line.endswith("the same command continues from the last checkpoint") for line in said)
    assert [f"rank {rank} after update {GATE}" in " ".join(said) for rank in (0, 1)] == [True, True]
    assert run.text.count("Traceback") == run.text.count("errors.ChildFailedError: ") == 2  # torchrun's own
    assert newest_update(run.out) == GATE
    nodes.mend()
    torchrun(nodes, folder, gate=False).expect(0, 0)
    check_same(run.out, unbroken(folder, *OPTIONS), "two nodes, resumed")


def test_namespaces_end_with_their_context(nodes: Nodes) -> None:
    with Nodes() as others:  # of the same addresses, beside the first
        holder = Path("/proc", others.command(1)[2])
        assert holder.exists()
    assert not holder.exists()

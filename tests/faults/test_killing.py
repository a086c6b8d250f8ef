"""Commands that are killed, or whose disk fails or is full, at any file operation; `--all-faults`: at each."""

from pathlib import Path

import pytest

from faults.killing import COMMANDS, Command, Walk
from faults.launch import cleared
from faults.operations import FAIL, FULL, KILL

pytestmark = pytest.mark.faults
SAMPLES = {KILL: 5, FAIL: 2, FULL: 2}  # operations per command


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name.replace(" ", "-"))
def test_the_same_command_then_gives_the_same_bits_and_leaves_nothing_over(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    everything = request.config.getoption("--all-faults")
    with cleared(tmp_path):
        walk, broken = Walk(command, tmp_path), list[str]()
        figures = [f"{len(walk.made)} operations"]
        for how, few in SAMPLES.items():
            numbers = walk.numbers(how, None if everything else few)
            broken += [line for number in numbers for line in walk.broken(how, number)]
            figures.append(f"{how} at {len(numbers)}")
    with capsys.disabled():
        print(f"\n{command.name}: {', '.join(figures)}")
    assert not broken, "\n".join(broken)

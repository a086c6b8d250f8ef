"""On a GPU work is timed by events after warm-ups, on a CPU by the clock; the GPU here is a list of its orders."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.timing import WARM_UPS, as_graph, graph_s, host_s, in_turn, median_s, timed
from benchmarks.turns import WALL


class Card:
    """Stands for `torch.cuda`: notes its orders; the nth pair of events is n seconds apart."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pairs = 0

    def work(self) -> str:
        self.calls.append("work")
        return "result"

    def synchronize(self) -> None:
        self.calls.append("synchronize")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            card.calls.append("event")

        def elapsed_time(self, last: "Event") -> float:
            card.pairs += 1
            return card.pairs * 1e3

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            card.calls.append("wait for stream")

    class Graph:
        def replay(self) -> None:
            card.calls.append("replay")

    @contextmanager
    def capturing(graph: Graph) -> Iterator[None]:
        card.calls.append("capture")
        yield
        card.calls.append("captured")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    fakes: dict[str, Any] = {
        "Event": Event, "synchronize": card.synchronize, "Stream": Stream, "current_stream": Stream, "stream": on,
        "CUDAGraph": Graph, "graph": capturing,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return card


TURN = ["synchronize", "event", "work", "event", "synchronize"]


def test_events_enclose_the_work_and_the_gpu_is_idle_before_and_after(card: Card) -> None:
    assert timed(card.work, "cuda") == ("result", 1.0)
    assert card.calls == TURN


def test_three_warm_ups_come_before_anything_counts(card: Card) -> None:
    assert WARM_UPS["cuda"] == 3
    assert median_s(card.work, "cuda", rounds=3) == 5.0  # of turns 4, 5 and 6
    assert card.calls == TURN * 6
    assert in_turn([card.work, card.work], "cuda", 2) == [[13.0, 15.0], [14.0, 16.0]]  # after 6 turns of warm-up


def test_a_graph_is_captured_after_three_warm_ups_and_replayed_without_the_host(card: Card) -> None:
    replay = as_graph([card.work, card.work], "cuda")
    assert card.calls.count("work") == 8 and card.calls[-4:] == ["capture", "work", "work", "captured"]
    before = card.calls[: card.calls.index("capture")]
    assert before.count("work") == 6 and before[-1] == "synchronize"
    card.calls.clear()
    replay()
    assert card.calls == ["replay"]
    assert graph_s([card.work, card.work], "cuda") == (3 + 5.5) / 2  # 3 warm-ups, then the median of 10, of two works


def test_a_training_step_warms_up_before_its_memory_and_time_count(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: card.calls.count("work") << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: card.calls.append("reset"))

    def one() -> dict[str, torch.Tensor]:
        card.work()
        return {"loss": torch.tensor(2.0)}

    turn = step.work(one, "cuda")
    assert card.calls == ["work"] * 3 + ["reset"]
    card.calls.clear()
    facts = turn()
    assert card.calls == ["synchronize", "event", *["work"] * step.STEPS["cuda"], "event", "synchronize"]
    assert facts == {"loss": 2.0, WALL: 1.0, "first CUDA MiB": 3.0, "CUDA MiB": 4.0}


def test_the_host_s_time_ends_before_the_gpu_s(card: Card) -> None:
    host_s(card.work, "cuda", repeats=2)
    assert card.calls == ["work"] * 3 + ["synchronize", "work", "work"] * 3


def test_on_a_cpu_the_clock_counts_after_one_warm_up(card: Card) -> None:
    result, seconds = timed(card.work, "cpu")
    assert result == "result" and seconds > 0
    card.calls.clear()
    assert median_s(card.work, "cpu", rounds=2) > 0 and card.calls == ["work"] * 3
    as_graph([card.work, card.work], "cpu")()
    assert card.calls == ["work"] * 5

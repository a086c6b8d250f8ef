"""The first signal is noted and interrupts what may be interrupted; the second ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from run_files import wait_for

from gndet.distributed import signals
from gndet.distributed.signals import SAME, Stop, StopSignals

pytestmark = pytest.mark.faults
MINUTES = 600.0  # for what a signal must break off


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_raised_only_where_it_is_polled(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.poll()
        os.kill(os.getpid(), number)
        assert stop.asked and stop.number == number  # but nothing was raised
        with pytest.raises(Stop):
            stop.poll()
        assert stop.status == (130 if number == signal.SIGINT else 0)
    assert signal.getsignal(number) is before


def test_within_at_once_a_signal_breaks_off_what_waits() -> None:
    with StopSignals() as stop, pytest.raises(Stop), stop.at_once():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        time.sleep(MINUTES)
        raise AssertionError("nothing was raised")


def test_within_at_once_a_stop_of_another_process_does_so_too() -> None:
    with StopSignals() as stop, pytest.raises(Stop), stop.at_once():
        threading.Timer(0.2, stop.ask).start()  # like the watch thread
        time.sleep(MINUTES)
        raise AssertionError("nothing was raised")
    assert stop.status == 0
    stop.ask()  # has no effect afterwards


def test_after_at_once_a_signal_raises_nothing() -> None:
    with StopSignals() as stop:
        with stop.at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stop), stop.at_once():
            raise AssertionError("asked before: the body does not begin")


def test_two_signals_of_one_request_do_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME", MINUTES)  # a busy machine may take a second between the two
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler signals all processes, and torchrun forwards its signal
        time.sleep(0.2)
        assert stop.asked


def test_a_stop_of_another_process_is_no_signal_of_this_one() -> None:
    with StopSignals() as stop:
        stop.ask()
        assert stop.asked and stop.status == 0
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.number != 0)
        assert stop.number == signal.SIGINT and stop.status == 130


@pytest.mark.parametrize("busy", [f"time.sleep({MINUTES})", "sum(range(10**6))"])
def test_a_second_signal_ends_the_process_whatever_it_does(busy: str) -> None:
    script = (
        "import sys, time\nfrom gndet.distributed.signals import StopSignals\n"
        f"with StopSignals():\n    print('ready', flush=True)\n    while True:\n        {busy}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME + 0.3)
    assert process.poll() is None
    try:
        for _ in range(5):  # a busy machine may notice the first signal late: both are then one request
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    found = []

    def work() -> None:
        with StopSignals() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]

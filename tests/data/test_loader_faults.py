"""Loader processes that are killed, signalled or abandoned, and pictures that turn bad (T2, T19, T25).

Processes and signals are real.  The truth is the stream of a single process without faults.
"""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_batching import DATA, equal

from gndet.config.data import DataConfig, DatasetConfig
from gndet.data import workers as worker_pool
from gndet.data.batches import stream as batching
from gndet.data.batches.stream import Loaded, micro_batches, prefetch
from gndet.data.datasets.images import read_image
from gndet.data.datasets.reading import read_dataset
from gndet.data.records import Dataset
from gndet.errors import DataError
from gndet.ops.noise import hash_ints

pytestmark = pytest.mark.faults
SOON = 120.0  # seconds; generous, because the machine may be busy


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """11 drawn images of 64 pixels."""
    return read_dataset(DatasetConfig(kind="shapes", count=11, size=64), DataConfig())


@pytest.fixture
def files(dataset: Dataset, tmp_path: Path) -> Dataset:
    """The same images as files, named by their ids."""
    records = []
    for record in dataset.records:
        path = tmp_path / f"{record.image_id}.png"
        Image.fromarray(record.load()).save(path)
        records.append(record._replace(load=functools.partial(read_image, path, record.size)))
    return dataset._replace(records=records)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def stream(dataset: Dataset, workers: int = 0, **options: Any) -> Any:
    defaults = {
        "seed": 0, "start": 0, "stop": 8, "images_per_gpu": 2, "global_batch": 4, "rank": 0, "world": 1,
        "masks": False, "pin_memory": False,
    }  # fmt: skip
    data = DATA.model_copy(update={"workers": workers})
    return batching.train_batches(dataset, data, **defaults | options)


def pids() -> list[int]:
    return sorted(process.pid for process in multiprocessing.active_children())


def gone(number: int) -> bool:
    """Return whether a process has ended, whoever its parent is."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def simple(load: Callable[[int], Any], count: int = 12, workers: int = 2, **options: Any) -> Any:
    return prefetch(
        load, iter(range(count)), workers=workers, pin_memory=False, describe=lambda item: f"item {item}", **options
    )


# --- killed


@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_t25_a_killed_process_is_replaced_and_the_stream_is_the_same(
    dataset: Dataset, after: int, which: tuple[int, ...]
) -> None:
    told: list[str] = []
    batches, found = stream(dataset, workers=2, notify=told.append), []
    for place, loaded in enumerate(batches):
        found.append(loaded)
        if place == after:
            killed = [pids()[one] for one in which]
            for number in killed:
                os.kill(number, signal.SIGKILL)
    assert equal(tuple(found), tuple(stream(dataset)))
    assert len(told) == len(which)
    for number in killed:
        (line,) = (line for line in told if line.startswith(f"loader process {number} "))
        assert "was killed by signal 9 (out of memory?) while preparing image(s) " in line
        assert line.endswith("; restarted")


def test_t25_processes_killed_again_and_again_lose_nothing(dataset: Dataset) -> None:
    found = []
    for loaded in stream(dataset, workers=2):
        found.append(loaded)
        os.kill(pids()[-(len(found) % 2)], signal.SIGKILL)
    assert equal(tuple(found), tuple(stream(dataset)))


def deadly(item: int) -> torch.Tensor:
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.full((1000,), item)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_t25_an_item_that_kills_is_named_once_all_earlier_ones_came(workers: int) -> None:
    told: list[str] = []
    found = []
    with pytest.raises(DataError, match=r"killed by signal 9 .*preparing item 7, and so did the .*data\.workers=0"):
        for tensor in simple(deadly, workers=workers, notify=told.append):
            found.append(int(tensor[0]))
    assert found == list(range(7))
    assert told[-1].endswith("while preparing item 7; restarted") and len(told) <= 2


def test_t25_a_picture_that_kills_is_named_by_its_image(dataset: Dataset) -> None:
    record = dataset.records[4]
    records = [*dataset.records]
    records[4] = record._replace(load=functools.partial(deadly, 7))
    batches = stream(dataset._replace(records=records), workers=2, images_per_gpu=1)
    with pytest.raises(DataError, match=rf"preparing image\(s\) {record.image_id}, and so did"):
        list(batches)


def end_by_itself(item: int) -> None:
    os._exit(3)


def test_a_process_that_ends_by_itself_is_an_error_too() -> None:
    with pytest.raises(DataError, match="ended by itself with status 3 while preparing item 0"):
        list(simple(end_by_itself))


def bug(item: int) -> int:
    return 1 // (item - 3)


def test_a_bug_in_a_process_arrives_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)preparing item 3:.*in bug.*ZeroDivisionError"):
        list(simple(bug))


# --- signalled


def test_signals_to_the_process_group_leave_the_processes_at_work(dataset: Dataset) -> None:
    told: list[str] = []
    batches = stream(dataset, workers=2, notify=told.append)
    found = [next(batches)]
    for number in pids():
        for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(number, kind)
    found += batches
    assert equal(tuple(found), tuple(stream(dataset))) and not told


def threads(item: int) -> int:
    return torch.get_num_threads()


def test_a_process_runs_one_thread() -> None:
    torch.set_num_threads(2)
    try:
        assert set(simple(threads)) == {1}
    finally:
        torch.set_num_threads(1)


def test_the_main_process_keeps_its_handlers_and_hears_no_signal_of_others() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before, before_fd = signal.signal(signal.SIGUSR2, lambda *_: None), signal.set_wakeup_fd(write)
    child_handler = signal.getsignal(signal.SIGCHLD)
    try:
        results = simple(threads)
        assert next(results) == next(results) == 1  # one result from each process
        assert signal.getsignal(signal.SIGCHLD) == child_handler  # torch's handler raises wherever the main thread is
        for number in pids():
            os.kill(number, signal.SIGUSR2)  # they inherited its handler
        assert set(results) == {1}
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    finally:
        signal.set_wakeup_fd(before_fd)
        signal.signal(signal.SIGUSR2, before)
        os.close(read)
        os.close(write)


# --- left alone


def test_two_loaders_at_once_end_in_any_order(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "GRACE", SOON)
    first, second = stream(dataset, workers=2), stream(dataset, workers=2)
    next(first), next(second)
    start = time.monotonic()
    first.close()  # the processes of the second hold its pipes
    second.close()
    assert not pids() and time.monotonic() - start < SOON


def test_closing_the_generator_ends_the_processes(dataset: Dataset) -> None:
    batches = stream(dataset, workers=2)
    next(batches)
    assert len(pids()) == 2
    batches.close()
    assert not pids()


def test_an_exception_where_batches_are_used_ends_the_processes(dataset: Dataset) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in stream(dataset, workers=2):
            raise ZeroDivisionError
    assert not pids()


def slow(item: int) -> int:
    time.sleep(0.0 if item == 0 else 600)
    return item


def test_a_process_in_the_middle_of_an_item_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "GRACE", 0.2)
    results = simple(slow)
    assert next(results) == 0
    start = time.monotonic()
    results.close()
    assert not pids() and time.monotonic() - start < SOON


SCRIPT = """
import multiprocessing, sys, time
sys.path.insert(0, {folder!r})
from test_loader_faults import simple, slow, threads
from gndet.distributed.process import spawn

def run(proc=None):
    global results
    results = simple({load})
    next(results)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    {then}

if __name__ == "__main__":
    {call}
"""


def script(tmp_path: Path, load: str, then: str, call: str = "run()") -> tuple[subprocess.Popen[str], list[int]]:
    """Start a process that takes one item of a loader and then does something else; return the loader's pids, too."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(folder=str(Path(__file__).parent), load=load, then=then, call=call))
    started = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = [int(word) for word in started.stdout.readline().split()]
    assert len(children) == 2, started.stderr.read()
    return started, children


def test_no_orphans_if_the_main_process_is_killed(tmp_path: Path) -> None:
    started, children = script(tmp_path, "threads", "time.sleep(600)")
    started.kill()
    started.communicate()
    assert wait_until(lambda: all(map(gone, children)))


@pytest.mark.parametrize(("load", "then", "status"), [("slow", "pass", 0), ("threads", "1 / 0", 1)])
def test_no_orphans_and_no_hang_if_the_main_process_ends_with_the_loader_open(
    tmp_path: Path, load: str, then: str, status: int
) -> None:
    started, children = script(tmp_path, load, then)
    assert started.wait(SOON) == status
    assert wait_until(lambda: all(map(gone, children)))
    started.communicate()


@pytest.mark.slow
def test_a_spawned_process_that_fails_with_the_loader_open_does_not_hang(tmp_path: Path) -> None:
    started, children = script(tmp_path, "threads", "1 / 0", "spawn(run, 1, 'cpu')")
    assert started.wait(SOON) == 1 and "ZeroDivisionError" in started.stderr.read()
    assert wait_until(lambda: all(map(gone, children)))
    started.communicate()


# --- resumed


@pytest.mark.parametrize("start", [1, 3, 5])
def test_t2_a_stream_goes_on_with_any_number_of_processes(dataset: Dataset, start: int) -> None:
    whole = list(stream(dataset))
    parts = [*stream(dataset, stop=start), *stream(dataset, 2, start=start, stop=7), *stream(dataset, start=7)]
    assert equal(tuple(parts), tuple(whole))


# --- pictures that turn bad


def spoil(folder: Path, dataset: Dataset, deleted: int, truncated: int) -> set[int]:
    """Make two pictures unreadable.  Returns their image ids."""
    ids = {dataset.records[index].image_id for index in (deleted, truncated)}
    (folder / f"{dataset.records[deleted].image_id}.png").unlink()
    path = folder / f"{dataset.records[truncated].image_id}.png"
    path.write_bytes(path.read_bytes()[:60])
    return ids


def own_keys(dataset: Dataset, epochs: int) -> dict[int, int]:
    """Map the key that each image has at its own position, in each of these epochs, to the image."""
    return {
        hash_ints(0, epoch, record.image_id): record.image_id for epoch in range(epochs) for record in dataset.records
    }


@pytest.mark.parametrize(("deleted", "truncated"), [(2, 7), (0, 1), (9, 10)])
def test_t19_bad_pictures_are_replaced_and_all_others_come_once(
    files: Dataset, tmp_path: Path, deleted: int, truncated: int
) -> None:
    whole = list(stream(files, stop=11))  # 44 images, 4 epochs
    bad = spoil(tmp_path, files, deleted, truncated)
    spoilt = list(stream(files, stop=11))
    keys, own = own_keys(files, 4), Counter()
    for before, after in zip(whole, spoilt, strict=True):
        missing = [image_id for image_id in before.image_ids if image_id in bad]
        assert [one.image_id for one in after.skipped] == missing
        for place, image_id in enumerate(before.image_ids):
            key = int(after.batch.keys[place])
            if image_id in bad:
                assert key not in keys and after.image_ids[place] not in bad  # no sample that comes anyway
            else:
                assert after.image_ids[place] == image_id == keys[key]
                own[image_id] += 1
    assert own == {record.image_id: 4 for record in files.records if record.image_id not in bad}
    stand_ins = [int(key) for one in spoilt for key in one.batch.keys if int(key) not in keys]
    assert len(set(stand_ins)) == len(stand_ins) == 8
    reasons = {one.image_id: one.reason for loaded in spoilt for one in loaded.skipped}
    assert all(reasons[image_id].startswith(f"{tmp_path / str(image_id)}.png: cannot be read") for image_id in bad)


def test_t19_the_replacement_is_the_next_in_the_epoch_s_order_wrapping_around(files: Dataset, tmp_path: Path) -> None:
    order = batching.order(0, 0, 11)
    for place in (10, 4, 5):  # the last of the epoch, and two in a row
        (tmp_path / f"{files.records[order[place]].image_id}.png").unlink()
    (first,) = stream(files, stop=1, images_per_gpu=11, global_batch=11)
    expected = [files.records[order[place]].image_id for place in (0, 1, 2, 3, 6, 6, 6, 7, 8, 9, 0)]
    assert list(first.image_ids) == expected


def test_t19_the_stream_with_bad_pictures_does_not_depend_on_how_it_is_loaded(files: Dataset, tmp_path: Path) -> None:
    spoil(tmp_path, files, 3, 8)
    alone = [images(loaded) for loaded in stream(files, stop=11)]
    assert [images(loaded) for loaded in stream(files, 2, stop=11)] == alone
    shares = [stream(files, 2, stop=11, rank=rank, world=2) for rank in (0, 1)]
    assert [images(loaded) for pair in zip(*shares, strict=True) for loaded in pair] == alone
    single = [images(loaded) for loaded in stream(files, stop=11, images_per_gpu=1)]
    assert single == [[one] for many in alone for one in many]
    resumed = [images(loaded) for loaded in stream(files, 2, start=4, stop=11)]
    assert resumed == alone[4 * len(micro_batches(4, 2, 0, 1)) :]


def images(loaded: Loaded) -> list[tuple[int, int, int]]:
    """Return id, key and sum of pixels of each image."""
    batch = loaded.batch
    sums = [
        int(batch.images[place, :, :height, :width].long().sum()) for place, (height, width) in enumerate(batch.sizes)
    ]
    return list(zip(loaded.image_ids, batch.keys.tolist(), sums, strict=True))


def test_t19_a_picture_that_turns_bad_between_two_reads_changes_only_its_own_places(
    files: Dataset, tmp_path: Path
) -> None:
    undisturbed, batches, found = list(stream(files, stop=11)), stream(files, stop=11), []
    for place, loaded in enumerate(batches):
        found.append(loaded)
        if place == 5:
            bad = spoil(tmp_path, files, 2, 6)
    assert equal(tuple(found[:6]), tuple(undisturbed[:6]))
    for before, after in zip(undisturbed[6:], found[6:], strict=True):
        assert {one.image_id for one in after.skipped} == set(before.image_ids) & bad
        kept = [before.image_ids[place] not in bad for place in range(2)]
        assert np.array_equal(np.array(before.image_ids)[kept], np.array(after.image_ids)[kept])
        assert torch.equal(before.batch.keys[kept], after.batch.keys[kept])


@pytest.mark.parametrize("workers", [0, 2])
def test_t19_if_no_picture_can_be_read_the_stream_ends_with_the_reason(
    files: Dataset, tmp_path: Path, workers: int
) -> None:
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"none of its 11 pictures to train on can be read; .*\.png: cannot be read"):
        next(stream(files, workers))


def test_a_mistake_in_the_data_set_is_not_taken_for_a_bad_picture(dataset: Dataset) -> None:
    records = [*dataset.records]
    batches, first = stream(dataset._replace(records=records), masks=True), batching.order(0, 0, 11)[0]
    records[first] = records[first]._replace(segmentations=[None] * len(records[first].labels))
    with pytest.raises(DataError, match="has no usable segmentation"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reports_a_bad_picture_and_yields_the_others(files: Dataset, tmp_path: Path, workers: int) -> None:
    bad = spoil(tmp_path, files, 0, 5)
    data = DATA.model_copy(update={"workers": workers})
    tested = list(batching.test_batches(files, data, images_per_gpu=2, rank=0, world=1, pin_memory=False))
    assert [image_id for one in tested for image_id in one.image_ids] == [one.image_id for one in files.records]
    assert {one.image_id for many in tested for one in many.skipped} == bad
    assert [index for one in tested for index in one.indices] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert [len(one.batch.images) for one in tested] == [1, 2, 1, 2, 2, 1]
    alone = list(batching.test_batches(files, data, images_per_gpu=1, rank=0, world=11, pin_memory=False))
    assert alone[0].batch is None and len(alone) == 1


STOPPED_AT_A_FORK = """
import os, signal
from gndet.data.workers import map_ahead
from gndet.distributed.signals import Stop, StopSignals

moment, number = sys.argv[1], int(sys.argv[2])
with StopSignals() as signals, signals.at_once():  # its thread receives what the main thread has masked
    os.register_at_fork(**{moment: lambda: os.kill(os.getpid(), number)})
    try:
        list(map_ahead(abs, range(3), workers=1, on_death=lambda *_: None))
    except Stop:
        print("stopped")
"""


@pytest.mark.parametrize("moment", ["before", "after_in_parent"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGURG])
def test_a_stop_signal_during_the_fork_of_a_worker_is_not_lost(moment: str, number: int) -> None:
    command = [sys.executable, "-c", f"import sys{STOPPED_AT_A_FORK}", moment, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("stopped\n", "", 0)

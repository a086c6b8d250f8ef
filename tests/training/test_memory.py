"""The limit on tensor memory counts living tensors and raises when it is exceeded."""

import pytest
import torch

from gndet.errors import out_of_memory
from gndet.training.memory import TensorBytes, largest_fitting, limited

CPU = torch.device("cpu")


def test_bytes_are_counted_while_tensors_live_and_views_are_not_counted() -> None:
    with TensorBytes(10**9, resident=500) as counted:
        a = torch.ones(1000)  # 4,000 bytes
        b = a[10:].reshape(2, 495).add_(1)  # a view, written in place
        assert counted.live == 4_500
        c = a.double()
        assert counted.live == 12_500 and b.sum() == 1980
        del c
        assert counted.live == 4_500 and counted.peak >= 12_500
        del a, b
        assert counted.live == 500


def test_what_autograd_keeps_for_the_backward_pass_counts() -> None:
    x = torch.randn(1000, requires_grad=True)
    with TensorBytes(10**9) as counted:
        y = x.exp()  # kept: its own derivative
        z = y.sum()
        del y
        assert counted.live == 4_004
        z.backward()
        del z
        assert counted.live == x.grad.nbytes == 4_000


def test_a_backward_pass_over_the_limit_raises() -> None:
    x = torch.randn(1000, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError, match="MiB of tensors, the limit is"), limited(CPU, 7_000):
        x.exp().sum().backward()  # exp 4,000, its sum 4, the gradient 4,000
    with limited(CPU, 13_000):
        x.exp().sum().backward()


def test_a_real_failure_to_allocate_is_recognized() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**55)
    assert out_of_memory(error.value)
    # cuDNN, cuBLAS and the driver raise plain errors with their own words
    for words in (
        "GET was unable to find an engine to execute this computation", "CUBLAS_STATUS_ALLOC_FAILED when",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory", "CUDA error: out of memory",
    ):  # fmt: skip
        assert out_of_memory(RuntimeError(words))
    for words in ("mat1 and mat2 shapes cannot be multiplied", "out of resource: shared memory, Required: 262144"):
        assert not out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(("cached", "freed"), [(0, 0), (300, 0), (301, 1)])
def test_what_an_evaluation_leaves_in_the_cache_is_freed_if_it_would_let_a_step_pass_the_limit(
    cached: int, freed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocator of 1,000 bytes with 200 in use, and a limit of 500; steps within the limit free nothing."""
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200 + cached)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: said.append(f"{share:g}"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: said.append("freed"))
    with limited(torch.device("cuda", 0), 500):
        said.append("step")
    assert said == [*["freed"] * freed, "0.5", "step", "1"]


@pytest.mark.parametrize("limit", range(12))
def test_the_largest_that_fits_is_found_with_few_trials(limit: int) -> None:
    tried = []

    def fits(num: int) -> bool:
        tried.append(num)
        return num <= limit

    candidates = [1, 2, 3, 4, 6, 8, 11]
    assert largest_fitting(candidates, fits) == max([0, *(num for num in candidates if num <= limit)])
    assert len(tried) <= 3 and len(set(tried)) == len(tried)

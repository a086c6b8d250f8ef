"""Measure what a checkpoint costs a training run: the copy, the write in the background, and the slowdown.

    python -m benchmarks.saving configs/mask_rcnn_r50_fpn_scratch_gn_3x.yaml data.train.kind=shapes data.val.kind=shapes

The run is set up in a temporary folder (or in --folder, on the disk to measure), with a state for its optimizer.  Three
saves follow; while each is written, the main thread multiplies matrices in steps of about 20 ms, as it did before.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gndet.config.loading import load_config
from gndet.distributed.process import process
from gndet.training.batch_size import checkpoint_bytes
from gndet.training.checkpointing import Saver
from gndet.training.run import Progress
from gndet.training.setup import build_run


def step(matrix: torch.Tensor) -> float:
    """Do some work; return the seconds it took."""
    began = time.perf_counter()
    float((matrix @ matrix).sum())
    return time.perf_counter() - began


def main() -> None:
    """Print one line per save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, process("auto") as proc:
        cfg = load_config(options.config, [*options.overrides, f"out={folder}"])
        run, _ = build_run(cfg, Path(folder), proc, None)
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        run.optimizer.step()
        saver = Saver(run, 10, print)
        size = checkpoint_bytes(run.model, run.cfg.train) / 1e6
        print(f"{options.config}: {size:.0f} MB per checkpoint, {torch.get_num_threads()} threads, {proc.device}")
        matrix = torch.randn(1000, 1000, device=proc.device)
        usual = statistics.median([step(matrix) for _ in range(50)])
        for update in (1, 2, 3):
            began = time.perf_counter()
            saver._groups()
            copied = time.perf_counter() - began
            began = time.perf_counter()
            saver.save(Progress(update=update))
            returned = time.perf_counter() - began
            steps = []
            while not saver._written.done():
                steps.append(step(matrix))
            written = time.perf_counter() - began
            saver.wait()
            print(
                f"copied to memory in {1e3 * copied:.0f} ms, save() returned after {1e3 * returned:.0f} ms, on disk "
                f"after {1e3 * written:.0f} ms; a step took {1e3 * statistics.median(steps):.0f} ms meanwhile (at "
                f"most {1e3 * max(steps):.0f}), {1e3 * usual:.0f} before"
            )
        saver.wait()


if __name__ == "__main__":
    main()

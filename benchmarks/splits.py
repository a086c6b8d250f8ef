"""Train the same 20 updates of 8 images in four splits, with GN and with BN, and draw how far the runs diverge.

    python -m benchmarks.splits [--work FOLDER] [--picture docs/splits.png]

The splits are 8 micro-batches of 1 image, 4 of 2, 1 of 8, and 2 ranks with 2 micro-batches of 2, on the quickstart's
model and data.  Runs that the folder already holds are not repeated.
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import load_file

from gndet.distributed.children import python_command

matplotlib.use("Agg")
import matplotlib.pyplot as plt

UPDATES = 20
SPLITS = {"8 x 1": (1, 1), "4 x 2": (2, 1), "1 x 8": (8, 1), "2 processes x 2 x 2": (2, 2)}  # images at once, ranks
NORMS = {"gn": "Group Normalization", "bn": "Batch Normalization"}
PRECISIONS = ("float64", "float32")
REFERENCE = "1 x 8"
OVERRIDES = (
    "train.global_batch=8", f"train.schedule.updates={UPDATES}", "train.schedule.reference_batch=8",
    "train.schedule.warmup=5", "train.log_every=1", "train.eval_every=0", "data.val.count=4",
)  # fmt: skip


def train(out: Path, norm: str, precision: str, split: str) -> None:
    """Train one run, unless it exists."""
    if (out / "last").exists():
        return
    images, world = SPLITS[split]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m"] if world > 1 else []
    words = [
        *launcher, "gndet.cli", "train", "configs/quickstart.yaml", f"out={out}", f"model.norm.kind={norm}",
        f"train.precision={precision}", f"train.images_per_gpu={images}", *OVERRIDES,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // world, 1))}
    subprocess.run(python_command(*words), check=True, env=environment, stdout=subprocess.DEVNULL)


def losses(out: Path) -> torch.Tensor:
    """Return the loss of every update."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["kind"] == "train"], dtype=torch.float64)


def weights(out: Path) -> torch.Tensor:
    """Return all weights after the last update as one vector."""
    tensors = load_file(out / "last" / "model.safetensors")
    learned = [name for name in sorted(tensors) if not name.endswith(("running_mean", "running_var", "tracked"))]
    return torch.cat([tensors[name].double().flatten() for name in learned])


def draw(folder: Path, picture: Path) -> None:
    """Draw losses above and their relative difference to the unsplit run below; GN on the left, BN on the right."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), sharex=True, sharey="row", layout="constrained")
    updates = range(1, UPDATES + 1)
    styles = dict(zip(SPLITS, ("-", "--", ":", "-."), strict=True))
    for column, (norm, title) in enumerate(NORMS.items()):
        above, below = axes[:, column]
        for split in SPLITS:
            label = split.replace("x", "×")
            above.plot(updates, losses(folder / f"{norm}-float64-{split}"), styles[split], label=label)
            for precision, color in zip(PRECISIONS, ("C0", "C1"), strict=True):
                reference = losses(folder / f"{norm}-{precision}-{REFERENCE}")
                apart = ((losses(folder / f"{norm}-{precision}-{split}") - reference) / reference).abs()
                if split != REFERENCE:
                    below.semilogy(
                        updates, apart.clamp(min=1e-17), styles[split], color=color, label=f"{precision}, {label}"
                    )
        above.set_title(title)
        above.legend(title="float64; micro-batches × images", fontsize=8, title_fontsize=8)
        below.set_xlabel("update")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("relative difference to 1 × 8")
    axes[1, 0].legend(fontsize=7, ncols=2, loc="center right")
    axes[0, 0].set_xticks(range(0, UPDATES + 1, 5))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--work", type=Path, help="keep the runs here; a temporary folder by default")
parser.add_argument("--picture", type=Path, default=Path("docs/splits.png"))
options = parser.parse_args()
with tempfile.TemporaryDirectory() as temporary:
    folder = options.work or Path(temporary)
    print("norm  precision  split                loss, largest difference of a step   weights, difference at the end")
    for norm in NORMS:
        for precision in PRECISIONS:
            for split in (REFERENCE, *(split for split in SPLITS if split != REFERENCE)):
                out, reference = (folder / f"{norm}-{precision}-{s}" for s in (split, REFERENCE))
                train(out, norm, precision, split)
                apart = ((losses(out) - losses(reference)) / losses(reference)).abs().max()
                moved = (weights(out) - weights(reference)).norm() / weights(reference).norm()
                print(f"{norm:5} {precision:10} {split:20} {apart:>25.1e} {moved:>32.1e}", flush=True)
    draw(folder, options.picture)

"""A toy data set of pictures in folders per class, and a classifier small enough to train in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLORS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}  # by class
CONFIG: dict[str, Any] = {
    "task": "classification", "device": "cpu",
    "model": {"norm": {"kind": "gn", "channels_per_group": 16}, "backbone": {"depth": 18}},
    "data": {"crop": {"size": 32}, "workers": 0, "cache": ""},
    "train": {
        "global_batch": 4, "images_per_gpu": 2, "ema": 0.9, "log_every": 1, "eval_every": 0, "checkpoint_every": 2,
        "keep_last": 9, "norm_images": 1, "report": False,
        "optimizer": {"lr": 0.02, "norm_weight_decay": 1e-4},
        "schedule": {"updates": 6, "warmup": 2, "steps": [4], "reference_batch": 4},
    },
}  # fmt: skip


def write_classes(root: Path, counts: dict[str, int] | None = None, size: tuple[int, int] = (40, 48)) -> Path:
    """Write pictures of noise around each class's color: ROOT/train/red/train-red-0.png.  Returns root."""
    for split, count in (counts or {"train": 5, "val": 2}).items():
        for label, (name, color) in enumerate(COLORS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng((label, number, split == "val"))
                pixels = rng.normal(color, 25, (*size, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}-{name}-{number}.png")
    return root

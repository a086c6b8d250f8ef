"""A toy data set of pictures in folders per class, and a classifier small enough to train in seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from gndet.checkpoint import save_checkpoint
from gndet.config.loading import load_config
from gndet.modeling.build import build_model

COLORS = {"blue": (80, 90, 180), "green": (80, 170, 80), "red": (190, 70, 70)}  # by class
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
    """Write pictures of each class's color, green with upright and red with level stripes, and noise.  Returns root.

    The files are ROOT/train/red/train-red-0.png ...
    """
    stripes = 60.0 * (np.indices(size) // 6 % 2 * 2 - 1)[..., None]  # (2, h, w, 1): level, upright
    for split, count in (counts or {"train": 5, "val": 2}).items():
        for label, (name, color) in enumerate(COLORS.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng((label, number, split == "val"))
                pixels = rng.normal(color, 25, (*size, 3)) + {"red": stripes[0], "green": stripes[1]}.get(name, 0.0)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{split}-{name}-{number}.png")
    return root


def random_classifier(folder: Path, *overrides: str) -> Path:
    """Save a checkpoint of a classifier of random weights and norms, whose probabilities differ.  Returns its folder.

    Its data.root is folder/set.
    """
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG | {"data": CONFIG["data"] | {"root": str(folder / "set")}}))
    cfg = load_config(folder / "tiny.yaml", [f"out={folder / 'run'}", *overrides])
    torch.manual_seed(0)
    model = build_model(cfg.model, len(COLORS))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm." in name and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
        model.classifier.logits.weight.normal_(0, 1)
        seen = torch.stack([torch.randint(low, low + 60, (3, 64, 64)) for low in (0, 60, 120, 180)]).byte()
        std, mean = torch.std_mean(model.eval().classify(seen, torch.tensor([[64, 64]] * 4), False), 0)
        model.classifier.logits.weight.div_(std[:, None])  # no class always wins
        model.classifier.logits.bias.sub_(mean).div_(std)
    meta = {"config": cfg.model_dump(mode="json"), "classes": list(COLORS), "category_ids": [1, 2, 3]}
    save_checkpoint(folder / "checkpoint", {"model": model.state_dict()}, meta)
    return folder / "checkpoint"

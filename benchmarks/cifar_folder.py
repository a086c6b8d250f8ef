"""Write real CIFAR-10 pictures as a folder of pictures per class: `python benchmarks/cifar_folder.py NPZ OUT`.

NPZ holds images (n, 32, 32, 3) uint8 RGB and labels (n,).  Of each class, four fifths of the pictures, chosen by a
fixed seed, go to OUT/train/CLASS, the others to OUT/val/CLASS, as PNG files.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # by label
SEED, SHARE = 0, 0.8  # of the choice; share of the pictures to train on


def write_folders(source: Path, out: Path) -> dict[str, int]:
    """Write the pictures.  Returns how many are in train and in val."""
    content = np.load(source, allow_pickle=False)
    images, labels, counts = content["images"], content["labels"], {"train": 0, "val": 0}
    for label, name in enumerate(CLASSES):
        places = np.random.default_rng((SEED, label)).permutation(np.flatnonzero(labels == label))
        first = round(SHARE * len(places))
        for split, chosen in (("train", places[:first]), ("val", places[first:])):
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for place in chosen.tolist():
                Image.fromarray(images[place]).save(folder / f"{place:05d}.png")
            counts[split] += len(chosen)
    return counts


if __name__ == "__main__":
    print(write_folders(Path(sys.argv[1]), Path(sys.argv[2])))

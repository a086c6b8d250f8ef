"""Compare starts: fine-tune one detector from one BN detector in every way, for the same number of updates.

python -m benchmarks.starts RUN_WITH_BN --root datasets/bccd --out runs/starts [--updates 200] [--jobs 2]

RUN_WITH_BN is a gndet run trained with bn, without weight standardization. With --backbone-only, pyramid and heads are
new, as with an ImageNet backbone. Finished runs are not repeated. Prints a table of box AP50 and AP: the mean over the
seeds and each value.
"""

import argparse
import json
import os
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gndet.checkpoint import load_checkpoint, resolve, save_checkpoint
from gndet.distributed.children import python_command

GN = "model.norm={kind: gn, channels_per_group: 16}"
STARTS = {
    "GN, random": [GN, "train.weights=''"],
    "GN, copied by name": [GN, "train.norm_policy=affine"],
    "GN, converted, damp 0": [GN, "train.norm_policy=convert", "train.norm_damp=0"],
    "GN, converted, damp 1": [GN, "train.norm_policy=convert", "train.norm_damp=1"],
    "GN, converted, damp 4": [GN, "train.norm_policy=convert", "train.norm_damp=4"],
    "GN, calibrated (damp 1)": [GN, "train.norm_policy=calibrate"],
}
BACKBONE_ONLY = STARTS | {
    "hybrid: frozen BN backbone, GN elsewhere": [GN, "train.norm_policy=hybrid"],
    "frozen BN backbone, no norm elsewhere": ["model.norm={kind: none}", "model.backbone.norm={kind: frozen_bn}"],
}
WHOLE = STARTS | {
    "hybrid: frozen BN backbone, the rest converted, damp 1": [
        GN, "model.backbone.norm={kind: frozen_bn}", "train.norm_policy=convert"
    ],
    "frozen BN everywhere": ["model.norm={kind: frozen_bn}"],
}  # fmt: skip


def backbone_of(run: Path, out: Path) -> Path:
    """Save the backbone of a run as a checkpoint; return its path."""
    if not out.exists():
        saved = load_checkpoint(resolve(run))
        tensors = {key: value for key, value in saved.groups["model"].items() if key.startswith("backbone.")}
        save_checkpoint(out, {"model": tensors}, saved.meta)
    return out


def score(folder: Path) -> dict[str, float]:
    """Return the last evaluation of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"][-1]


def run(words: list[str], folder: Path) -> dict[str, float]:
    """Train in a process with one thread, unless the run is finished; return its score."""
    if not (folder / "metrics.jsonl").exists() or '"evaluation"' not in (folder / "metrics.jsonl").read_text():
        command = python_command("gndet.cli", "train", *words, f"out={folder}", "--fresh")
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return score(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--config", default="configs/bccd_r18_gn_scratch.yaml")
    parser.add_argument("--root", required=True, help="data.root")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.0003, 0.001])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides for every run")
    parser.add_argument("--backbone-only", action="store_true")
    parser.add_argument("--edge", type=int, default=160, help="shorter edge of the pictures, pixels")
    options = parser.parse_args()
    weights = backbone_of(options.run, options.out / "backbone") if options.backbone_only else options.run
    starts = BACKBONE_ONLY if options.backbone_only else WHOLE
    common = [
        options.config, f"data.root={options.root}", f"train.weights={weights}", "data.workers=0",
        "model.norm.weight_standardization=false", f"train.schedule.updates={options.updates}",
        "train.schedule.warmup=20", "train.eval_every=0", "train.checkpoint_every=0", "train.vis_images=0",
        f"data.shortest_edge=[{options.edge}]", f"data.shortest_edge_test={options.edge}",
        f"data.max_edge={2 * options.edge}", *options.set,
    ]  # fmt: skip
    jobs = {
        (name, lr, seed): [*common, *words, f"train.optimizer.lr={lr}", f"seed={seed}"]
        for seed in options.seeds for lr in options.lrs for name, words in starts.items()
    }  # fmt: skip
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {}
        for (name, lr, seed), words in jobs.items():
            folder = options.out / f"{list(starts).index(name)}-{lr:g}-{seed}"
            waiting[name, lr, seed] = pool.submit(run, words, folder)
        results = {key: future.result() for key, future in waiting.items()}
    print("| start |" + "".join(f" lr {lr:g}: AP50 | AP |" for lr in options.lrs))
    print("|---|" + "---|---|" * len(options.lrs))
    for name in starts:
        row = f"| {name} |"
        for lr in options.lrs:
            for key in ("box/AP50", "box/AP"):
                values = [100 * (results[name, lr, seed][key] or 0.0) for seed in options.seeds]
                row += f" {statistics.mean(values):.1f} ({', '.join(f'{v:.1f}' for v in values)}) |"
        print(row)


if __name__ == "__main__":
    main()

"""Report what `gndet check` found, as lines and as JSON: each data set's findings and a summary of its content."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gndet.data.datasets.faults import SEVERITIES, describe_finding, several
from gndet.data.records import Dataset, Finding
from gndet.text import printable, text_table

SIDES = ("widths", "heights")
LISTED_CLASSES = 100  # others are only counted
SMALL, LARGE = 32**2, 96**2  # pixels of area, as COCO's metric divides objects


class Checked(NamedTuple):
    """A data set that was read, with its findings."""

    name: str  # train, val, or "" for a JSON file by itself
    dataset: Dataset
    folder: Path | None  # of the pictures; None if they are drawn, or not looked for

    @property
    def has_pictures(self) -> bool:
        """Whether there are pictures to decode: they are drawn, or their folder could be listed."""
        refused = any(finding.code == "folder-missing" for finding in self.dataset.findings)
        return not refused and (self.folder is not None or self.name != "")


def report_lines(checked: Checked) -> list[str]:
    """Write out a data set: what is wrong with it, then what it contains."""
    dataset = checked.dataset
    lines = [f"\n{checked.name}: {dataset.name}" if checked.name else f"\n{dataset.name}"]
    lines += [f"  {note}" for note in dataset.notes]
    return [*lines, *finding_lines(dataset.findings), *summary_lines(summarize(dataset))]


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Write out findings, grouped by severity."""
    lines = []
    for severity, title in SEVERITIES.items():
        described = [describe_finding(finding) for finding in findings if finding.severity == severity]
        lines += [f"  {title}"] if described else []
        for first, *others in described:
            lines += [f"    {severity} {first}", *(f"      {line}" for line in others)]
    return lines


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Count images, sizes (width, height), objects and classes of a data set; widths, heights: least and largest."""
    num, sizes, counts, areas, crowd = len(dataset.classes), set(), [], [np.zeros(0)], 0
    objects, images = np.zeros((2, num), dtype=np.int64)
    for record in dataset.records:
        sizes.add(record.size[::-1])
        counts.append(len(record.labels))
        areas.append(record.area)
        crowd += int(np.count_nonzero(record.crowd))
        objects += np.bincount(record.labels, minlength=num)
        images += np.bincount(np.unique(record.labels), minlength=num)
    classes = zip(dataset.category_ids, dataset.classes, objects.tolist(), images.tolist(), strict=True)
    return {
        "images": len(counts), "sizes": len(sizes), "smallest": min(sizes, default=None, key=_by_pixels),
        "largest": max(sizes, default=None, key=_by_pixels), "objects": sum(counts), "crowd_regions": crowd,
        **{side: (min(ends), max(ends)) for side, ends in zip(SIDES, zip(*sizes, strict=True), strict=False)},
        "most_objects": max(counts, default=0),
        "small_medium_large": np.histogram(np.concatenate(areas), [0, SMALL, LARGE, np.inf])[0].tolist(),
        "classes": [{"id": id, "name": name, "objects": n, "images": m} for id, name, n, m in classes],
    }  # fmt: skip


def _by_pixels(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return size[0] * size[1], size


def sizes_in_words(summary: dict[str, Any]) -> str:
    """Name one or two sizes as width x height; give the ends of the widths and heights of more."""
    if summary["sizes"] <= 2:
        named = dict.fromkeys((summary["smallest"], summary["largest"]))
        return f"{' and '.join(f'{width} x {height}' for width, height in named)} pixels"
    widths, heights = (f"{low} to {high}" if low < high else f"{low}" for low, high in (summary[k] for k in SIDES))
    return f"widths {widths}, heights {heights} pixels ({summary['sizes']} sizes)"


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Write out a summary."""
    if not summary["images"]:
        return ["  no image is left"]
    total = max(summary["objects"], 1)
    small, medium, large = (f"{100 * count / total:.0f} %" for count in summary["small_medium_large"])
    images, objects = several(summary["images"], "image"), several(summary["objects"], "object")
    lines = [
        f"  {images} of {sizes_in_words(summary)}, {objects}, "
        f"{summary['objects'] / summary['images']:.1f} per image, at most {summary['most_objects']}",
        f"  objects: {small} small (area under 32 x 32 pixels), {medium} medium, {large} large (96 x 96 or more)",
    ]
    rows = [["label", "id", "objects", "images", "class"]]
    for label, entry in enumerate(summary["classes"][:LISTED_CLASSES]):
        counts = (label, entry["id"], entry["objects"], entry["images"])
        rows.append([*map(str, counts), printable(entry["name"])])
    lines += [f"  {line}" for line in text_table(rows, left=(4,)).splitlines()]
    left = len(summary["classes"]) - LISTED_CLASSES
    return lines + ([f"  and {left} more classes"] if left > 0 else [])


def json_report(sets: list[Checked], both: Sequence[Finding], *, refused: bool) -> dict[str, Any]:
    """Return the report: {"gndet", "refused": bool, "sets": [{"set", "findings", "summary", ...}], "both": [...]}."""
    parts = [
        {
            "set": name, "annotations": dataset.name, "images": str(folder) if folder else None,
            "findings": [_plain(finding) for finding in dataset.findings], "notes": list(dataset.notes),
            "summary": summarize(dataset),
        }
        for name, dataset, folder in sets
    ]  # fmt: skip
    return {"gndet": "check", "refused": refused, "sets": parts, "both": [_plain(finding) for finding in both]}


def _plain(finding: Finding) -> dict[str, Any]:
    return finding._asdict() | {"outcome": SEVERITIES[finding.severity]}

"""What `gndet check` found, as lines and as JSON: the findings of each data set, and a summary of what is in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gndet.data.datasets.faults import REFUSED, SEVERITIES, describe, several
from gndet.data.datasets.segmentation import printable
from gndet.data.records import Dataset, Finding
from gndet.evaluation.tables import text_table

LISTED_CLASSES = 100  # more are counted only
SMALL, LARGE = 32**2, 96**2  # pixels of area, as COCO's metric divides objects


class Checked(NamedTuple):
    """A data set as it was found."""

    which: str  # train, val, or "" for a file of its own
    dataset: Dataset
    folder: Path | None  # of its pictures; None where they are not looked for

    @property
    def has_pictures(self) -> bool:
        """Whether its pictures can be looked at: they are drawn, or their folder could be listed."""
        refused = any(one.code == "folder-missing" for one in self.dataset.findings)
        return not refused and (self.folder is not None or self.which != "")


def report(checked: Checked) -> list[str]:
    """A data set in lines: what is wrong, then what is in it."""
    dataset = checked.dataset
    lines = [f"\n{checked.which}: {dataset.name}" if checked.which else f"\n{dataset.name}"]
    lines += [f"  {note}" for note in dataset.notes]
    return [*lines, *finding_lines(dataset.findings), *summary_lines(summarize(dataset))]


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Findings in lines, under their severity."""
    lines = []
    for severity, title in SEVERITIES.items():
        some = [one for one in findings if one.severity == severity]
        lines += [f"  {title}"] if some else []
        for first, *others in map(describe, some):
            lines += [f"    {severity} {first}", *(f"      {line}" for line in others)]
    return lines


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Count what is in a data set: images, sizes (width, height), objects, classes."""
    sizes: set[tuple[int, int]] = set()
    of_image, areas, crowd = [np.zeros(0, np.int64)], [np.zeros(0)], 0
    for record in dataset.records:
        sizes.add(record.size[::-1])
        of_image.append(record.labels)
        areas.append(record.area)
        crowd += int(np.count_nonzero(record.crowd))
    labels, counts = np.concatenate(of_image), list(map(len, of_image[1:]))
    pairs = np.unique(np.repeat(np.arange(len(counts)), counts) * max(len(dataset.classes), 1) + labels)
    objects = np.bincount(labels, minlength=len(dataset.classes)).tolist()
    images = np.bincount(pairs % max(len(dataset.classes), 1), minlength=len(dataset.classes)).tolist()
    classes = zip(dataset.category_ids, dataset.classes, objects, images, strict=True)
    return {
        "images": len(counts), "sizes": len(sizes), "smallest": min(sizes, default=None, key=np.prod),
        "largest": max(sizes, default=None, key=np.prod), "objects": len(labels), "crowd_regions": crowd,
        "most_objects": max(counts, default=0),
        "small_medium_large": np.histogram(np.concatenate(areas), [0, SMALL, LARGE, np.inf])[0].tolist(),
        "classes": [{"id": id, "name": name, "objects": n, "images": m} for id, name, n, m in classes],
    }  # fmt: skip


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """A summary in lines."""
    if not summary["images"]:
        return ["  no image is left"]
    (w, h), (wide, high), total = summary["smallest"], summary["largest"], max(summary["objects"], 1)
    sizes = f"{w} x {h}" if summary["sizes"] == 1 else f"{w} x {h} to {wide} x {high} (in {summary['sizes']} sizes)"
    small, medium, large = (f"{100 * count / total:.0f} %" for count in summary["small_medium_large"])
    lines = [
        f"  {several(summary['images'], 'image')} of {sizes} pixels, {several(summary['objects'], 'object')}, "
        f"{summary['objects'] / summary['images']:.1f} an image, {summary['most_objects']} at the most",
        f"  {small} of the objects small (area under 32 x 32 pixels), {medium} medium, {large} large (from 96 x 96 on)",
    ]
    rows = [["label", "id", "objects", "images", "class"]]
    for label, one in enumerate(summary["classes"][:LISTED_CLASSES]):
        counts = (label, one["id"], one["objects"], one["images"])
        rows.append([*map(str, counts), printable(one["name"])])
    lines += [f"  {line}" for line in text_table(rows, left=(4,)).splitlines()]
    left = len(summary["classes"]) - LISTED_CLASSES
    return lines + ([f"  and {left} classes more"] if left > 0 else [])


def to_json(sets: list[Checked], both: Sequence[Finding]) -> dict[str, Any]:
    """The report: {"refused": bool, "sets": [{"name", "set", "findings", "summary", ...}], "both": findings}."""
    findings = [finding for one in sets for finding in one.dataset.findings] + list(both)
    return {
        "refused": any(one.severity == REFUSED for one in findings),
        "sets": [
            {
                "set": one.which, "annotations": one.dataset.name, "images": str(one.folder) if one.folder else None,
                "findings": [_plain(finding) for finding in one.dataset.findings], "notes": list(one.dataset.notes),
                "summary": summarize(one.dataset),
            }
            for one in sets
        ],
        "both": [_plain(finding) for finding in both],
    }  # fmt: skip


def _plain(finding: Finding) -> dict[str, Any]:
    return finding._asdict() | {"outcome": SEVERITIES[finding.severity]}

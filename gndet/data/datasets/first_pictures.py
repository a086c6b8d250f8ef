"""Look for values that need data.pixel_range in the first pictures of a data set, before a run starts.

Only files that may have more than 8 bits per channel are opened, and only those that have are decoded.
"""

from collections.abc import Iterable, Sequence

from gndet.data.datasets.deep_pictures import suited_range
from gndet.data.datasets.faults import Fault, Findings, several
from gndet.data.datasets.images import Unusual, picture_size, read_image
from gndet.data.datasets.packed import PackedRecords
from gndet.data.records import Finding
from gndet.errors import DataError

RANGED = ("picture-range", "picture-dim", "picture-clipped")  # data.pixel_range changes them
LOOKED_AT = 8  # pictures; `gndet check --images` decodes all
SUFFIXES = (".png", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".pgm", ".ppm", ".pnm")


def look_at_first(records: PackedRecords) -> tuple[tuple[Finding, ...], list[str]]:
    """Read the first pictures.  Returns what is refused, and a line on values that data.pixel_range should map."""
    found, values, odd = Findings(), list[tuple[float, float]](), 0
    for index in range(min(LOOKED_AT, len(records))):
        path, unusual = records.path(index), Unusual()
        if path.suffix.lower() not in SUFFIXES:
            continue
        try:
            picture_size(path, records.reading, unusual)
            if unusual.depth > 8:
                read_image(path, None, records.reading, unusual)
        except DataError as error:  # other faults of pictures are found when they are decoded
            if isinstance(error, Fault) and error.code in RANGED:
                found.add(error.code, f"image {records[index].image_id}: {error}", records[index].image_id)
        values += [unusual.values] if unusual.values else []
        odd += any(code in RANGED for code, _ in unusual.found)
    words = f"{odd} of the first {several(len(values), 'picture')} of more than 8 bits per channel"
    notes = [f"{words} hardly fit their range; {range_words(values, records.reading.pixel_range)}"] if odd else []
    return with_range(found.listed(), values, records.reading.pixel_range), notes


def with_range(
    findings: Iterable[Finding], values: Sequence[tuple[float, float]], pixel_range: tuple[float, float] | None
) -> tuple[Finding, ...]:
    """Name the data.pixel_range that suits all pictures of the set in the remedies of RANGED.

    values: the least and the largest of each picture of more than 8 bits per channel.
    """
    if not values:
        return tuple(findings)
    remedy = range_words(values, pixel_range)
    return tuple(found._replace(remedy=remedy) if found.code in RANGED else found for found in findings)


def range_words(values: Sequence[tuple[float, float]], pixel_range: tuple[float, float] | None) -> str:
    """Say which values pictures have, and which data.pixel_range maps them to 0 to 255."""
    least, most = min(low for low, _ in values), max(high for _, high in values)
    low, high = suited = suited_range(least, most)
    words = f"their values go from {least:g} to {most:g}: "
    if suited == (pixel_range or (0, 65535)):
        return f"{words}bring the pictures to one range of values"
    return f"{words}data.pixel_range=[{low:g},{high:g}] maps them to 0 to 255"

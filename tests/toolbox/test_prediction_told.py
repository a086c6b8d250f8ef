"""`gndet predict` takes odd pictures of a folder, and says in a line what it did with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gndet.distributed.process import Process
from gndet.evaluation.detector import Detector, load_detector
from gndet.toolbox.predict.predict import predict

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def detector(trained: Path) -> Detector:
    return load_detector(trained, ["data.workers=0", "data.pixel_range=[0,4095]"], Process(0, 1, CPU))


def test_animations_deep_pictures_and_other_files_are_told(tmp_path: Path, detector: Detector) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    frames = [Image.new("RGB", (64, 64), tint) for tint in ("red", "green", "blue")]
    for name in ("a.gif", "b.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    frames[0].save(folder / "c.jfif")
    Image.fromarray(np.full((64, 64), 4000, dtype=np.uint16)).save(folder / "d.png")
    frames[0].save(folder / "e.jpg")
    (folder / "e.jpg").write_bytes((folder / "e.jpg").read_bytes()[:-2])
    (folder / "notes.txt").write_text("")
    lines: list[str] = []
    predict(detector, [str(folder)], tmp_path / "out", CPU, lines.append)
    assert lines[0] == f"{folder}: passed over 1 .txt"
    assert lines[1] == "picture-16bit (1): 16-bit pictures scaled to 8 bits"
    assert lines[2] == "  d.png: values 0 to 4095 become 0 to 255 (data.pixel_range)"
    assert lines[3] == "picture-animated (2): animations, reduced to their first frame"
    assert lines[4] == "  a.gif: 3 frames" and lines[5] == "  b.webp: 3 frames"
    names = ["a.gif", "b.webp", "c.jfif", "d.png", "e.jpg"]
    assert [line.split(":")[0] for line in lines[6:11]] == [str(folder / name) for name in names]
    drawn = np.asarray(Image.open(tmp_path / "out" / "d.png"))
    assert abs(float(np.median(drawn)) - 255 * 4000 / 4095) < 1  # the run's range, not 65535

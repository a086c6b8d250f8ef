"""An exported classifier names the classes that gndet names, or it is not written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from classes import random_classifier, write_classes
from PIL import Image

import gndet
from gndet.cli.main import main
from gndet.errors import CheckpointError, DataError
from gndet.toolbox.onnx import classifier as onnx_classifier
from gndet.toolbox.onnx.classifier import classify_onnx, export_classifier
from gndet.toolbox.onnx.export import session

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("thin")
SIZES = [(40, 48), (90, 41), (33, 200), (20, 31)]  # height, width
VARIANTS = {
    "gn": (),
    "bn": ("model.norm={kind: bn}",),
    "frn, sigmoid": ("model.norm={kind: frn}", "model.classifier.loss=sigmoid"),
    "vgg": (
        "model.backbone={kind: vgg, depth: 16}", "model.classifier={pool_size: 2, fc_channels: [16], dropout: 0.5}",
    ),
}  # fmt: skip


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_the_file_has_the_probabilities_of_the_classifier(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    write_classes(tmp_path / "set")
    checkpoint, said = random_classifier(tmp_path, "data.crop.size=64", *overrides), list[str]()
    assert export_classifier(checkpoint, tmp_path / "out" / "c.onnx", [], said.append)
    assert any(line.startswith("equal on 6 of ") for line in said)
    classifier, file = gndet.load_classifier(checkpoint, "cpu"), tmp_path / "out" / "c.onnx"
    pictures = [noise(size, seed) // (seed + 1) for seed, size in enumerate(SIZES)]
    expected = np.stack([classifier.predict(picture).probabilities for picture in pictures])
    found = np.stack([classify_onnx(file, picture) for picture in pictures])
    assert np.abs(found - expected).max() < 1e-4 and expected.std(0).max() > 0.01
    about = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["blue", "green", "red"] and json.loads(about["crop"]) == 64


def test_a_file_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "set")
    checkpoint, file = random_classifier(tmp_path), tmp_path / "out" / "c.onnx"
    Image.fromarray(noise((40, 48))).save(tmp_path / "a.png")
    right = onnx_classifier.OneClassified.forward

    def wrong(self: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        return right(self, image) + (2e-4 if torch.onnx.is_in_onnx_export() else 0)

    with monkeypatch.context() as patch:
        patch.setattr(onnx_classifier.OneClassified, "forward", wrong)
        words = ["export", str(checkpoint), "--onnx", str(file), "--picture", str(tmp_path / "a.png")]
        assert main(words) == 1 and not file.exists()
    said = capsys.readouterr().out
    assert "mismatch on a picture of 32 x 32: probabilities 0.0002 apart" in said and "not written" in said
    assert main(words) == 0 and file.exists()


def test_what_does_not_fit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_classes(tmp_path / "set")
    checkpoint = random_classifier(tmp_path, "model.classifier.pool_size=2", "data.max_edge=64", "data.crop.size=64")
    file = tmp_path / "out" / "c.onnx"
    Image.fromarray(noise((64, 64))).save(tmp_path / "a.png")
    words = ["export", str(checkpoint), "--onnx", str(file), "--picture", str(tmp_path / "a.png")]
    assert main([*words, "--size", "64x64"]) == 2 and main([*words, "--no-masks"]) == 2
    assert "is a classifier, which has no masks" in capsys.readouterr().err
    assert main(words) == 0
    with pytest.raises(DataError, match="picture: 32 x 64 pixels after resizing; the file takes 64 x 64 only"):
        classify_onnx(file, noise((20, 40)))
    with pytest.raises(DataError, match="expected uint8"):
        classify_onnx(file, noise((20, 40)).astype(np.float32))
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(CheckpointError, match="its metadata lack shortest_edge"):
        classify_onnx(tmp_path / "bare.onnx", noise((20, 40)))

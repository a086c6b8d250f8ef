"""A classifier in Python names the classes that evaluation counts, whatever else is in the list."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from classes import random_classifier, write_classes
from PIL import Image

import gndet
from gndet.distributed.process import alone
from gndet.errors import CheckpointError, ConfigError, DataError
from gndet.evaluation.picture_classifier import PictureClassifier, evaluate_classifier

pytestmark = pytest.mark.usefixtures("thin")
SIZES = [(40, 48), (90, 41), (33, 200), (20, 31), (64, 64)]  # the crop is 32 x 32: the fourth is enlarged


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, thin: None) -> Path:
    folder = tmp_path_factory.mktemp("home")
    write_classes(folder / "set")
    random_classifier(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(home: Path) -> PictureClassifier:
    classifier = gndet.load_classifier(home / "checkpoint", "cpu")
    for parameter in classifier.model.classifier.logits.parameters():
        parameter.data.div_(10)  # or a probability would be 1 for every picture of one color
    return classifier


def noise(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_predictions_are_those_of_evaluation(home: Path, classifier: PictureClassifier) -> None:
    dataset, found = evaluate_classifier(classifier, alone("cpu"))
    files = [str(home / "set" / "val" / record.file_name) for record in dataset.records]
    predictions = classifier.predict(files)
    assert len({prediction.score for prediction in predictions}) == 6  # or nothing would be compared
    for place, prediction in enumerate(predictions):
        assert prediction.labels.tolist() == found.ranking.classes[place, :3].tolist()
        assert prediction.score == found.ranking.scores[place] and prediction.path == Path(files[place])
    streamed = list(classifier.predict(f"{home}/set/val/*/*.png"))
    assert [prediction.name for prediction in streamed] == [prediction.name for prediction in predictions]
    scores = classifier.evaluate()
    assert scores == found.scalars() and "top-1 error" in str(scores)
    assert classifier.evaluate(home / "set") == scores and classifier.evaluate(home / "tiny.yaml") == scores
    assert classifier.evaluate(home / "set" / "val") == scores


def test_the_network_sees_the_middle_of_the_resized_picture(classifier: PictureClassifier) -> None:
    """The crop is 32 of 37 pixels, as 224 of 256."""
    pixels = noise((80, 160))
    x = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None], (37, 74), mode="bilinear", antialias=True)
    with torch.no_grad():
        logits = classifier.model.classify(x[..., 2:34, 21:53], torch.tensor([[32, 32]]), False)
    expected = logits.double().softmax(1)[0].numpy()
    np.testing.assert_allclose(classifier.predict(pixels).probabilities, expected, rtol=1e-6)


@pytest.mark.parametrize("edge", [32, 128])
def test_a_picture_does_not_depend_on_its_batch_mates(home: Path, edge: int) -> None:
    """Narrow pictures that data.max_edge makes smaller than the crop are padded."""
    classifier = gndet.load_classifier(
        home / "checkpoint", "cpu", data={"max_edge": edge}, train={"precision": "float64"}
    )
    pictures = [noise(size, seed) for seed, size in enumerate(SIZES)]
    alone_each = [classifier.predict(picture) for picture in pictures]
    together, backward = classifier.predict(pictures, batch=5), classifier.predict(pictures[::-1], batch=3)[::-1]
    for single, first, second in zip(alone_each, together, backward, strict=True):
        np.testing.assert_allclose(first.probabilities, single.probabilities, rtol=0, atol=1e-12)
        np.testing.assert_allclose(second.probabilities, single.probabilities, rtol=0, atol=1e-12)
    assert max(prediction.probabilities.std() for prediction in together) > 0.1


def test_a_prediction_reads_like_those_of_other_libraries(classifier: PictureClassifier, tmp_path: Path) -> None:
    Image.fromarray(noise((40, 48))).save(tmp_path / "a.png")
    found = classifier.predict(tmp_path / "a.png")
    assert found.size == (40, 48) and len(found) == 3 and found.load().shape == (40, 48, 3)
    assert found.probabilities.sum() == pytest.approx(1) and [item["score"] for item in found] == sorted(
        found.probabilities, reverse=True
    )
    assert found.top(1) == [{"score": found.score, "label": found.name}] == list(found)[:1]
    assert repr(found).startswith(
        f"<ClassPrediction of a.png: {found.name} "
    ) and "of 3 classes, resnet-18, gn" in repr(classifier)
    assert pickle.loads(pickle.dumps(found)).name == found.name


def test_equal_probabilities_keep_the_order_of_the_classes() -> None:
    prediction = gndet.ClassPrediction(
        (1, 1), ("b", "a", "c"), None, np.array([0.25, 0.5, 0.25]), lambda: noise((1, 1))
    )
    assert prediction.labels.tolist() == [1, 0, 2]


def test_with_a_sigmoid_each_class_has_its_own_probability(home: Path) -> None:
    options = {"model": {"classifier": {"loss": "sigmoid"}}}
    classifier = gndet.load_classifier(home / "checkpoint", "cpu", **options)
    pixels = noise((32, 32))
    softmax = gndet.load_classifier(home / "checkpoint", "cpu").predict(pixels).probabilities
    found = classifier.predict(pixels).probabilities
    odds = found / (1 - found)
    np.testing.assert_allclose(odds / odds.sum(), softmax)  # both come from the same logits


def test_what_is_no_classifier_or_no_option_is_refused(
    home: Path, classifier: PictureClassifier, tmp_path: Path, trained: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"a detector, not a classifier; gndet\.load loads it"):
        gndet.load_classifier(trained)
    with pytest.raises(CheckpointError, match=r"a classifier, not a detector; gndet\.load_classifier loads it"):
        gndet.load(home / "checkpoint")
    with pytest.raises(ConfigError, match="batch: got 0"):
        classifier.predict(noise((9, 9)), batch=0)
    with pytest.raises(DataError, match=r"\(height, width, 3\)"):
        classifier.predict(noise((9, 9))[..., 0])
    write_classes(tmp_path / "more")
    (tmp_path / "more" / "val" / "red").rename(tmp_path / "more" / "val" / "pink")
    (tmp_path / "more" / "train" / "red").rename(tmp_path / "more" / "train" / "pink")
    with pytest.raises(DataError, match="has the classes blue, green, pink; the classifier knows blue, green, red"):
        classifier.evaluate(tmp_path / "more")

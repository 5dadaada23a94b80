"""Labels from a file apart, several for an image, what is confused with what, and several crops of an image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from torchvision.transforms import functional as TF

from fdscale import UserError
from fdscale.classify import _scores
from fdscale.data.augment import eval_view
from fdscale.data.shards import make
from fdscale.tasks.classification import Tally
from fdscale.tasks.labels import read_labels


def test_forms_of_files(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_text(json.dumps([[3, 4], [], [9]]))
    real = read_labels(str(path), 10)
    keys = ["n01/ILSVRC2012_val_00000001", "ILSVRC2012_val_00000003", "ILSVRC2012_val_00000002"]
    assert real(keys).tolist() == [[3, 4], [9, -1], [-1, -1]]
    path.write_text(json.dumps({"a/b": 2, "c": [1, 0]}))
    assert read_labels(str(path), 10)(["a/b", "x/c"]).tolist() == [[2, -1], [1, 0]]
    path.write_text("cat 4\n\ndog 5 6\n")
    assert read_labels(str(path), 10)(["pets/dog", "pets/cat"]).tolist() == [[5, 6], [4, -1]]
    for text, message in (
        ("cat four\n", "line 1: expected a name and class numbers, got 'cat four'"),
        ('{"cat": 10}', "cat has the class 10; expected numbers from 0 to 9"),
        ('{"cat": true}', "cat has the class True"),
        ('{"cat": ', "no JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_labels(str(path), 10)
    with pytest.raises(UserError, match="not readable"):
        read_labels(str(tmp_path / "missing"), 10)
    path.write_text("cat 4\n")
    with pytest.raises(UserError, match="has no entry for the sample 'pets/dog'"):
        read_labels(str(path), 10)(["pets/dog"])


def test_one_of_several_labels_is_enough_and_none_does_not_count() -> None:
    """ReaL's accuracy, as google-research/reassessed-imagenet computes it."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(300, 7))
    sets = [rng.choice(7, size=rng.integers(0, 4), replace=False).tolist() for _ in range(300)]
    labels = torch.tensor([one + [-1] * (3 - len(one)) for one in sets])
    tally = Tally(300, 7)
    for part in np.array_split(rng.permutation(300), 5):
        some = torch.from_numpy(part)
        tally.add(some, labels[some], torch.from_numpy(scores)[some], torch.ones(len(part)))
    found = tally.result()
    judged = [int(np.argmax(row)) in one for row, one in zip(scores, sets, strict=True) if one]
    assert found.samples == len(judged)
    assert found.top1 == np.mean(judged)
    first5 = [bool({*np.argsort(-row)[:5]} & {*one}) for row, one in zip(scores, sets, strict=True) if one]
    assert found.top5 == np.mean(first5)


def test_confusions_are_sklearns() -> None:
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(0, 6, 400), rng.normal(size=(400, 6))
    tally = Tally(400, 6)
    tally.add(torch.arange(400), torch.from_numpy(labels), torch.from_numpy(scores), torch.ones(400))
    found = tally.result().confusion
    expected = confusion_matrix(labels, scores.argmax(1))
    np.fill_diagonal(expected, 0)
    assert found[:, 2].tolist() == sorted(expected[expected > 0].tolist(), reverse=True)
    for label, predicted, often in found.tolist():
        assert expected[label, predicted] == often


@pytest.mark.parametrize("decoding", ["exact", "pillow"])
def test_crops_are_torchvisions(decoding: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    views = eval_view(buffer.getvalue(), 32, crop_ratio=0.8, decoding=decoding, crops=10)  # not resized: 32 / 0.8 is 40
    expected = torch.stack([TF.pil_to_tensor(view) for view in TF.five_crop(image, [32, 32])])
    assert torch.equal(views[:5], expected)
    assert torch.equal(views[5:], expected.flip(3))
    assert torch.equal(eval_view(buffer.getvalue(), 32, crop_ratio=0.8, decoding=decoding, crops=5), expected)
    assert torch.equal(eval_view(buffer.getvalue(), 32, crop_ratio=0.8, decoding=decoding), expected[4])


def test_probabilities_of_crops_are_averaged() -> None:
    images = torch.randn(3, 5, 3, 4, 4)
    weight = torch.randn(6, 48)

    def classifier(views: torch.Tensor) -> torch.Tensor:
        return views.flatten(1) @ weight.T

    mean = torch.stack([classifier(images[:, i]).softmax(1) for i in range(5)]).mean(0)
    torch.testing.assert_close(_scores(classifier, images).exp(), mean)


def test_folders_that_are_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    """As ImageNet-V2's: 10 is not between 1 and 2."""
    for number in range(12):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "in" / str(number) / "image.png")
    make(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == [str(number) for number in range(12)]

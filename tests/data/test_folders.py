"""A folder of class folders, read as it is, is the set that `shards make` would pack."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fdscale import UserError, cli, config
from fdscale.data.augment import eval_view
from fdscale.data.folders import Folders, is_folder
from fdscale.data.lost import Lost
from fdscale.data.shards import make
from fdscale.data.stream import evaluation_batches
from fdscale.inputs import names_of_classes, open_heldout, open_inputs


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("10", "9", "0"):
        for number in range(4):
            path = tmp_path / "images" / name / ("deep" if number == 3 else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)
            pixels[:10] = int(name) * 20
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def seen(index: object, ranks: int) -> dict[str, tuple[int, bytes]]:
    found = {}
    for rank in range(ranks):
        for batch in evaluation_batches(
            index, lambda data: eval_view(data, size=16), micro_batch=2, rank=rank, world=ranks, workers=0, classes=3
        ):
            for place, (_, key) in enumerate(batch["origin"]):
                if batch["weights"][place]:
                    found[key] = (int(batch["labels"][place]), batch["images"][place].numpy().tobytes())
    return found


def test_it_is_what_make_packs(classes: Path, tmp_path: Path) -> None:
    index = Folders(str(classes))
    assert index.names == ["0", "9", "10"] == names_of_classes(index)
    assert index.counts.tolist() == [4, 4, 4]
    packed = make(classes, tmp_path / "shards", samples_per_shard=5)
    ours = seen(index, 1)
    assert len(ours) == 12
    assert ours == seen(index, 2)
    assert sorted(ours.values()) == sorted(seen(packed, 1).values())
    assert index.fingerprint == Folders(str(classes)).fingerprint
    (classes / "0" / "0.png").unlink()
    assert index.fingerprint != Folders(str(classes)).fingerprint
    (classes / "9/notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"9/notes\.txt: is no image"):
        Folders(str(classes))
    with pytest.raises(Lost, match="cannot be read"):
        index.read(0, 0)
    with pytest.raises(UserError, match=r"\.seg\.png is needed beside each: pack the set with `fdscale shards make`"):
        index.read(0, 1, ("seg.png",))


def test_only_where_images_are_seen_once(classes: Path, tmp_path: Path) -> None:
    make(classes, tmp_path / "shards")
    assert is_folder(str(classes))
    assert not is_folder(str(tmp_path / "shards"))
    assert not is_folder(str(classes / "0/0.png"))
    assert not is_folder(None)
    (tmp_path / "split/train").mkdir(parents=True)
    assert not is_folder(str(tmp_path / "split"))
    settings = config.load("demo_finetune", [f"data.shards={classes}", f"data.heldout_shards={classes}"])
    assert isinstance(open_heldout(settings.data), Folders)
    with pytest.raises(UserError, match=r"holds images, no shards: `fdscale shards make .*images DIRECTORY` packs it"):
        open_inputs(settings, 1)


@pytest.mark.slow
def test_a_probe_of_folders_is_that_of_their_shards(classes: Path, tmp_path: Path) -> None:
    packed = tmp_path / "shards"
    make(classes, packed)
    found = []
    for where in (classes, packed):
        torch.manual_seed(0)
        out = tmp_path / f"{where.name}.json"
        sets = [f"data.shards={where}", f"data.heldout_shards={where}", "data.image_size=32", "data.workers=0"]
        words = [word for one in sets for word in ("--set", one)]
        teacher = ("--teacher", "--set", "teacher.weights=random")
        assert cli.main(["probe", "demo", *teacher, "--kinds", "knn", "--out", str(out), *words]) == 0
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]

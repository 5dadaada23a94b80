"""Shards made of Parquet files, written by pyarrow as `datasets` does, hold the very bytes and labels."""

from __future__ import annotations

import json

import pytest
from packed import contents, read

from fdscale import UserError
from fdscale.data.listing import Columns
from fdscale.data.shards import make

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def hugging_face_schema(names: list[str]) -> pa.Schema:
    """As `datasets` writes it: images as structs, and the names of the classes in the metadata."""
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)


@pytest.mark.parametrize("workers", [1, 2])
def test_hugging_face_parquet(tmp_path, photos, workers):
    schema = hugging_face_schema(["owl", "ant"])
    rows = [
        {"image": {"bytes": data, "path": f"{i}.jpg" if i % 2 else None}, "label": i % 2}
        for i, data in enumerate(photos)
    ]
    (tmp_path / "in" / "data").mkdir(parents=True)
    for number, part in enumerate((rows[:9], rows[9:])):
        table = pa.Table.from_pylist(part, schema=schema)
        pq.write_table(table, tmp_path / "in" / "data" / f"train-0000{number}-of-00002.parquet", row_group_size=4)
    test = pa.Table.from_pylist(rows[:3], schema=schema)
    pq.write_table(test, tmp_path / "in" / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"several splits .test, train.; choose one with --split"):
        make(tmp_path / "in", tmp_path / "out")
    made = make(tmp_path / "in", tmp_path / "out", split="train", workers=workers, samples_per_shard=10)
    assert made.counts.tolist() == [10, 10, 4]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["owl", "ant"]
    found = read(tmp_path / "out")
    assert sorted((data, cls) for _, data, cls in found.values()) == sorted((p, i % 2) for i, p in enumerate(photos))
    assert {"1", "23", "train-00000-of-00002/000000000", "train-00001-of-00002/000000001"} <= set(found)
    assert sorted(contents(tmp_path / "out")) == ["classes.json", *(f"shard-00000{i}.tar" for i in range(3))]
    make(tmp_path / "in", tmp_path / "again", split="train", workers=3 - workers, samples_per_shard=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert make(tmp_path / "in", tmp_path / "test", split="test", seed=None).samples == 3
    with pytest.raises(UserError, match=r"has no split val .found: test, train"):
        make(tmp_path / "in", tmp_path / "val", split="val")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet_of_bytes_with_columns_of_other_names(tmp_path, photos, kind):
    columns = {
        "pic": pa.array(photos[:6], kind),
        "kind": [f"k{i % 3}" for i in range(6)],
        "id": [f"a/{i}" for i in range(6)],
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    make(tmp_path / "t.parquet", tmp_path / "out", seed=None, columns=Columns("pic", "kind", "id"))
    assert read(tmp_path / "out") == {f"a/{i}": ("jpg", photos[i], i % 3) for i in range(6)}
    make(tmp_path / "t.parquet", tmp_path / "plain", seed=None, columns=Columns("pic", "none"))
    assert [(data, cls) for _, data, cls in read(tmp_path / "plain").values()] == [(data, None) for data in photos[:6]]


def test_parquet_of_paths(image_folder, tmp_path):
    files = sorted(path for path in image_folder.rglob("*") if path.is_file())[:6]
    table = pa.table({"path": [str(f.relative_to(tmp_path)) for f in files], "cls": pa.array(range(6), pa.int32())})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    make(tmp_path / "t.parquet", tmp_path / "out", seed=None)
    assert [(data, cls) for _, data, cls in read(tmp_path / "out").values()] == [
        (path.read_bytes(), i) for i, path in enumerate(files)
    ]


def test_parquet_that_cannot_be_packed(tmp_path, photos):
    path, schema = tmp_path / "t.parquet", hugging_face_schema(["a", "b"])

    def write(*rows, schema=schema):
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)

    good = {"image": {"bytes": photos[0], "path": None}, "label": 1}
    html = {"image": {"bytes": b"<html>", "path": None}, "label": 0}
    cases = {
        "row 1: is of no known kind of image": lambda: write(good, html),
        "row 1: holds no image": lambda: write(good, {"image": None, "label": 0}),
        'row 0: label is "-1"': lambda: write({**good, "label": -1}),
        'row 0: label is "2", expected the number of one of 2': lambda: write({**good, "label": 2}),
        'row 0: label is "None"': lambda: write({**good, "label": None}),
        "lists no images": lambda: write(),
        r"has the columns \['a'\]; expected one of image": lambda: pq.write_table(pa.table({"a": [1]}), path),
        "column image is int64; expected paths": lambda: pq.write_table(pa.table({"image": [1]}), path),
        "cannot be read as Parquet": lambda: path.write_bytes(b"PAR1" + bytes(100) + b"PAR1"),
        "names a file outside its folder": lambda: write({"image": {"bytes": None, "path": "../x.jpg"}, "label": 0}),
        "gone/x.jpg: No such file": lambda: write({"image": {"bytes": None, "path": "gone/x.jpg"}, "label": 0}),
    }
    for message, spoil in cases.items():
        spoil()
        with pytest.raises(UserError, match=message):
            make(path, tmp_path / "out")
    raw = path.read_bytes()
    write(*[good] * 50)
    raw = bytearray(path.read_bytes())
    raw[2000:2400] = bytes(400)  # pages, not the directory at the end
    path.write_bytes(raw)
    try:
        make(path, tmp_path / "out")
    except UserError:
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []

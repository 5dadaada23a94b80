"""Making WebDataset shards from images.

A shard is a plain tar; a sample is an image file, its bytes untouched unless asked otherwise, and, where classes are
known, a member .cls with the number of the class in decimal, or .seg.png with those of all pixels. The same source
gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator

from fdscale import UserError
from fdscale.data.coco import packed
from fdscale.data.files import prepare_folder
from fdscale.data.index import Index, open_index
from fdscale.data.indexing import Progress, index
from fdscale.data.listing import MOST_IMAGE_BYTES, Columns, Listing, Row, find
from fdscale.data.order import check_seed, permutation
from fdscale.data.pairs import read_mask
from fdscale.data.parallel import parallel
from fdscale.data.recode import Recoding, check_recoding, recode
from fdscale.data.tar import Problem
from fdscale.data.writing import Members, Shards, check_sizes, new_folder

ANY_COLUMNS = Columns()
CHECKED = Recoding()
LOST_OBJECTS = "left-out-objects.jsonl"
CHUNK_ROWS = 32  # given to a worker at a time
CHUNK_BYTES = 16 * 2**20  # the same; a few such chunks per worker are in memory


def make(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    samples_per_shard: int | None = None,
    max_bytes: int | None = None,
    seed: int | None = 0,
    split: str | None = None,
    columns: Columns = ANY_COLUMNS,
    recoding: Recoding = CHECKED,
    skip_damaged: bool = False,
    workers: int = 1,
    index_dir: str | None = None,
    progress: Progress | None = None,
    report: Callable[[Problem], None] | None = None,
) -> Index:
    """Pack images into the new folder `out`: shard-000000.tar and so on, classes.json where classes have names, index.

    source: a folder of images, with or without one subfolder per class (numbered in the order of their names), a table
    (.csv, .tsv, .jsonl, .parquet) that lists or holds images, a Hugging Face data set, or images and masks, of which
    `split` is taken; see listing.py and pairs.py. Keys are the paths without extension, further dots turned to "_"; a
    key that would come twice gets a number, unless the table names it.
    samples_per_shard or max_bytes: where a shard ends; 256 MiB by default. seed: shuffles the samples over the
    shards; None keeps their order (by path, or as in the table). recoding: every image is decoded to see that it is
    whole, and may be made smaller; see recode.py. skip_damaged: broken images are left out, listed in
    out/left-out.jsonl and given to `report` (as problems whose `shard` is the file). index_dir: by default out/index.
    progress: called with (samples done, samples). `out` appears when all is written, or not at all. Images inside
    Parquet are first copied out, into the folder of `out`: so much more room is needed for a while.
    Raises UserError if a file is missing, empty, broken or of an unknown kind, or if `out` is not new.
    """
    check_sizes(samples_per_shard, max_bytes)
    check_recoding(recoding)
    if seed is not None:
        check_seed(seed)
    out = os.path.abspath(out)
    if index_dir is not None:
        prepare_folder(index_dir, "--index")
    with new_folder(out) as folder:
        listing = Listing(os.path.join(folder, ".rows"))
        try:
            find(os.fspath(source), split, columns, listing, workers)
            shards = Shards(folder, samples_per_shard, max_bytes)
            _pack(listing, folder, shards, recoding, seed, skip_damaged, workers, progress, report)
        finally:
            listing.close()
        for name in os.listdir(folder):
            if name == ".rows" or name.startswith("images-"):
                os.unlink(os.path.join(folder, name))
        for name, about in (("classes", listing.classes), ("categories", listing.categories)):
            if about is not None:
                with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as file:
                    json.dump(about, file, indent=1)
        index(folder, index_dir, workers)
    return open_index(out, index_dir)


def _pack(
    listing: Listing,
    folder: str,
    shards: Shards,
    recoding: Recoding,
    seed: int | None,
    skip_damaged: bool,
    workers: int,
    progress: Progress | None,
    report: Callable[[Problem], None] | None,
) -> None:
    """Read, check and write all rows, in the order of `seed`."""
    total, done = len(listing), 0
    order = range(total) if seed is None else permutation(seed, 0, (0, 3, 0, 0), total)
    left_out: list[Problem] = []
    jobs = ((rows, recoding) for rows in _chunks(listing, order))
    for prepared in parallel(_prepare, jobs, workers):
        for sample in prepared:
            if not isinstance(sample, Problem):
                shards.add(*sample[:2])
                _note(folder, LOST_OBJECTS, sample[0], sample[2])
            elif skip_damaged:
                left_out.append(sample)
                if report:
                    report(sample)
            else:
                raise UserError(
                    f"{sample.shard}: {sample.reason}. Repair or remove it, or pack the rest (--skip-damaged)"
                )
        done += len(prepared)
        if progress:
            progress(done, total)
    shards.close()
    if len(left_out) == total:
        raise UserError(f"all {total} images are broken, the first: {left_out[0].shard}: {left_out[0].reason}")
    if left_out:
        with open(os.path.join(folder, "left-out.jsonl"), "w", encoding="utf-8") as file:
            for problem in left_out:
                file.write(json.dumps({"file": problem.shard, "key": problem.key, "reason": problem.reason}) + "\n")


def _chunks(listing: Listing, order: Iterable[int]) -> Iterator[list[Row]]:
    rows: list[Row] = []
    size = 0
    for number in order:
        row = listing.row(int(number))
        if rows and (len(rows) == CHUNK_ROWS or size + row.size > CHUNK_BYTES):
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += row.size
    yield rows


def _note(folder: str, name: str, key: str, reasons: list[str]) -> None:
    """Write down what was left out of a sample."""
    if reasons:
        with open(os.path.join(folder, name), "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"key": key, "reason": reason}) + "\n" for reason in reasons)


Prepared = tuple[str, Members, list[str]]  # key, members, and what was left out of them


def _prepare(job: tuple[list[Row], Recoding]) -> list[Prepared | Problem]:
    """Samples ready to be written, and in the place of broken images what is wrong with them."""
    rows, recoding = job
    prepared: list[Prepared | Problem] = []
    for row in rows:
        named = row.path if row.offset < 0 else row.where.rstrip(": ")
        try:
            with open(row.path, "rb") as file:
                file.seek(max(0, row.offset))
                data = file.read(row.size if row.offset >= 0 else MOST_IMAGE_BYTES)
        except OSError as error:
            raise UserError(f"{named}: cannot be read ({error.strerror})") from None
        try:
            image, extension = recode(data, row.extension, recoding)
            members, left_out = {extension: image}, list[str]()
            if (row.mask or row.objects) and recoding.resize is not None:
                raise UserError("--resize would make the image smaller than what is marked on it; leave it out")
            if row.objects:
                members["objects.json"], left_out = packed(row.objects, image)
            if row.mask:
                members["seg.png"] = read_mask(row.mask, image, row.most, recoding.check)
        except UserError as error:
            prepared.append(Problem(named, row.key, str(error)))
            continue
        if row.cls is not None:
            members["cls"] = str(row.cls).encode()
        prepared.append((row.key, members, left_out))
    return prepared

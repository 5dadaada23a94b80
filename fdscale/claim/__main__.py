"""`python -m fdscale.claim`, what `make claim` runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fdscale.claim import summary
from fdscale.claim.data import DEFAULT
from fdscale.claim.experiment import Experiment
from fdscale.durable import as_json
from fdscale.verbs import exit_code


def main() -> int:
    """Run, or go on with, the experiment; print the table and write claim.json, claim.md and claim.png."""
    parser = argparse.ArgumentParser(
        prog="python -m fdscale.claim",
        description="Does a distilled student fine-tune better than its teacher? Fashion-MNIST, on a CPU.",
    )
    out = "where everything goes (default: runs/claim); an earlier call goes on there"
    parser.add_argument("--out", type=Path, default=Path("runs/claim"), help=out)
    folder = f"folder with Fashion-MNIST's four .gz files (default: {DEFAULT})"
    parser.add_argument("--data", type=Path, default=DEFAULT, help=folder)
    quick = "scikit-learn's digits and little of everything: whether it runs, not what is true"
    parser.add_argument("--quick", action="store_true", help=quick)
    arguments = parser.parse_args()
    return exit_code(lambda: _claim(arguments))


def _claim(arguments: argparse.Namespace) -> None:
    results = Experiment(arguments.out, arguments.data, arguments.quick).run()
    (arguments.out / "claim.json").write_text(as_json({**results, **summary.summarise(results)}, indent=1) + "\n")
    text = summary.table(results)
    (arguments.out / "claim.md").write_text(text)
    summary.plot(results, arguments.out / "claim.png")
    print(f"\n{text}\nDone in {results['seconds']:.0f} s. Plot: {arguments.out / 'claim.png'}")


if __name__ == "__main__":
    sys.exit(main())

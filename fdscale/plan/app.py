"""`fdscale plan`."""

from __future__ import annotations

from typing import Any

from fdscale import UserError, config
from fdscale.durable import as_json
from fdscale.engine import ds_config
from fdscale.inputs import open_inputs
from fdscale.plan import report, search
from fdscale.plan.machines import machine
from fdscale.plan.memory import Setup
from fdscale.plan.shapes import Networks

SAMPLES = 1_281_167  # of ImageNet-1K's training set


def main(
    recipe: str,
    set: list[str],
    ds: str | None,
    gpus: str,
    gpu: str,
    network: str | None,
    gpus_per_node: int,
    samples: int | None,
    mfu: float | None,
    overlap: float | None,
    price: float | None,
    json: bool,
) -> int:
    """`fdscale plan`."""
    worlds = _worlds(gpus)
    on = machine(gpu, network, gpus_per_node, mfu=mfu, overlap=overlap)
    settings = in_steps(config.load(recipe, set), worlds[0], samples)
    networks = Networks(settings)
    told = ds_config.read(ds)
    setups = [Setup(settings, told, world, gpus_per_node) for world in worlds]
    if len(setups) > 1:
        setups = [search.divided(setup) for setup in setups]
    found = [search.plan(setup, networks, on) for setup in setups]
    best = None if found[0].fits else search.cheapest(found[0].setup, networks, on)
    if json:
        rows = [report.numbers(one, on, price) for one in found]
        record: dict[str, Any] = {"recipe": recipe, "ds_config": ds, "plans": rows, "assumed": on.__dict__}
        if not found[0].fits:
            record["suggestion"] = best and {
                "changes": search.changes(found[0].setup, best.setup),
                **report.numbers(best, on, price),
            }
        print(as_json(record, indent=1))
        return 0
    print(report.text(found[0], on, price, f"{recipe} with {ds or 'no ds_config'}"))
    if len(found) > 1:
        print(f"\n{report.scaling(found, on, price)}")
    if not found[0].fits:
        print(f"\n{report.suggestion(found[0], best, on)}")
    return 0


def in_steps(settings: config.Config, world: int, samples: int | None) -> config.Config:
    """A config with its lengths in steps.

    An epoch is as long as `samples` says, else as data.shards where they are set, else as ImageNet-1K.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--samples must be at least 1, got {samples}")
    if samples is None and settings.data.shards:
        return open_inputs(settings, world).settings
    return config.in_steps(settings, samples or SAMPLES)


def _worlds(text: str) -> list[int]:
    try:
        worlds = [int(word) for word in text.split(",")]
    except ValueError:
        worlds = []
    if not worlds or min(worlds) < 1:
        raise UserError(f"--gpus {text}: expected a number of GPUs, or several with commas, such as 8,64,512")
    return worlds

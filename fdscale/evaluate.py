"""Evaluating a classifier on the held-out set: while it is fine-tuned, and by `fdscale evaluate`.

Each image counts exactly once on any number of ranks, and what cannot be read is left out and counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdscale import UserError, config
from fdscale.data.augment import eval_view
from fdscale.data.index import Index
from fdscale.engine import ema
from fdscale.inputs import CLIP_STATISTICS, heldout_batches, normalise, open_heldout, to_device
from fdscale.run import Run
from fdscale.tasks.classification import Accuracy, Tally


class HeldOut:
    """Loss and accuracy on the held-out set, as records of a run."""

    def __init__(self, settings: config.Config, dtype: torch.dtype, run: Run):
        self._settings, self._dtype, self._run = settings, dtype, run
        self._index = open_heldout(settings.data)
        self._first = True

    def __call__(self, engine: Any) -> dict[str, Any]:
        """The record of one evaluation; a collective. Empty where there is no held-out set, or a signal came."""
        if self._index is None:
            return {}
        found = self._evaluate(engine)
        if found is None:
            return {}
        record = {
            "heldout_loss": found.loss,
            "heldout_top1": found.top1,
            "heldout_top5": found.top5,
            "heldout_samples": found.samples,
        }
        if self._settings.optim.ema is not None:
            with ema.in_place_of_weights(engine):
                averaged = self._evaluate(engine)
            if averaged is None:
                return {}
            record |= {"heldout_loss_ema": averaged.loss, "heldout_top1_ema": averaged.top1}
        return record

    def _evaluate(self, engine: Any) -> Accuracy | None:
        assert self._index is not None
        engine.eval()
        found = evaluate(self._settings, self._index, engine, self._dtype, self._lost, self._run.interrupted)
        engine.train()
        self._first = False
        return None if self._run.stopped_by else found

    def _lost(self, replaced: list[Any]) -> None:
        if self._first:  # every evaluation loses the same samples
            self._run.report_lost(replaced)


def evaluate(
    settings: config.Config,
    index: Index,
    classifier: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    lost: Callable[[list[Any]], object],
    interrupted: Callable[[], bool] = lambda: False,
) -> Accuracy:
    """The accuracy of a classifier of normalised images on data.heldout_samples of a set; a collective.

    lost: gets the samples that could not be read. interrupted: whether to leave it unfinished; a collective too.
    Raises UserError where no sample can be read.
    """
    data, classify = settings.data, settings.classify
    assert classify.classes is not None
    view = functools.partial(
        eval_view,
        size=data.image_size,
        crop_ratio=classify.crop_ratio,
        interpolation=data.interpolation,
        decoding=data.decode,
    )
    statistics = CLIP_STATISTICS if classify.statistics == "clip" else None
    tally = Tally(min(data.heldout_samples, index.samples), classify.classes)
    with torch.no_grad():
        for batch in heldout_batches(settings, index, view, classify.classes):
            if interrupted():
                break
            lost(batch["replaced"])
            images = normalise(to_device(batch["images"]), dtype, *(statistics or ()))
            tally.add(batch["numbers"], batch["labels"], classifier(images), batch["weights"])
    found = tally.result()
    if found is None:
        raise UserError(f"no sample of data.heldout_shards ({data.heldout_shards}) can be read")
    return found

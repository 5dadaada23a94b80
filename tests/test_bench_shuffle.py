"""The comparison of orders on a small set: every way delivers whole batches of the set, and is described right."""

from __future__ import annotations

import numpy as np

from fdscale.bench import shuffle


def test_every_way_delivers_batches_of_distinct_samples(monkeypatch, capsys):
    monkeypatch.setattr(shuffle, "PER_SHARD", 100)
    monkeypatch.setattr(shuffle, "FIRST", 1)
    monkeypatch.setattr(shuffle, "BATCHES", 3)
    data, machine = shuffle.Set("small", 64, 32), shuffle.Machine(batch=64, ranks=2, workers=2)
    for batches in (shuffle.by_order(data, machine, 16), shuffle.by_webdataset(data, machine, 50)):
        places = np.concatenate(list(batches))
        assert len(places) == len(np.unique(places)) == 3 * 64
        assert 0 <= places.min() <= places.max() < 6400
    found = shuffle.describe([np.array([0, 1, 250, 6399])], data)  # 200 samples of each class
    assert found == {"shards": 3.0, "classes": 3.0, "most_of_one_class": 2.0}
    monkeypatch.setattr(shuffle, "SETS", (data,))
    monkeypatch.setattr(shuffle, "MACHINE", machine)
    assert shuffle.main(None) == 0
    assert "| webdataset, buffer of 1000 |" in capsys.readouterr().out

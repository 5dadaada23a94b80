"""The data path: shards on disk -> index -> order of samples -> batches.

`shards` makes and verifies WebDataset tars, `index` lists where every sample lies, `order` says which sample is
number n of a run, `augment` turns bytes into a view of it, `stream` delivers the views in batches. Nothing is
re-exported here, so that indexing a set does not import torch.
"""

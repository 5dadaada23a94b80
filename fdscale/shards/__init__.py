"""`fdscale shards`: making sets of shards and looking after them; the work is done in fdscale.data."""

"""The claim of arXiv 2205.14141, in small: does a distilled student fine-tune better than its teacher? `make claim`.

data: what is seen and by whom. contrastive: a teacher without labels. experiment: all runs, by fdscale's own verbs.
summary: means, intervals, table and plot.
"""

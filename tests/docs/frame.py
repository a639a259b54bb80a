# What fragments of Python in the pages use: one rank alone, a few tokens, experts that do nothing, and numpy in torch's place.
import a2a
import numpy as np

torch = np
rank, num_ranks, group = 0, 1, a2a.UniqueId.create()
tokens = np.ones((4, 7168), np.float16)
topk_ids = np.tile(np.arange(8, dtype=np.int32), (4, 1))
topk_weights = np.full((4, 8), 0.125, np.float32)
out = np.empty_like(tokens)


def experts(rows):
    return rows

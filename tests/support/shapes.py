"""Configurations of experts, for what only depends on their shape."""

A14B = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": [1, 2, 2],
}

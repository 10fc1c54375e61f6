"""DDNP: Disentangled Differentiable Network Pruning (Gao et al., ECCV 2022)."""

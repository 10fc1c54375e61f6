"""NPPM: Network Pruning via Performance Maximization (Gao et al., CVPR 2021)."""

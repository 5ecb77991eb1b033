"""Benches of loss, KL divergence and output error at a budget."""

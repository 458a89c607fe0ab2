"""Causal attention over samples that lie end to end, for the fused schedule; with sinks for transformers' layers."""

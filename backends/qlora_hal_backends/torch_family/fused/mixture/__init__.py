"""The routed experts of a mixture as the feed-forward of the fused decoder layer.

Tokens go to their experts in one sort; all experts of a projection are one grouped product of decoded weights, with the
adapter inside; a token's routing weight rides in the gated product, so what an expert gives is only summed.
"""

"""A language model adapts to a domain by everything, by all experts, or by the experts that take the domain's tokens.

Protocol, fixed before any result. For each of five seeds and each arm one model of `examples.transformer_moe`, at half its
width (64) and window (64) for 300 steps, is trained on its four domains. From it, with the same windows, a new AdamW and the
example's settings and learning rate, it goes on with each domain alone: once with everything free, once with all experts,
once with the experts that take half of the domain's tokens in each layer (`surgical(share=0.5)`, read from the first 64
windows). Each is measured before and at twelve points, on 16 windows of each domain. At equal gain: of the three scopes of a
seed, arm and domain the least of the largest gains, and what the other domains have given up there, on the line between two
measurements. Nothing is chosen by these results.
"""

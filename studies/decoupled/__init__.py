"""The penalty through Adam's gradient, or past it: which holds a router better at the same task loss?

A small Mixtral on a made language, its gates under `penalty="spread"`: in the gradient (delivered at the step), where Adam
divides it by its own second moment, and decoupled, as AdamW does weight decay. The protocol, fixed before any run: both have
the same coefficients to choose from; of each the largest mean stable rank is reported whose task loss is within 0.01 of the
runs without a penalty, on batches that were not trained on.
"""

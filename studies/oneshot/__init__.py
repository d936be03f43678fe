"""The one-shot test for studies, which ask thousands of updates what the example asks one.

`stacked` does `examples.image_classification.oneshot.adapt` for many update rules on many copies of a model at once, with the
experts of a layer in one `stack`; the records are the same. `plasticity` reads what updates cost where they teach equally much.
"""

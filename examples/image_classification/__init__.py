"""The experiment of SR-MoE (arXiv:2601.03889) on images: `python -m examples.image_classification --help`.

To read the paper's method, in this order:

model        the network of section 3.1
objective    equation 7; `terms` is what else can fill its two places
train        the training loop, with a checkpoint after every epoch
oneshot      the one-shot adaptation test of section 4.3

Around it: `config` (every flag, its default and its rule), `data` (images in memory, splits, augmentation), `evaluate`
(predictions, accuracy, spectra), `routing` (paths, mutual information), `experiment` (all routers and seeds, saved as it goes),
`report` (tables 1 and 2), `figures` (figures 2 to 6).
"""

"""The experiment of SR-MoE (arXiv:2601.03889) on images: `python -m examples.image_classification --help`.

config    every flag, its default and its rules        oneshot   the one-shot adaptation test of section 4.3
data      images in memory, splits, augmentation       routing   paths, mutual information, spectra
model     the network of section 3.1                   study     all routers and seeds, saved as it goes
train     equation 7, the training loop, checkpoints   report    tables 1 and 2;  figures: figures 2 to 6
"""

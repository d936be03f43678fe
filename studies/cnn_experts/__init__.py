"""Convolutional experts in a ResNet-18 (arXiv:2204.10598): `python -m studies.cnn_experts --help`.

config   every flag, the arms, and their rules           study    all arms and seeds, saved as it goes
model    ResNet-18, one stage of it a mixture, gates     claims   the paper's claims, and a verdict on each
train    the training loop, checkpoints                  report   tables as text and Markdown
measure  what a trained network does with test images    figures  pictures

Images, splits, augmentation and paths are those of `examples.image_classification`; flags, files, progress bars and intervals
those of `examples.shared`.
"""

"""The network that the tests of the one-shot updates begin with."""

import torch

from examples.image_classification import train
from examples.image_classification.config import Config
from examples.image_classification.data import ImageSet, Split

CPU = torch.device("cpu")


def trained(config: Config, router: str, data: ImageSet, split: Split) -> train.Trained:
    """A network after two epochs: batch norm has statistics that an update could disturb, and Adam has left gradients."""
    model, objective = train.build(config, router, 0, data, CPU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for epoch in range(config.epochs):
        train._train_epoch(config, train.forward, model, objective, optimizer, data, split.train, epoch)
    model.eval()
    return train.Trained(model, objective, [])

"""The CNN of PyTorch's CIFAR-10 tutorial."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 32
"""Height and width of the images that it takes."""


class Net(nn.Module):
    """Two convolutions and three linear layers, 62,006 parameters: 32 × 32 colour images in, ten scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores [n, 10] of images [n, 1 or 3, height, width], in 8 bits or from 0 to 1."""
        x = as_colours(images)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def as_colours(images: Tensor) -> Tensor:
    """Returns images [n, 3, 32, 32] from -1 to 1; those of another data set than CIFAR-10 are fitted to it."""
    scaled = images / 255 if images.dtype == torch.uint8 else images
    if scaled.shape[-1] != SIZE:
        scaled = F.interpolate(scaled, size=SIZE, mode="bilinear", antialias=False)
    return (2 * scaled - 1).expand(-1, 3, -1, -1)

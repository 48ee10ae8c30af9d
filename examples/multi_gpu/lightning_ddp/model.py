"""The CNN of PyTorch's CIFAR-10 tutorial as a LightningModule."""

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 32
"""Height and width of the images that it takes."""


class LitNet(LightningModule):
    """Two convolutions and three linear layers, 62,006 parameters: 32 × 32 colour images in, ten scores out.

    Args:
        lr: The learning rate of SGD.
    """

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(3, 6, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Returns the scores [n, 10] of images [n, 1 or 3, height, width], in 8 bits or from 0 to 1."""
        return self.net(as_colours(images))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Returns the loss of a batch."""
        loss, _ = self._measured(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        """Measures a batch; the mean over those of all sites is the global model's accuracy."""
        loss, accuracy = self._measured(batch)
        self.log_dict({"val_loss": loss, "accuracy": accuracy}, batch_size=len(batch[1]), sync_dist=True)

    def test_step(self, batch: list[Tensor]) -> None:
        """Measures a batch."""
        _, accuracy = self._measured(batch)
        self.log("test_accuracy", accuracy, batch_size=len(batch[1]), sync_dist=True)

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        """Returns the classes of a batch."""
        return self(batch[0]).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def _measured(self, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        scores = self(images)
        return F.cross_entropy(scores, labels), (scores.argmax(1) == labels).float().mean()


def as_colours(images: Tensor) -> Tensor:
    """Returns images [n, 3, 32, 32] from -1 to 1; those of another data set than CIFAR-10 are fitted to it."""
    scaled = images / 255 if images.dtype == torch.uint8 else images
    if scaled.shape[-1] != SIZE:
        scaled = F.interpolate(scaled, size=SIZE, mode="bilinear", antialias=False)
    return (2 * scaled - 1).expand(-1, 3, -1, -1)

"""How many examples a user's own loaders bring to all ranks, and what a validation of them logs."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils.data import DistributedSampler

from shoal.errors import ConfigurationError
from shoal.learners.lightning_metrics import gather_json, over_ranks


class Examples:
    """Counts the examples in batches.

    Args:
        given: The site's weight, by the user's own count; each batch then counts as one example. None to count.
    """

    def __init__(self, given: float | None) -> None:
        self.given = given

    def __call__(self, batch: Any, index: int = 0) -> int:
        """Returns the length of the first axis of the tensors in a batch.

        Raises:
            ConfigurationError: There is no tensor in it.
        """
        if self.given is not None:
            return 1
        try:
            return extract_batch_size(batch)
        except (MisconfigurationException, RecursionError) as error:
            raise ConfigurationError(
                f"how many examples batch {index} has cannot be told from it: say how many the site has with "
                "shoal.lightning.patch(trainer, examples=…)"
            ) from error

    def over_ranks(self, trainer: Trainer, own: int, loaders: Any) -> float:
        """Returns how many examples all ranks have had in a pass.

        Those that a ``DistributedSampler`` has repeated, so that the ranks have equally many, count once.

        Args:
            trainer: Joins the ranks, each of which calls this.
            own: How many this rank has had.
            loaders: A loader, or a list of them.
        """
        if self.given is not None:
            return self.given
        total = sum(gather_json(trainer, own)) if trainer.world_size > 1 else own
        flat = loaders if isinstance(loaders, list | tuple) else [loaders]
        samplers = [getattr(getattr(loader, "batch_sampler", None), "sampler", None) for loader in flat]
        known = [sampler for sampler in samplers if isinstance(sampler, DistributedSampler)]
        if len(known) == len(flat) and total == sum(sampler.total_size for sampler in known):
            total = sum(min(sampler.total_size, _length(sampler)) for sampler in known)
        return float(total)


def _length(sampler: DistributedSampler[Any]) -> int:
    dataset: Any = sampler.dataset  # which has a length, or the sampler would not know what to draw
    return len(dataset)


class TrainingExamples(Callback):
    """Counts the examples in the first epoch of one call to ``fit``.

    Args:
        examples: Counts.
    """

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self._epochs = 0
        self._own = 0
        self.total = 0.0
        """Of all ranks, once training has ended."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the epochs."""
        self._epochs += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch."""
        if self._epochs == 1:
            self._own += self._examples(batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds what the other ranks have."""
        self.total = self._examples.over_ranks(trainer, self._own, trainer.train_dataloader)


class ValidationMeans(Callback):
    """Has what one call to ``validate`` logs, as means over the examples of all ranks.

    Args:
        examples: Counts.
    """

    def __init__(self, examples: Examples) -> None:
        self._examples = examples
        self._own = 0
        self.total = 0.0
        """How many examples there were."""
        self.means: dict[str, float] = {}
        """By the names that were logged."""

    def on_validation_batch_end(  # noqa: PLR0917 - Lightning calls it so
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the batch."""
        self._own += self._examples(batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the means: what a module has averaged over the ranks stays, and what is one rank's own is averaged."""
        own = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.means = over_ranks(trainer, own, self._own)
        self.total = self._examples.over_ranks(trainer, self._own, trainer.val_dataloaders)

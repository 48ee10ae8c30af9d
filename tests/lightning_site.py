"""A site's script that trains with a Lightning Trainer, as a user would write it; started by a job."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.utils.data import DataLoader, TensorDataset

import shoal.lightning
from lightning_modules import Classifier, CpuFsdp
from shoal.learners.lightning_sharded import whole_arrays
from support import samples

SIZES = {"site-1": 12, "site-2": 20}
"""Examples of each site; half of them are a rank's only batch."""

HELD_OUT = 10


class Predicting(Classifier):
    """Is measured, tested and asked for its opinion."""

    def validation_step(self, batch, index):
        inputs, targets = batch
        self.log("accuracy", (self.network(inputs).argmax(1) == targets).float().mean())

    def test_step(self, batch, index):
        super().validation_step(batch, index)

    def predict_step(self, batch, index):
        return self.network(batch[0])


class SavedCpuFsdp(CpuFsdp):
    """Gathers what a checkpoint has itself: torch's own way frees arrays on a CPU that it has yet to copy."""

    def lightning_module_state_dict(self):
        return whole_arrays(self.model)


UNITS = partial(size_based_auto_wrap_policy, min_num_params=40)
"""Divides the first layer by itself, and leaves the last to the whole module's unit."""

STRATEGIES = {"ddp": lambda: "ddp", "fsdp": lambda: SavedCpuFsdp(auto_wrap_policy=UNITS)}


class Data(LightningDataModule):
    """A site's examples, all of a rank's in one batch."""

    def __init__(self, site, ranks=2):
        super().__init__()
        self.site, self.ranks = site, ranks

    def loader(self, data):
        tensors = TensorDataset(*(torch.as_tensor(part) for part in data.take(np.arange(len(data)))))
        return DataLoader(tensors, batch_size=len(tensors) // self.ranks, num_workers=0)

    def train_dataloader(self):
        return self.loader(data_of(self.site))

    def val_dataloader(self):
        return self.loader(held_out())

    test_dataloader = predict_dataloader = val_dataloader


def data_of(site):
    """Returns the examples of a site."""
    return samples(SIZES[site], seed=int(site[-1]))


def held_out():
    """Returns the examples that all sites measure on."""
    return samples(HELD_OUT, seed=9)


def main():
    """Runs the loop of the seed, and tells of each turn in a file."""
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    folder, strategy = Path(asked["folder"]), STRATEGIES[sys.argv[2]]()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=asked["epochs"],
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(dirpath=folder / "kept", save_weights_only=isinstance(strategy, CpuFsdp))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(trainer.global_rank)  # the ranks' own first models are not the same
    model, turns = Predicting(), []
    for task in shoal.lightning.tasks(trainer):
        data = Data(task.site)
        trainer.validate(model, datamodule=data, verbose=False)
        trainer.fit(model, datamodule=data)
        trained = {name: array.tolist() for name, array in model.state_dict().items()}
        tested = trainer.test(ckpt_path="best", datamodule=data, verbose=False)
        predicted = trainer.predict(ckpt_path="best", datamodule=data)
        turns.append(
            {
                "kind": task.kind,
                "round": task.round,
                "trained": trained,
                "test": tested[0],
                "predicted": sum(len(batch) for batch in predicted),
                "best": str(Path(trainer.checkpoint_callback.best_model_path).relative_to(folder / "kept")),
                "epochs": trainer.current_epoch,
                "steps": trainer.global_step,
                "limit": trainer.max_epochs,
            }
        )
        (folder / f"{task.site}-{trainer.global_rank}.json").write_text(json.dumps(turns))


if __name__ == "__main__":
    main()

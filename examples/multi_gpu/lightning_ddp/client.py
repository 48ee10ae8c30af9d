"""A site's own training with a Lightning Trainer, on all devices of the site.

job.py has every site run it. By itself it trains on all of the data: `python client.py`, or
`torchrun --nproc_per_node=2 client.py --local_epochs 5`.
"""

import argparse
import logging
import os
import warnings
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

import shoal.lightning
from data import SiteImages
from model import LitNet


def main() -> None:
    args = arguments()
    quieten()
    lightning.seed_everything(args.seed, verbose=False)
    data = SiteImages(
        args.data_dir, part=args.part, parts=args.parts, alpha=args.alpha, most=args.images,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    model = LitNet(lr=args.lr)
    site = f"site-{args.part + 1}"
    trainer = lightning.Trainer(
        strategy="ddp",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        max_epochs=args.local_epochs,  # in each round
        callbacks=[ModelCheckpoint(args.root_dir / "checkpoints", monitor="accuracy", mode="max")],
        logger=TensorBoardLogger(args.root_dir / "tensorboard", name=site, version="") if args.use_tracking else False,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    if trainer.is_global_zero:
        print(data.told, flush=True)

    # Momentum begins anew in each round: what is left of it points on from where this site ended, but the round begins
    # at the average of all sites. Without a state a site is also the same after a restart or a resume.
    shoal.lightning.patch(trainer, keep_optimizer=False)
    for task in shoal.lightning.tasks(trainer):
        trainer.validate(model, datamodule=data, verbose=False)  # the global model
        trainer.fit(model, datamodule=data)  # starts from it, and sends what comes of it
        if task.kind == "evaluate":  # after a round; fit has done nothing
            continue
        [tested] = trainer.test(ckpt_path="best", datamodule=data, verbose=False)
        trainer.predict(ckpt_path="best", datamodule=data)
        if trainer.is_global_zero:
            print(f"round {task.round}: test accuracy {tested['test_accuracy']:.4f} with this site's model", flush=True)


def quieten() -> None:
    """Leaves out what Lightning says of devices and loaders at each of its calls."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for about in (".*does not have many workers", ".*it is recommended to use `Trainer", ".*treespec"):
        warnings.filterwarnings("ignore", about)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", type=Path, help="where CIFAR-10 or Fashion-MNIST lies")
    add("--images", type=int, help="use only so many training images, of all sites together")
    add("--part", type=int, default=0, help="which site's part of the images to take")
    add("--parts", type=int, default=1, help="how many sites share them")
    add("--alpha", type=float, help="skew the sites' labels by Dirichlet(alpha)")
    add("--batch_size", type=int, default=32, help="of each device")
    add("--lr", type=float, default=0.02)
    add("--local_epochs", type=int, default=1, help="passes over the site's images in a round")
    add("--seed", type=int, default=0)
    add("--root_dir", type=Path, default=Path("lightning"), help="where checkpoints and events go")
    add("--use_tracking", action="store_true", help="write TensorBoard events of each step, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()

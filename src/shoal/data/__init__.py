"""Data of clients: data sets, partitions, and a catalogue of known ones."""

from shoal.data.cifar10 import cifar10
from shoal.data.dataset import ArrayDataset, Dataset, ItemDataset, Subset, as_dataset, split
from shoal.data.digits import digits
from shoal.data.fashion_mnist import fashion_mnist
from shoal.data.partition import IID, Dirichlet, Natural, Partitioner, QuantitySkew, Shards, partition
from shoal.data.population import Population
from shoal.data.synthetic import synthetic

__all__ = [
    "IID",
    "ArrayDataset",
    "Dataset",
    "Dirichlet",
    "ItemDataset",
    "Natural",
    "Partitioner",
    "Population",
    "QuantitySkew",
    "Shards",
    "Subset",
    "as_dataset",
    "cifar10",
    "digits",
    "fashion_mnist",
    "partition",
    "split",
    "synthetic",
]

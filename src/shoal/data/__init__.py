"""Data of clients: data sets, partitions, and a catalogue of known ones."""

from shoal.data.catalogue.cifar10 import cifar10
from shoal.data.catalogue.digits import digits
from shoal.data.catalogue.fashion_mnist import fashion_mnist
from shoal.data.catalogue.hapt import hapt
from shoal.data.catalogue.stanford_dogs import stanford_dogs
from shoal.data.catalogue.synthetic import synthetic
from shoal.data.dataset import ArrayDataset, Dataset, ItemDataset, Subset, as_dataset, split
from shoal.data.partition import IID, Dirichlet, Natural, Partitioner, QuantitySkew, Shards, partition
from shoal.data.population import Population

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
    "hapt",
    "partition",
    "split",
    "stanford_dogs",
    "synthetic",
]

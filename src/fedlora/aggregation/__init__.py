"""The published ways to average LoRA adapters."""

from fedlora.aggregation.base import Aggregator, ProductMean, WeightedMean, product
from fedlora.aggregation.fedavg import FedAvg
from fedlora.aggregation.fedex import FedExLoRA
from fedlora.aggregation.fedsa import FedSALoRA
from fedlora.aggregation.ffa import FFALoRA

__all__ = [
    "Aggregator",
    "FFALoRA",
    "FedAvg",
    "FedExLoRA",
    "FedSALoRA",
    "ProductMean",
    "WeightedMean",
    "product",
]

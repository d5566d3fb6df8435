"""Memory, time and cost of RLHF on GPUs that are not there yet, in closed form."""

from rlhf.plan.devices import DEVICES, Device, find_device
from rlhf.plan.memory import Models, Recipe, Strategy
from rlhf.plan.search import Plan, evaluate, search
from rlhf.plan.shapes import ModelShape, find_shape
from rlhf.plan.systems import SYSTEMS, System
from rlhf.plan.time import Cluster, Estimator

__all__ = [
    "DEVICES",
    "SYSTEMS",
    "Cluster",
    "Device",
    "Estimator",
    "ModelShape",
    "Models",
    "Plan",
    "Recipe",
    "Strategy",
    "System",
    "evaluate",
    "find_device",
    "find_shape",
    "search",
]

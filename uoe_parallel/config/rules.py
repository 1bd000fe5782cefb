"""The names that a config has for selections, gates and balance rules, and the classes behind them.

A rule is one class in one file of `uoe_parallel.routing`, and a line here. A name with a colon is
the class of another package, "module:Class".
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import Any

_PACKAGE = "uoe_parallel.routing"

SELECTIONS = MappingProxyType(
    {
        "top_k": f"{_PACKAGE}.selection.top_k:TopK",
        "threshold": f"{_PACKAGE}.selection.threshold:Threshold",
        "expert_choice": f"{_PACKAGE}.selection.expert_choice:ExpertChoice",
    }
)
GATES = MappingProxyType(
    {
        "sigmoid": f"{_PACKAGE}.gates.sigmoid:SigmoidGate",
        "softmax": f"{_PACKAGE}.gates.softmax:SoftmaxGate",
        "softmax_of_chosen": f"{_PACKAGE}.gates.softmax_of_chosen:SoftmaxOfChosenGate",
        "relu": f"{_PACKAGE}.gates.relu:ReluGate",
    }
)
BALANCE_RULES = MappingProxyType(
    {
        "sequence_loss": f"{_PACKAGE}.balance.sequence_loss:SequenceLoss",
        "batch_loss": f"{_PACKAGE}.balance.batch_loss:BatchLoss",
        "bias": f"{_PACKAGE}.balance.bias:LoadBias",
    }
)


def is_path(name: str) -> bool:
    """Whether a rule's name is that of another package's class."""
    return ":" in name


def load_rule(table: MappingProxyType[str, str], name: str) -> Any:
    """The class that `name` means. Raises ImportError or AttributeError with the reason."""
    module, _, attribute = table.get(name, name).partition(":")
    return getattr(import_module(module), attribute)

"""What runs inside the rank processes for the tests of floating-point operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.tiny import USED_VOCAB_SIZE
from tests.model.cases import build_model, random_tokens, start
from uoe_parallel.analysis.exchange import ExchangeSizes
from uoe_parallel.analysis.flop_counter import flop_counter
from uoe_parallel.analysis.flops import Computation, micro_batch_flops
from uoe_parallel.analysis.simulate import build_stage
from uoe_parallel.analysis.work import BlockWork, Workload
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.dispatch import dispatcher
from uoe_parallel.model.context import Context
from uoe_parallel.model.language_model import LanguageModel

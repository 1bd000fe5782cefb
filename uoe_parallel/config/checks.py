"""Rules between fields. A rule yields a Fault for each way in which a valid-typed config is wrong.

A rule names in `Fault.fields` every field that it reads: where one of them is faulty by itself,
the rule was run on a stand-in for its value and its verdict is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from uoe_parallel.config.deepspeed import passthrough_faults
from uoe_parallel.config.faults import Fault, show
from uoe_parallel.config.routing_checks import (
    is_routed,
    kv_fields,
    routers_are_there,
    routing_fits,
    teacher_stands_still,
)
from uoe_parallel.config.schema import RoutingConfig, RunConfig

Rule = Callable[[RunConfig], Iterable[Fault]]


def _divides(
    field: str, value: int, divisor_field: str, divisor: int, *others: str
) -> Iterator[Fault]:
    """`divisor` has to divide `value`; `others` are further fields that either came from."""
    if value % divisor == 0:
        return
    yield Fault(
        (field, divisor_field, *others),
        value,
        f"is not a multiple of {divisor_field} = {divisor}",
        f"use {_multiples(value, divisor)}, or {divisor_field} = {_divisor(value, divisor)}",
    )


def _multiples(value: int, step: int) -> str:
    """The multiples of `step` next to `value`, in words."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _divisor(value: int, near: int) -> int:
    """The divisor of `value` that is nearest to `near`, the smaller of two."""
    near = min(value, near)
    return next(
        divisor
        for distance in range(near)
        for divisor in (near - distance, near + distance)
        if value % divisor == 0
    )


def heads_split_hidden(config: RunConfig) -> Iterator[Fault]:
    """Heads have one whole width, and an even one where rotary positions turn pairs of elements."""
    model = config.model
    if model.positions != "rotary":
        size, heads = model.hidden_size, model.num_heads
        yield from _divides("model.hidden_size", size, "model.num_heads", heads)
        return
    fields = ("model.hidden_size", "model.num_heads", "model.positions")
    pairs = 2 * model.num_heads
    if model.hidden_size % model.num_heads:
        problem = f"is not a multiple of model.num_heads = {model.num_heads}"
    elif model.hidden_size % pairs:
        width = model.hidden_size // model.num_heads
        problem = f"makes heads {width} wide, and rotary positions need an even width"
    else:
        return
    mend = f"use {_multiples(model.hidden_size, pairs)}, a multiple of 2 x model.num_heads"
    yield Fault(fields, model.hidden_size, problem, mend)


def kv_heads_split_heads(config: RunConfig) -> Iterator[Fault]:
    model = config.model
    if model.num_heads % model.kv_heads:
        problem = f"does not divide model.num_heads = {model.num_heads}"
        mend = f"use {_divisor(model.num_heads, model.kv_heads)}"
        fields = ("model.num_kv_heads", "model.num_heads")
        yield Fault(fields, model.kv_heads, problem, mend)


def experts_split_ffn(config: RunConfig) -> Iterator[Fault]:
    experts = config.feed_forward.num_experts
    size = config.model.ffn_size
    yield from _divides("model.ffn_size", size, "feed_forward.num_experts", experts)


def ranks_split_experts(config: RunConfig) -> Iterator[Fault]:
    experts = config.feed_forward.num_experts
    yield from _ranks_split("feed_forward.num_experts", experts, "feed_forward", config)


def ranks_split_kv_heads(config: RunConfig) -> Iterator[Fault]:
    field, other = kv_fields(config)
    yield from _ranks_split(field, config.model.kv_heads, "attention", config, other)


def _ranks_split(
    field: str, experts: int, kind: str, config: RunConfig, *others: str
) -> Iterator[Fault]:
    """Every rank that shares a block's experts holds equally many of them."""
    routing: RoutingConfig = getattr(config, kind)
    parallel = config.parallel
    yield from _divides(field, experts, "parallel.tensor", parallel.tensor, *others)
    wide = parallel.expert is not None and routing.spread == "expert" and is_routed(routing)
    if wide and experts % parallel.tensor == 0:
        used = ("parallel.tensor", f"{kind}.spread", f"{kind}.routed_layers", *others)
        yield from _divides(field, experts, "parallel.expert", parallel.expert_size, *used)


def ranks_split_vocabulary(config: RunConfig) -> Iterator[Fault]:
    multiple = config.model.vocab_multiple
    tensor = config.parallel.tensor
    yield from _divides("model.vocab_multiple", multiple, "parallel.tensor", tensor)


def ranks_split_sequence(config: RunConfig) -> Iterator[Fault]:
    if config.parallel.sequence_parallel:
        yield from _divides(
            "model.sequence_length",
            config.model.sequence_length,
            "parallel.tensor",
            config.parallel.tensor,
            "parallel.sequence_parallel",
        )


def feed_forward_layers(config: RunConfig) -> Iterator[Fault]:
    yield from _routed_layers("feed_forward.routed_layers", config.feed_forward, config)


def attention_layers(config: RunConfig) -> Iterator[Fault]:
    yield from _routed_layers("attention.routed_layers", config.attention, config)


def _routed_layers(field: str, routing: RoutingConfig, config: RunConfig) -> Iterator[Fault]:
    layers = routing.routed_layers
    if isinstance(layers, str):
        return
    count = config.model.num_layers
    good = sorted({layer for layer in layers if layer < count})
    mend = f"use {show(good)}" if good else 'name layers, or use "all" or "none"'
    if beyond := sorted({layer for layer in layers if layer >= count}):
        problem = f"names {show(beyond)}, and layers are counted from 0 to {count - 1}"
        yield Fault((field, "model.num_layers"), layers, problem, mend)
    elif len(good) < len(layers):
        yield Fault((field,), layers, "names a layer twice", mend)


def micro_batches_fill_batch(config: RunConfig) -> Iterator[Fault]:
    yield from _divides(
        "training.global_batch_size",
        config.training.global_batch_size,
        "training.micro_batch_size",
        config.training.micro_batch_size,
    )


def learning_rate_falls(config: RunConfig) -> Iterator[Fault]:
    low, peak = config.training.min_learning_rate, config.training.learning_rate
    if low > peak:
        fields = ("training.min_learning_rate", "training.learning_rate")
        problem = f"is above training.learning_rate = {peak:g}"
        yield Fault(fields, low, problem, f"use at most {peak:g}, such as {peak / 10:g}")


def warmup_ends(config: RunConfig) -> Iterator[Fault]:
    warmup, steps = config.training.warmup_steps, config.training.steps
    if warmup > steps:
        fields = ("training.warmup_steps", "training.steps")
        problem = f"is more than training.steps = {steps}"
        yield Fault(fields, warmup, problem, f"use at most {steps}")


def profiled_steps_are_taken(config: RunConfig) -> Iterator[Fault]:
    profile, steps = config.profile, config.training.steps
    if profile.steps and profile.first_step + profile.steps > steps:
        fields = ("profile.first_step", "profile.steps", "training.steps")
        problem = f"and profile.steps = {profile.steps} reach beyond training.steps = {steps}"
        mend = f"use at most {max(steps - profile.steps, 0)}, or fewer steps"
        yield Fault(fields, profile.first_step, problem, mend)


def products_suit_precision(config: RunConfig) -> Iterator[Fault]:
    if config.training.precision == "fp64" and config.training.expert_products == "grouped":
        fields = ("training.expert_products", "training.precision")
        problem = (
            'can\'t be combined with training.precision = "fp64", which has no grouped product'
        )
        yield Fault(fields, "grouped", problem, 'use "loop" or "auto"')


def betas_in_range(config: RunConfig) -> Iterator[Fault]:
    betas = config.training.betas
    if not all(0 <= beta < 1 for beta in betas):
        problem = "holds a number outside [0, 1)"
        yield Fault(("training.betas",), betas, problem, "use numbers such as [0.9, 0.95]")


def validation_has_data(config: RunConfig) -> Iterator[Fault]:
    every = config.training.validate_every
    if every and config.data.validation is None:
        fields = ("training.validate_every", "data.validation")
        problem = "asks for validation passes, and data.validation is not given"
        yield Fault(fields, every, problem, "give data.validation, or use 0")


def classes_suit_task(config: RunConfig) -> Iterator[Fault]:
    task, classes = config.model.task, config.model.num_classes
    fields = ("model.num_classes", "model.task")
    if task != "classification" and classes is not None:
        mend = 'leave it out, or set model.task to "classification"'
        yield Fault(fields, classes, f"means nothing to model.task = {show(task)}", mend)
    elif task == "classification" and (classes is None or classes < 2):
        problem = 'leaves nothing to tell apart, as model.task = "classification" is to'
        yield Fault(fields, classes, problem, "use the number of classes, 2 or more")


def classified_documents_are_apart(config: RunConfig) -> Iterator[Fault]:
    if config.model.task == "classification" and config.data.reset_at_documents:
        yield Fault(
            ("data.reset_at_documents", "model.task"),
            True,
            'means nothing to model.task = "classification", which reads one document a sequence',
            "leave it out",
        )


def one_use_of_routes(config: RunConfig) -> Iterator[Fault]:
    given = {f"routes.{use}": folder for use, folder in config.routes if folder is not None}
    if len(given) > 1:
        first, *others = given
        problem = f"is given together with {' and '.join(others)}"
        yield Fault(tuple(given), given[first], problem, "keep one of them")


def routes_beside_checkpoints(config: RunConfig) -> Iterator[Fault]:
    """Both name their folders by steps: a record would take the place of checkpoints."""
    record, checkpoints = config.routes.record, Path(config.run_dir, "checkpoints")
    if record is not None and Path(record).resolve() == checkpoints.resolve():
        problem = "is the folder of the run's checkpoints"
        mend = f"use another folder, such as {show(str(Path(config.run_dir, 'routes')))}"
        yield Fault(("routes.record", "run_dir"), record, problem, mend)


def experts_widen_tensor_groups(config: RunConfig) -> Iterator[Fault]:
    """An expert group is a run of whole tensor groups, and rows are exchanged within it."""
    parallel = config.parallel
    if parallel.expert is None:
        return
    yield from _divides("parallel.expert", parallel.expert, "parallel.tensor", parallel.tensor)
    if parallel.expert > parallel.tensor > 1 and not parallel.sequence_parallel:
        yield Fault(
            ("parallel.sequence_parallel", "parallel.expert", "parallel.tensor"),
            False,
            f"leaves tokens on every tensor rank, and an expert group of {parallel.expert} ranks "
            f"would compute them {parallel.tensor} times",
            f"set it to true, or parallel.expert = {parallel.tensor}",
        )


def zero_stage_suits_axes(config: RunConfig) -> Iterator[Fault]:
    parallel = config.parallel
    stage = parallel.zero_stage
    if parallel.pipeline > 1 and stage > 1:
        yield Fault(
            ("parallel.zero_stage", "parallel.pipeline"),
            stage,
            f"can't be combined with parallel.pipeline = {parallel.pipeline}: a pipeline adds up "
            "the gradients of its micro-batches before it reduces them, and DeepSpeed's ZeRO 2 "
            "and 3 cut gradients up in every backward pass",
            "use 1, or parallel.pipeline = 1",
        )
    if parallel.expert_size > parallel.tensor and stage == 3:
        yield Fault(
            ("parallel.zero_stage", "parallel.expert", "parallel.tensor"),
            stage,
            f"can't be combined with parallel.expert = {parallel.expert}: ZeRO 3 cuts every "
            "parameter over all data-parallel ranks, and those of an expert group hold different "
            "experts",
            f"use 2, or parallel.expert = {parallel.tensor}",
        )
    if config.training.precision == "fp64" and stage > 0:
        yield Fault(
            ("parallel.zero_stage", "training.precision"),
            stage,
            "can't be combined with training.precision = \"fp64\": DeepSpeed's ZeRO keeps its "
            "masters in fp32",
            "use 0",
        )


def stages_have_layers(config: RunConfig) -> Iterator[Fault]:
    stages, layers = config.parallel.pipeline, config.model.num_layers
    if stages > layers:
        yield Fault(
            ("parallel.pipeline", "model.num_layers"),
            stages,
            f"is more than model.num_layers = {layers}",
            f"use at most {layers}",
        )


def there_is_a_checkpoint_to_go_back_to(config: RunConfig) -> Iterator[Fault]:
    """What goes back needs checkpoints on the way, and records of routes are of given data."""
    anomalies = config.anomalies
    asked = {
        "anomalies.not_finite": (anomalies.not_finite, "roll_back"),
        "anomalies.spike": (anomalies.spike, "roll_back"),
        "replicas.on_mismatch": (config.replicas.on_mismatch, "repair"),
    }
    for field, (value, goes_back) in asked.items():
        if value != goes_back:
            continue
        if config.checkpoint.every == 0:
            problem = "goes back to checkpoints, and checkpoint.every = 0 writes none on the way"
            yield Fault((field, "checkpoint.every"), value, problem, "give checkpoint.every")
        for use in ("replay", "compare"):
            if value == "roll_back" and getattr(config.routes, use) is not None:
                problem = "passes over data, and then steps are no longer those of the record in "
                mend = f'use "skip", or leave routes.{use} out'
                yield Fault((field, f"routes.{use}"), value, f"{problem}routes.{use}", mend)


def replicas_are_compared(config: RunConfig) -> Iterator[Fault]:
    if config.replicas.on_mismatch == "repair" and config.replicas.check_every == 0:
        yield Fault(
            ("replicas.on_mismatch", "replicas.check_every"),
            "repair",
            "finds nothing to repair, as replicas.check_every = 0 never compares",
            "give replicas.check_every, or leave replicas.on_mismatch out",
        )


PARALLEL_RULES: tuple[Rule, ...] = (
    ranks_split_experts,
    ranks_split_kv_heads,
    ranks_split_vocabulary,
    ranks_split_sequence,
    experts_widen_tensor_groups,
    zero_stage_suits_axes,
    stages_have_layers,
)
"""What axes and ZeRO stages need of the config and of each other."""

RULES: tuple[Rule, ...] = (
    heads_split_hidden,
    kv_heads_split_heads,
    experts_split_ffn,
    routing_fits,
    *PARALLEL_RULES,
    feed_forward_layers,
    attention_layers,
    micro_batches_fill_batch,
    learning_rate_falls,
    warmup_ends,
    profiled_steps_are_taken,
    products_suit_precision,
    betas_in_range,
    validation_has_data,
    classes_suit_task,
    classified_documents_are_apart,
    one_use_of_routes,
    routes_beside_checkpoints,
    there_is_a_checkpoint_to_go_back_to,
    replicas_are_compared,
    routers_are_there,
    teacher_stands_still,
    passthrough_faults,
)
"""Every rule that needs nothing but the config."""

"""What a run is: every field of the YAML, its type, its default and its range.

Sizes are counts of elements, times are in steps, rates are per optimizer step. Rules between
fields live in `checks.py`; sizes and ranks of the parallel layout in `uoe_parallel.parallel`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

RoutedLayers = Literal["all", "none"] | list[NonNegativeInt]
Precision = Literal["fp32", "bf16", "fp64"]
Task = Literal["next_token", "masked_token", "classification"]
Recompute = Literal["none", "selective", "full"]
ExpertProducts = Literal["auto", "grouped", "loop"]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are not coerced between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RoutingConfig(Section):
    """How one kind of block (feed-forward or attention) routes tokens to its experts.

    Selection, gates and balance rules go by names of `rules.py`, or are classes of other packages,
    such as "my_package.my_module:MyRule".
    """

    routed_layers: RoutedLayers = "all"
    """Layers (counted from 0) whose block is routed; the others compute the dense block."""
    top_k: PositiveInt = 2
    """Experts that a patch visits beside the shared ones: exactly so many with top_k, on average
    with threshold and expert_choice."""
    selection: str | None = "top_k"
    """Which patches visit which experts: top_k, threshold or, in bidirectional models,
    expert_choice. null leaves the choice to the segments."""
    patch_length: PositiveInt = 1
    """Neighbouring tokens of a document that are routed as one."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """Most patches of a document that an expert takes, over its even share of a whole context,
    top_k / experts: what comes later is dropped. null drops nothing."""
    segment_length: PositiveInt | None = None
    """Tokens of a segment, a multiple of patch_length. Segments keep segment_experts of the experts
    before patches choose among these; in a causal model by the mean of the segment before."""
    segment_experts: PositiveInt | None = None
    """Experts that a segment keeps, shared ones not counted; null switches this selection off."""
    shared_experts: NonNegativeInt = 0
    """Experts that every token visits with a gate of one, spread evenly over the block's."""
    gate: str = "sigmoid"
    """What a chosen expert's result is multiplied by: sigmoid, softmax, softmax_of_chosen, relu."""
    balance: list[str] | None = None
    """Rules that keep experts evenly used: sequence_loss, batch_loss, bias. null means
    [sequence_loss], but none for threshold and expert_choice, which balance patches themselves."""
    balance_loss: NonNegativeFloat = 0.01
    """Weight of the load-balance losses, summed over routed layers."""
    z_loss: NonNegativeFloat = 0.001
    """Weight of the router z-loss (mean squared log-sum-exp of the scores), summed likewise."""
    bias_rate: float = Field(default=0.01, gt=0)
    """What the bias rule adds to or takes from an expert's bias in a step, in units of scores."""
    threshold_warmup: NonNegativeInt = 20
    """Steps in which the threshold rule selects every expert, while it learns the quantiles."""
    threshold_rate: float = Field(default=0.1, gt=0, le=1)
    """Weight of a step's quantiles in the running ones that the threshold rule compares with."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of rules from other packages."""
    spread: Literal["tensor", "expert"] = "tensor"
    """The ranks that share the experts of a routed block: those of a tensor group, or those of an
    expert group (parallel.expert), which may reach over data-parallel ranks."""

    @property
    def chosen_experts(self) -> int:
        """Experts that a token visits beside the shared ones, on average and without drops."""
        if self.selection is not None:
            return self.top_k
        assert self.segment_experts is not None
        return self.segment_experts

    @property
    def levels(self) -> list[str]:
        """The decisions that have a router each, in their order."""
        segments = ["segments"] if self.segment_experts is not None else []
        return segments + (["patches"] if self.selection is not None else [])

    def routes(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is routed."""
        if isinstance(self.routed_layers, str):
            return self.routed_layers == "all"
        return layer in self.routed_layers


class FeedForwardConfig(RoutingConfig):
    """The feed-forward block: `num_experts` equal slices of one dense block."""

    num_experts: PositiveInt = 8
    spread: Literal["tensor", "expert"] = "expert"
    initialization: Literal["slices", "separate"] = "slices"
    """Of routed blocks' first weights: slices of one dense block's, or those of separate experts,
    as a mixture has them."""


class AttentionConfig(RoutingConfig):
    """The attention block: its experts are the key/value heads with their query heads."""

    routed_layers: RoutedLayers = "none"
    keys_and_values: Literal["selected", "all"] = "selected"
    """Whether a head attends among the tokens that it selected, or routes queries only and has the
    keys and values of all tokens."""


class ModelConfig(Section):
    """The dense transformer that is cut into experts."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_size: PositiveInt
    """Width of the whole feed-forward block; every expert has ffn_size / num_experts of it."""
    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    """Key/value heads (grouped-query attention); null means num_heads."""
    sequence_length: PositiveInt
    task: Task = "next_token"
    """What the model learns: a causal model to predict each next token, a bidirectional one to
    predict masked tokens or the class of a document."""
    num_classes: PositiveInt | None = None
    """Classes of the classification task, and only there."""
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "swiglu"
    """gelu_tanh is GPT-2's approximation of gelu."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    positions: Literal["rotary", "learned"] = "rotary"
    """Turning queries and keys, or adding one of sequence_length learned vectors to a token's."""
    bias: bool = False
    """Biases in the linear layers of both blocks."""
    tie_embeddings: bool = True
    """Use the embedding's weight in the head as well, where that is over the vocabulary."""
    vocab_multiple: PositiveInt = 8
    """The vocabulary is padded to a multiple of this, which the tensor size must divide."""
    norm_eps: float = Field(default=1e-5, gt=0)
    rope_base: float = Field(default=10000.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of elements zeroed in training: of the embedding's output, and of each block's output
    before it is added to the residual stream."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention probabilities zeroed in training, in routed and dense blocks alike."""
    init_std: float = Field(default=0.02, gt=0)
    router_init_std: float = Field(default=0.02, gt=0)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def causal(self) -> bool:
        return self.task == "next_token"


class ParallelConfig(Section):
    """How ranks share the model. Data-parallel size is world size / (tensor x pipeline)."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    """Stages that the layers are cut into, of about equal cost."""
    expert: PositiveInt | None = None
    """Ranks of an expert group, a multiple of tensor: null means tensor. A larger one reaches over
    data-parallel ranks, so that each holds fewer experts and tokens travel between them."""
    sequence_parallel: bool = True
    """Shard tokens over the tensor group between blocks (all-to-all dispatch); without it
    tokens are replicated there and sums are all-reduced. No effect with tensor = 1."""
    zero_stage: Literal[0, 1, 2, 3] = 1

    @property
    def expert_size(self) -> int:
        return self.expert or self.tensor


class BlendPart(Section):
    """One corpus of a blend."""

    prefix: str
    weight: float = Field(gt=0)
    """Its share of the sequences drawn, relative to the other weights."""


Corpora = str | list[BlendPart]


class DataConfig(Section):
    """Where tokens come from: prefixes of megatron .bin/.idx files, for classification with a file
    <prefix>.labels.npy that has the class of each document; or blends of several, by weight."""

    train: Corpora
    validation: Corpora | None = None
    test: Corpora | None = None
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] | None = None
    """Cut every corpus of `train` at documents into parts of these relative sizes, in their order:
    for training, validation and test, which then have no corpora of their own."""
    tokenizer: str = "bytes"
    """bytes, a Hugging Face tokenizers file (.json) or a SentencePiece model (.model)."""
    reset_at_documents: bool = False
    """Keep the documents of a sequence apart: attention, positions and routing restart after each
    end-of-document token. Without it a sequence is read as one document."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """Chance of each token of text to be one that the masked_token task predicts."""


class TrainingConfig(Section):
    """Optimization. Batch sizes count sequences."""

    steps: PositiveInt
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt
    trains: Literal["all", "routers"] = "all"
    """Which parameters move: all, or those of routers alone."""
    precision: Precision = "fp32"
    """Of weights and activations. fp64 is for proofs, such as those of layouts, without ZeRO."""
    learning_rate: float = Field(gt=0)
    min_learning_rate: NonNegativeFloat = 0.0
    router_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the routers; null means learning_rate."""
    warmup_steps: NonNegativeInt = 0
    weight_decay: NonNegativeFloat = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it. selective: what experts compute
    between dispatch and combine, from the rows that arrived; in dense blocks, what lies between the
    linears: attention with its rotary positions, from queries, keys and values, and the activation,
    from the first linear's result. Nothing is routed or sent again. full: whole layers, from their
    inputs, with all that they send. No bit of a loss or gradient depends on it."""
    expert_products: ExpertProducts = "auto"
    """How rows are multiplied by their experts' slices: in one grouped call (not in fp64), slice by
    slice in a loop, or by the faster of them, as measured when the run starts. On a CPU both give
    the same bits. On CUDA name one for a run that is to be repeated or resumed bit by bit."""
    validate_every: NonNegativeInt = 0
    """Steps between validation passes; 0 validates only at the end."""
    validation_sequences: PositiveInt = 64
    """Sequences of a validation or test pass, spread evenly over the split."""


class CheckpointConfig(Section):
    """Checkpoints are written to <run_dir>/checkpoints; a run continues from the newest whole one
    that it finds there."""

    start_from: str | None = None
    """A checkpoint, or a run folder for its newest, whose weights and routing rules a run that has
    no checkpoint of its own yet begins with. It is of a model of the same sizes; routers that it
    does not have begin as in a new model."""
    every: NonNegativeInt = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    asynchronous: bool = False
    """Train on while a checkpoint is written: training stands still only until its state has been
    copied to the host's memory, which holds that copy until it is on disk."""


class DistillationConfig(Section):
    """Learning from a dense teacher: the model's own weights with all experts on and gates of one,
    which is the dense model that a converted checkpoint was made of. Only where training.trains is
    routers, so that the teacher stands still."""

    weight: float = Field(default=0.0, ge=0, le=1)
    """Of the teacher's part in the loss, KL(teacher || student) of each label that counts; the rest
    is cross entropy. 0 has no teacher."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits in the KL, which is multiplied by its square (Hinton et al.,
    arXiv 1503.02531)."""


class AnomaliesConfig(Section):
    """What to do about a step whose loss or gradient norm is not a finite number, or jumps. It is
    found out before weights move, and every case is an event in the run's metrics.

    stop ends the run; skip leaves the weights as they are and goes on with the next step; roll_back
    continues from the newest checkpoint with the data that comes after that step's."""

    not_finite: Literal["stop", "skip", "roll_back"] = "stop"
    spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    spike_window: int = Field(default=128, ge=2)
    """Steps that a spike stands out from; none is seen before half as many were taken."""
    spike_sigmas: float = Field(default=6.0, gt=0)
    """A loss or gradient norm is a spike if it lies this many standard deviations of the window
    above its mean."""
    limit: PositiveInt = 3
    """Anomalies in a row, with no step taken in between that got further, after which the run stops
    whatever it would do about one."""


class ReplicasConfig(Section):
    """Comparing checksums of what ranks hold alike: replicated weights and optimizer states,
    routers, thresholds and biases of routing, random state, the position in the data."""

    check_every: NonNegativeInt = 0
    """Steps between comparisons; 0 compares never. Others come before every checkpoint."""
    on_mismatch: Literal["stop", "repair"] = "stop"
    """repair continues from the newest checkpoint, which holds every value once. It counts as one
    of the anomalies that `anomalies.limit` bounds."""


class LoggingConfig(Section):
    """Metrics go to <run_dir>/metrics.jsonl, TensorBoard's events to <run_dir>/tensorboard."""

    every: PositiveInt = 10
    tensorboard: bool = True
    prompt: str = Field(default="The ", min_length=1)
    """What the text begins with that is sampled from the model when the run ends."""


class RoutesConfig(Section):
    """Keeping the routes of training steps (which experts each token visits) and using kept ones.

    A record lies in <folder>/step-<step>, a folder that all ranks share. Any layout reads what any
    other wrote. At most one of the three is given."""

    record: str | None = None
    """Folder that gets the routes of every step; a step that is taken again is written again."""
    replay: str | None = None
    """Folder of a record to follow: tokens visit the recorded experts, whatever their scores."""
    compare: str | None = None
    """Folder of a record to compare with; the run keeps its own routes. Like replay, this reports
    routes/flipped_tokens, how many tokens would not by themselves go where the record says, among
    routes/tokens: sums over routed blocks and the steps since the last report."""


class ProfileConfig(Section):
    """Looking at a run's communication while it goes on; see docs/profiling.md."""

    first_step: NonNegativeInt = 20
    """First of the steps (from 0) whose collectives are timed."""
    steps: NonNegativeInt = 0
    """How many steps are timed; 0 times none. The results go to <run_dir>/profile."""
    wait_limit: float | None = Field(default=None, gt=0)
    """Seconds. A collective that waits longer for its ranks is reported, with the ranks that have
    not arrived, and ends the run everywhere; null waits until the backend gives up. Choose it above
    what ranks rightly wait for each other, as when one of them writes a checkpoint."""


class RunConfig(Section):
    """A whole run."""

    run_dir: str
    seed: NonNegativeInt = 1234
    model: ModelConfig
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    attention: AttentionConfig = AttentionConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    training: TrainingConfig
    distillation: DistillationConfig = DistillationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    anomalies: AnomaliesConfig = AnomaliesConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    logging: LoggingConfig = LoggingConfig()
    routes: RoutesConfig = RoutesConfig()
    profile: ProfileConfig = ProfileConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed through to DeepSpeed's config; may add to what is derived, not contradict it."""

    @property
    def has_documents(self) -> bool:
        """Whether micro-batches say which document each token is of, and which are padding."""
        return self.data.reset_at_documents or self.model.task == "classification"

    @property
    def routed_blocks(self) -> dict[str, int]:
        """The model's routed blocks by name, such as "layers.3.attention", and their experts."""
        kinds = {
            "attention": (self.attention, self.model.kv_heads),
            "feed_forward": (self.feed_forward, self.feed_forward.num_experts),
        }
        return {
            f"layers.{layer}.{kind}": experts
            for layer in range(self.model.num_layers)
            for kind, (routing, experts) in kinds.items()
            if routing.routes(layer)
        }

    @property
    def recorded_choices(self) -> dict[str, int]:
        """As `routed_blocks`: how many experts a token's record says yes or no of. Where segments
        choose before patches, their choice comes first."""
        return {
            name: experts + self.routed_experts[name] * (len(self.routing_of(name).levels) - 1)
            for name, experts in self.routed_blocks.items()
        }

    def routing_of(self, block: str) -> RoutingConfig:
        """Of a routed block by its name."""
        return self.attention if block.endswith(".attention") else self.feed_forward

    @property
    def routed_experts(self) -> dict[str, int]:
        """As `routed_blocks`, with the experts that are not shared."""
        blocks = self.routed_blocks.items()
        return {name: count - self.routing_of(name).shared_experts for name, count in blocks}

"""Files and overrides become configs; every fault is told, all in one message."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uoe_parallel.config.faults import Fault
from uoe_parallel.config.load import format_config, load_config, save_config
from uoe_parallel.config.schema import RunConfig
from uoe_parallel.errors import UserError

MINIMAL = """\
run_dir: runs/toy
model:
  num_layers: 2
  hidden_size: 32
  ffn_size: 64
  num_heads: 4
  sequence_length: 16
data:
  train: corpus/train
training:
  steps: 10
  global_batch_size: 8
  micro_batch_size: 2
  learning_rate: 1e-3
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, **options)  # pyright: ignore[reportArgumentType]
    return str(caught.value)


def only_fault(path: Path, *overrides: str) -> str:
    """The one fault that the overrides cause."""
    header, *faults = message(path, *overrides).splitlines()
    assert header == f"the config {path} with its overrides has 1 fault:"
    (fault,) = faults
    return fault.removeprefix("  - ")


def test_defaults_complete_a_minimal_file(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.training.learning_rate == 1e-3
    assert config.training.betas == (0.9, 0.95)
    assert config.feed_forward.routed_layers == "all"
    assert config.attention.routed_layers == "none"
    assert config.model.kv_heads == 4


def test_a_default_of_a_section_survives_setting_another_field_of_it(minimal: Path) -> None:
    assert load_config(minimal, ["attention.top_k=1"]).attention.routed_layers == "none"


@pytest.mark.parametrize("written", ["3e-3", "3E-3", "+.003", "0.003", "3.0e-03", " 3e-3 "])
def test_overrides_read_numbers_in_every_notation(minimal: Path, written: str) -> None:
    assert load_config(minimal, [f"training.learning_rate={written}"]).training.learning_rate == (
        3e-3
    )


def test_overrides_create_sections_and_take_lists_text_and_null(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "training.betas=[0.8, 0.9]",
            "feed_forward.routed_layers=[0]",
            "attention.routed_layers=all",
            "run_dir=runs/a=b",
            "training.router_learning_rate=null",
            "deepspeed.comms_logger.enabled=true",
            "checkpoint={every: 5, keep: 1}",
            "model.bias=true",
        ],
    )
    assert config.training.betas == (0.8, 0.9)
    assert config.feed_forward.routed_layers == [0]
    assert config.attention.routed_layers == "all"
    assert config.run_dir == "runs/a=b"
    assert config.deepspeed == {"comms_logger": {"enabled": True}}
    assert (config.checkpoint.every, config.checkpoint.keep) == (5, 1)
    assert config.model.bias


def test_the_last_of_two_overrides_counts(minimal: Path) -> None:
    assert load_config(minimal, ["seed=1", "seed=2"]).seed == 2


def test_overrides_do_not_reach_through_an_alias(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "deepspeed:\n  a: &a {x: 1}\n  b: *a\n")
    config = load_config(minimal, ["deepspeed.a.x=2"])
    assert config.deepspeed == {"a": {"x": 2}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("model.bias=yes", 'model.bias = "yes" is not true or false; write true'),
        ("model.bias='false'", 'model.bias = "false" is not true or false; write false'),
        ("logging.tensorboard=1", "logging.tensorboard = 1 is not true or false; write true"),
        ("seed='3'", 'seed = "3" is not an integer of at least 0; write 3'),
        ("seed=3.0", "seed = 3.0 is not an integer of at least 0; write 3"),
        ("seed=-3", "seed = -3 is not an integer of at least 0; give an integer of at least 0"),
        ("seed=", "seed = null is not an integer of at least 0; give an integer of at least 0"),
        ("seed=true", "seed = true is not an integer of at least 0; give an integer of at least 0"),
        ("seed=010", "seed = 10.0 is not an integer of at least 0; write 10"),
        (
            "model.dropout=1",
            (
                "model.dropout = 1 is not a finite number of at least 0 and below 1; "
                "give a finite number of at least 0 and below 1"
            ),
        ),
        (
            "training.eps='1e-8'",
            'training.eps = "1e-8" is not a finite number above 0; write 1e-08',
        ),
        (
            "training.eps=.inf",
            "training.eps = Infinity is not a finite number above 0; give a finite number above 0",
        ),
        (
            "training.router_learning_rate=high",
            (
                'training.router_learning_rate = "high" is not a finite number above 0 or null; '
                "give a finite number above 0 or null"
            ),
        ),
        ("run_dir=7", 'run_dir = 7 is not text; write "7"'),
        (
            "model.activation=gelo",
            'model.activation = "gelo" is not "gelu" or "gelu_tanh" or "swiglu"; write "gelu"',
        ),
        (
            "parallel.zero_stage=4",
            "parallel.zero_stage = 4 is not 0 or 1 or 2 or 3; give 0 or 1 or 2 or 3",
        ),
        (
            "feed_forward.routed_layers=1",
            (
                'feed_forward.routed_layers = 1 is not "all" or "none" or a list, each an integer '
                "of at least 0; write [1]"
            ),
        ),
        (
            "training.betas=[0.9]",
            (
                "training.betas = [0.9] is not a list of 2, each a finite number; "
                "give a list of 2, each a finite number"
            ),
        ),
        (
            "parallel=2",
            (
                "parallel = 2 is not a section; give it the fields tensor, "
                "pipeline, expert, sequence_parallel, zero_stage, or remove it"
            ),
        ),
        (
            "logging=",
            "logging = null is not a section; give it the fields every, tensorboard, prompt, or "
            "remove it",
        ),
        ("deepspeed=[1]", "deepspeed = [1] is not a mapping; give a mapping"),
        (
            "paralel.tensor=2",
            'paralel = {"tensor": 2} is not a known field; did you mean parallel?',
        ),
        (
            "model.hiden_size=2",
            "model.hiden_size = 2 is not a known field; did you mean model.hidden_size?",
        ),
        (
            "learning_rate=2",
            "learning_rate = 2 is not a known field; did you mean training.learning_rate?",
        ),
        (
            "top_k=2",
            "top_k = 2 is not a known field; did you mean feed_forward.top_k or attention.top_k?",
        ),
        (
            "logging.zzz=2",
            "logging.zzz = 2 is not a known field; use one of every, tensorboard, prompt",
        ),
        ("seed", "override 'seed' has no \"=\"; write it as section.field=value"),
        ("=3", "override '=3' names no field; write it as section.field=value"),
        (
            "model..bias=true",
            "override 'model..bias=true' names no field; write it as section.field=value",
        ),
        (
            "run_dir.x=1",
            (
                "override 'run_dir.x=1' reaches into what is not a section; "
                "give the whole value of run_dir"
            ),
        ),
        (
            "training.betas.0=0.5",
            (
                'training.betas = {"0": 0.5} is not a list of 2, each a finite '
                "number; give a list of 2, each a finite number"
            ),
        ),
        (
            "data.train=[{prefix: a}]",
            (
                'data.train = [{"prefix": "a"}] is not text or a list, each a mapping of prefix '
                "(text) and weight (a finite number above 0); give text or a list, each a mapping "
                "of prefix (text) and weight (a finite number above 0)"
            ),
        ),
    ],
)
def test_what_users_type_wrong(minimal: Path, override: str, fault: str) -> None:
    assert only_fault(minimal, override) == fault


def test_an_override_that_is_not_yaml(minimal: Path) -> None:
    fault = only_fault(minimal, "training.betas=[0.9, ")
    assert fault.startswith("override 'training.betas=[0.9, ' has a value that is not YAML: ")


def test_replacing_a_section_leaves_its_required_fields_missing(minimal: Path) -> None:
    text = message(minimal, "data={validation: v}")
    assert "data.train is required; give text" in text


def test_a_missing_section_is_one_fault(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("data:\n  train: corpus/train\n", ""))
    assert message(minimal).splitlines()[1:] == ["  - data is required; give it the fields train"]


def test_faults_of_every_kind_come_together(minimal: Path) -> None:
    text = message(
        minimal,
        "seed",  # an override that is none
        "model.hiden_size=2",  # an unknown field
        "model.num_layers='2'",  # a wrong type
        "training.warmup_steps=-1",  # out of range
        "training.global_batch_size=7",  # a broken rule
        "deepspeed.optimizer={}",  # a key that is not DeepSpeed's
        checks=[lambda config: [Fault(("parallel.tensor",), 1, "is too few", "start more")]],
    )
    header, *faults = text.splitlines()
    assert header.endswith("has 7 faults:")
    expected = [
        "override 'seed'",
        "model.num_layers = ",
        "model.hiden_size = ",
        "training.warmup_steps = -1 ",
        "training.global_batch_size = 7 is not a multiple of training.micro_batch_size = 2",
        "deepspeed.optimizer = ",
        "parallel.tensor = 1 is too few; start more",
    ]
    for start in expected:
        assert any(fault.startswith(f"  - {start}") for fault in faults), start


def test_rules_do_not_judge_stand_ins(minimal: Path) -> None:
    # hidden_size would be 1 and num_heads 4: both rules that read hidden_size must stay silent.
    assert only_fault(minimal, "model.hidden_size=x").startswith("model.hidden_size = ")
    # The default of num_kv_heads would blame num_heads for not dividing by the tensor size.
    overrides = ["model.num_kv_heads=x", "parallel.tensor=8"]
    assert only_fault(minimal, *overrides).startswith("model.num_kv_heads = ")
    # A whole section that is missing takes its fields with it.
    minimal.write_text(MINIMAL[: MINIMAL.index("training:")])
    seen: list[RunConfig] = []

    def check(config: RunConfig) -> Iterable[Fault]:
        seen.append(config)
        yield Fault(("parallel.tensor", "training.steps"), 1, "is judged", "blindly")

    assert message(minimal, checks=[check]).count("\n") == 1
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", " is empty; it needs at least run_dir, model, data, training"),
        ("# only a comment\n", " is empty; "),
        ("- 1\n- 2\n", " is not a mapping; "),
        ("just text\n", " is not a mapping; "),
        ("a: 1\nb: [1, 2\nc: 3\n", ", line 3: "),
        ("a:\n\tb: 1\n", ", line 2: "),
        ("seed: 1\nmodel: {}\nseed: 2\n", ", line 3: 'seed' is given twice in the same section"),
        ("model:\n  bias: true\n  bias: true\n", ", line 3: 'bias' is given twice"),
        ("1: a\n", ", line 1: a key is not text; put it in quotes"),
        ("[a]: 1\n", ", line 1: a key is not text"),
        ("a: 1\n---\nb: 1\n", ", line 2: "),
        ("seed: !!python/object:os.system 1\n", ", line 1: could not determine a constructor"),
        ("seed: !!binary aGk=\n", ": holds more than plain values"),
        ("deepspeed: &x {y: *x}\n", ": holds more than plain values"),
        ('run_dir: "\\ud800"\n', ": holds more than plain values"),
        (b"run_dir: \xff\xfe\xfa\n", ": "),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    text = message(path)
    assert text.startswith(f"the config {path}{expected}"), text
    assert "\n" not in text


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    reason = "no such file or directory; check the path"
    assert message(path) == f"cannot read the config {path}: {reason}"
    assert message(tmp_path).startswith(f"cannot read the config {tmp_path}: is a directory")


def test_scalars_follow_yaml_1_2(minimal: Path) -> None:
    minimal.write_text(
        MINIMAL + "deepspeed: {date: 2024-01-01, no: off, time: 1:30, '<<': 1, many: 1_000, e: 1e2}"
    )
    assert load_config(minimal).deepspeed == {
        "date": "2024-01-01", "no": "off", "time": "1:30", "<<": 1, "many": 1000, "e": 100.0,
    }  # fmt: skip


LOOKALIKES = [
    "", "~", "null", "yes", "True", "3e-3", "1.e5", "1_0", "010", "1:30", ".inf", "2024-01-01",
    "=", "<<", "\x85", "\u2028", "\ufeff", "\0", "a\n", " a ", "# a", "a: b",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(LOOKALIKES)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
RATES = st.floats(1e-30, 1e30)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    """Configs that break no rule, with every kind of value in them."""
    tensor = draw(st.sampled_from([1, 2, 4]))
    kv_heads = tensor * draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    experts = tensor * draw(st.integers(1, 4))
    layers = draw(st.integers(1, 5))
    micro, peak = draw(st.integers(1, 9)), draw(RATES)
    routed = st.sampled_from(["all", "none"]) | st.lists(st.integers(0, layers - 1), unique=True)
    return RunConfig.model_validate(
        {
            "run_dir": draw(TEXT),
            "seed": draw(st.integers(0, 2**70)),
            "model": {
                "num_layers": layers,
                "hidden_size": heads * 2 * draw(st.integers(1, 8)),
                "ffn_size": experts * draw(st.integers(1, 99)),
                "num_heads": heads,
                "num_kv_heads": draw(st.sampled_from([kv_heads, heads, None])),
                "sequence_length": tensor * draw(st.integers(1, 99)),
                "bias": draw(st.booleans()),
                "norm_eps": draw(RATES),
            },
            "feed_forward": {"num_experts": experts, "top_k": 1, "routed_layers": draw(routed)},
            "attention": {"top_k": 1, "routed_layers": draw(routed)},
            "parallel": {"tensor": tensor, "sequence_parallel": draw(st.booleans())},
            "data": {"train": draw(TEXT), "test": draw(st.none() | TEXT)},
            "training": {
                "steps": draw(st.integers(1, 10**12)),
                "global_batch_size": micro * draw(st.integers(1, 99)),
                "micro_batch_size": micro,
                "learning_rate": peak,
                "min_learning_rate": peak * draw(st.floats(0, 1)),
                "betas": tuple(draw(st.floats(0, 1, exclude_max=True)) for _ in range(2)),
            },
            "deepspeed": {"of_the_user": draw(PLAIN)},
        }
    )


@given(configs())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_a_saved_config_loads_back_equal(tmp_path: Path, config: RunConfig) -> None:
    path = tmp_path / "saved.yaml"
    save_config(config, path)
    assert load_config(path) == config


def test_text_that_looks_like_something_else_stays_text(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal).model_copy(update={"deepspeed": {"words": LOOKALIKES}})
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_saved_config_holds_every_field(minimal: Path) -> None:
    text = format_config(load_config(minimal))
    for section in RunConfig.model_fields:
        assert f"{section}:" in text
    assert "zero_stage: 1" in text
    assert "!!" not in text

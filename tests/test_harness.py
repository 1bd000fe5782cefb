"""The rank harness itself: what it promises when ranks succeed, fail, hang or die."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, Ranks


def _rank_and_sum(base: int, *, factor: int = 1) -> tuple[int, float]:
    total = torch.tensor([float(base + factor * dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def _environment() -> dict[str, str]:
    return dict(os.environ)


def _process() -> tuple[int, int]:
    """This rank's process id and the number of threads of the server it was forked from."""
    return os.getpid(), psutil.Process(os.getppid()).num_threads()


def _rank_1_raises_others_wait() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def _every_rank_exits() -> None:
    print(f"last words of rank {dist.get_rank()}")
    raise SystemExit(3)


def _rank_0_hangs() -> None:
    if dist.get_rank() == 0:
        _sleep_for_long()


def _sleep_for_long() -> None:
    time.sleep(600)


def _rank_1_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _return_a_function_that_does_not_pickle() -> object:
    return lambda: None


def _make_groups(tensor: int) -> tuple[int, int, int]:
    """Groups of both libraries; their tensor, data-parallel and expert group sizes."""
    import deepspeed
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor, create_gloo_process_groups=False
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    groups._create_expert_and_data_parallel(tensor)  # pyright: ignore[reportAttributeAccessIssue]
    groups.mpu = parallel_state  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.checkpointing.get_cuda_rng_tracker().add("left behind", 1)
    cycle: list[object] = [dist.group.WORLD]  # As an engine of DeepSpeed is one.
    cycle.append(cycle)
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        dist.get_world_size(groups._get_expert_parallel_group(f"ep_size_{tensor}")),  # pyright: ignore[reportAttributeAccessIssue]
    )


def _remains() -> list[str]:
    """What an earlier case left in this process."""
    import deepspeed.comm.comm
    from deepspeed.utils import groups
    from megatron.core import parallel_state
    from torch.distributed import distributed_c10d

    def holds_group(value: object) -> bool:
        inner = value.values() if isinstance(value, dict) else [value]
        return any(isinstance(v, dist.ProcessGroup | list) and bool(v) for v in inner)

    remains = [
        f"{module.__name__}.{name}"
        for module in (parallel_state, groups)
        for name, value in vars(module).items()
        if not name.startswith("__") and holds_group(value)
    ]
    checks = {
        "deepspeed's backend": deepspeed.comm.comm.cdb is not None,
        "deepspeed's mpu": groups.mpu is not None,
        "deepspeed's random streams": deepspeed.checkpointing.get_cuda_rng_tracker().get_states(),
        "torch's groups": len(distributed_c10d._world.pg_map) != 1,
        "environment": "LEFT_BEHIND" in os.environ,
        "default dtype": torch.get_default_dtype() != torch.float32,
    }
    return remains + [name for name, left in checks.items() if left]


def _open_files_and_threads() -> int:
    return sum(len(list(Path("/proc/self", kind).iterdir())) for kind in ("fd", "task"))


def test_results_are_ordered_by_rank(ranks: Ranks) -> None:
    assert ranks(3).run(_rank_and_sum, 10, factor=2) == [(0, 36.0), (1, 36.0), (2, 36.0)]


def test_ranks_find_what_torchrun_would_set(ranks: Ranks) -> None:
    for rank, environment in enumerate(ranks(2).run(_environment)):
        assert environment["RANK"] == environment["LOCAL_RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert environment["MASTER_PORT"].isdigit()


def test_processes_serve_many_cases_and_world_sizes(ranks: Ranks) -> None:
    first, again, more = ranks(2).run(_process), ranks(2).run(_process), ranks(3).run(_process)
    assert first == again == more[:2]


def test_ranks_are_forked_from_a_process_without_threads(ranks: Ranks) -> None:
    [(_, server_threads)] = ranks(1).run(_process)
    assert server_threads == 1


def test_failing_rank_fails_the_case_at_once_and_is_named(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks(3).run(_rank_1_raises_others_wait, timeout=600)

    message = str(caught.value)
    assert "test_failing_rank_fails_the_case_at_once_and_is_named" in message
    assert "_rank_1_raises_others_wait: world size 3: rank 1 failed; rank 0, 2 did not" in message
    failure = caught.value.failures[1]
    assert (failure.type_name, failure.message) == ("ValueError", "rank one is unhappy")
    assert 'raise ValueError("rank one is unhappy")' in failure.traceback
    for waiting in (0, 2):
        assert "another rank failed" in caught.value.failures[waiting].message
        assert "in barrier" in caught.value.failures[waiting].output
    assert ranks(3).run(_rank_and_sum, 0) == [(0, 3.0), (1, 3.0), (2, 3.0)]


def test_hanging_rank_is_named_with_its_stack_and_replaced(ranks: Ranks) -> None:
    before = ranks(2).run(_process)
    with pytest.raises(RankError, match="world size 2: rank 0 did not finish") as caught:
        ranks(2).run(_rank_0_hangs, timeout=0.5)

    assert caught.value.failures.keys() == {0}
    assert "not finished after 0.5 s" in caught.value.failures[0].message
    assert "in _sleep_for_long" in caught.value.failures[0].output
    after = ranks(2).run(_process)
    assert before[0] != after[0]
    assert before[1] == after[1]
    assert not psutil.pid_exists(before[0][0])


def test_dead_rank_is_named_with_its_exit_code(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks(2).run(_rank_1_dies, timeout=600)
    assert caught.value.failures[1].message == "exit code 7"
    assert ranks(2).run(_rank_and_sum, 0) == [(0, 1.0), (1, 1.0)]


def test_ranks_that_all_fail_report_output_and_live_on(ranks: Ranks) -> None:
    before = ranks(2).run(_process)
    with pytest.raises(RankError) as caught:
        ranks(2).run(_every_rank_exits)
    for rank, failure in caught.value.failures.items():
        assert failure.type_name == "SystemExit"
        assert failure.output == f"last words of rank {rank}"
    assert ranks(2).run(_process) == before


def test_result_that_does_not_pickle_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="pickle"):
        ranks(1).run(_return_a_function_that_does_not_pickle)


def test_groups_and_settings_are_reset_between_cases(ranks: Ranks) -> None:
    assert ranks(4).run(_make_groups, 2) == [(2, 2, 2)] * 4
    assert ranks(4).run(_remains) == [[]] * 4
    assert ranks(4).run(_make_groups, 4) == [(4, 1, 4)] * 4
    assert ranks(2).run(_make_groups, 1) == [(1, 2, 1)] * 2
    assert ranks(4).run(_remains) == [[]] * 4


def test_cases_do_not_pile_up_files_and_threads(ranks: Ranks) -> None:
    def after_a_case() -> list[int]:
        ranks(2).run(_make_groups, 2)
        return ranks(2).run(_open_files_and_threads)

    after_a_case()
    assert after_a_case() == [after_a_case() for _ in range(5)][-1]


def test_closing_leaves_no_process(tmp_path_factory: pytest.TempPathFactory) -> None:
    own = Ranks(tmp_path_factory.mktemp("own_ranks"))
    own(2).run(_rank_and_sum, 0)
    pids = own.pids
    assert len(pids) == 2
    own.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)

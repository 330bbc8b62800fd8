"""Inside micro batches no tensor is asked for its value: on a GPU the program would wait for the device's work."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stitchvm_reward.diffusion.solvers import solve_each
from stitchvm_reward.transfer import RunningMean
from tests.tiny import AWM, DRAFT, FLOW_GRPO


class NoValues(TorchDispatchMode):
    """Raises where a tensor's numbers decide what the program does."""

    ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket._qualified_op_name.split("::")[1] not in self.ASKING, func
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), AWM, FLOW_GRPO, DRAFT], ids=["nft", "awm", "flow_grpo", "draft"])
def test_a_micro_batch_of_training_asks_for_no_value(make_trainer, tmp_path, settings):
    trainer = make_trainer(tmp_path / "run", *settings)
    rollout = trainer.collector.collect(0)[0]
    object.__setattr__(rollout, "worth", torch.full((len(rollout.samples),), 0.5))
    with NoValues():
        for compute in trainer.objective.losses(rollout, 0):
            loss, _ = compute()
            loss.backward()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoValues():
        float(loss.detach())  # what it would raise at


class IndicesOnTheDevice(TorchFunctionMode):
    """Raises where a list of places picks samples: its copy to the device is one that the program waits for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            assert not isinstance(args[1], list), args[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_solver_steps_take_samples_away_by_indices_that_are_on_the_device(solver):
    with IndicesOnTheDevice():
        end = solve_each(lambda z, sigma, rows: z * 0, torch.ones(3, 4, 2, 2), [1.0, 0.7, 0.4, 0.0], solver, [3, 1, 2])
    assert end.shape == (3, 4, 2, 2) and end.isfinite().all()


def test_progress_shows_the_mean_of_the_batches_before_the_last():
    reward = RunningMean()
    assert reward.shown() == {}
    reward.add(torch.tensor([1.0, 2.0]))
    assert reward.shown() == {}
    reward.add(torch.tensor([7.0]))
    assert reward.shown() == {"reward": "1.500"}
    reward.add(torch.tensor([0.0]))
    assert reward.shown() == {"reward": "3.333"}

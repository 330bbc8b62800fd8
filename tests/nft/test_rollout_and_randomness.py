"""Random numbers by address, and what is drawn with them: prompts, rollouts, training levels."""

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from nft.prompts import epoch_prompts
from nft.rollout import continue_rollout, plan_rollout, roll_out, stop_step, training_levels
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.solvers import solve
from stitchvm_reward.families import SD3
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.families.sd3 import static_levels
from stitchvm_reward.runs import randomness
from stitchvm_reward.runs.randomness import EVALUATION, ROLLOUT, TRAINING, noise

SHAPE = (4, 8, 8)
GRID = static_levels(10, 3.0)


def test_same_address_gives_the_same_numbers_whatever_was_drawn_before():
    first = noise(SHAPE, 7, ROLLOUT, 3, [0, 1, 2])
    torch.manual_seed(123)
    noise(SHAPE, 7, EVALUATION, 0, [0, 1])
    assert torch.equal(noise(SHAPE, 7, ROLLOUT, 3, [0, 1, 2]), first)


def test_company_and_order_do_not_matter():
    together = noise(SHAPE, 7, ROLLOUT, 3, [0, 1, 2, 3])
    assert torch.equal(noise(SHAPE, 7, ROLLOUT, 3, [3, 1]), together[[3, 1]])


def test_every_part_of_an_address_matters():
    addresses = [
        (7, ROLLOUT, 3, [5]),
        (8, ROLLOUT, 3, [5]),
        (7, TRAINING, 3, [5]),
        (7, ROLLOUT, 4, [5]),
        (7, ROLLOUT, 3, [6]),
        (7, ROLLOUT, 5, [3]),
        (7, ROLLOUT, 3, [5], 0),
        (7, ROLLOUT, 3, [5], 1),
    ]
    drawn = [noise(SHAPE, *address) for address in addresses]
    for index, first in enumerate(drawn):
        assert not any(torch.equal(first, second) for second in drawn[:index])


def test_noise_of_many_samples_is_standard_normal():
    drawn = noise((64,), 0, ROLLOUT, 0, list(range(2000)))
    assert abs(drawn.mean().item()) < 0.01 and drawn.std().item() == pytest.approx(1, abs=0.01)
    assert drawn.mean(0).abs().max() < 0.12


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    noise(SHAPE, 7, ROLLOUT, 3, [0])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_prompt_comes_once_per_pass():
    chosen = [prompt for epoch in range(7) for prompt in epoch_prompts(7, 3, seed=0, epoch=epoch)]
    passes = [chosen[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert passes[0] != passes[1]


def test_sequence_of_prompts_does_not_depend_on_how_epochs_cut_it():
    sequences = [
        [prompt for epoch in range(30 // groups) for prompt in epoch_prompts(7, groups, seed=4, epoch=epoch)]
        for groups in (1, 3, 10, 30)
    ]
    assert all(sequence == sequences[0] for sequence in sequences)


def test_fewer_prompts_than_groups_are_used_again():
    assert sorted(epoch_prompts(2, 6, seed=0, epoch=0)) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("tau", [0.0, GRID[6], GRID[3]])
def test_grid_levels_are_above_tau_and_not_repeated(tau):
    above = [level for level in GRID if level > tau]
    count = len(above)
    found = training_levels(list(range(50)), [tau] * 50, GRID, count=count, kind="grid", seed=0, epoch=0)
    assert found.shape == (50, count) and found.dtype == torch.float32
    assert torch.equal(found.sort(descending=True).values, torch.tensor(above).expand(50, -1))


def test_grid_levels_are_a_permutation_of_each_samples_own():
    found = training_levels(list(range(200)), [0.0] * 200, GRID, count=1, kind="grid", seed=0, epoch=0)
    assert len(found.unique()) == 10


def test_continuous_levels_keep_their_distance_from_tau():
    tau = [0.0, 0.6, 0.9] * 200
    found = training_levels(list(range(600)), tau, GRID, count=3, kind="continuous", seed=0, epoch=0)
    assert (found - torch.tensor(tau)[:, None]).min() >= 0.03 - 1e-6 and found.max() <= 1
    assert len(found.unique()) > 1700


@pytest.mark.parametrize("kind", ["grid", "continuous"])
def test_levels_of_a_sample_depend_on_its_address_alone(kind):
    together = training_levels([4, 5, 6], [0.0, 0.6, 0.0], GRID, count=2, kind=kind, seed=1, epoch=2)
    assert torch.equal(training_levels([5], [0.6], GRID, count=2, kind=kind, seed=1, epoch=2), together[1:2])
    later = training_levels(list(range(20)), [0.0] * 20, GRID, count=2, kind=kind, seed=1, epoch=3)
    assert not torch.equal(
        later, training_levels(list(range(20)), [0.0] * 20, GRID, count=2, kind=kind, seed=1, epoch=2)
    )


def tiny_generator():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=1.5,
        shift_factor=0.1,
    )
    return Generator(SD3, transformer, vae, scheduler={"shift": 3.0}, resolution=16)


def rolled_out(generator, table, samples, sigmas, stops, solver):
    planned = plan_rollout(generator, samples, samples, table=table, rows=samples, seed=0, epoch=1)
    return roll_out(generator, generator.transformer, planned, sigmas, solver=solver, stops=stops)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_a_rollout_does_not_depend_on_its_micro_batch(solver):
    generator = tiny_generator()
    table = Conditions({"tokens": noise((5, 32), 0, 9, 0, [0, 1, 2]), "pooled": noise((32,), 0, 9, 1, [0, 1, 2])})

    def rolled(samples):
        return rolled_out(generator, table, samples, static_levels(4, 3.0), [4] * len(samples), solver)

    together, alone = rolled([0, 1, 2]), rolled([2])
    assert generator.latent_shape == SHAPE and together.anchor.dtype == torch.float32
    assert torch.equal(together.tau, torch.zeros(3)) and not together.anchor.requires_grad
    torch.testing.assert_close(alone.anchor, together.anchor[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_a_rollout_stopped_at_k_is_the_first_k_steps_of_a_full_one_bit_for_bit(solver):
    generator = tiny_generator()
    table = Conditions({"tokens": noise((5, 32), 0, 9, 0, [0, 1, 2]), "pooled": noise((32,), 0, 9, 1, [0, 1, 2])})
    sigmas, start = static_levels(6, 3.0), noise(SHAPE, 0, ROLLOUT, 1, [0, 1, 2])

    def velocity(latents, sigma):
        return generator.velocity(latents, torch.full((3,), sigma), table)

    full = [start]  # what an ordinary run holds after each step
    for stop in range(1, 7):
        with torch.no_grad():
            full.append(solve(velocity, start, sigmas, solver, stop))
    for stop in range(1, 7):
        stopped = rolled_out(generator, table, [0, 1, 2], sigmas, [stop] * 3, solver)
        assert torch.equal(stopped.anchor, full[stop])
        assert torch.equal(stopped.tau, torch.tensor([sigmas[stop]] * 3))


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_samples_that_stop_at_different_steps_share_a_batch_and_are_not_run_on(solver):
    generator, asked = tiny_generator(), []
    table = Conditions({"tokens": noise((5, 32), 0, 9, 0, [0, 1, 2]), "pooled": noise((32,), 0, 9, 1, [0, 1, 2])})
    sigmas, stops, rows = static_levels(6, 3.0), [4, 2, 5], torch.arange(3)
    network = generator.transformer
    network.register_forward_pre_hook(lambda _, __, given: asked.append(len(given["hidden_states"])), with_kwargs=True)

    def rolled(samples, chosen):
        return rolled_out(generator, table, samples, sigmas, chosen, solver).anchor

    together = rolled([0, 1, 2], stops)
    assert asked == [3, 3, 2, 2, 1]
    for row, stop in zip(rows.tolist(), stops):
        torch.testing.assert_close(rolled([row], [stop])[0], together[row], rtol=1e-4, atol=1e-5)


def test_stopped_samples_rolled_on_reach_what_full_rollouts_reach():
    generator = tiny_generator()
    table = Conditions({"tokens": noise((5, 32), 0, 9, 0, [0, 1, 2]), "pooled": noise((32,), 0, 9, 1, [0, 1, 2])})
    sigmas, network = static_levels(6, 3.0), generator.transformer

    def rolled(stops):
        return rolled_out(generator, table, [0, 1, 2], sigmas, stops, "euler")

    onward = continue_rollout(generator, network, rolled([4, 2, 5]), [2, 0, 1], sigmas=sigmas, solver="euler")
    torch.testing.assert_close(onward, rolled([6, 6, 6]).anchor[[2, 0, 1]], rtol=1e-4, atol=1e-5)


def test_the_stop_is_shared_by_a_group_and_covers_the_window():
    drawn = [stop_step(0, epoch, 3, [12, 17]) for epoch in range(200)]
    assert set(drawn) == set(range(12, 18)) and drawn[7] == stop_step(0, 7, 3, [12, 17])
    assert len({tuple(stop_step(0, epoch, group, [12, 17]) for epoch in range(20)) for group in range(5)}) == 5


def test_training_levels_lie_above_the_stop_although_it_is_kept_in_single_precision():
    sigmas = static_levels(25, 3.0)
    for stop in range(1, 25):
        tau = float(torch.tensor(sigmas[stop]))
        found = training_levels([5], [tau], sigmas, count=stop, kind="grid", seed=0, epoch=0)
        assert sorted(found[0].tolist(), reverse=True) == torch.tensor(sigmas[:stop]).tolist()


def test_decoded_images_are_pictures():
    generator = tiny_generator()
    images = generator.decode(randomness.noise(generator.latent_shape, 0, ROLLOUT, 0, [0, 1]).bfloat16() * 50)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1

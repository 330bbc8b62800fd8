"""Three adapters on one small real transformer."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from nft.policy import ADAPTERS, Policy, ema_decay, old_decay
from stitchvm_reward.errors import InputError

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj"]


def make_network():
    torch.manual_seed(0)
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return network.eval().requires_grad_(False)


def make_policy(rank=4, targets=TARGETS, seed=0):
    return Policy(make_network(), rank, 2 * rank, targets, seed)


def randomise(policy, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for name in ADAPTERS:
        for tensor in policy.tensors(name).values():
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3


def values(policy, adapter):
    return torch.cat([tensor.detach().flatten() for tensor in policy.tensors(adapter).values()])


def run_network(policy):
    generator = torch.Generator().manual_seed(3)
    latents, tokens = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    pooled = torch.randn(2, 32, generator=generator)
    return policy.network(latents, tokens, pooled, torch.tensor([300.0, 700.0]), return_dict=False)[0]


def output(policy, adapter="current"):
    with policy.using(adapter):
        return run_network(policy)


@pytest.fixture
def policy():
    return make_policy()


def test_adapters_start_equal(policy):
    assert torch.equal(values(policy, "current"), values(policy, "old"))
    assert torch.equal(values(policy, "current"), values(policy, "ema"))
    assert policy.old_is_current and values(policy, "current").any()


@torch.no_grad()
def test_every_adapter_starts_as_the_reference(policy):
    reference = output(policy, None)
    assert all(torch.equal(output(policy, name), reference) for name in ADAPTERS)


@torch.no_grad()
def test_reference_is_the_network_without_adapters(policy):
    randomise(policy)
    bare = Policy(make_network(), 4, 8, TARGETS, seed=9)
    assert torch.equal(output(policy, None), output(bare, None))


@torch.no_grad()
def test_each_adapter_acts_on_the_output_by_itself(policy):
    randomise(policy)
    outputs = [output(policy, name) for name in (*ADAPTERS, None)]
    for index, first in enumerate(outputs):
        assert all(not torch.allclose(first, second) for second in outputs[:index])


def test_only_current_is_trainable_and_switching_never_changes_that(policy):
    ours = {id(tensor) for tensor in policy.tensors("current").values()}

    def trainable():
        return {id(parameter) for parameter in policy.network.parameters() if parameter.requires_grad}

    assert trainable() == ours
    for name in (*ADAPTERS, None, "current"):
        with policy.using(name):
            assert trainable() == ours
    assert trainable() == ours


def test_an_exception_leaves_current_active(policy):
    randomise(policy)
    expected = output(policy, "current")
    for name in ("old", None):
        with pytest.raises(RuntimeError), policy.using(name):
            raise RuntimeError
        assert torch.equal(run_network(policy), expected)


def test_old_stays_behind_after_an_optimizer_step(policy):
    optimizer = torch.optim.AdamW(policy.tensors("current").values(), lr=1e-2)
    before = output(policy, "old").detach()
    output(policy).square().mean().backward()
    optimizer.step()
    policy.after_update(1, 0.9)
    with torch.no_grad():
        assert not policy.old_is_current
        assert torch.equal(output(policy, "old"), before)
        assert not torch.allclose(output(policy, "current"), before, atol=1e-4)
        assert not torch.equal(values(policy, "ema"), values(policy, "old"))


def test_blend_moves_the_target_towards_current(policy):
    randomise(policy)
    current, ema, old = (values(policy, name) for name in ("current", "ema", "old"))
    policy.blend("ema", 0.75)
    torch.testing.assert_close(values(policy, "ema"), 0.75 * ema + 0.25 * current)
    assert torch.equal(values(policy, "current"), current) and torch.equal(values(policy, "old"), old)


@pytest.mark.parametrize("schedule, step, decay", [(0, 900, 0.0), (1, 100, 0.1), (1, 4000, 0.5), (2, 95, 0.15)])
def test_after_an_epoch_old_follows_current(policy, schedule, step, decay):
    randomise(policy)
    current, old = values(policy, "current"), values(policy, "old")
    policy.after_epoch(schedule, step)
    torch.testing.assert_close(values(policy, "old"), decay * old + (1 - decay) * current)
    assert policy.old_is_current == (decay == 0) == torch.equal(values(policy, "old"), current)


def test_old_decay_follows_the_published_schedules():
    assert [old_decay(0, step) for step in (0, 1, 1000)] == [0, 0, 0]
    assert [old_decay(1, step) for step in (0, 100, 500, 9000)] == pytest.approx([0, 0.1, 0.5, 0.5])
    assert [old_decay(2, step) for step in (0, 74, 75, 175, 209)] == pytest.approx([0, 0, 0, 0.75, 0.999])


def test_ema_decay_rises_to_its_ceiling():
    assert [ema_decay(step, 0.9) for step in (1, 8, 80, 81, 5000)] == pytest.approx([2 / 11, 0.5, 0.9, 0.9, 0.9])


def test_state_goes_round_bit_for_bit(policy):
    randomise(policy)
    other = make_policy(seed=1)
    other.load_state_dict({key: tensor.clone() for key, tensor in policy.state_dict().items()})
    assert all(torch.equal(values(policy, name), values(other, name)) for name in ADAPTERS)
    with torch.no_grad():
        assert all(torch.equal(output(policy, name), output(other, name)) for name in ADAPTERS)


@pytest.mark.parametrize("other", [{"rank": 2}, {"targets": TARGETS[:2]}], ids=["rank", "layers"])
def test_state_of_another_rank_or_other_layers_is_refused(policy, other):
    before = values(policy, "current").clone()
    with pytest.raises(InputError, match="another rank, other layers"):
        policy.load_state_dict(make_policy(**other).state_dict())
    assert torch.equal(values(policy, "current"), before)


def test_unknown_target_is_refused():
    with pytest.raises(InputError, match=r"attn\.to_z"):
        make_policy(targets=["attn.to_z"])


def test_one_unknown_target_among_known_ones_is_refused():
    with pytest.raises(InputError, match=r"attn\.to_z"):
        make_policy(targets=["attn.to_q", "attn.to_z"])


def test_start_depends_on_the_seed_and_leaves_the_global_generator_alone():
    network = make_network()
    state = torch.get_rng_state()
    first = Policy(network, 4, 8, TARGETS, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(values(first, "current"), values(make_policy(), "current"))
    assert not torch.equal(values(first, "current"), values(make_policy(seed=1), "current"))


def test_adapters_are_float32_on_a_bfloat16_network():
    policy = Policy(make_network().bfloat16(), 4, 8, TARGETS, seed=0)
    assert all(tensor.dtype == torch.float32 for name in ADAPTERS for tensor in policy.tensors(name).values())

"""Adapted layers compute what PEFT's do, in their base's number format."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nft.adapters import AdaptedLinear
from nft.config import load_recipe
from nft.cost.traffic import forward_traffic
from nft.policy import ADAPTERS, Policy
from stitchvm_reward.diffusion.generator import Generator
from stitchvm_reward.diffusion.recipe import ModelRecipe
from stitchvm_reward.families import architecture_of
from stitchvm_reward.families.family import Conditions
from stitchvm_reward.measure import Traffic

MODELS = ["sd3", pytest.param("flux", marks=pytest.mark.slow)]
TOKENS = 13
RANK, ALPHA = 4, 12  # a scale of 3, which bfloat16 does not absorb


def load(model: str, dtype: str = "float32") -> Generator:
    return Generator.load(ModelRecipe(f"miniature/weights/{model}", dtype, 64, TOKENS), torch.device("cpu"))


def make_policy(generator: Generator) -> Policy:
    policy = Policy(generator.transformer, RANK, ALPHA, list(generator.family.lora_targets), seed=0)
    random = torch.Generator().manual_seed(7)
    policy.load_state_dict(
        {key: torch.randn(t.shape, generator=random) * 0.1 for key, t in policy.state_dict().items()}
    )
    return policy


def inputs(generator: Generator, model: str = "sd3", count: int = 2) -> dict:
    random = torch.Generator().manual_seed(5)
    stand_in = generator.family.stand_in(architecture_of(f"miniature/weights/{model}"), count, TOKENS)
    conditions = Conditions({n: torch.randn(t.shape, generator=random) for n, t in stand_in.tensors.items()})
    latents = torch.randn(count, *generator.latent_shape, generator=random)
    conditions = conditions.to(generator.device, generator.dtype)
    return generator.family.inputs(
        latents.to(generator.dtype), torch.rand(count, generator=random), conditions, generator.guidance
    )


def by_peft(model: str, policy: Policy, adapter: str) -> Generator:
    """A generator whose adapter runs by PEFT's own forward."""
    generator = load(model)
    targets = list(generator.family.lora_targets)
    generator.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets), "current")
    layers = dict(generator.transformer.named_modules())
    for key, matrix in policy.tensors(adapter).items():
        name, part = key.rsplit(".", 1)
        getattr(layers[name], part)["current"].weight.data.copy_(matrix.data)
    return generator


@pytest.mark.parametrize("model", MODELS)
def test_a_float32_base_gives_what_peft_gives(model):
    generator = load(model)
    policy = make_policy(generator)
    given = inputs(generator, model)
    for adapter in ADAPTERS:
        theirs = by_peft(model, policy, adapter)
        expected = theirs.transformer(**given)[0]
        with policy.using(adapter):
            found = policy.network(**given)[0]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
        with policy.using(None), torch.no_grad():
            assert (policy.network(**given)[0] - found).abs().max() > 1e-2
        if adapter == "current":
            found.square().sum().backward()
            expected.square().sum().backward()
            layers = dict(theirs.transformer.named_modules())
            for key, matrix in policy.tensors("current").items():
                name, part = key.rsplit(".", 1)
                gradient = getattr(layers[name], part)["current"].weight.grad
                torch.testing.assert_close(matrix.grad, gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)


class LargeFloat32(TorchDispatchMode):
    """Counts results in float32 of more numbers than `limit`, by operation."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.found = limit, {}

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 and leaf.numel() > self.limit:
                self.found[str(function)] = self.found.get(str(function), 0) + 1
        return result


@pytest.mark.parametrize("model", MODELS)
def test_a_bfloat16_base_copies_no_activation_to_float32_and_multiplies_nothing_in_it(model):
    generator = load(model, "bfloat16")
    policy = make_policy(generator)
    given = inputs(generator, model, 24)
    # More numbers than any matrix of an adapter has; all activations have more.
    limit = max(t.numel() for t in policy.tensors("current").values())
    counts, products = {}, {}
    for adapter in (None, "old", "ema", "current"):
        gradient = torch.set_grad_enabled(adapter == "current")
        with gradient, policy.using(adapter), LargeFloat32(limit) as large, Traffic() as traffic:
            output = policy.network(**given)[0]
            if adapter == "current":
                output.float().square().sum().backward()
        products[adapter], counts[adapter] = traffic.float32_flops, large.found.get("aten._to_copy.default", 0)
    assert products == dict.fromkeys((None, "old", "ema", "current"), 0)
    assert counts["old"] == counts["ema"] == counts[None]
    assert all(t.grad.dtype == torch.float32 for t in policy.tensors("current").values())


def test_one_layer_at_bfloat16_is_as_exact_as_its_format_and_so_are_its_gradients():
    random = torch.Generator().manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Linear(64, 48)).bfloat16().requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    config._register_custom_module({torch.nn.Linear: AdaptedLinear})
    layer = inject_adapter_in_model(config, network, "current")[0]
    for part in (layer.lora_A, layer.lora_B):
        part["current"].weight.data = torch.randn(part["current"].weight.shape, generator=random)
    layer.activate("current")
    x = torch.randn(2, 5, 64, generator=random).bfloat16().requires_grad_()
    towards = torch.randn(2, 5, 48, generator=random).bfloat16()
    found = layer(x)
    found.backward(towards)
    a, b = (part["current"].weight for part in (layer.lora_A, layer.lora_B))
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    expected = F.linear(exact[0], layer.base_layer.weight.double(), layer.base_layer.bias.double())
    expected = expected + 3.0 * exact[0] @ exact[1].T @ exact[2].T
    expected.backward(towards.double())
    assert found.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32
    for ours, theirs in ((found, expected), *((t.grad, e.grad) for t, e in zip((x, a, b), exact, strict=True))):
        assert (ours.double() - theirs).norm() < 2**-7 * theirs.norm()


def test_at_bfloat16_the_copies_follow_their_adapter():
    generator = load("sd3", "bfloat16")
    policy = make_policy(generator)
    given = inputs(generator)

    @torch.no_grad()
    def outputs() -> dict[str | None, torch.Tensor]:
        found = {}
        for name in (*ADAPTERS, None):
            with policy.using(name):
                found[name] = policy.network(**given)[0]
        return found

    before = outputs()
    copies = [layer.lora_B["old"].product.data_ptr() for layer in policy.layers.values()]
    policy.blend("ema", 0.5)
    policy.copy("current", "old")
    after = outputs()
    assert torch.equal(after["old"], after["current"]) and not torch.equal(before["old"], before["current"])
    assert not torch.equal(after["ema"], before["ema"])
    assert torch.equal(after[None], before[None]) and torch.equal(after["current"], before["current"])
    assert copies == [layer.lora_B["old"].product.data_ptr() for layer in policy.layers.values()]
    policy.load_state_dict({key: tensor * 0 for key, tensor in policy.state_dict().items()})
    assert all(torch.equal(output, after[None]) for output in outputs().values())


def test_checkpointed_blocks_have_the_same_gradient():
    gradients = []
    for checkpointing in (False, True):
        generator = load("sd3")
        policy = make_policy(generator)
        if checkpointing:
            generator.transformer.enable_gradient_checkpointing()
        given = inputs(generator)
        output = policy.network(**given)[0]
        with policy.using("old"), torch.no_grad():  # another adapter runs between a forward and its backward pass
            policy.network(**given)
        output.square().sum().backward()
        gradients.append(torch.cat([t.grad.flatten() for t in policy.tensors("current").values()]))
    assert torch.equal(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["recipes/aesthetic.yaml", "recipes/flux/aesthetic.yaml"])
def test_adapters_move_a_tenth_more_bytes_at_most_at_real_shapes(recipe):
    found = forward_traffic(load_recipe(recipe))
    assert all(traffic.bytes <= 1.1 * found["no adapter"].bytes for traffic in found.values())
    assert all(traffic.float32_flops == 0 for traffic in found.values())
    assert found["old"].bytes > 1.05 * found["no adapter"].bytes

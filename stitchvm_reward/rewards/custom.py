"""Rewards of a user's own: a function, or a class with options."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stitchvm_reward.errors import InputError, nearest
from stitchvm_reward.rewards.recipe import RewardRecipe
from stitchvm_reward.users_code import users_code

ScoreFunction = Callable[[Tensor, list[str]], Tensor]


def find_function(name: str) -> Callable[..., Any]:
    """Import the function or class `package.module:name`. Raises InputError if that fails."""
    module, _, attribute = name.partition(":")
    if not attribute or not module or module.startswith("."):
        raise InputError(f"a function is written package.module:function, got {name!r}")
    with users_code(name, f"cannot import {name} (is it on PYTHONPATH?):"):
        target = getattr(importlib.import_module(module), attribute)
    if not callable(target):
        raise InputError(f"{name} is not a function or class")
    return target


def check_custom(reward: RewardRecipe) -> None:
    """Check a user's reward without constructing it: import, options and required arguments. Raises InputError.

    Rewards of other kinds are not checked.
    """
    if reward.custom:
        _check(reward.custom, find_function(reward.custom), reward.options)


def load_custom(reward: RewardRecipe, device: torch.device) -> "FunctionReward":
    """Return a user's reward; a class is constructed with the recipe's options and, if it takes one, the device.

    Raises InputError where it is missing, does not take the options or cannot be constructed.
    """
    name, target = reward.custom, find_function(reward.custom)
    _check(name, target, reward.options)
    if not inspect.isclass(target):
        return FunctionReward(name, target)
    options = dict(reward.options)
    if "device" in _parameters(target):
        options.setdefault("device", device)
    with users_code(name, f"{name} cannot be constructed:"):
        instance: Any = target(**options)
        return FunctionReward(name, instance.score)


class FunctionReward:
    """A user's `function(images, prompts) -> (batch,)`; its errors become an InputError with its name."""

    def __init__(self, name: str, function: ScoreFunction | None = None):
        self.name, self.function = name, find_function(name) if function is None else function

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return scores (batch,) float32. Raises InputError if the function raises, or returns no such numbers."""
        with users_code(self.name, f"{self.name} raised"):
            scores = self.function(images, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(f"{self.name} must return a tensor of shape ({len(prompts)},), got {given}")
        if scores.is_complex():
            raise InputError(f"{self.name} must return real numbers, got {scores.dtype}")
        return scores.to(torch.float32)


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be given by name; VAR_KEYWORD stands for any name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(target).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in named}


def _check(name: str, target: Callable[..., Any], options: Mapping[str, Any]) -> None:
    if not inspect.isclass(target):
        if options:
            raise InputError(f"{name} is a function and takes no options, got {', '.join(options)}; write a class")
        return
    if not callable(getattr(target, "score", None)):
        raise InputError(f"{name} must have a method score(images, prompts)")
    parameters = _parameters(target)
    known = [key for key, parameter in parameters.items() if parameter.kind != inspect.Parameter.VAR_KEYWORD]
    if len(known) == len(parameters):
        for option in options:
            if option not in known:
                raise InputError(f"{name} has no option {option}: {nearest(option, known)}")
    missing = [
        key
        for key in known
        if parameters[key].default is inspect.Parameter.empty and key not in options and key != "device"
    ]
    if missing:
        raise InputError(f"{name} needs {', '.join(f'options.{key}' for key in missing)}")

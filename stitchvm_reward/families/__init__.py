"""Model families: everything that differs between them lives in one module each."""

from stitchvm_reward.errors import InputError
from stitchvm_reward.families.family import Architecture, Family, class_name
from stitchvm_reward.families.flux import Flux
from stitchvm_reward.families.sd3 import StableDiffusion3
from stitchvm_reward.hub import locate

SD3, FLUX = StableDiffusion3(), Flux()


def family_of_class(pipeline: str, model: str = "the model") -> Family:
    """Return the family of a diffusers pipeline class. Raises InputError, which calls it `model`, for any other."""
    if pipeline == "StableDiffusion3Pipeline":
        return SD3
    if pipeline == "FluxPipeline":
        return FLUX
    raise InputError(f"{model} is a {pipeline}; supported are Stable Diffusion 3 and 3.5, and FLUX.1")


def family_of(model: str) -> Family:
    """Return the family of a model folder or hub id; a hub id that is published here is not looked up.

    Raises InputError for a model of another family, or one that cannot be found.
    """
    for family in (SD3, FLUX):
        if model in family.published:
            return family
    return family_of_class(class_name(locate(model, ())), model)


def architecture_of(model: str) -> Architecture:
    """Return the configurations of a model folder or hub id, without reading weights. Raises InputError."""
    family = family_of(model)
    if model not in family.published:
        model = str(locate(model, ()))
    return family.architecture(model)

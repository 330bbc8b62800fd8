"""Everything of a run that must survive a restart, in one place."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from stitchvm_reward.errors import InputError

if TYPE_CHECKING:
    from nft.trainer import Trainer

Tensors = dict[str, dict[str, Tensor]]
Snapshot = tuple[Tensors, dict[str, Any]]


def capture(trainer: "Trainer", copy: bool = False) -> Snapshot:
    """The run's tensor files and JSON state as of now, by all processes together; `copy` keeps them so when it goes on.

    All three adapters, Adam's moments, the rate's schedule, counters, the audits, and the figures of an epoch whose
    evaluation has still to come. Of randomness only the seed: it is addressed by that, epoch and sample. `prompt_key`
    says which text encoders made the prompts' embeddings.
    """
    tensors = {"adapters": trainer.policy.state_dict(), "optimizer": trainer.backend.optimizer_tensors()}
    return kept(tensors) if copy else tensors, counters(trainer)


def kept(tensors: Tensors) -> Tensors:
    """The tensors of a snapshot as they are now, in the CPU's memory."""
    return {file: {key: t.detach().to("cpu", copy=True) for key, t in part.items()} for file, part in tensors.items()}


def counters(trainer: "Trainer") -> dict[str, Any]:
    """The JSON state alone."""
    return {
        "seed": trainer.recipe.seed,
        "prompt_key": trainer.embeddings.key,
        "epoch": trainer.epoch,
        "step": trainer.step,
        "skipped": trainer.skipped,
        "old_is_current": trainer.policy.old_is_current,
        "scheduler": trainer.scheduler.state_dict(),
        "audit": trainer.audit.state_dict(),
        "pending": trainer.pending,
    }


def restore(trainer: "Trainer", tensors: Tensors, state: dict[str, Any]) -> None:
    """Put back what `capture` gave. Raises InputError for the state of a version that kept something else, or
    where the text encoders have changed since."""
    if odd := sorted(state.keys() ^ counters(trainer).keys()):
        raise InputError(
            f"the checkpoint was written by another version of this code (see {', '.join(odd)}): go on with that, or "
            "give another out=FOLDER"
        )
    if state["prompt_key"] != trainer.embeddings.key:
        raise InputError(
            f"the text encoders of {trainer.recipe.model.path} are not those that this run began with: put them back, "
            "or give another out=FOLDER"
        )
    trainer.policy.load_state_dict(tensors["adapters"])
    trainer.policy.old_is_current = state["old_is_current"]
    trainer.backend.load(tensors["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    trainer.audit.load_state_dict(state["audit"])
    # A scheduler writes its rate only when it steps; until then the groups would hold a fresh run's.
    for group, rate in zip(trainer.backend.optimizer.param_groups, trainer.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    trainer.epoch, trainer.step = state["epoch"], state["step"]
    trainer.skipped, trainer.pending = state["skipped"], state["pending"]

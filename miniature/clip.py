"""Pretraining of the miniature's CLIPModel, of a second CLIP text tower, and of the aesthetic head.

The two text towers become the generator's text encoders, as CLIP ViT-L/14's does in Stable Diffusion 3. The head
has the published form: linear layers 1024-128-64-16-1 without activations, on the normalised image embedding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection

from miniature import scenes, wording
from miniature.training import train

STEPS = 1150
BATCH = 112
DISTORTED = 40  # extra pictures per step, for the aesthetic loss alone
PROJECTION = 128
SECOND_WIDTH = 64  # of the second text tower
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def _text_config(hidden: int, layers: int, activation: str) -> dict:
    tokenizer = wording.clip_tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "max_position_embeddings": wording.LENGTH,
        "projection_dim": PROJECTION,
        "hidden_act": activation,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


class Towers(nn.Module):
    """All that is trained together: CLIP, the second text tower, the aesthetic head."""

    def __init__(self):
        super().__init__()
        vision = {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "image_size": scenes.SIZE,
            "patch_size": 8,
            "projection_dim": PROJECTION,
            "hidden_act": "quick_gelu",
        }
        self.clip = CLIPModel(
            CLIPConfig(text_config=_text_config(128, 3, "quick_gelu"), vision_config=vision, projection_dim=PROJECTION)
        )
        self.second = CLIPTextModelWithProjection(CLIPTextConfig(**_text_config(SECOND_WIDTH, 3, "gelu")))
        sizes = [PROJECTION, 1024, 128, 64, 16, 1]
        self.head = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised image embeddings of (batch, 3, 64, 64) in [0, 1]."""
        return F.normalize(self.clip.get_image_features((images - MEAN) / STD).pooler_output.float(), dim=-1)

    def embed_texts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised text embeddings of (batch, LENGTH) token ids from both text towers."""
        first = self.clip.get_text_features(tokens).pooler_output
        second = self.second(tokens).text_embeds
        return F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures outside this world: faded, oversaturated, blended, blurred, flattened, noisy, tinted.

    The head learns the true score of these too, so that a policy cannot easily please it by leaving the data.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator) * (high - low) + low

    def sometimes(changed: torch.Tensor, base: torch.Tensor, share: float) -> torch.Tensor:
        return torch.where(uniform(0, 1) < share, changed, base)

    result = images.mean(1, keepdim=True) + (images - images.mean(1, keepdim=True)) * uniform(0, 1.4)
    result = sometimes(torch.lerp(result, result.roll(1, 0), uniform(0, 1)), result, 0.4)
    small = F.interpolate(result, scale_factor=0.25, mode="bilinear", antialias=True)
    result = sometimes(F.interpolate(small, size=images.shape[-2:], mode="bilinear"), result, 0.25)
    result = sometimes(torch.lerp(result, result.mean((2, 3), keepdim=True), uniform(0, 1)), result, 0.25)
    tint = torch.rand(len(images), 3, 1, 1, generator=generator)
    result = sometimes(torch.lerp(result, tint.expand_as(result), uniform(0, 0.9)), result, 0.25)
    noise = torch.randn(images.shape, generator=generator)
    return sometimes(result + uniform(0, 0.15) * noise, result, 0.5).clamp(0, 1)


def tokenize(captions: list[str]) -> torch.Tensor:
    """(len(captions), LENGTH) CLIP token ids."""
    return wording.clip_tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Rank correlation of two (n,) tensors without ties."""
    ranks = torch.stack([first.argsort().argsort().float(), second.argsort().argsort().float()])
    return float(torch.corrcoef(ranks)[0, 1])


def distinct(count: int, seed: int) -> list[scenes.Scene]:
    """Held-out scenes no two of which state the same facts."""
    result = {scene.facts: scene for scene in scenes.draw_scenes(8 * count, seed, held_out=True)}
    return list(result.values())[:count]


@torch.no_grad()
def quality(towers: Towers) -> dict[str, float]:
    """Recall@1 from image to caption among 200 held-out scenes, and the head's rank correlation with the truth."""
    towers.eval()
    chosen = distinct(200, seed=902)
    images = scenes.render(chosen)
    embedded = towers.embed_images(images)
    first, second = towers.embed_texts(tokenize([scene.caption for scene in chosen]))
    diagonal = torch.arange(len(chosen))
    plain = scenes.render(scenes.draw_scenes(1000, 908, True))
    strange = distort(scenes.render(scenes.draw_scenes(200, 903, True)), torch.Generator().manual_seed(0))
    result = {
        "recall": float(((embedded @ first.T).argmax(1) == diagonal).float().mean()),
        "recall_second": float(((embedded @ second.T).argmax(1) == diagonal).float().mean()),
        "spearman": spearman(towers.head(towers.embed_images(plain))[:, 0], scenes.true_aesthetic(plain)),
        "spearman_distorted": spearman(towers.head(towers.embed_images(strange))[:, 0], scenes.true_aesthetic(strange)),
    }
    towers.train()
    return result


def contrast(pictures: torch.Tensor, texts: torch.Tensor, known: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """CLIP's loss on normalised embeddings, both ways; another picture of the same statement is no wrong answer.

    `known` (texts,) numbers the statements. Pictures beyond the texts are wrong for every text.
    """
    count = len(texts)
    same = (known[:, None] == known[None, :]).fill_diagonal_(False)
    logits = scale.exp().clamp(max=100) * texts @ pictures.T
    square = logits[:, :count].masked_fill(same, -1e4)
    target = torch.arange(count)
    to_picture = F.cross_entropy(torch.cat([square, logits[:, count:]], dim=1), target)
    return (to_picture + F.cross_entropy(square.T, target)) / 2


def pictures(pool: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of BATCH scenes, and their pictures followed by DISTORTED strange ones, in [0, 1]."""
    chosen = torch.randint(len(pool), (BATCH,), generator=generator)
    images = pool[chosen].float() / 255
    images += torch.randn(images.shape, generator=generator) * 0.02
    more = pool[torch.randint(len(pool), (DISTORTED,), generator=generator)].float() / 255
    return chosen, torch.cat([images, distort(more, generator)])


def facts_of(drawn: list[scenes.Scene]) -> torch.Tensor:
    """A number for each scene, the same for scenes whose facts say the same."""
    statements = [scene.facts.statement for scene in drawn]
    numbers = {statement: number for number, statement in enumerate(dict.fromkeys(statements))}
    return torch.tensor([numbers[statement] for statement in statements])


def save_towers(towers: Towers, path: Path) -> None:
    """Write all towers as one file."""
    tensors = {name: tensor.contiguous() for name, tensor in towers.state_dict().items()}
    save_file(tensors, path)


def pretrain(folder: Path, drawn: list[scenes.Scene], pool: torch.Tensor, stop_at: int | None = None) -> Towers:
    """Train all towers on a pool of scenes and their uint8 pictures; resumable."""
    torch.manual_seed(0)
    towers = Towers()
    nn.init.constant_(towers.head[-1].get_parameter("bias"), 5.0)
    tokens = tokenize([scene.caption for scene in drawn])
    facts = facts_of(drawn)
    scale: torch.Tensor = towers.clip.logit_scale

    def step_loss(step: int, generator: torch.Generator):
        chosen, images = pictures(pool, generator)
        truth = scenes.true_aesthetic(images)
        embedded = towers.embed_images(images)
        first, second = towers.embed_texts(tokens[chosen])
        known = facts[chosen]
        matching = [contrast(embedded[:BATCH], texts, known, scale) for texts in (first, second)]
        aesthetic = F.smooth_l1_loss(towers.head(embedded)[:, 0], truth)
        shown = {"match": matching[0].item(), "second": matching[1].item(), "taste": aesthetic.item()}
        return matching[0] + 0.5 * matching[1] + 3 * aesthetic, shown

    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    train(
        "clip",
        towers,
        step_loss,
        [optimizer],
        STEPS,
        folder,
        average=0.98,
        every=lambda *_: quality(towers),
        evaluate_every=130,
        stop_at=stop_at,
    )
    save_towers(towers, folder / "towers.safetensors")
    return towers.eval()


def save_head(head: nn.Sequential, path: Path) -> None:
    """Write the head under the published predictor's keys: layers.0, .2, .4, .6, .7 (the gaps are its dropouts)."""
    places = {str(index): place for index, place in enumerate((0, 2, 4, 6, 7))}
    tensors = {}
    for key, value in head.state_dict().items():
        index, name = key.split(".")
        tensors[f"layers.{places[index]}.{name}"] = value.half().contiguous()
    save_file(tensors, path)

"""A dataset and a network whose condition is neither a tensor nor class ids, as a user would write them."""

import dataclasses
from typing import ClassVar

import torch
from torch import nn

from fastmask.models.maskdit import MaskDiT, MaskDiTConfig

TOKENS, FEATURES = 3, 8


class Captioned:
    """Squares whose brightness depends on the first values of their text, which is of 1 to 3 tokens."""

    shape = (1, 8, 8)
    num_classes = 0
    class_names: ClassVar[list[str]] = []
    latents = None

    def __init__(self, size=40):
        self.size = size

    def __len__(self):
        return self.size

    def read(self, ids):
        condition = self.condition(torch.from_numpy(ids))
        brightness = condition["text"][:, 0, 0].tanh()
        return brightness[:, None, None, None].expand(-1, *self.shape).contiguous(), condition

    def condition(self, ids):
        text = torch.stack(
            [torch.randn(TOKENS, FEATURES, generator=torch.Generator().manual_seed(int(i))) for i in ids]
        )
        return {"text": text, "length": 1 + ids % TOKENS}

    def fingerprint(self):
        return f"captioned {self.size}"

    def to_images(self, stored, seed, sample):
        return stored


class TextDiT(MaskDiT):
    """A MaskDiT that is told the mean of the embedded tokens of a text; a text of length 0 is none."""

    conditional = True

    def __init__(self, input_size, **sizes):
        super().__init__(input_size, **sizes)
        self.token_embedder = nn.Linear(FEATURES, sizes["width"])
        self.seen = []  # conditions, in order

    def embed_condition(self, condition):
        if not torch.compiler.is_compiling():
            self.seen.append(condition)
        there = torch.arange(TOKENS, device=condition["length"].device) < condition["length"][:, None]
        tokens = self.token_embedder(condition["text"]) * there[..., None]
        return tokens.sum(1) / condition["length"].clamp(min=1)[:, None]

    def drop(self, condition, chosen):
        return {**condition, "length": condition["length"].masked_fill(chosen, 0)}

    def no_condition(self, batch):
        return {"text": torch.zeros(batch, TOKENS, FEATURES), "length": torch.zeros(batch, dtype=torch.int64)}

    def check_condition(self, condition, batch, *, values=True):
        if condition["text"].shape != (batch, TOKENS, FEATURES) or condition["length"].shape != (batch,):
            raise ValueError(f"a text must have shape ({batch}, {TOKENS}, {FEATURES})")
        if values and condition["length"][condition["length"] > TOKENS].numel():
            raise ValueError(f"a text has at most {TOKENS} tokens")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextDiTConfig(MaskDiTConfig):
    """The sizes of a `TextDiT`."""

    name: ClassVar[str] = "text-dit"

    def build(self, channels, input_size, num_classes):
        return TextDiT(input_size, in_channels=channels, num_classes=num_classes, **dataclasses.asdict(self))

"""Trains a multi-token prediction layer behind a checkpoint of DeepSeek-V3 on Python's standard library.

    python examples/train_draft.py examples/tiny-v3 --save tiny-v3-draft

The model stays as it is. The layer learns to say what the model would say two tokens ahead (the divergence from the
model's own predictions is the loss), so that what it drafts is accepted. Progress goes to stderr, and to stdout how
often the likeliest drafts of held-out text are the model's own choice, at each depth. Takes transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from training.data import standard_library
from transformers.modeling_layers import MtpModel

#: Drafts ahead that are measured.
DEPTHS = 3
PREFIX = "model.layers.{}."
#: Of the learning rate, steps that it takes to rise.
WARM_UP, RATE = 40, 3e-3


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--save", type=Path, required=True, help="folder to make: the checkpoint with the layer")
    parser.add_argument("--steps", type=int, default=600, help="(default: 600)")
    parser.add_argument("--window", type=int, default=128, help="tokens of a sequence (default: 128)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step (default: 8)")
    parser.add_argument("--files", type=int, metavar="N", help="take no more than N files, to try this out")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: 0)")
    return parser.parse_args()


class Drafter:
    """A model that stays as it is, and its layer."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.layer = MtpModel(self.model, 1).eval()
        # It begins as the model's last layer, which is of the same kind.
        last = self.model.model.layers[-1].state_dict()
        self.layer.layers[0].mtp_block.load_state_dict(last)
        with torch.no_grad():
            width = self.model.config.hidden_size
            self.layer.layers[0].eh_proj.weight.copy_(torch.eye(width).repeat(1, 2) / 2)
            self.layer.layers[0].post_norm.weight.copy_(self.model.model.norm.weight)
        self.weights = [p.requires_grad_() for p in self.layer.layers.parameters()]

    def said(self, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The model's logits, and its hidden states behind the last norm."""
        with torch.no_grad():
            out = self.model(ids_BS, output_hidden_states=True, use_cache=False)
        return out.logits, out.hidden_states[-1]

    def drafts(self, following_BS: Tensor, features_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's logits of what comes after the tokens that follow, and what it hands on."""
        at = torch.arange(following_BS.shape[1])[None]
        handed = self.layer.forward_layer(0, features_BSD, at, None, following_BS)
        return self.model.lm_head(handed), handed

    def loss(self, ids_BS: Tensor) -> Tensor:
        """How far drafts are from what the model says of the same tokens, one depth and two."""
        logits, features = self.said(ids_BS)
        wanted = logits.log_softmax(-1)
        total, following = torch.zeros(()), ids_BS
        for depth in (1, 2):
            following, features = following[:, 1:], features[:, :-1]
            drafted, features = self.drafts(following, features)
            total = (
                total
                + nn.functional.kl_div(drafted.log_softmax(-1), wanted[:, depth:], reduction="none", log_target=True)
                .sum(-1)
                .mean()
            )
        return total

    def agreement(self, ids_BS: Tensor) -> list[float]:
        """How often the likeliest draft is what the model finds likeliest, where those before it were, by depth."""
        logits, features = self.said(ids_BS)
        wanted_BS, found = logits.argmax(-1), []
        following, right = ids_BS, None
        for depth in range(1, DEPTHS + 1):
            following, features = following[:, 1:], features[:, :-1]
            with torch.no_grad():
                drafted, features = self.drafts(following, features)
            same = drafted.argmax(-1) == wanted_BS[:, depth:]
            right = same if right is None else right[:, 1:] & same
            found.append(float(right.float().mean()))
        return found


def tokens_of(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """All of them behind each other."""
    return torch.tensor([i for one in tokenizer.encode_batch(texts) for i in one.ids])


def windows(tokens: Tensor, count: int, length: int, random: torch.Generator) -> Tensor:
    """Pieces that begin anywhere, [B, S]."""
    starts = torch.randint(0, len(tokens) - length, (count,), generator=random)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def save(checkpoint: Path, out: Path, drafter: Drafter) -> None:
    """The checkpoint, with the layer behind the others, in bfloat16 and by the Hub's names."""
    shutil.copytree(checkpoint, out)
    prefix = PREFIX.format(drafter.model.config.num_hidden_layers)
    own: dict[str, Tensor] = {}
    for name, value in drafter.layer.layers[0].state_dict().items():
        leaf = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        if leaf.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                for part, weight in zip(("gate_proj", "up_proj"), both.chunk(2), strict=True):
                    own[leaf.replace("gate_up_proj", f"{e}.{part}.weight")] = weight
        elif leaf.endswith("experts.down_proj"):
            own |= {leaf.replace("down_proj", f"{e}.down_proj.weight"): one for e, one in enumerate(value)}
        else:
            own[leaf] = value
    exact = ("e_score_correction_bias",)
    stored = {prefix + n: v if n.endswith(exact) else v.bfloat16() for n, v in own.items()}
    file = out / "model.safetensors"
    save_file({n: v.contiguous() for n, v in {**load_file(file), **stored}.items()}, file, {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}, indent=2) + "\n")


def main() -> None:
    """Train, measure, save."""
    asked, start = arguments(), time.monotonic()
    torch.manual_seed(asked.seed)
    random = torch.Generator().manual_seed(asked.seed)
    tokenizer = Tokenizer.from_file(str(asked.checkpoint / "tokenizer.json"))
    text = standard_library()
    train, held_out = (tokens_of(some[: asked.files], tokenizer) for some in (text.train, text.held_out))
    drafter = Drafter(asked.checkpoint)
    optimizer = torch.optim.AdamW(drafter.weights, lr=RATE, weight_decay=0.0, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1.0) * max(1 - step / asked.steps, 0.05)
    )
    judged = windows(held_out, 16, asked.window, random)
    for step in range(asked.steps):
        loss = drafter.loss(windows(train, asked.batch, asked.window, random))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(drafter.weights, 1.0)
        optimizer.step()
        rate.step()
        if step % 50 == 49 or step + 1 == asked.steps:
            shown = ", ".join(f"{one:.1%}" for one in drafter.agreement(judged))
            print(f"{step + 1}: loss {loss:.3f}, {shown}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    save(asked.checkpoint, asked.save, drafter)
    for depth, one in enumerate(drafter.agreement(windows(held_out, 64, asked.window, random)), 1):
        print(f"depth {depth}: {one:.1%}")


if __name__ == "__main__":
    main()

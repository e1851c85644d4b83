"""HyDRA: hierarchical and dynamic rank adaptation for mobile vision-language models.

    python hydra.py chat CHECKPOINT --image FILE --prompt TEXT

The paper (arXiv 2512.20674) fine-tunes MobileVLM with LoRA adapters whose ranks differ and move:

    image [B, 3, 336, 336]
      -> CLIPEncoder, frozen              [B, 576, 1024]
      -> LDP projector, trained           [B, 144, D] ───┐ takes the place of <image>
    "USER: <image>\\nWhat is this? ASSISTANT:" [B, T]     │
      -> token embeddings                 [B, T, D] ─────┴─> [B, T + 143, D]
      -> MobileLLaMA, frozen, with HybridLoRALinear in the seven linears of every layer
      -> loss, at the answers' tokens alone

    hierarchical   rank of a linear = coarse rank of its layer + fine rank of its own
    dynamic        a performance model, fitted during training to measured losses, moves the ranks
    equal budget   never more adapter parameters than LoRA with one rank for all

The paper gives these three ideas and no hyper-parameters. Ours are the signals (gradient
signal-to-noise; masked components), the clustering, the multipliers, the features of the
performance model, and when events happen; each says so where it is defined.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()  # of loading weights, a line for every part

IMAGE_TOKEN = -200  # stands for the image in input_ids
IGNORE = -100  # label of a position that is no target


class HydraError(ValueError):
    """A mistake in a model, checkpoint or rank: one line that names it and says what to do."""


# ---------------------------------------------------------------------------------------------
# vision: CLIP and the projector


class CLIPEncoder(nn.Module):
    """Patch features of a frozen CLIP: [B, 3, H, W] -> [B, P, C], P patches in reading order.

    MobileVLM reads the last hidden state but one, so the last layer is kept but never run.
    """

    def __init__(self, clip):
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.train(False)

    def train(self, mode=True):
        return super().train(False)  # frozen: in eval mode for ever

    @torch.no_grad()
    def forward(self, pixel_values):
        hidden = self.clip.embeddings(pixel_values.to(self.clip.dtype))  # [B, 1 + P, C]
        hidden = self.clip.pre_layrnorm(hidden)
        for layer in self.clip.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        return hidden[:, 1:]  # without the class token


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, D, h, w]."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcitation(nn.Module):
    """Channels gated by what all positions hold on average (MobileNetV3)."""

    def __init__(self, width):
        super().__init__()
        squeezed = max(8, (width // 4 + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * F.hardsigmoid(gate)


class MobileBlock(nn.Module):
    """Depthwise 3x3, gate, pointwise 1x1; adds its input where the stride is 1."""

    def __init__(self, width, stride):
        super().__init__()
        self.stride = stride
        self.block = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False), ChannelNorm(width), nn.Hardswish()
            ),
            SqueezeExcitation(width),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), ChannelNorm(width)),
        )

    def forward(self, x):
        return x + self.block(x) if self.stride == 1 else self.block(x)


def to_grid(tokens):
    """[B, P, D] -> [B, D, √P, √P]"""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class LDPNet(nn.Module):
    """MobileVLM's lightweight downsample projector: [B, P, C] -> [B, P / 4, D]."""

    # Module names follow upstream's checkpoint keys: index 0 was an Identity there, too
    def __init__(self, clip_width, llm_width):
        super().__init__()
        self.model = nn.ModuleDict({
            "mlp": nn.Sequential(
                nn.Identity(), nn.Linear(clip_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
            ),
            "mb_block": nn.Sequential(nn.Identity(), MobileBlock(llm_width, 1), MobileBlock(llm_width, 2)),
        })  # fmt: skip

    def forward(self, features):
        x = self.model["mlp"](features)  # [B, P, C] -> [B, P, D]
        x = self.model["mb_block"](to_grid(x))  # [B, D, 24, 24] -> [B, D, 12, 12]
        return x.flatten(2).transpose(1, 2)  # [B, P / 4, D]


class LDPNetV2(nn.Module):
    """MobileVLM V2's projector: [B, P, C] -> [B, 144, D], by pooling and a positional convolution."""

    def __init__(self, clip_width, llm_width):
        super().__init__()
        mlp = nn.Sequential(nn.Linear(clip_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))
        self.mlp = nn.ModuleDict({"mlp": mlp})
        conv = nn.Conv2d(llm_width, llm_width, 3, padding=1, groups=llm_width)
        self.peg = nn.ModuleDict({"peg": nn.Sequential(conv)})

    def forward(self, features):
        x = self.mlp["mlp"](features)  # [B, P, C] -> [B, P, D]
        x = F.adaptive_avg_pool2d(to_grid(x), 12)  # [B, D, 12, 12]
        x = x + self.peg["peg"](x)
        return x.flatten(2).transpose(1, 2)  # [B, 144, D]


def build_projector(kind, clip_width, llm_width):
    """kind "ldpnet" or "ldpnetv2"; module names are upstream's, so mm_projector.bin loads strictly."""
    kinds = {"ldpnet": LDPNet, "ldpnetv2": LDPNetV2}
    if kind not in kinds:
        raise HydraError(f"unknown projector {kind!r}; choose from {', '.join(kinds)}")
    projector = kinds[kind](clip_width, llm_width)
    projector.kind = kind
    return projector


# ---------------------------------------------------------------------------------------------
# the pretrained parts


def from_hub(loader, name_or_dir, **options):
    """loader.from_pretrained, with one clear line when the name or folder leads nowhere."""
    is_folder = Path(name_or_dir).is_dir()
    if is_folder and not Path(name_or_dir, "config.json").is_file():
        raise HydraError(f"{name_or_dir}: no config.json; give a folder with a model, or a hub id")
    try:
        return loader.from_pretrained(str(name_or_dir), **options)
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if is_folder:
            raise HydraError(f"{name_or_dir}: cannot be loaded: {reason}") from None
        raise HydraError(f"{name_or_dir}: neither a folder nor reachable on the hub: download it, or give a folder") from None


def load_clip(name_or_dir, dtype=torch.float32):
    """CLIPEncoder from a folder or hub id."""
    return CLIPEncoder(from_hub(CLIPVisionModel, name_or_dir, dtype=dtype))


def load_mobilellama(name_or_dir, dtype=torch.float32):
    """(LlamaForCausalLM, tokenizer) from a folder or hub id, as MobileLLaMA is published."""
    folder = Path(name_or_dir)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise HydraError(f"{folder}: no tokenizer.json and no tokenizer.model; copy the tokenizer there")
        if not (folder / "tokenizer.json").is_file():
            for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
                try:
                    __import__(module)
                except ImportError:
                    raise HydraError(f"{folder / 'tokenizer.model'}: needs the package {package}: pip install {package}") from None
    llm = from_hub(LlamaForCausalLM, name_or_dir, dtype=dtype)  # dtype: else it is the config's
    if llm.config.model_type != "llama":
        raise HydraError(f"{name_or_dir}: is a {llm.config.model_type!r} model; give a LLaMA")
    # legacy: MobileLLaMA's ids come from the tokenizer as it was before transformers changed it
    tokenizer = from_hub(AutoTokenizer, name_or_dir, legacy=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token  # id 0; a new token would resize the embeddings
    if len(tokenizer) > llm.config.vocab_size:
        raise HydraError(f"{name_or_dir}: tokenizer of {len(tokenizer)} ids for a model of {llm.config.vocab_size}")
    return llm, tokenizer


# ---------------------------------------------------------------------------------------------
# the adapter


class HybridLoRALinear(nn.Module):
    """A frozen linear map plus a low-rank one whose rank is the sum of two:

                        ┌───────── W [out, in], frozen ────────┐
        x [.., in] ─────┤                                       + ──> y [.., out]
                        └─ dropout ─ A [r, in] ─ B [out, r] ·scale ┘

        r = coarse rank (the layer's, shared by its seven projections)
          + fine rank   (this projection's own, may be negative), at least 1

    A component is one row of A with its column of B; ranks move by adding and dropping components.
    B starts at zero, so that the function starts as the base's. The scale belongs to the adapter
    and stays when the rank moves: AdaLoRA's author found that rescaling by the new rank hurts.
    """

    def __init__(self, base, coarse_rank, fine_rank=0, scale=2.0, dropout=0.05):
        super().__init__()
        self.base, self.scale, self.merged = base.requires_grad_(False), scale, False
        self.coarse_rank, self.fine_rank = coarse_rank, fine_rank
        self.check_rank(coarse_rank + fine_rank)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(self.random_rows(self.rank))  # [r, in], fp32 whatever the base is
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, self.rank, device=base.weight.device))  # [out, r]

    @property
    def rank(self):
        return self.coarse_rank + self.fine_rank

    @property
    def cost(self):
        """Parameters of one component."""
        return self.base.in_features + self.base.out_features

    @property
    def max_rank(self):
        return min(self.base.in_features, self.base.out_features)

    def check_rank(self, rank):
        if not 1 <= rank <= self.max_rank:
            raise HydraError(f"rank {rank} for a linear of {self.base.in_features} -> {self.base.out_features}: use 1 to {self.max_rank}")

    def random_rows(self, rows, generator=None):
        """New rows of A [rows, in], uniform as LoRA's (Kaiming, a = √5)."""
        bound = 1 / math.sqrt(self.base.in_features)
        new = torch.empty(rows, self.base.in_features)  # on the CPU: the same numbers on every device
        return new.uniform_(-bound, bound, generator=generator).to(self.base.weight.device)

    def forward(self, x):
        y = self.base(x)
        if self.merged:
            return y
        return y + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)

    def delta(self):
        """The dense update [out, in] that the adapter stands for."""
        return self.scale * self.lora_B @ self.lora_A

    @torch.no_grad()
    def merge(self):
        """Add the update to the base weight; forward then runs the base alone."""
        if not self.merged:
            self.base.weight += self.delta().to(self.base.weight.dtype)
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        if self.merged:
            self.base.weight -= self.delta().to(self.base.weight.dtype)
            self.merged = False

    @torch.no_grad()
    def resize(self, coarse_rank, fine_rank, importance=None, generator=None):
        """Change the rank; returns the indices of the components kept, which come first and in order.

        Growing leaves the function as it is: new rows of A are random, new columns of B zero.
        Shrinking drops the components of least importance [r] (without it, of least norm).
        The parameters are new objects; see carry_moments for their optimizer state.
        """
        self.check_rank(coarse_rank + fine_rank)
        if importance is None:
            importance = self.lora_A.norm(dim=1) * self.lora_B.norm(dim=0)
        rank = coarse_rank + fine_rank
        kept = importance.argsort(descending=True, stable=True)[:rank].sort().values
        new = rank - len(kept)
        A = torch.cat([self.lora_A[kept], self.random_rows(new, generator)])
        B = torch.cat([self.lora_B[:, kept], self.lora_B.new_zeros(self.base.out_features, new)], dim=1)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        self.coarse_rank, self.fine_rank = coarse_rank, fine_rank
        return kept


PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def inject_adapters(llm, rank, scale, dropout=0.05):
    """Put a HybridLoRALinear in place of all seven linears of every transformer layer."""
    for layer in llm.model.layers:
        for name in PROJECTIONS:
            parent, child = name.split(".")
            block = getattr(layer, parent)
            setattr(block, child, HybridLoRALinear(getattr(block, child), rank, 0, scale, dropout))


def adapters(model):
    """{module name in the LLM: HybridLoRALinear}, layer by layer; empty without adapters."""
    return {
        f"model.layers.{i}.{name}": module
        for i, layer in enumerate(model.llm.model.layers)
        for name in PROJECTIONS
        if isinstance(module := layer.get_submodule(name), HybridLoRALinear)
    }


def freeze(model, stage, method):
    """Leave trainable what the stage trains: the projector, and in stage 2 the adapters or the whole LLM."""
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    if stage == 2 and method == "full":
        model.llm.requires_grad_(True)
    for adapter in adapters(model).values():
        adapter.lora_A.requires_grad_(True)
        adapter.lora_B.requires_grad_(True)


def parameter_table(model):
    """Parameters of each part, and how many of them are trained, as text."""
    lora = [p for adapter in adapters(model).values() for p in (adapter.lora_A, adapter.lora_B)]
    in_adapters = {id(p) for p in lora}
    parts = {
        "CLIP": list(model.clip.parameters()),
        "projector": list(model.projector.parameters()),
        "LLM": [p for p in model.llm.parameters() if id(p) not in in_adapters],
        "adapters": lora,
    }
    lines = [f"{'':10}{'parameters':>15}{'trained':>15}"]
    for name, parameters in [*parts.items(), ("total", sum(parts.values(), []))]:
        total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        lines.append(f"{name:10}{total:15,}{trained:15,}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# the rank method: coarse, fine, performance model, budget

MILD = 1.5  # no rank target leaves [r₀/1.5², 1.5²·r₀]: strong multipliers starve layers


def mild(score, centre):
    """Multiplier of a score against the typical one: the square root of the ratio, within 1/1.5 … 1.5."""
    return np.clip(np.sqrt(score / centre), 1 / MILD, MILD)


def cluster(values, k=3):
    """Deterministic one-dimensional k-means: the mean of each value's cluster. [L] -> [L]"""
    centres = np.quantile(values, np.linspace(0, 1, k))
    while True:
        member = np.abs(values[:, None] - centres).argmin(1)
        moved = np.array([values[member == j].mean() if (member == j).any() else centres[j] for j in range(k)])
        if np.allclose(moved, centres):
            return moved[member]
        centres = moved


def coarse_and_fine(scores, rank):
    """Rank targets from scores [layers, projections] > 0: (coarse [layers, 1], both [layers, projections]).

    Coarse: layers whose log scores cluster together get one rank. Fine: inside a layer each
    projection is set against the layer's own typical score.
    """
    log = np.log(scores)
    layer = cluster(log.mean(1))[:, None]  # three kinds of layer
    coarse = rank * mild(np.exp(layer), np.exp(layer.mean()))
    return coarse, coarse * mild(scores, np.exp(log.mean(1, keepdims=True)))


def fit_to_budget(targets, costs, budget, limits):
    """Whole ranks near the targets (arrays of one shape) that cost at most `budget` parameters.

    At least 1 and at most `limits` each. What is over is taken from, and what is left given to,
    whichever module is furthest from its target, until no further component fits.
    """
    targets = targets * budget / (targets * costs).sum()
    ranks = np.clip(np.floor(targets), 1, limits)
    while (over := (ranks * costs).sum() - budget) > 0:
        ranks.flat[np.where(ranks > 1, ranks / targets, -np.inf).argmax()] -= 1
    while ((fits := (costs <= -over) & (ranks < limits))).any():
        i = np.where(fits, targets / (ranks + 1), -np.inf).argmax()
        ranks.flat[i] += 1
        over += costs.flat[i]
    return ranks.astype(int)


class PerformancePredictor:
    """Ridge regression from a change of ranks to the change of held-out loss.

    A change is described by five numbers (RankController.describe), the same for all layers, so
    that some dozen measurements suffice; it passes through the origin, since no change changes
    nothing. Observations are weighted towards the latest, because what a component is worth
    moves while the model learns.
    """

    RIDGE, FORGET = 1.0, 0.5

    def __init__(self):
        self.observations = []  # (event, features, measured change of loss)
        self.weights = None

    def observe(self, event, features, change):
        self.observations.append((event, [float(x) for x in features], float(change)))

    def fit(self):
        """Fit; returns {"error", "error_of_mean", "observations"}: root mean square, leave-one-out."""
        events, X, y = (np.array(column, dtype=float) for column in zip(*self.observations))
        root = np.sqrt(self.FORGET ** (events.max() - events))[:, None]  # weighted least squares
        self.spread = np.sqrt((X**2).mean(0)) + 1e-12
        Xw, yw = X / self.spread * root, y * root[:, 0]
        inverse = np.linalg.inv(Xw.T @ Xw + self.RIDGE * np.eye(X.shape[1]))
        self.weights = inverse @ Xw.T @ yw
        leverage = np.einsum("ij,jk,ik->i", Xw, inverse, Xw)
        left_out = (yw - Xw @ self.weights) / (1 - leverage)  # residual of a fit without that row
        weight = root[:, 0] ** 2
        mean_without = ((weight * y).sum() - weight * y) / (weight.sum() - weight)
        self.error = float(np.sqrt((left_out**2).sum() / weight.sum()))
        self.error_of_mean = float(np.sqrt((weight * (y - mean_without) ** 2).sum() / weight.sum()))
        return {"error": self.error, "error_of_mean": self.error_of_mean, "observations": len(y)}

    def predict(self, features):
        return float(np.asarray(features) / self.spread @ self.weights)


class RankController:
    """Moves the ranks of a model's adapters during stage 2.

    observe() after every backward pass gathers, from the gradients that are there anyway,
      signal-to-noise of each adapter   ‖mean ∂B‖² / mean ‖∂B‖²
      importance of each component      mean |B_j · ∂B_j|, the first-order change of loss without it
    event() at 15, 30 and 45 % of the steps masks the weakest components of random groups of
    modules, measures the held-out loss without them, fits the performance model to it, lets it
    choose among candidates, and changes the ranks if the predicted gain is above the model's own
    error. What a change brought is measured at the next event, and learned from, too.
    """

    EVENTS, WARM_UP = (0.15, 0.30, 0.45), 0.05
    PROBES, CANDIDATES = 16, 32

    def __init__(self, model, rank, total_steps, seed=0):
        self.adapters = adapters(model)
        self.shape = (-1, len(PROJECTIONS))
        modules = list(self.adapters.values())
        self.rank, self.seed = rank, seed  # r₀, everywhere at the start
        self.costs = np.array([module.cost for module in modules]).reshape(self.shape)
        self.limits = np.array([module.max_rank for module in modules]).reshape(self.shape)
        self.budget = int(self.rank * self.costs.sum())
        self.event_steps = [max(1, round(at * total_steps)) for at in self.EVENTS]
        self.warm_up = round(self.WARM_UP * total_steps)
        self.predictor = PerformancePredictor()
        self.last_change = None
        self.history = [{"step": 0, "ranks": self.ranks().tolist()}]
        self.clear()

    def ranks(self):
        """[layers, projections]"""
        return np.array([module.rank for module in self.adapters.values()]).reshape(self.shape)

    def parameters_used(self):
        return int((self.ranks() * self.costs).sum())

    STATE = ("count", "mean_grad", "norm", "importance", "last_change", "history")

    def state_dict(self):
        return {key: getattr(self, key) for key in self.STATE} | {"observations": self.predictor.observations}

    def load_state_dict(self, state):
        for key in self.STATE:
            setattr(self, key, state[key])
        self.predictor.observations = state["observations"]

    def clear(self):
        self.count, self.mean_grad, self.norm, self.importance = 0, {}, {}, {}

    @torch.no_grad()
    def observe(self, step):
        """After backward and before the optimizer's step; no synchronisation with the device."""
        if step < self.warm_up or step >= self.event_steps[-1]:
            return
        self.count += 1
        for name, module in self.adapters.items():
            grad = module.lora_B.grad.float()
            contribution = (module.lora_B * grad).sum(0).abs()
            if name not in self.norm:
                self.mean_grad[name], self.norm[name] = torch.zeros_like(grad), torch.zeros((), device=grad.device)
                self.importance[name] = torch.zeros_like(contribution)
            self.mean_grad[name] += grad
            self.norm[name] += grad.square().sum()
            self.importance[name] += contribution

    def statistics(self):
        """(signal-to-noise [layers, projections], {name: importance [r]}) since the last event."""
        signal = [(self.mean_grad[n].square().sum() / self.norm[n].clamp(min=1e-30) / self.count).item() for n in self.adapters]
        importance = {name: self.importance[name].cpu() / self.count for name in self.adapters}
        return np.array(signal).reshape(self.shape).clip(1e-6), importance

    def describe(self, signal, importance):
        """What one component of each module is like: features [layers, projections, 5].

        In units of its share of the budget: itself, whether in attention, how deep, the module's
        signal-to-noise; and the importance of the module's weaker half.
        """
        weaker = [imp.sort().values[: (len(imp) + 1) // 2].mean().item() for imp in importance.values()]
        share = self.costs / self.budget
        attention = np.array([name.startswith("self_attn") for name in PROJECTIONS], dtype=float)
        depth = np.linspace(-1, 1, len(share))[:, None]
        return np.stack([share, share * attention, share * depth, share * signal, np.array(weaker).reshape(self.shape)], -1)

    def event(self, step, measure, optimizer):
        """One rank event. measure() is the held-out loss, equal on all processes. Returns a log entry."""
        signal, importance = self.statistics()
        features, before = self.describe(signal, importance), self.ranks()
        number, loss = self.event_steps.index(step), measure()
        random = np.random.default_rng((self.seed, number))
        generator = torch.Generator().manual_seed(self.seed + number)
        if self.last_change is not None:
            self.learn_from_last_change(number, measure, loss)
        for _ in range(self.PROBES):
            # a quarter of the modules, each without the weaker part of its components
            removed = np.where(random.random(before.shape) < 0.25, np.ceil(before * random.uniform(0.2, 0.6)), 0).astype(int)
            weakest = {
                name: imp.argsort(stable=True)[:count]
                for (name, imp), count in zip(importance.items(), removed.flat)
            }  # fmt: skip
            self.predictor.observe(number, np.einsum("lp,lpf->f", removed, features), self.loss_without(weakest, measure) - loss)
        entry = {"step": step, "budget": self.budget, "held_out_loss": loss, **self.predictor.fit()}

        # the model's favourite; equal on every process, yet process 0 decides for all
        candidates = self.candidates(signal, before, random)
        gains = {
            name: -self.predictor.predict(np.einsum("lp,lpf->f", before - ranks, features))
            for name, (_, ranks) in candidates.items()
        }
        choice = max(gains, key=gains.get)
        able = entry["error"] < entry["error_of_mean"]
        decision = [choice if able and gains[choice] > entry["error"] else "stay"]
        if dist.is_initialized():
            dist.broadcast_object_list(decision)
        entry |= {"choice": decision[0], "favourite": choice, "predicted_gain": gains[choice], "abstained": not able}
        if decision[0] != "stay":
            self.change(*candidates[decision[0]], importance, features, optimizer, generator)
            entry["loss_of_shrinking"] = self.last_change["loss_of_shrinking"] = measure() - loss
        entry |= {"ranks_before": before.tolist(), "ranks": self.ranks().tolist(), "parameters": self.parameters_used()}
        self.history.append(entry)
        self.clear()
        return entry

    def candidates(self, signal, before, random):
        """{name: (coarse [layers], ranks [layers, projections])}, all within the budget."""
        def fit(coarse, targets):
            return np.maximum(1, np.rint(coarse)).astype(int).ravel(), fit_to_budget(targets, self.costs, self.budget, self.limits)

        uniform = np.full(before.shape, float(self.rank))
        coarse, both = coarse_and_fine(signal, self.rank)
        found = {
            "coarse": fit(coarse, coarse * np.ones_like(uniform)),
            "coarse+fine": fit(coarse, both),
            "half": fit(np.sqrt(coarse * self.rank), np.sqrt(both * before)),
            "uniform": fit(uniform[:, 0], uniform),
        }
        for i in range(self.CANDIDATES - len(found)):  # small random moves away from what is
            targets = before * np.exp(random.normal(0, 0.3, before.shape))
            found[f"random {i}"] = fit(targets.mean(1), targets)
        return found

    def change(self, coarse, ranks, importance, features, optimizer, generator):
        """Give every module its new rank and carry the optimizer's state over."""
        before, grown = self.ranks(), {}
        for (name, module), layer_rank, rank in zip(self.adapters.items(), coarse.repeat(len(PROJECTIONS)), ranks.ravel()):
            old = module.lora_A, module.lora_B
            kept = module.resize(int(layer_rank), int(rank - layer_rank), importance[name], generator)
            carry_moments(optimizer, old[0], module.lora_A, kept, dim=0)
            carry_moments(optimizer, old[1], module.lora_B, kept, dim=1)
            grown[name] = torch.arange(len(kept), module.rank)
        self.last_change = {"features": np.einsum("lp,lpf->f", before - ranks, features).tolist(), "grown": grown}

    def learn_from_last_change(self, number, measure, loss):
        """What the last change brought: what its new components are worth now, less what shrinking cost."""
        worth = self.loss_without(self.last_change["grown"], measure) - loss
        change = self.last_change["loss_of_shrinking"] - worth
        self.history[-1]["realised_gain"] = -change
        self.predictor.observe(number, self.last_change["features"], change)
        self.last_change = None

    @torch.no_grad()
    def loss_without(self, components, measure):
        """Held-out loss while the components {name: indices} are masked."""
        saved = {name: self.adapters[name].lora_B.clone() for name in components}
        for name, indices in components.items():
            self.adapters[name].lora_B[:, indices] = 0
        loss = measure()
        for name, value in saved.items():
            self.adapters[name].lora_B.copy_(value)
        return loss


def carry_moments(optimizer, old, new, kept, dim):
    """Put `new` in the place of `old` in Adam; components kept (indices along dim) keep their moments.

    A new component starts with first moment 0 and the mean second moment of its neighbours: with
    0 there its first steps would be far larger than theirs.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if state:
        kept = kept.to(new.device)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = state[key].index_select(dim, kept)
            fresh = moment.mean(dim, keepdim=True).expand_as(new.narrow(dim, 0, new.shape[dim] - len(kept)))
            state[key] = torch.cat([moment, fresh if key == "exp_avg_sq" else torch.zeros_like(fresh)], dim)
        optimizer.state[new] = state


# ---------------------------------------------------------------------------------------------
# the whole model


class HydraVLM(nn.Module):
    """CLIP, projector and LLM as one model over token ids and pictures."""

    def __init__(self, clip, projector, llm):
        super().__init__()
        self.clip, self.projector, self.llm = clip, projector, llm

    @property
    def image_size(self):
        return self.clip.clip.config.image_size

    @property
    def image_tokens(self):
        """What one image takes in the LLM's context."""
        patches = (self.image_size // self.clip.clip.config.patch_size) ** 2
        return 144 if self.projector.kind == "ldpnetv2" else (math.isqrt(patches) + 1) // 2 * ((math.isqrt(patches) + 1) // 2)

    def splice(self, input_ids, attention_mask, pixel_values, labels=None, left=False):
        """Put the image's tokens in the place of IMAGE_TOKEN.

        input_ids [B, T] with IMAGE_TOKEN once per image, pixel_values [N, 3, H, W] in reading order.
        Returns embeddings [B, T', D], mask [B, T'] and labels [B, T'] or None, padded on the right,
        or on the left for generation. The indices are computed where the ids live: ids on the CPU
        keep a GPU from waiting.
        """
        device = self.llm.device
        width = self.image_tokens
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        is_image = input_ids == IMAGE_TOKEN
        images = 0 if pixel_values is None else len(pixel_values)
        if is_image.sum() != images:
            raise ValueError(f"{int(is_image.sum())} image placeholders for {images} images")
        places = torch.where(is_image, width, 1) * attention_mask  # places that each id takes [B, T]
        lengths = places.sum(1, keepdim=True)
        position = torch.arange(int(lengths.max()))[None].to(lengths.device)
        mask = position >= position.numel() - lengths if left else position < lengths  # [B, T']

        def expand(values, padding):
            out = torch.full(mask.shape, padding, device=values.device)
            out[mask] = values.flatten().repeat_interleave(places.flatten())
            return out

        ids = expand(input_ids, 0)
        embeddings = self.llm.get_input_embeddings()(ids.clamp(min=0).to(device))  # [B, T', D]
        if images:
            tokens = self.projector(self.clip(pixel_values.to(device)))  # [N, 144, D]
            where = (ids == IMAGE_TOKEN).flatten().nonzero().squeeze(1).to(device)
            flat = embeddings.flatten(0, 1).index_copy(0, where, tokens.flatten(0, 1).to(embeddings.dtype))
            embeddings = flat.view_as(embeddings)
        elif self.training:
            # DDP waits for every gradient: a batch without an image gives the projector a zero one
            nothing = torch.zeros(1, (self.image_size // self.clip.clip.config.patch_size) ** 2, self.clip.clip.config.hidden_size)
            embeddings = embeddings + 0 * self.projector(nothing.to(device)).sum().to(embeddings.dtype)
        return embeddings, mask, None if labels is None else expand(labels, IGNORE)

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None):
        """With labels (loss_sum, target_count), else the logits [B, T', vocabulary].

        The loss is a sum, and taken from the hidden states at target positions alone: how a global
        batch is split then does not matter, and no [B, T', vocabulary] tensor is made.
        """
        embeddings, mask, labels = self.splice(input_ids, attention_mask, pixel_values, labels)
        # right-padded and causal: no token that counts sees the padding, so attention needs no mask
        hidden = self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state  # [B, T', D]
        if labels is None:
            return self.llm.lm_head(hidden)
        targets = labels[:, 1:]  # a hidden state predicts the next token
        where = (targets != IGNORE).flatten().nonzero().squeeze(1)
        hidden = hidden[:, :-1].flatten(0, 1)[where.to(hidden.device)]  # [targets, D]
        logits = self.llm.lm_head(hidden).float()  # [targets, vocabulary]
        targets = targets.flatten()[where].to(logits.device)
        return F.cross_entropy(logits, targets, reduction="sum"), torch.tensor(len(where), device=logits.device)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask=None, pixel_values=None, max_new_tokens=64, **options):
        """New token ids [B, n], greedy unless options (transformers' generate) say otherwise."""
        was_training = self.training
        self.eval()
        embeddings, mask, _ = self.splice(input_ids, attention_mask, pixel_values, left=True)
        options = {"do_sample": False, "pad_token_id": 0, **options}
        ids = self.llm.generate(
            inputs_embeds=embeddings, attention_mask=mask.long().to(embeddings.device), max_new_tokens=max_new_tokens, **options
        )
        self.train(was_training)
        return ids


# ---------------------------------------------------------------------------------------------
# checkpoints


def trained_tensors(model):
    """{name: tensor} of what training changes: the projector, the adapters, and with full fine-tuning the LLM."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_model(folder, model, description):
    """config.json, readable, and model.safetensors with the trained tensors."""
    ranks = {name: [module.coarse_rank, module.fine_rank] for name, module in adapters(model).items()}
    (folder / "config.json").write_text(json.dumps({"format": "hydra", **description, "ranks": ranks}, indent=1))
    save_file({name: tensor.contiguous() for name, tensor in trained_tensors(model).items()}, folder / "model.safetensors")


def find_checkpoint(folder):
    """The newest checkpoint of a run's folder, or the folder itself when it is a checkpoint; else None."""
    folder = Path(folder)
    steps = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return folder if (folder / "config.json").is_file() else max(steps, key=lambda path: int(path.name[11:]), default=None)


def read_config(folder):
    """config.json of one of our checkpoints."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise HydraError(f"{folder / 'config.json'}: cannot be read ({error})") from None
    if not isinstance(config, dict) or config.get("format") != "hydra":
        raise HydraError(f"{folder}: is not a checkpoint of train.py; give a folder that it wrote")
    return config


def restore(model, folder, config):
    """Load a checkpoint's trained tensors, with its ranks, into a model of the same backbones."""
    for name, (coarse, fine) in config["ranks"].items():
        if name not in adapters(model):
            raise HydraError(f"{folder}: has an adapter for {name}, which this model has not; use the model it names")
        adapters(model)[name].resize(coarse, fine)
    try:
        state = load_file(folder / "model.safetensors")
    except Exception as error:  # safetensors raises its own kinds
        raise HydraError(f"{folder / 'model.safetensors'}: cannot be read ({error})") from None
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise HydraError(f"{folder}: {name} {list(tensor.shape)} does not fit this model; use the model it names")
    model.load_state_dict(state, strict=False)


def load_checkpoint(folder, dtype=torch.float32):
    """(model in eval mode, tokenizer, config) from a folder that train.py wrote."""
    found = find_checkpoint(folder)
    if found is None:
        raise HydraError(f"{folder}: holds no checkpoint; give a folder that train.py wrote")
    config = read_config(found)
    llm, tokenizer = load_mobilellama(config["model"], dtype)
    clip = load_clip(config["vision_tower"], dtype)
    model = HydraVLM(clip, build_projector(config["projector"], clip.clip.config.hidden_size, llm.config.hidden_size), llm)
    if config["ranks"]:
        inject_adapters(llm, 1, config["scale"], config["dropout"])
    restore(model, found, config)
    return model.eval(), tokenizer, config


def chat(args):
    """Print the answer to one question about one image as it is generated."""
    from transformers import TextStreamer

    import data  # the command line, unlike the model, needs the template and the pixels

    try:
        model, tokenizer, _ = load_checkpoint(args.checkpoint)
        path = Path(args.image)
        pixels = data.image_to_tensor(data.open_image(path.parent, path.name), model.image_size, "pad")
        turn = {"from": "human", "value": "<image>\n" + args.prompt}
        input_ids, _ = data.encode_conversation([turn], tokenizer, "v1")
    except (HydraError, data.DataError) as error:
        print(f"hydra.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    model.generate(
        torch.tensor([input_ids]), pixel_values=pixels[None], max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="HyDRA: answer a question about an image")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("chat", help="print the model's answer as it is generated")
    command.add_argument("checkpoint", help="folder that train.py --stage 2 wrote")
    command.add_argument("--image", required=True, help="picture to ask about")
    command.add_argument("--prompt", required=True, help="the question")
    command.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    chat(parser.parse_args())

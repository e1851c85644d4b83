"""HyDRA: hierarchical and dynamic rank adaptation for mobile vision-language models (arXiv 2512.20674).

    python hydra.py chat CHECKPOINT --image FILE [--prompt TEXT]
    python hydra.py export CHECKPOINT --format peft|mobilevlm|hf --to DIR

Read this file down to the section comment that says what to skip; then train.py and data.py likewise.

    image [B, 3, 336, 336]
      -> CLIPEncoder, frozen              [B, 576, 1024]
      -> LDP projector, trained           [B, 144, D] ───┐ takes the place of <image>
    "USER: <image>\\nWhat is this? ASSISTANT:" [B, T]     │
      -> token embeddings                 [B, T, D] ─────┴─> [B, T + 143, D]
      -> MobileLLaMA, frozen, with HybridLoRALinear in the seven linears of every layer
      -> loss, at the answers' tokens alone

    hierarchical   ranks differ between layers (coarse) and between the linears inside a layer (fine)
    dynamic        ranks move during training to where Adam's second moments say that the loss needs them; a
                   performance model, fitted to measured losses, can veto
    equal budget   never more adapter parameters than LoRA with one rank for all

Written from the paper's abstract and its authors' README, whose ideas these three are; its text was not at hand.
All else of the rank method is ours: the signal, how far it is believed, the performance model, when events happen; but
for rows of A that start along their input's principal directions (EVA's). The model is MobileVLM (arXiv 2312.16886).
"""

import argparse
import json
import math
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel, GenerationConfig, LlamaForCausalLM, TextStreamer, logging

import data
from data import IGNORE, IMAGE_TOKEN, Mistake, reading, whole

# what matters of loading and of a failed download is said here, in one line
logging.disable_progress_bar()
logging.set_verbosity_error()
hub_logging.set_verbosity_error()
torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention would be planned anew for each shape of a batch

# ------------------------------------------------------------------------------------------
# vision: CLIP and the projector


class CLIPEncoder(nn.Module):
    """Patch features of a frozen CLIPVisionModel: [B, 3, H, W] -> [B, P, C], P patches in reading order.

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
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, ChannelNorm(width), nn.Hardswish()),
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

    kind = "ldpnet"

    # module names follow upstream's checkpoint keys: index 0 was an Identity there, too
    def __init__(self, clip_width, llm_width):
        super().__init__()
        mlp = nn.Sequential(nn.Identity(), nn.Linear(clip_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width))
        blocks = nn.Sequential(nn.Identity(), MobileBlock(llm_width, 1), MobileBlock(llm_width, 2))
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": blocks})

    def forward(self, features):
        x = self.model["mlp"](features)  # [B, P, C] -> [B, P, D]
        x = self.model["mb_block"](to_grid(x))  # [B, D, 24, 24] -> [B, D, 12, 12]
        return x.flatten(2).transpose(1, 2)  # [B, P / 4, D]


# ------------------------------------------------------------------------------------------
# the adapter


class HybridLoRALinear(nn.Module):
    """A frozen linear map plus a low-rank one (LoRA, arXiv 2106.09685) whose rank can move:

                        ┌───────── W [out, in], frozen ────────┐
        x [.., in] ─────┤                                       + ──> y [.., out]
                        └─ dropout ─ A [r, in] ─ B [out, r] ·scale ┘

    A component is one row of A with its column of B; the rank r, at least 1, moves by adding and dropping components.
    The rank is kept as coarse rank (the layer's mean, rounded) + fine rank (what this projection has beyond it, may be
    negative), which is bookkeeping: what is coarse and fine in a decision is in RankController.shrink. B starts at
    zero, so that the function starts as the base's. The scale belongs to the adapter and stays when the rank moves:
    AdaLoRA's author found that rescaling by the new rank hurts.
    """

    def __init__(self, base, coarse_rank, fine_rank=0, scale=2.0, dropout=0.05):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.zeros(0, base.in_features, device=base.weight.device))  # [r, in]
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, 0, device=base.weight.device))  # [out, r]
        self.resize(coarse_rank, fine_rank)

    @property
    def rank(self):
        return self.coarse_rank + self.fine_rank

    def forward(self, x):
        tokens = x.flatten(0, -2)  # [n, in]
        y = self.base(tokens)
        if self.training and self.dropout:
            # of [n, in] the backward pass keeps the tokens alone, which q, k and v share: dropout is drawn again
            read = lambda tokens, A: F.linear(drop(tokens, self.dropout), A)
            h = checkpoint(read, tokens, self.lora_A, use_reentrant=False)  # [n, r]
        else:
            h = F.linear(tokens, self.lora_A)
        # in place, since the base's backward pass does not need y: no second tensor of its size
        return y.addmm_(h, self.lora_B.T.to(y.dtype), alpha=self.scale).view(*x.shape[:-1], -1)

    def delta(self):
        """The dense update [out, in] that the adapter stands for."""
        return self.scale * self.lora_B @ self.lora_A

    def by_strength(self):
        """Indices of the components [r], the strongest first: by norm of A's row · norm of B's column."""
        return (self.lora_A.norm(dim=1) * self.lora_B.norm(dim=0)).argsort(descending=True, stable=True)

    def new_rows(self, count, moment=None):
        """New rows of A [count, in]: the strongest directions, of length 1, that A's gradient has outside of A's rows.

        moment: the gradient's running mean [r, in]. Without one, or beyond r, rows are uniform as LoRA's (Kaiming,
        a = √5).
        """
        bound = 1 / math.sqrt(self.base.in_features)
        # drawn on the CPU: the same numbers on every device
        new = torch.empty(count, self.base.in_features).uniform_(-bound, bound).to(self.lora_A.device)
        if moment is not None and count:
            basis = torch.linalg.qr(self.lora_A.T).Q  # [in, r]
            strongest = torch.linalg.svd(moment - moment @ basis @ basis.T, full_matrices=False).Vh[:count]
            new[: len(strongest)] = strongest
        return new

    @torch.no_grad()
    def resize(self, coarse_rank, fine_rank=0, optimizer=None):
        """Change the rank; returns the indices of the components kept, which come first and in order.

        Growing leaves the function as it is: new columns of B are zero. Shrinking drops the weakest components. A and B
        are new objects, which take the old ones' place in the optimizer, Adam: kept components keep their moments; a
        new one starts with first moment 0 and the mean second moment of those kept, since with 0 there its first
        steps would be far larger than theirs.
        """
        rank = coarse_rank + fine_rank
        outputs, inputs = self.base.weight.shape
        if not 1 <= rank <= min(outputs, inputs):
            raise Mistake(f"rank {rank} for a linear of {inputs} -> {outputs}: use 1 to {min(outputs, inputs)}")
        A = self.lora_A
        B = self.lora_B
        kept = self.by_strength()[:rank].sort().values
        added = rank - len(kept)
        self.coarse_rank = coarse_rank
        self.fine_rank = fine_rank
        moment = optimizer.state[A]["exp_avg"] if optimizer else None
        self.lora_A = nn.Parameter(torch.cat([A[kept], self.new_rows(added, moment)]))
        self.lora_B = nn.Parameter(F.pad(B[:, kept], (0, added)))
        if optimizer is None:
            return kept
        for old, new, dim in ((A, self.lora_A, 0), (B, self.lora_B, 1)):
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            state = optimizer.state[new] = optimizer.state.pop(old)
            for name in ("exp_avg", "exp_avg_sq"):
                carried = state[name].index_select(dim, kept)
                fresh = carried.mean(dim, keepdim=True).repeat_interleave(added, dim)
                state[name] = torch.cat([carried, fresh if name == "exp_avg_sq" else torch.zeros_like(fresh)], dim)
        return kept


PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TABLE = (-1, len(PROJECTIONS))  # the shape that makes [L, 7] of a list of all adapters [L · 7]


def inject_adapters(llm, rank, scale, dropout=0.05):
    """Put a HybridLoRALinear in place of all seven linears of every transformer layer."""
    for layer in llm.model.layers:
        for name in PROJECTIONS:
            layer.set_submodule(name, HybridLoRALinear(layer.get_submodule(name), rank, 0, scale, dropout))


def adapters(model):
    """{module name in the LLM: HybridLoRALinear}, layer by layer in the order of PROJECTIONS."""
    return {name: module for name, module in model.llm.named_modules() if isinstance(module, HybridLoRALinear)}


@torch.no_grad()
def align(model, batches):
    """Start every adapter's rows of A along the principal directions of its input (EVA, arXiv 2410.07170).

    B learns what the rows of A read of the input: these read most of it, and learn faster than random ones.
    batches: of one sample each, the same on all processes.
    """
    seen = {adapter: [] for adapter in adapters(model).values()}

    def watch(adapter, args):
        x = args[0].flatten(0, -2)  # [T, in]; of each sample 32 places are enough
        seen[adapter].append(x[torch.linspace(0, len(x) - 1, 32).long()].float())

    hooks = [adapter.register_forward_pre_hook(watch) for adapter in seen]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for adapter, inputs in seen.items():
        x = torch.cat(inputs)
        x = x[x.isfinite().all(1)]
        if not len(x):  # the rows stay as they are; training will say what is wrong
            continue
        with torch.autocast(x.device.type, enabled=False):  # its products are to be exact, too
            # 20 rounds: where directions are nearly as strong as each other, the usual two leave them mixed
            _, _, directions = torch.pca_lowrank(x, min(2 * adapter.rank, *x.shape), niter=20)
            rows = directions.T[: adapter.rank]
            adapter.lora_A[: len(rows)] = rows


def freeze(model, stage, method):
    """Leave trainable what the stage trains: the projector, and in stage 2 the adapters or (method "full") the LLM."""
    parts = ("projector.", "llm." if stage == 2 and method == "full" else ".lora_")
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in parts))


# ------------------------------------------------------------------------------------------
# the whole model


class HydraVLM(nn.Module):
    """CLIP, projector and LLM as one model over token ids and pictures.

    origin says where the frozen parts came from, stage which stage the projector has been through (0: it is new).
    """

    def __init__(self, clip, projector, llm, origin=None, stage=0):
        super().__init__()
        self.clip = clip
        self.projector = projector
        self.llm = llm
        self.origin = origin
        self.stage = stage
        vision = clip.clip.config
        self.image_size = vision.image_size
        self.patches = (vision.image_size // vision.patch_size) ** 2
        nothing = next(projector.parameters()).new_zeros(1, self.patches, vision.hidden_size)
        self.image_tokens = projector(nothing).shape[1]  # what one image takes in the LLM's context
        self.context_length = llm.config.max_position_embeddings

    def splice(self, input_ids, attention_mask, pixel_values, labels=None, padding_side="right"):
        """Put the image's tokens in the place of IMAGE_TOKEN.

        input_ids [B, T] with IMAGE_TOKEN once per image, pixel_values [N, 3, H, W] in reading order. Returns
        embeddings [B, T', D], mask [B, T'] and labels [B, T'] or None, padded on the right, on the left for generation.
        Ids, mask and labels stay on the CPU, where to count them waits for no GPU.
        """
        device = self.llm.device
        is_image = input_ids == IMAGE_TOKEN
        images = 0 if pixel_values is None else len(pixel_values)
        if is_image.sum() != images:
            raise ValueError(f"{int(is_image.sum())} image placeholders for {images} images")
        # places that each id takes [B, T]: text 1, an image 144, padding 0
        places = torch.where(is_image, self.image_tokens, 1)
        places = places if attention_mask is None else places * attention_mask

        def expand(values, padding):  # [B, T] -> [B, T']
            rows = [row.repeat_interleave(counts) for row, counts in zip(values, places)]
            return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=padding_side)

        mask = expand(torch.ones_like(input_ids), 0)
        ids = expand(input_ids, 0)  # IMAGE_TOKEN gets some embedding, which the image's replace below
        embeddings = self.llm.get_input_embeddings()(ids.clamp(min=0).to(device, non_blocking=True))  # [B, T', D]
        if images:
            features = self.clip(pixel_values.to(device, non_blocking=True))
        else:  # DDP waits for every gradient: a batch without an image gives the projector a zero one
            features = torch.zeros(1, self.patches, self.clip.clip.config.hidden_size, device=device)
        tokens = self.projector(features.to(next(self.projector.parameters()).dtype))[:images]  # [N, 144, D]
        tokens = tokens.flatten(0, 1).to(embeddings.dtype)
        embeddings = embeddings.index_put(torch.where(ids == IMAGE_TOKEN), tokens)
        return embeddings, mask, None if labels is None else expand(labels, IGNORE)

    @torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())  # products on a GPU are in bf16
    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None):
        """With labels (loss_sum, target_count), else the logits [B, T', vocabulary].

        The loss is a sum, and taken from the hidden states at target positions alone: how a global batch is split then
        does not matter, and no [B, T', vocabulary] tensor is made.
        """
        embeddings, _, labels = self.splice(input_ids, attention_mask, pixel_values, labels)
        # right-padded and causal: no token that counts sees the padding, so attention needs no mask
        hidden = self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state  # [B, T', D]
        head = self.llm.lm_head
        if labels is None:
            return head(hidden)
        rows, columns = torch.where(labels[:, 1:] != IGNORE)  # a hidden state predicts the next token
        targets = labels[rows, columns + 1].to(hidden.device)  # [targets]
        hidden = hidden[rows.to(hidden.device), columns.to(hidden.device)]  # [targets, D]
        # in pieces of 1,024 targets: [targets, vocabulary] is never whole
        if torch.is_grad_enabled():  # with each piece's gradient; bf16 rounds the sum, not the gradients
            pieces = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
            hidden = hidden.to(head.weight.dtype)
            loss = F.linear_cross_entropy(hidden, head.weight, targets, reduction="sum", options=pieces).float()
        else:
            pieces = zip(hidden.split(1024), targets.split(1024))
            loss = sum(F.cross_entropy(head(h).float(), t, reduction="sum") for h, t in pieces)
        return loss, torch.tensor(len(targets))

    @torch.no_grad()
    @torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available())
    def generate(self, input_ids, attention_mask=None, pixel_values=None, max_new_tokens=64, **options):
        """New token ids [B, n], greedy unless options (transformers' generate) say otherwise.

        A row ends where the context does: what would lie beyond it is padding.
        """
        was_training = self.training
        self.eval()
        embeddings, mask, _ = self.splice(input_ids, attention_mask, pixel_values, padding_side="left")
        room = self.context_length - mask.sum(1, keepdim=True)  # [B, 1]
        options = {"do_sample": False, "max_new_tokens": max(1, min(max_new_tokens, int(room.max()))), **options}
        ids = self.llm.generate(inputs_embeds=embeddings, attention_mask=mask.to(embeddings.device), **options)
        self.train(was_training)
        beyond = torch.arange(ids.shape[1])[None] >= room
        return ids.masked_fill(beyond.to(ids.device), self.llm.generation_config.pad_token_id)


# ------------------------------------------------------------------------------------------
# the rank method: signal, coarse and fine, budget, performance model, event


def worths(adapter, optimizer):
    """What components of an adapter's update B A are worth: squared singular values [r] of Γ^½ B A Σ^½, falling.

    x is the adapter's input, g its output's gradient, Σ the mean of x xᵀ, Γ that of g gᵀ. Without the update the
    loss rises, to second order, by half the mean of (gᵀ B A x)²: with x and g independent, by half the sum of these
    squares (K-FAC, arXiv 1503.05671). What all adapters share (½, batch, clipping) the price takes up.

    Adam has their diagonals, taken for the whole. With a = |A Σ^½| and b = |Γ^½ B| the mean square of A[j, i]'s
    gradient, (Bᵀg)[j] · x[i], sums over components j to b² Σ[i, i], that of B[i, j]'s to a² Γ[i, i] (with the
    adapter's scale); a and b are divided out at the end. Of tall matrices the QR's triangle is enough.
    """
    of_inputs = optimizer.state[adapter.lora_A]["exp_avg_sq"].double().sum(0)  # [in]: b² Σ
    of_outputs = optimizer.state[adapter.lora_B]["exp_avg_sq"].double().sum(1)  # [out]: a² Γ
    right = torch.linalg.qr((adapter.lora_A * of_inputs.sqrt()).T).R  # [r, r]: of b Σ^½ Aᵀ, of norm a · b
    left = torch.linalg.qr(adapter.lora_B * of_outputs.sqrt()[:, None]).R  # [r, r]: of a Γ^½ B, of norm a · b
    squares = torch.linalg.svdvals(left @ right.T).square()
    bias_correction = 1 - optimizer.defaults["betas"][1] ** optimizer.state[adapter.lora_B]["step"]
    return (squares / (bias_correction * left.norm() * right.norm()).clamp(min=1e-150) + 1e-30).cpu().numpy()


def lasting(now, then):
    """The share of deviations that the event before had, too: their covariance / the variance now, 0 to 1."""
    return float(np.clip((now * then).sum() / max((now**2).sum(), 1e-12), 0, 1))


def fill(worth, costs, budget):
    """Ranks [M]: 1 each, then what is of most worth per cost, until the budget is spent. worth [M, K] falls along K."""
    ranks = np.ones(len(costs), int)
    left = budget - costs.sum()
    value = worth[:, 1:] / costs[:, None]
    for place in np.argsort(-value, axis=None, kind="stable"):
        i = place // value.shape[1]
        if value.flat[place] > 0 and costs[i] <= left:
            ranks[i] += 1
            left -= costs[i]
    return ranks


class RankController:
    """Moves the ranks of a model's adapters at a few events of stage 2, within the budget.

    At an event `worths` weighs the components that are there; component k > r is promised w_r · r(r + 1) / k(k + 1),
    w_r being the worth of the adapter's last. `shrink` splits log(w_r / cost) into mean, layers' part (coarse) and that
    inside a layer (fine), and keeps of each the share that the event before had, too: at first 0, so nothing moves.
    `fill`: the budget goes to what is of most worth per cost. Where all ranks are 2, an adapter whose last is worth 4
    times the others' gets a third, worth 4 · 6/12 = 2 of theirs, and a fourth, 4 · 6/20 = 1.2; two lose their last.
    by_strength says which components go: the n weakest are taken to be worth the n smallest.

    `decide`: a performance model has to consent. Its price, loss per worth, is fitted to what the probe loss rises by
    while components are masked; its trust is what moves brought of what they promised. The history is all that is kept.
    method "hydra"; to compare, without consent: "dynamic", and at two events "coarse", "coarse+fine" and "random".
    """

    EVENTS = (0.05, 0.1, 0.2, 0.3, 0.4)  # shares of the steps

    def __init__(self, model, rank, total_steps, seed=0, method="hydra"):
        self.modules = list(adapters(model).values())
        self.costs = np.array([sum(module.base.weight.shape) for module in self.modules])  # of one component [L · 7]
        self.budget = rank * int(self.costs.sum())
        self.seed = seed
        self.method = method
        events = self.EVENTS if method in ("hydra", "dynamic") else self.EVENTS[1:3]
        self.event_steps = [max(i, round(at * total_steps)) for i, at in enumerate(events, 1)]  # a step for each
        self.history = [{"step": 0, "choice": "start", "ranks": self.ranks().reshape(TABLE).tolist()}]

    def ranks(self):
        return np.array([module.rank for module in self.modules])  # [L · 7]

    @torch.no_grad()
    def event(self, step, measure, optimizer):
        """A rank event's log entry. measure() is the probe records' loss, equal on all processes; optimizer an Adam."""
        before = ranks = self.ranks()
        previous = self.history[-1]
        entry = {"step": step, "choice": "stay", "probe_loss": measure(), "ranks_before": previous["ranks"]}
        self.history.append(entry)  # below, `fit` and `rise_without` read it there
        if math.isfinite(entry["probe_loss"]) and optimizer.state:  # none while every step was skipped
            spectra = [worths(module, optimizer) for module in self.modules]
            if dist.is_initialized():  # all decide on the first process's
                dist.broadcast_object_list(spectra)
            ranks = self.decide(before, spectra, measure, entry, previous)
        if entry["choice"] == "move":
            coarse = ranks.reshape(TABLE).mean(1).round().astype(int).repeat(len(PROJECTIONS))
            for module, coarse_rank, rank in zip(self.modules, coarse.tolist(), ranks.tolist()):
                module.resize(coarse_rank, rank - coarse_rank, optimizer)
        entry |= {"ranks": ranks.reshape(TABLE).tolist(), "parameters": int(self.costs @ ranks), "budget": self.budget}
        return entry

    def decide(self, before, spectra, measure, entry, previous):
        """Ranks [L · 7] from worths [L · 7][r]; what they rest on goes into the entry. previous: the last event's."""
        trust = self.trust(measure, entry, previous)
        last = np.array([spectrum[-1] for spectrum in spectra])
        log_last = np.log(last / self.costs)
        correction = np.exp(self.shrink(log_last, entry, previous) - log_last)  # one factor per adapter [L · 7]

        # the plan: the budget goes to the components of most worth, of an adapter up to twice as many as there are
        limit = np.minimum(2 * before, [min(module.base.weight.shape) for module in self.modules])
        k = np.arange(1, limit.max() + 1)
        there = k <= before[:, None]  # [L · 7, K]
        raw = np.outer(last * before * (before + 1), 1 / (k * (k + 1)))  # extrapolated from the last
        raw[there] = np.concatenate(spectra)
        believed = correction[:, None] * raw
        offered = np.where(there, believed, trust * believed) * (k <= limit[:, None])
        ranks = fill(offered, self.costs, self.budget)
        if (ranks == before).all():
            return before

        # the prediction: price · worth of what comes, less what the loss rises by while what goes is masked
        dropped = there & (k > ranks[:, None])
        added = ~there & (k <= ranks[:, None])
        stand_in = (k == before[:, None]) & (before < ranks)[:, None]  # masked, for the price, in place of what comes
        entry["maskings"] = [
            {"worth": float(raw[part].sum()), "components": int(part.sum()),
             "rise": self.rise_without(part.sum(1).tolist(), measure)} for part in (dropped, stand_in)
        ]  # fmt: skip
        log_price, error = self.fit("worth")
        _, blind = self.fit("components")
        promised = math.exp(log_price) * float(believed[added].sum())
        gain = trust * promised - max(0.0, entry["maskings"][0]["rise"])  # that masking helps is chance

        # the consent; left_then: the next event's probe loss if it falls on at the pace since the event before
        step = entry["step"]
        fall = previous.get("probe_loss", math.nan) - entry["probe_loss"]
        next_event = next((at for at in self.event_steps if at > step), 2 * step - previous["step"])
        left_then = entry["probe_loss"] - fall * (next_event - step) / (step - previous["step"])
        is_first = not any("judged" in event for event in self.history)
        left_to_gone = (self.event_steps[-1] - step) / step  # 3 at 10 %, 0 at the last event: no first move there
        entry["vetoes"] = {  # with "not", so that what is no number is a veto, too
            "worths tell no more than a count of components": not error < blind,
            "no gain, or more than the loss left at the next event": not 0 < gain < left_then,
            "too little gain for a first move as late as this": is_first and not gain * left_to_gone > max(fall, 0.0),
        }
        entry |= {"predicted_gain": gain, "error": error, "error_without_signals": blind, "choice": "abstain"}
        if self.method == "hydra" and any(entry["vetoes"].values()):
            return before
        entry |= {"choice": "move", "added": added.sum(1).tolist(), "promised": promised}
        return ranks

    def trust(self, measure, entry, previous):
        """Brought / promised of all moves, 0 to 1. Brought: the rise now while as many as were added are masked."""
        if "added" in previous:
            entry["judged"] = [previous["promised"], self.rise_without(previous["added"], measure)]
        judged = [event["judged"] for event in self.history if "judged" in event]
        promised, brought = np.sum(judged or [[1, 1]], axis=0)
        return float(np.clip(brought / max(promised, 1e-12), 0, 1))

    def shrink(self, log_worth, entry, previous):
        """Log worths [L · 7] whose deviations, coarse (of layers) and fine (in a layer), are shrunk to what lasts."""
        layer = log_worth.reshape(TABLE).mean(1, keepdims=True)
        coarse, fine = weaken(self.method, layer - layer.mean(), log_worth.reshape(TABLE) - layer, self.seed)
        shares = [lasting(coarse, previous.get("coarse", 0)), lasting(fine, previous.get("fine", 0))]
        spread = [float(coarse.std()), float(fine.std())]
        entry |= {"coarse": coarse.tolist(), "fine": fine.tolist(), "spread": spread, "lasting": shares}
        return log_worth.mean() + (shares[0] * coarse + shares[1] * fine).flatten()

    def fit(self, column):
        """Fit rise = price · column ("worth" or "components"): (log price, leave-one-out RMS error in logs)."""
        maskings = [masking for event in self.history for masking in event.get("maskings", ()) if masking["components"]]
        x, rise = np.array([(masking[column], masking["rise"]) for masking in maskings]).T
        floor = 1e-3 * abs(rise).max() + 1e-12  # by chance a rise may be below 0, and have no logarithm
        log_price = np.log(np.maximum(rise, floor) / x)
        left_out = (log_price - log_price.mean()) * len(x) / max(len(x) - 1, 1)  # distance from the others' mean
        return float(log_price.mean()), float(np.sqrt((left_out**2).mean()))

    def rise_without(self, counts, measure):
        """What the probe loss rises by while so many of each adapter's components are masked, those to drop first."""
        masked = [(module, n, module.lora_B.clone()) for module, n in zip(self.modules, counts) if n]
        for module, n, _ in masked:
            module.lora_B[:, module.by_strength()[-n:]] = 0
        rise = measure() - self.history[-1]["probe_loss"]
        for module, _, B in masked:
            module.lora_B.copy_(B)
        return rise


# ------------------------------------------------------------------------------------------
# From here on: skip on a first reading. Dropout, a second projector, methods to compare, checkpoints, export, commands.
# ------------------------------------------------------------------------------------------


def drop(x, share):
    """F.dropout; on a CPU, where its draws take longer than a product with A, from whole numbers of 15 bits."""
    if x.is_cuda:
        return F.dropout(x, share)
    drawn = torch.empty_like(x, dtype=torch.int16).random_()  # 0 to 2¹⁵ - 1
    return x.masked_fill(drawn < int(share * 2**15), 0).div_(1 - share)


class LDPNetV2(nn.Module):
    """MobileVLM V2's projector: [B, P, C] -> [B, 144, D], by pooling and a positional convolution."""

    kind = "ldpnetv2"

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
    """A new projector; its module names are upstream's, so that mm_projector.bin loads strictly."""
    kinds = {projector.kind: projector for projector in (LDPNet, LDPNetV2)}
    if kind not in kinds:
        raise Mistake(f"unknown projector {kind!r}; choose from {', '.join(kinds)}, or give a file")
    return kinds[kind](clip_width, llm_width)


def weaken(method, coarse, fine, seed):
    """The deviations that a method to compare with goes by: "coarse" (the layers' part alone), "random" (drawn)."""
    if method == "random":
        return 0 * coarse, np.random.default_rng(seed).normal(size=fine.shape)
    return coarse, 0 * fine if method == "coarse" else fine


# ------------------------------------------------------------------------------------------
# pretrained parts

CLIP = "openai/clip-vit-large-patch14-336"  # MobileVLM's
TEXT_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")  # of a whole CLIP
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# of a MobileVLM's config: what changes the result, as MobileVLM was trained; what is read elsewhere, or not needed
MOBILEVLM = {
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "use_mm_proj": True, "vision_tower_type": "clip",
}  # fmt: skip
PIXELS = {  # of a CLIP's preprocessing, beside its sizes
    "image_mean": list(data.CLIP_MEAN), "image_std": list(data.CLIP_STD), "resample": 3, "rescale_factor": 1 / 255,
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
}  # fmt: skip
READ_ELSEWHERE = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size", "mm_projector_lr")


def open_folder(name):
    """(folder, its config.json) of a folder, a run (its newest checkpoint) or a hub id, which is downloaded."""
    folder = find_checkpoint(name)
    if folder is None and Path(name).is_dir():
        raise Mistake(f"{name}: no config.json; give a folder with a model or a checkpoint, or a hub id")
    if folder is None:
        with reading(name, "neither a folder nor reachable on the hub: download it, or give a folder"):
            for weights in ("*.safetensors", "*.bin"):  # the second only where there is none of the first
                folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "tokenizer.model", weights]))
                if any(folder.glob(weights)):
                    break
    with reading(folder / "config.json"):
        config = dict(json.loads((folder / "config.json").read_bytes()))
    if config.get("quantization_config"):
        raise Mistake(f"{folder}: its weights are quantized, which is not supported; give those of full precision")
    if config.get("format") == "hydra":
        kinds = {"stage": int, "model": str, "vision_tower": str, "projector": str, "ranks": dict, "run": dict}
        kinds |= {"scale": float, "dropout": float} if config.get("ranks") else {}
        for key, kind in kinds.items():
            if not isinstance(config.get(key), kind):
                raise Mistake(f"{folder / 'config.json'}: {key} is missing or damaged; use another checkpoint")
    return folder, config


def require(file, config, wanted):
    """Mistake that names a setting which would change the result, and is there but not what we do."""
    for key in wanted:
        if config.get(key, wanted[key]) != wanted[key]:
            raise Mistake(f"{file}: {key} is {config[key]!r}, and only {wanted[key]!r} is supported")


def read_weights(path):
    """{name: tensor} of a .safetensors or .bin file, or of those in a folder; mapped, not yet in memory."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("model[.-]*safetensors")) or sorted(path.glob("pytorch_model[.-]*bin"))
    if not files:
        raise Mistake(f"{path}: holds neither model.safetensors nor pytorch_model.bin, nor parts of either")
    weights = {}
    for file in files:
        with reading(file):
            if file.suffix == ".safetensors":
                read = load_file(file)
            else:  # files of the old format, which are no zip files, cannot be mapped
                read = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
            read = {key: tensor for key, tensor in read.get("state_dict", read).items() if torch.is_tensor(tensor)}
        if any(tensor.element_size() < 2 for tensor in read.values()):
            raise Mistake(f"{file}: holds weights of 8 bits, which is not supported; give those of full precision")
        if twice := weights.keys() & read.keys():
            raise Mistake(f"{file}: has {min(twice)}, which another file there has, too: remove the older files")
        weights |= read
    return weights


def check_fit(own, there, source):
    """Mistake that names a tensor unless two {name: tensor} are of the same names and shapes."""
    for key in own | there:
        expected, found = (list(tensors[key].shape) if key in tensors else "absent" for tensors in (own, there))
        if found != expected:
            raise Mistake(f"{source}: does not fit: {key} is {found} in it, {expected} here")


def build(loader, config, weights, dtype, source):
    """A transformers model that holds these weights {name: tensor}, all of them and no others."""
    with reading(source):
        config = loader.config_class.from_dict(config)
        model, found = loader.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    for problem in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, found[f"{problem}_keys"])):
            raise Mistake(f"{source}: does not fit its config.json: {names[0]} is {problem} ({len(names)} are)")
    return model


def load_clip(name, dtype=torch.float32, weights=None):
    """CLIPEncoder from a folder or hub id; with weights {name: tensor} the folder gives the config alone."""
    folder, config = open_folder(name)
    vision = config.get("vision_config", config)
    require(folder / "config.json", vision, {"num_channels": 3})
    wanted = PIXELS | dict.fromkeys(("size", "crop_size"), vision.get("image_size", 224))
    for file in filter(Path.is_file, (folder / "preprocessor_config.json", folder / "processor_config.json")):
        with reading(file):
            steps = dict(json.loads(file.read_bytes()))
            steps = dict(steps.get("image_processor", steps))
            for key in ("size", "crop_size"):  # a number, or {"shortest_edge": number}, or height and width
                if isinstance(steps.get(key), dict) and len(set(steps[key].values())) == 1:
                    steps[key] = max(steps[key].values())
        require(file, steps, wanted)
    weights = weights or read_weights(folder)
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith(TEXT_HALF)}
    return CLIPEncoder(build(CLIPVisionModel, vision, weights, dtype, name))


def load_llm(name, dtype=torch.float32, weights=None):
    """(LlamaForCausalLM, tokenizer) from a folder or hub id, as MobileLLaMA is published; weights as in load_clip."""
    folder, config = open_folder(name)
    tokenizer = data.load_tokenizer(folder)
    # upstream always runs a MobileVLM in fp16, its tables of sines and cosines included: 4e-4 in the logits
    rotary = config.get("rotary_dtype", "float16") if config["model_type"] == "mobilevlm" else "float32"
    config = config | {"model_type": "llama", "rotary_dtype": rotary}
    llm = build(LlamaForCausalLM, config, weights or read_weights(folder), dtype, name)
    if (kind := llm.config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
        raise Mistake(f"{name}: rope_type {kind} depends on the batch's longest row, which is not supported")
    if rotary == "float16":
        llm.model.rotary_emb.register_forward_hook(lambda _, args, out: tuple(t.half().to(t.dtype) for t in out))
    largest = max(tokenizer.get_vocab().values())
    if largest >= llm.config.vocab_size:
        raise Mistake(f"{name}: a tokenizer with id {largest} for a model of {llm.config.vocab_size}; copy its own")
    # training takes these from the tokenizer: so do generation and what is exported, whatever other files say
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    llm.config.update(ids)
    llm.generation_config = GenerationConfig(**ids)
    return llm, tokenizer


def load_checkpoint(name_or_dir, vision_tower=None, projector=None, dtype=torch.float32):
    """(model in eval mode, tokenizer) from a folder or hub id; its config.json says which kind it is:

    a LLaMA            with CLIP from vision_tower (default: MobileVLM's) and a new projector
    a MobileVLM        with its own projector, and its own CLIP where the file holds one; a CLIP's config, and
                       else its weights, come from vision_tower (default: the one that the config names)
    one of train.py's  on the backbones that it names

    projector is a kind, for a new one, or upstream's mm_projector.bin. dtype is that of CLIP and the LLM; projector and
    adapters, which train, are fp32. Mistake names what is missing, left over, of another shape, or set to what is not
    supported.
    """
    folder, config = open_folder(name_or_dir)
    file = folder / "config.json"
    kind = config.get("format") or config.get("model_type")
    if kind == "hydra":
        if projector:
            raise Mistake(f"{folder}: has its own projector; do not give another")
        parts = {"model": config["model"], "vision_tower": vision_tower or config["vision_tower"]}
        for key, path in parts.items():
            if Path(path).is_absolute() and not Path(path).is_dir():
                raise Mistake(f"{file}: its {key} is not at {path}; write in where it is now, or give --vision_tower")
        model, tokenizer = load_checkpoint(*parts.values(), config["projector"], dtype)
        restore(model, folder)
        return model.eval(), tokenizer
    if kind == "mobilevlm":
        unknown = {key: None for key in config if key.startswith(("mm_", "image_")) and key not in READ_ELSEWHERE}
        require(file, {"image_aspect_ratio": None} | config, unknown | MOBILEVLM)
    elif kind != "llama":
        raise Mistake(f"{name_or_dir}: is neither a LLaMA, a MobileVLM nor a checkpoint of train.py, but {kind!r}")
    tower, state, weights = {}, {}, {}
    for key, tensor in read_weights(folder).items():
        part = tower if key.startswith("model.vision_tower.") else state if ".mm_projector." in key else weights
        part[key.removeprefix("model.vision_tower.vision_tower.").removeprefix("model.mm_projector.")] = tensor
    if vision_tower is None:
        vision_tower = config.get("mm_vision_tower") or CLIP
        beside = folder.resolve().parent / vision_tower  # in upstream's configs a path, at times relative
        vision_tower = beside if beside.is_dir() else vision_tower
    llm, tokenizer = load_llm(folder, dtype, weights)  # not the name: the hub is asked once
    clip = load_clip(vision_tower, dtype, tower)
    is_file = projector and Path(projector).is_file()
    is_trained = is_file or kind == "mobilevlm" and not projector
    if is_file:
        state = {key.split("mm_projector.")[-1]: tensor for key, tensor in read_weights(Path(projector)).items()}
    own = "ldpnetv2" if "peg.peg.0.weight" in state else "ldpnet"
    new = build_projector(own if is_trained else projector or own, clip.clip.config.hidden_size, llm.config.hidden_size)
    if is_trained:
        check_fit(new.state_dict(), state, projector or name_or_dir)
        new.load_state_dict(state)
    if is_trained and not is_file:
        require(file, config, {"mm_projector_type": own})
    origin = {"model": name_or_dir, "vision_tower": vision_tower}
    # a checkpoint names its backbones; a folder's name must mean the same from everywhere
    origin = {key: str(Path(name).resolve() if Path(name).is_dir() else name) for key, name in origin.items()}
    model = HydraVLM(clip, new, llm, origin | {"fingerprint": fingerprint(clip, llm)}, int(is_trained))
    if model.context_length <= model.image_tokens:
        sizes = f"a context of {model.context_length}, and an image takes {model.image_tokens}"
        raise Mistake(f"{file}: {sizes}; take a model of a longer context")
    return model.eval(), tokenizer


# ------------------------------------------------------------------------------------------
# checkpoints: a readable config.json, and model.safetensors with the trained tensors: all that training changes


def write_model(folder, model, description):
    """Both files, into a folder that is there."""
    modules = adapters(model)
    first = next(iter(modules.values()), None)
    config = {
        "format": "hydra", **description, **model.origin, "projector": model.projector.kind,
        "scale": first and first.scale, "dropout": first and first.dropout,
        "ranks": {name: [module.coarse_rank, module.fine_rank] for name, module in modules.items()},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    (folder / "model.safetensors").write_bytes(save(trained))  # save_file ignores the umask


def list_checkpoints(run):
    """The checkpoints in a run's folder, the newest last."""
    steps = [path for path in Path(run).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(steps, key=lambda path: int(path.name[11:]))


def find_checkpoint(folder):
    """The newest checkpoint of a run's folder, or the folder itself when it is a checkpoint; else None."""
    return Path(folder) if Path(folder, "config.json").is_file() else (list_checkpoints(folder) or [None])[-1]


def read_config(folder):
    """config.json of one of our checkpoints, or of a run's newest."""
    folder, config = open_folder(folder)
    if config.get("format") != "hydra":
        raise Mistake(f"{folder}: is not a checkpoint of train.py; give a folder that it wrote")
    return config


def fingerprint(*parts):
    """A number that tells weights apart, equal whether they are read in fp32 or bf16: of some of each parameter."""
    some = [p.detach().flatten()[:1024].bfloat16() for part in parts for p in part.parameters()]
    return zlib.crc32(torch.cat(some).view(torch.uint8).numpy())


def restore(model, folder):
    """Load a checkpoint's trained tensors, with its ranks, into a model of the same backbones."""
    config = read_config(folder)
    fits = f"use the model it names, {config['model']}"
    # fp16 rounds before bf16 does: then it cannot be told
    if model.llm.dtype != torch.float16 and config.get("fingerprint") != model.origin["fingerprint"]:
        raise Mistake(f"{folder}: was trained on another LLM or CLIP than {model.origin['model']}; {fits}")
    if config["ranks"] and not adapters(model):
        inject_adapters(model.llm, 1, config["scale"], config["dropout"])
    for name, module in adapters(model).items():
        with reading(f"{folder}: config.json's rank of {name}"):
            module.resize(*config["ranks"].get(name, (1, 0)))
    model.stage = config["stage"]
    freeze(model, model.stage, config.get("method"))
    weights = read_weights(find_checkpoint(folder) / "model.safetensors")
    check_fit({name: p for name, p in model.named_parameters() if p.requires_grad}, weights, f"{folder} ({fits})")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise Mistake(f"{folder}: its weights are not all finite; train again, with a lower --learning_rate")
    model.load_state_dict(weights, strict=False)


# ------------------------------------------------------------------------------------------
# commands


def check_trained(model, name):
    """Mistake if the projector is new: its answers would mean nothing."""
    if not model.stage:
        raise Mistake(f"{name}: has no trained projector; give a run of train.py, or a MobileVLM")


def export(checkpoint, format, to, dtype="float32", padded=False, force=False, vision_tower=None):
    """Write a checkpoint in the layout of another tool: whole or not at all. force replaces what an export wrote."""
    to = Path(to)
    if padded and format != "peft":
        raise Mistake("--padded: is for --format peft alone")
    if to.exists() and not force:
        raise Mistake(f"{to}: exists; name another folder, or add --force to replace an export in it")
    if to.exists():
        with reading(f"{to}: is no export of ours, name another folder; its export.json"):
            ours = json.loads((to / "export.json").read_bytes())["files"]
        if others := sorted({path.name for path in to.iterdir()} - {*ours}):
            raise Mistake(f"{to}: holds {others[0]}, which no export wrote; name another folder")
    model, tokenizer = load_checkpoint(checkpoint, vision_tower)  # in fp32: merged exactly, cast once
    check_trained(model, checkpoint)
    modules = adapters(model)
    if format == "peft" and not modules:
        raise Mistake(f"{checkpoint}: has no adapters; give a run of stage 2 with some, or --format hf or mobilevlm")
    if format != "peft":
        for name, module in modules.items():
            module.base.weight.data += module.delta()
            model.llm.set_submodule(name, module.base)
    model.to(getattr(torch, dtype))

    with whole(to) as folder:
        if format == "peft":
            note = write_peft(folder, modules, model.origin["model"], padded)
        else:
            note = write_merged(folder, model, tokenizer, format, dtype)
        if format != "mobilevlm":
            write_bin(model.projector.state_dict(prefix="model.mm_projector."), folder / "mm_projector.bin")
        files = sorted([path.name for path in folder.iterdir()] + ["export.json"])
        (folder / "export.json").write_text(json.dumps({"checkpoint": str(checkpoint), "files": files}))
    print(f"wrote {to}: {note}")


def write_bin(state, file):
    """torch.save; on a full disk its RuntimeError hides the file's own, which is raised here."""
    try:
        with open(file, "wb") as output:
            torch.save(state, output)
    except RuntimeError as error:
        raise error.__context__ or error


def write_merged(folder, model, tokenizer, format, dtype):
    """The LLM, whose adapters are merged, for "mobilevlm" with projector and CLIP; what it is, in words."""
    source, config = open_folder(model.origin["model"])
    ids = {key: getattr(model.llm.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config |= ids | {"torch_dtype": dtype, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config.pop("dtype", None)
    if config.get("rope_parameters"):  # as transformers 4 names them
        rope = model.llm.config.rope_parameters
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope if rope["rope_type"] != "default" else None}
    state = model.llm.state_dict()
    if format == "mobilevlm":
        state |= model.projector.state_dict(prefix="model.mm_projector.")
        state |= model.clip.clip.state_dict(prefix="model.vision_tower.vision_tower.vision_model.")
        tower = Path(model.origin["vision_tower"])
        config |= MOBILEVLM | {
            "model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"],
            "mm_projector_type": model.projector.kind, "mm_hidden_size": model.clip.clip.config.hidden_size,
            # a folder as seen from the export's parent, so that the two can be moved together
            "mm_vision_tower": os.path.relpath(tower, folder.resolve().parent) if tower.is_dir() else str(tower),
            "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
            "rotary_dtype": model.llm.config.rotary_dtype,  # for load_llm alone
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_bin(state, folder / "pytorch_model.bin")
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True} | tokenizer.special_tokens_map
    for file in filter(Path.is_file, map(source.joinpath, TOKENIZER)):  # as they are, for an older transformers, too
        (folder / file.name).write_bytes(file.read_bytes())
        settings = json.loads(file.read_bytes()) if file.name == "tokenizer_config.json" else settings
    if (folder / "tokenizer.model").is_file():  # beside which transformers 5 gives no BOS unless it is told to
        settings["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return f"LLM, projector and tokenizer in {dtype}"


def write_peft(folder, modules, base, padded):
    """PEFT's two files and a README, whose first line is returned.

    padded: zeros bring every adapter to the largest rank, for tools that know one rank and one alpha.
    """
    ranks = {name: module.rank for name, module in modules.items()}
    largest = max(ranks.values())
    scale = next(iter(modules.values())).scale
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": largest, "lora_alpha": largest * scale, "lora_dropout": 0.0, "bias": "none", "target_modules": list(ranks),
    }  # fmt: skip
    if not padded:
        config |= {"rank_pattern": ranks, "alpha_pattern": {name: rank * scale for name, rank in ranks.items()}}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    state = {}
    for name, module in modules.items():
        missing = (largest - module.rank) * padded
        state[f"base_model.model.{name}.lora_A.weight"] = F.pad(module.lora_A.detach(), (0, 0, 0, missing))
        state[f"base_model.model.{name}.lora_B.weight"] = F.pad(module.lora_B.detach(), (0, missing))
    (folder / "adapter_model.safetensors").write_bytes(save(state, {"format": "pt"}))
    note = f"LoRA adapters for {base}; the largest rank is {largest} (servers ask for it: vLLM's --max-lora-rank)"
    readers = "PEFT, vLLM and llama.cpp" if padded else "PEFT from 0.6 on; for vLLM and llama.cpp export with --padded"
    load = f'peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained("{base}"), FOLDER)'
    (folder / "README.md").write_text(f"{note}\n\nFor {readers}.\n\n    {load}\n")
    return note


def chat(checkpoint, image, prompt=None, max_new_tokens=256, vision_tower=None):
    """Answer the prompt about an image; without one, what is asked on standard input, as one conversation."""
    if max_new_tokens < 1:
        raise Mistake(f"--max_new_tokens {max_new_tokens}: give a positive number")
    picture = data.open_image("/", image if "://" in image else os.path.abspath(image))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = load_checkpoint(checkpoint, vision_tower, dtype=dtype)
    check_trained(model, checkpoint)
    model.to(device)
    pixels = data.image_to_tensor(picture, model.image_size, "pad")[None]
    turns = []
    for text in [prompt] if prompt is not None else iter(sys.stdin.readline, ""):
        data.check_text(text, "--prompt")
        text = text.replace("<image>", "").strip()  # the one image comes first
        turns.append({"from": "human", "value": "<image>\n" * (not turns) + text})
        input_ids, _ = data.encode_conversation(turns, tokenizer, "v1")
        places = len(input_ids) - 1 + model.image_tokens
        if places >= model.context_length:
            sizes = f"{places} tokens of a context of {model.context_length}"
            raise Mistake(f"--prompt: the conversation takes {sizes}; ask less")
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        ids = model.generate(torch.tensor([input_ids]), None, pixels, max_new_tokens, streamer=streamer)
        said = tokenizer.decode(ids[0], skip_special_tokens=True).replace("<image>", "").strip()
        turns.append({"from": "gpt", "value": said})


def main():
    parser = argparse.ArgumentParser(description="HyDRA: ask a checkpoint about an image, or export it")
    commands = parser.add_subparsers(dest="run", required=True)
    ask = commands.add_parser("chat", help="print the model's answers as they are generated")
    ask.add_argument("--image", required=True, help="picture to ask about")
    ask.add_argument("--prompt", help="the question (default: questions are read from the terminal)")
    ask.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    write = commands.add_parser("export", help="write a checkpoint for other tools")
    write.add_argument("--format", required=True, choices=("peft", "mobilevlm", "hf"), help="adapters; all; merged LLM")
    write.add_argument("--to", required=True, help="folder to write")
    write.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the weights")
    write.add_argument("--padded", action="store_true", help="peft: zeros up to one rank, for vLLM and llama.cpp")
    write.add_argument("--force", action="store_true", help="replace what an export wrote to --to before")
    for command in (ask, write):
        command.add_argument("checkpoint", help="folder that train.py wrote; chat: or a MobileVLM, folder or hub id")
        command.add_argument("--vision_tower", help="CLIP, where it is not the one that the checkpoint names")
    options = vars(parser.parse_args())
    {"chat": chat, "export": export}[options.pop("run")](**options)


if __name__ == "__main__":
    data.one_line(main)

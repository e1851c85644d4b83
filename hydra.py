"""HyDRA: hierarchical and dynamic rank adaptation for mobile vision-language models.

    python hydra.py chat CHECKPOINT --image FILE --prompt TEXT
    python hydra.py export CHECKPOINT --format peft|mobilevlm|hf --to DIR

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
performance model, when events happen, and that rows of A start along their input's principal
directions.
"""

import argparse
import hashlib
import json
import math
import re
import shutil
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.utils import logging as hub_logging
from safetensors import safe_open
from safetensors.torch import save
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedConfig
from transformers.utils import is_protobuf_available, is_sentencepiece_available, logging

# what matters of loading and of a failed download is said here, in one line
logging.disable_progress_bar()
logging.set_verbosity_error()
hub_logging.set_verbosity_error()

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
        raise HydraError(f"unknown projector {kind!r}; choose from {', '.join(kinds)}, or give a file")
    projector = kinds[kind](clip_width, llm_width)
    projector.kind = kind
    return projector


# ---------------------------------------------------------------------------------------------
# the pretrained parts


CLIP = "openai/clip-vit-large-patch14-336"  # MobileVLM's
DERIVED = r"rotary_emb\.inv_freq$|position_ids$"  # in files of older versions; models compute them
TEXT_HALF = r"|^(text_model|text_projection|visual_projection|logit_scale)\b"  # of a whole CLIP


def reason(error):
    """The first line of what went wrong elsewhere."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def open_folder(name_or_dir):
    """(folder, its config.json) of a folder, a run (its newest checkpoint) or a hub id, which is downloaded."""
    folder = Path(name_or_dir)
    if folder.is_dir():
        folder = find_checkpoint(folder)
        if folder is None:
            raise HydraError(f"{name_or_dir}: no config.json; give a folder with a model or a checkpoint, or a hub id")
    else:
        try:
            for weights in ("*.safetensors", "*.bin"):  # the second only where there is none of the first
                folder = Path(snapshot_download(str(name_or_dir), allow_patterns=["*.json", "tokenizer.model", weights]))
                if any(folder.glob(weights)):
                    break
        except Exception:  # the hub raises many kinds
            message = "neither a folder nor reachable on the hub: download it, or give a folder"
            raise HydraError(f"{name_or_dir}: {message}") from None
    try:
        return folder, dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise HydraError(f"{folder / 'config.json'}: cannot be read ({error})") from None


def read_weights(path, dtype, ignored=DERIVED):
    """Yield (name, tensor in dtype) of a .safetensors or .bin file, or of a folder's, sharded or not.

    One tensor is read at a time and by itself: at no time are there two copies of more than one.
    """
    files = [path]
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        files = [file for file in files if file.is_file() or Path(f"{file}.index.json").is_file()][:1]
        if not files:
            raise HydraError(f"{path}: holds neither model.safetensors nor pytorch_model.bin, nor the index of either")
    file = Path(f"{files[0]}.index.json")
    try:
        if path.is_dir() and file.is_file():
            files = sorted({path / name for name in json.loads(file.read_text())["weight_map"].values()})
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    names = [name for name in opened.keys() if not re.search(ignored, name)]
                for name in names:
                    with safe_open(file, "pt") as opened:  # anew: what was read from it stays in memory until it is closed
                        yield name, opened.get_tensor(name).to(dtype, copy=True)
            else:
                with FakeTensorMode():  # reads no data, and notes where in the file it is
                    fakes = torch.load(file, map_location="cpu", weights_only=True)
                # the largest first, while there is room for its bytes beside it
                for name, fake in sorted(fakes.items(), key=lambda item: -item[1].nbytes):
                    if re.search(ignored, name):
                        continue
                    extent = 1 + sum((n - 1) * stride for n, stride in zip(fake.shape, fake.stride()))
                    start = fake.untyped_storage()._checkpoint_offset + fake.storage_offset() * fake.itemsize
                    data = torch.from_numpy(np.fromfile(file, np.uint8, extent * fake.itemsize, offset=start))
                    yield name, data.view(fake.dtype).as_strided(fake.shape, fake.stride()).to(dtype)
    except Exception as error:  # the unpickler and safetensors raise many kinds
        raise HydraError(f"{file}: cannot be read ({reason(error)}); download or write it again") from None


def check_fit(source, state, own):
    """HydraError that names the first tensor in which `state` differs from the model's `own` {name: tensor}."""
    for name in [*own, *state]:
        there, here = (list(tensors[name].shape) if name in tensors else "absent" for tensors in (state, own))
        if there != here:
            raise HydraError(f"{source}: does not fit the model: {name} is {there} in it, {here} in the model")


def build(loader, config, weights, source):
    """A transformers model that holds the tensors {name: tensor} themselves, all of them and no others."""
    try:
        config = loader.config_class.from_dict(config)
        with torch.device("meta"):
            own = loader(config).state_dict()
    except Exception as error:  # a config can be wrong in many ways
        raise HydraError(f"{source}: its config.json is not a {loader.__name__}'s ({reason(error)})") from None
    check_fit(source, weights, own)
    return loader.from_pretrained(None, config=config, state_dict=weights, dtype=next(iter(weights.values())).dtype)


def build_random(loader, dtype, **shape):
    """A transformers model of a given shape with random weights, for benchmarks."""
    with torch.device("meta"):
        own = loader(loader.config_class(**shape)).state_dict()
    weights = {name: torch.ones(t.shape, dtype=dtype) if t.ndim == 1 else torch.empty(t.shape, dtype=dtype).normal_(std=0.02) for name, t in own.items()}
    return build(loader, shape, weights, "random weights")


def load_clip(name_or_dir, dtype=torch.float32, weights=None):
    """CLIPEncoder from a folder or hub id; with weights {name: tensor} the folder gives the config alone."""
    folder, config = open_folder(name_or_dir)
    if weights is None:
        weights = dict(read_weights(folder, dtype, DERIVED + TEXT_HALF))
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
    return CLIPEncoder(build(CLIPVisionModel, config.get("vision_config", config), weights, name_or_dir))


def load_mobilellama(name_or_dir, dtype=torch.float32, weights=None):
    """(LlamaForCausalLM, tokenizer) from a folder or hub id, as MobileLLaMA is published; weights as in load_clip."""
    folder, config = open_folder(name_or_dir)
    if config.get("model_type") not in ("llama", "mobilevlm"):
        raise HydraError(f"{name_or_dir}: is a {config.get('model_type')!r} model; give a LLaMA")
    if weights is None:
        weights = dict(read_weights(folder, dtype))
    # upstream always loads a MobileVLM in fp16, its tables of sines and cosines included: 4e-4 in the logits
    rotary = config.get("rotary_dtype", "float16") if config["model_type"] == "mobilevlm" else "float32"
    llm = build(LlamaForCausalLM, {**config, "model_type": "llama", "rotary_dtype": rotary}, weights, name_or_dir)
    if rotary == "float16":
        llm.model.rotary_emb.register_forward_hook(lambda _, args, tables: tuple(t.half().to(t.dtype) for t in tables))
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != llm.config.vocab_size:
        raise HydraError(f"{folder}: tokenizer of {len(tokenizer)} ids for a model of {llm.config.vocab_size}; copy its own")
    return llm, tokenizer


def load_tokenizer(folder):
    """The tokenizer of a folder, with upstream's ids: from its tokenizer.model if there is one, else tokenizer.json."""
    # AutoTokenizer would read a tokenizer.model that stands alone as another kind of tokenizer, with other ids
    loader = LlamaTokenizer if (folder / "tokenizer.model").is_file() else AutoTokenizer
    for package, is_there in (("sentencepiece", is_sentencepiece_available), ("protobuf", is_protobuf_available)):
        if loader is LlamaTokenizer and not is_there():
            raise HydraError(f"{folder}: its tokenizer.model needs the package {package}: pip install {package}")
    if loader is AutoTokenizer and not (folder / "tokenizer.json").is_file():
        raise HydraError(f"{folder}: no tokenizer.json and no tokenizer.model; copy the tokenizer there")
    try:  # legacy: MobileLLaMA's ids come from the tokenizer as it was before transformers changed it
        tokenizer = loader.from_pretrained(folder, legacy=True, trust_remote_code=False)
        if loader is LlamaTokenizer:
            # transformers merges pieces in the order of their ids, LLaMA in that of their scores: runs of spaces last
            from sentencepiece import SentencePieceProcessor

            pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
            spec = json.loads(tokenizer.backend_tokenizer.to_str())
            spec["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
            tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(spec))
    except Exception as error:  # the tokenizers' own kinds
        raise HydraError(f"{folder}: its tokenizer cannot be read ({reason(error)})") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token  # id 0; a new token would resize the embeddings
    return tokenizer


# ---------------------------------------------------------------------------------------------
# the adapter


class DropoutLinear(torch.autograd.Function):
    """linear(dropout(x), A), but only x and the mask are kept: x is there anyway, and shared by q, k and v."""

    @staticmethod
    def forward(ctx, x, A, p):
        dropped, mask = torch.native_dropout(x, p, True)
        ctx.save_for_backward(x, A, mask)
        ctx.scale = 1 / (1 - p)
        return F.linear(dropped, A)

    @staticmethod
    def backward(ctx, grad):
        x, A, mask = ctx.saved_tensors
        grad_A = grad.flatten(0, -2).T @ (x * mask).to(grad.dtype).flatten(0, -2)
        grad_x = (grad @ A.to(grad.dtype)).mul_(mask).mul_(ctx.scale) if ctx.needs_input_grad[0] else None
        return grad_x, grad_A * ctx.scale, None


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
        self.dropout = dropout
        self.sketch = None  # [k, in]: the input's principal directions, each as long as it is strong; align sets it
        self.lora_A = nn.Parameter(self.new_rows(self.rank, None))  # [r, in], fp32 whatever the base is
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

    def new_rows(self, rows, present, generator=None):
        """New rows of A [rows, in] beside those present [r, in]: the strongest directions of the sketch outside theirs.

        Those have length 1. Without a sketch, or beyond it, rows are uniform as LoRA's (Kaiming, a = √5; length 0.6).
        """
        bound = 1 / math.sqrt(self.base.in_features)
        new = torch.empty(rows, self.base.in_features)  # on the CPU: the same numbers on every device
        new = new.uniform_(-bound, bound, generator=generator).to(self.base.weight.device)
        if self.sketch is not None and rows:
            basis = torch.linalg.qr(present.T).Q  # [in, r]
            outside = torch.linalg.svd(self.sketch - self.sketch @ basis @ basis.T, full_matrices=False).Vh[:rows]
            new = torch.cat([outside, new[len(outside) :]])
        return new

    def forward(self, x):
        y = self.base(x)
        if self.merged:
            return y
        if self.training and self.dropout:
            h = DropoutLinear.apply(x, self.lora_A, self.dropout)
        else:
            h = F.linear(x, self.lora_A)  # [.., r]
        return torch.addmm(y.flatten(0, -2), self.scale * h.flatten(0, -2), self.lora_B.T).view_as(y)

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

        Growing leaves the function as it is: new columns of B are zero.
        Shrinking drops the components of least importance [r] (without it, of least norm).
        The parameters are new objects; see carry_moments for their optimizer state.
        """
        self.check_rank(coarse_rank + fine_rank)
        self.unmerge()
        if importance is None:
            importance = self.lora_A.norm(dim=1) * self.lora_B.norm(dim=0)
        rank = coarse_rank + fine_rank
        kept = importance.argsort(descending=True, stable=True)[:rank].sort().values
        new = rank - len(kept)
        A = torch.cat([self.lora_A[kept], self.new_rows(new, self.lora_A[kept], generator)])
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


@torch.no_grad()
def align(model, batches):
    """Give every adapter a sketch of its input, from batches of one sample, and rows of A to start from.

    B learns what the rows of A read of the input (in the last layer's MLP: at the targets, where alone it runs): rows along
    its principal directions read most of it, and learn faster than random ones (EVA, arXiv 2410.07170).
    """
    inputs = {module: [] for module in adapters(model).values()}

    def watch(module, args):
        x = args[0].flatten(0, -2)  # [T, in]; of each sample 32 places are enough
        inputs[module].append(x[torch.linspace(0, len(x) - 1, 32 * (len(x) > 0)).long()].float())

    hooks = [module.register_forward_pre_hook(watch) for module in inputs]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    for module, seen in inputs.items():
        x = torch.cat(seen)
        x = x[x.isfinite().all(1)]
        if not len(x):  # the rows stay as they are; training will say what is wrong
            continue
        with torch.autocast(x.device.type, enabled=False):  # its products are to be exact, too
            # 20 rounds: where directions are nearly as strong as each other, the usual two leave them mixed
            _, strength, directions = torch.pca_lowrank(x, min(2 * module.rank, *x.shape), niter=20)
            module.sketch = (strength * directions).T
            module.lora_A.copy_(module.new_rows(module.rank, module.lora_A[:0]))


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

MILD = 1.5  # coarse and fine each multiply a rank by 1/1.5 … 1.5: strong multipliers starve layers


def mild(score, centre):
    """Multiplier of a score against the typical one: the square root of the ratio, within 1/1.5 … 1.5."""
    return np.clip(np.sqrt(score / centre), 1 / MILD, MILD)


def cluster(values, k=3):
    """Deterministic one-dimensional k-means: the mean of each value's cluster. [L] -> [L]"""
    centres = np.quantile(values, np.linspace(0, 1, k))
    for _ in range(100):  # far more than so few values ever need
        member = np.abs(values[:, None] - centres).argmin(1)
        centres = np.array([values[member == j].mean() if (member == j).any() else centres[j] for j in range(k)])
    return centres[member]


def coarse_and_fine(scores, costs, rank):
    """Rank targets from the scores and component costs [layers, projections] > 0 of the modules:
    (coarse [layers, 1], both [layers, projections]).

    Coarse: layers whose log scores cluster together get one rank. Fine: inside a layer each
    projection is set against the layer's own typical score, and against its cost: where gains
    flatten as log(rank) does, equal gains per parameter take equal parameters, not equal ranks.
    The score, our choice, is the gradient's signal-to-noise. fit_to_budget settles the sum.
    """
    log = np.log(scores)
    layer = cluster(log.mean(1))[:, None]  # three kinds of layer
    coarse = rank * mild(np.exp(layer), np.exp(layer.mean()))
    return coarse, coarse * mild(scores, np.exp(log.mean(1, keepdims=True))) * costs.mean(1, keepdims=True) / costs


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
    """Ridge regression from a change of ranks (features) to the change of held-out loss it brings.

    It passes through the origin, since no change changes nothing. Each event halves the weight of
    older observations: what a component is worth moves while the model learns.
    """

    RIDGE, FORGET = 1.0, 0.5

    def __init__(self):
        self.observations = []  # (event, weight, features, measured change of loss)

    def fit(self):
        """Fit; returns {"error", "error_of_mean", "observations"}: root mean squares, each row left out in turn."""
        events, weight, X, y = (np.array(column, dtype=float) for column in zip(*self.observations))
        weight = weight * self.FORGET ** (events.max() - events)
        self.spread = np.sqrt((X**2).mean(0)) + 1e-12
        X = X / self.spread
        self.inverse = np.linalg.inv(X.T @ (weight[:, None] * X) + self.RIDGE * np.eye(X.shape[1]))
        self.weights = self.inverse @ X.T @ (weight * y)
        leverage = weight * np.einsum("nf,fg,ng->n", X, self.inverse, X)
        left_out = (y - X @ self.weights) / (1 - leverage)  # residual of a fit without that row
        mean_left_out = y - ((weight * y).sum() - weight * y) / (weight.sum() - weight)
        error, error_of_mean = (float(np.sqrt(np.average(e**2, weights=weight))) for e in (left_out, mean_left_out))
        self.error = error
        return {"error": error, "error_of_mean": error_of_mean, "observations": len(y)}

    def predict(self, features):
        """(change of loss, its standard error), the error growing with the change."""
        x = np.asarray(features) / self.spread
        return float(x @ self.weights), float(self.error * np.sqrt(x @ self.inverse @ x))


def effect(before, after, features):
    """Features [5] of a change of ranks, in components lost at the old rank's worth.

    A module's loss is taken to fall as 1 / rank: each further component brings less than the one before.
    """
    return np.einsum("lp,lpf->f", before * (before / after - 1), features).tolist()


def from_first(value):
    """Process 0's value, on every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


class RankController:
    """Moves the ranks of a model's adapters during stage 2.

    observe() gathers from the gradients of the steps, which are there anyway, after the first 2 %
      signal-to-noise of an adapter   ‖mean ∂B‖² / mean ‖∂B‖²
      importance of a component       mean |B_j · ∂B_j|, the first-order change of loss without it
    event(), at 5 and 15 % of the steps, masks the weaker components of random groups of modules,
    measures the held-out loss without them, fits the performance model to that, and lets it choose
    among candidates. Ranks change if its error on measurements left out is below that of their mean
    (else it abstains), and the predicted gain above the prediction's standard error. What the change
    brought is measured at the next event, and learned from, too (after the second there is none).

    The other methods, for comparison, take a candidate without asking: "coarse", "coarse+fine" or
    "random" at 10 % of the steps, "dynamic" the coarse and fine ranks at each event. Theirs are LoRA's rows.
    """

    EVENTS, STATIC_EVENTS, WARM_UP = (0.05, 0.15), (0.10,), 0.02
    PROBES, SAMPLES = 6, 8
    STATE = ("count", "statistics", "last_change", "history")

    def __init__(self, model, rank, total_steps, seed=0, method="hydra"):
        self.adapters, self.rank, self.seed = adapters(model), rank, seed  # rank: r₀, everywhere at the start
        modules = list(self.adapters.values())
        self.costs, self.limits = (
            np.array(values).reshape(-1, len(PROJECTIONS))
            for values in ([module.cost for module in modules], [module.max_rank for module in modules])
        )
        self.method, self.budget = method, int(rank * self.costs.sum())
        events = self.EVENTS if method in ("hydra", "dynamic") else self.STATIC_EVENTS
        self.event_steps = [max(i, round(at * total_steps)) for i, at in enumerate(events, 1)]
        self.warm_up = round(self.WARM_UP * total_steps)
        self.predictor, self.last_change = PerformancePredictor(), None
        self.history = [{"step": 0, "ranks": self.ranks().tolist()}]
        self.clear()

    def state_dict(self):
        return {key: getattr(self, key) for key in self.STATE} | {"observations": self.predictor.observations}

    def load_state_dict(self, state):
        for key in self.STATE:
            setattr(self, key, state[key])
        self.predictor.observations = state["observations"]
        for name, statistics in self.statistics.items():
            self.statistics[name] = [value.to(self.adapters[name].lora_B.device) for value in statistics]

    def ranks(self):
        """[layers, projections]"""
        return np.array([module.rank for module in self.adapters.values()]).reshape(-1, len(PROJECTIONS))

    def parameters_used(self):
        return int((self.ranks() * self.costs).sum())

    def clear(self):
        self.count, self.statistics = 0, {}

    def checksum(self):
        """Of all that has to be the same on every process."""
        state = [[adapter.coarse_rank, adapter.fine_rank, adapter.scale] for adapter in self.adapters.values()], self.predictor.observations
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    @torch.no_grad()
    def observe(self, step, finite):
        """After backward and before the optimizer's step; nothing here waits for the device.

        finite, a boolean tensor, says whether the gradient counts.
        """
        if step < self.warm_up or step >= self.event_steps[-1]:
            return
        self.count = self.count + finite
        for name, module in self.adapters.items():
            grad = torch.where(finite, module.lora_B.grad, 0.0)
            new = grad, grad.square().sum(), (module.lora_B * grad).sum(0).abs()
            if name in self.statistics:
                torch._foreach_add_(self.statistics[name], new)
            else:
                self.statistics[name] = [value.clone() for value in new]

    def describe(self):
        """Since the last event: (signal-to-noise [layers, projections], {name: importance [r]}, features).

        features [layers, projections, 5] say what one component of a module is like: its share of the
        budget, and that times being in attention, times depth, times the module's signal-to-noise; and
        the importance of the module's weaker half.
        """
        signal, weaker, importance = [], [], {}
        for name, (grad, norm, contribution) in self.statistics.items():
            count = max(float(self.count), 1.0)
            signal.append((grad.square().sum() / norm.clamp(min=1e-30)).item() / count)
            importance[name] = contribution.cpu() / count
            weaker.append(importance[name].sort().values[: (len(contribution) + 1) // 2].mean().item())
        signal, weaker = np.clip(signal, 1e-6, 1).reshape(self.costs.shape), np.reshape(weaker, self.costs.shape)
        share = self.costs / self.budget
        attention = [name.startswith("self_attn") for name in PROJECTIONS]
        depth = np.linspace(-1, 1, len(share))[:, None]
        return signal, importance, np.stack([share, share * attention, share * depth, share * signal, weaker], -1)

    def event(self, step, measure, optimizer):
        """One rank event. measure() is the held-out loss, equal on all processes. Returns its log entry."""
        number, before, loss = self.event_steps.index(step), self.ranks(), measure()
        entry = {"step": step, "budget": self.budget, "held_out_loss": loss, "choice": "stay", "ranks_before": before.tolist()}
        if math.isfinite(loss) and self.statistics:
            random = np.random.default_rng((self.seed, number))  # nothing random outlives an event
            signal, importance, features = from_first(self.describe())
            candidates = self.candidates(signal, features[..., -1], before, random)
            if self.method == "hydra":
                entry |= from_first(self.decide(number, loss, measure, before, importance, features, candidates, random))
            else:
                entry["choice"] = self.method.replace("dynamic", "coarse+fine")
            if entry["choice"] != "stay":
                coarse, ranks = candidates[entry["choice"]]
                grown = self.change(coarse, ranks, importance, optimizer, torch.Generator().manual_seed(self.seed + number))
                entry["loss_of_shrinking"] = measure() - loss
                self.last_change = {"features": effect(before, ranks, features), "grown": grown}
                self.last_change["loss_of_shrinking"] = entry["loss_of_shrinking"]
        entry |= {"ranks": self.ranks().tolist(), "parameters": self.parameters_used()}
        self.history.append(entry)
        self.clear()
        return entry

    def decide(self, number, loss, measure, before, importance, features, candidates, random):
        """Probe, fit the performance model, and let it choose: what of it belongs in the log."""
        entry, observations = {}, self.predictor.observations
        if self.last_change:
            # the last change's gain: what its new components are worth now, less what shrinking cost then
            worth = self.loss_without(self.last_change["grown"], measure) - loss
            entry["realised_gain"] = worth - self.last_change["loss_of_shrinking"]
            # one change that was made tells as much as all probes of an event
            observations.append((number, self.PROBES, self.last_change["features"], -entry["realised_gain"]))
            self.last_change = None
        for _ in range(self.PROBES):
            # of a quarter of the modules the weaker part of the components
            removed = np.ceil(before * random.uniform(0.2, 0.6, before.shape) * (random.random(before.shape) < 0.25)).astype(int)
            removed = np.minimum(removed, before - 1)  # one stays
            weakest = {name: imp.argsort(stable=True)[:n] for (name, imp), n in zip(importance.items(), removed.flat)}
            observations.append((number, 1, effect(before, before - removed, features), self.loss_without(weakest, measure) - loss))
        entry |= self.predictor.fit()
        scored = {name: self.predictor.predict(effect(before, ranks, features)) for name, (_, ranks) in candidates.items()}
        favourite = min(scored, key=lambda name: sum(scored[name]))  # lowest loss with the doubt added to it
        change, doubt = scored[favourite]
        abstained = entry["error"] >= entry["error_of_mean"]
        entry |= {"favourite": favourite, "predicted_gain": -change, "doubt": doubt, "abstained": abstained}
        return entry | {"choice": "stay" if abstained or change + doubt >= 0 else favourite}

    def candidates(self, signal, weaker, before, random):
        """{name: (coarse [layers], ranks [layers, projections])}, all within the budget."""
        coarse, both = coarse_and_fine(signal, self.costs, self.rank)
        even = np.ones_like(both)
        worth = weaker / self.costs + 1e-12  # of a parameter in the weaker components
        by_worth = before * mild(worth, np.median(worth))
        targets = {
            "coarse": (coarse, coarse * even),
            "coarse+fine": (coarse, both),
            "half way": (np.sqrt(coarse * self.rank), np.sqrt(both * before)),
            "uniform": (self.rank * even, self.rank * even),
            "importance": (before, by_worth + (by_worth > 1.4 * before)),  # a factor alone would leave 1 at 1
            "random": (self.rank * even, self.rank * np.exp(random.normal(0, 0.4, before.shape))),
        }
        for i in range(self.SAMPLES):  # small random moves away from what is
            target = before * np.exp(random.normal(0, 0.15, before.shape))
            targets[f"sample {i}"] = target, target
        return {
            name: (np.rint(coarse.mean(1)).clip(1).astype(int), fit_to_budget(target, self.costs, self.budget, self.limits))
            for name, (coarse, target) in targets.items()
        }

    def change(self, coarse, ranks, importance, optimizer, generator):
        """Give every module its new rank and carry Adam's state over; returns {name: indices of new components}."""
        grown = {}
        for (name, module), layer_rank, rank in zip(self.adapters.items(), coarse.repeat(len(PROJECTIONS)), ranks.flat):
            old = module.lora_A, module.lora_B
            kept = module.resize(int(layer_rank), int(rank - layer_rank), importance[name], generator)
            carry_moments(optimizer, old[0], module.lora_A, kept, dim=0)
            carry_moments(optimizer, old[1], module.lora_B, kept, dim=1)
            grown[name] = torch.arange(len(kept), module.rank)
        return grown

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
        side = self.image_size // self.clip.clip.config.patch_size
        return 144 if self.projector.kind == "ldpnetv2" else ((side + 1) // 2) ** 2

    def splice(self, input_ids, attention_mask, pixel_values, labels=None, left=False):
        """Put the image's tokens in the place of IMAGE_TOKEN.

        input_ids [B, T] with IMAGE_TOKEN once per image, pixel_values [N, 3, H, W] in reading order.
        Returns embeddings [B, T', D], mask [B, T'] and labels [B, T'] or None, padded on the right,
        or on the left for generation.
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
        embeddings = self.llm.get_input_embeddings()(ids.clamp(min=0).to(device, non_blocking=True))  # [B, T', D]
        if images:
            tokens = self.projector(self.clip(pixel_values.to(device, non_blocking=True)))  # [N, 144, D]
            where = (ids == IMAGE_TOKEN).flatten().nonzero().squeeze(1).to(device)
            flat = embeddings.flatten(0, 1).index_copy(0, where, tokens.flatten(0, 1).to(embeddings.dtype))
            embeddings = flat.view_as(embeddings)
        elif self.training:
            # DDP waits for every gradient: a batch without an image gives the projector a zero one
            nothing = torch.zeros(1, (self.image_size // self.clip.clip.config.patch_size) ** 2, self.clip.clip.config.hidden_size)
            embeddings = embeddings + 0 * self.projector(nothing.to(device)).sum().to(embeddings.dtype)
        return embeddings, mask, None if labels is None else expand(labels, IGNORE)

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None, labels=None, embeddings=None):
        """With labels (loss_sum, target_count), else the logits [B, T', vocabulary].

        Embeddings [B, T', D], with their labels, stand for what splice makes of the rest.
        The loss is a sum, and taken from the hidden states at target positions alone: how a global
        batch is split then does not matter, and no [B, T', vocabulary] tensor is made.
        """
        if embeddings is None:
            embeddings, _, labels = self.splice(input_ids, attention_mask, pixel_values, labels)
        # right-padded and causal: no token that counts sees the padding, so attention needs no mask
        if labels is None:
            return self.llm.lm_head(self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # a hidden state predicts the next token
        where = (targets != IGNORE).nonzero().squeeze(1)
        targets, where, head = targets[where].to(embeddings.device), where.to(embeddings.device), self.llm.lm_head
        with self.last_mlp_at(where):
            hidden = self.llm.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state  # [B, T', D]
        hidden = hidden.flatten(0, 1)[where]  # [targets, D]
        # in pieces: [targets, vocabulary] is never whole
        if torch.is_grad_enabled():  # each gives its gradient at once; in bf16 the sum, too, is bf16, which only the log sees
            pieces = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=1024)
            loss = F.linear_cross_entropy(hidden.to(head.weight.dtype), head.weight, targets, reduction="sum", options=pieces).float()
        else:
            pieces = zip(hidden.split(1024), targets.split(1024))
            loss = sum(F.cross_entropy(head(h).float(), t, reduction="sum") for h, t in pieces)
        return loss, torch.tensor(len(where))

    @contextmanager
    def last_mlp_at(self, where):
        """Inside, the last layer's MLP runs at the places `where` of [B · T'] alone: nothing reads what it gives at others."""
        layer = self.llm.model.layers[-1]
        mlp = layer.mlp

        def forward(x):
            y = type(mlp).forward(mlp, x.flatten(0, 1)[where])  # [B, T', D] -> [targets, D]
            return torch.zeros_like(x).flatten(0, 1).index_copy(0, where, y.to(x.dtype)).view_as(x)

        if not (layer.gradient_checkpointing and layer.training):  # which runs the layer again when this is over
            mlp.forward = forward
        try:
            yield
        finally:
            vars(mlp).pop("forward", None)

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


def model_files(model, description):
    """{name: bytes}: config.json, readable, and model.safetensors with the trained tensors, which are all that training changes."""
    ranks = {name: [module.coarse_rank, module.fine_rank] for name, module in adapters(model).items()}
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    config = json.dumps({"format": "hydra", **description, "ranks": ranks}, indent=1)
    return {"config.json": config.encode(), "model.safetensors": save(trained)}


def list_checkpoints(run):
    """The checkpoints in a run's folder, the newest last."""
    steps = [path for path in Path(run).glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(steps, key=lambda path: int(path.name[11:]))


def find_checkpoint(folder):
    """The newest checkpoint of a run's folder, or the folder itself when it is a checkpoint; else None."""
    return Path(folder) if Path(folder, "config.json").is_file() else (list_checkpoints(folder) or [None])[-1]


def read_config(folder):
    """config.json of one of our checkpoints."""
    folder, config = open_folder(folder)
    if config.get("format") != "hydra":
        raise HydraError(f"{folder}: is not a checkpoint of train.py; give a folder that it wrote")
    kinds = {"stage": int, "model": str, "vision_tower": str, "projector": str, "ranks": dict, "run": dict}
    kinds |= {"scale": float, "dropout": float} if config.get("ranks") else {}
    damaged = [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]
    ranks = {} if damaged else config["ranks"]
    damaged += [name for name, rank in ranks.items() if not isinstance(rank, list) or [*map(type, rank)] != [int, int]]
    if damaged:
        raise HydraError(f"{folder / 'config.json'}: {damaged[0]} is missing or damaged; use another checkpoint")
    return config


def fingerprint(model):
    """A number that tells backbones apart, equal whether they are read in fp32 or bf16: of one row of each linear."""
    linears = [module for part in (model.clip, model.llm) for module in part.modules() if isinstance(module, nn.Linear)]
    return zlib.crc32(torch.cat([linear.weight[0].detach().bfloat16() for linear in linears]).view(torch.uint8).numpy())


@torch.no_grad()
def restore(model, folder, config):
    """Load a checkpoint's trained tensors, with its ranks, into a model of the same backbones."""
    fits = f"use the model it names, {config['model']}"
    # fp16 rounds before bf16 does: then it cannot be told
    if model.llm.dtype != torch.float16 and config.get("fingerprint") != model.origin["fingerprint"]:
        raise HydraError(f"{folder}: was trained on another LLM or CLIP than {model.origin['model']}; {fits}")
    modules = adapters(model)
    for name, (coarse, fine) in config["ranks"].items():
        if name not in modules:
            raise HydraError(f"{folder}: has an adapter for {name}, which this model has not; {fits}")
        modules[name].resize(coarse, fine)
    freeze(model, config["stage"], config.get("method"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in read_weights(folder / "model.safetensors", torch.float32):
        if name not in trained or trained[name].shape != tensor.shape:
            raise HydraError(f"{folder}: {name} {list(tensor.shape)} does not fit this model; {fits}")
        trained.pop(name).copy_(tensor)
    if trained:
        raise HydraError(f"{folder}: lacks {next(iter(trained))}; use a whole checkpoint")


def load_checkpoint(name_or_dir, vision_tower=None, projector=None, dtype=torch.float32):
    """(model in eval mode, tokenizer, image_transform) from a folder or hub id; its config.json says which kind it is:

    a LLaMA            with CLIP from vision_tower (default: MobileVLM's) and a new projector
    a MobileVLM        with its own projector, and its own CLIP where the file holds one; a CLIP's config, and
                       else its weights, come from vision_tower (default: the one that the config names)
    one of train.py's  on the backbones that it names

    projector is a kind, for a new one, or upstream's mm_projector.bin. image_transform(PIL image, "pad" or
    "crop") gives pixels [3, S, S]. HydraError names what is missing, left over or of another shape.
    """
    import data  # not at the top: the model itself needs no pixels

    def absolute(name):
        """A checkpoint names its backbones; a folder's name must mean the same from everywhere."""
        return str(Path(name).resolve() if Path(name).is_dir() else name)

    folder, config = open_folder(name_or_dir)
    kind = config.get("format") or config.get("model_type")
    if kind == "hydra":
        config = read_config(folder)
        if projector:
            raise HydraError(f"{folder}: has its own projector; do not give another")
        parts = config["model"], vision_tower or config["vision_tower"], config["projector"]
        model, tokenizer, _ = load_checkpoint(*parts, dtype)
        if config["ranks"]:
            inject_adapters(model.llm, 1, config["scale"], config["dropout"])
        restore(model, folder, config)
        model.stage = config["stage"]
    elif kind in ("llama", "mobilevlm"):
        weights = dict(read_weights(folder, dtype))
        tower, state = (
            {name.removeprefix(prefix): weights.pop(name) for name in list(weights) if name.startswith(prefix)}
            for prefix in ("model.vision_tower.vision_tower.", "model.mm_projector.")
        )
        if vision_tower is None:
            vision_tower = config.get("mm_vision_tower") or CLIP
            beside = folder.parent / vision_tower  # in upstream's configs a path, at times relative
            vision_tower = beside if beside.is_dir() else vision_tower
        llm, tokenizer = load_mobilellama(name_or_dir, dtype, weights)
        clip = load_clip(vision_tower, dtype, tower or None)
        source, is_trained = name_or_dir, kind == "mobilevlm" and projector is None
        if projector and Path(projector).is_file():
            source, is_trained = projector, True
            state = {name.split("mm_projector.")[-1]: tensor for name, tensor in read_weights(Path(projector), dtype)}
        if is_trained:
            projector = "ldpnetv2" if "mlp.mlp.0.weight" in state else "ldpnet"
        new = build_projector(projector or "ldpnet", clip.clip.config.hidden_size, llm.config.hidden_size)
        if is_trained:
            check_fit(source, state, new.state_dict())
            new.load_state_dict(state)
        model = HydraVLM(clip, new, llm)
        model.stage = int(is_trained)  # that it has been through: 0 is a new projector
        model.origin = {"model": absolute(name_or_dir), "vision_tower": absolute(vision_tower)}
        model.origin["fingerprint"] = fingerprint(model)
    else:
        raise HydraError(f"{name_or_dir}: is neither a LLaMA, a MobileVLM nor a checkpoint of train.py, but {kind!r}")
    for parameter in model.parameters():  # not model.to: buffers such as the rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    return model.eval(), tokenizer, lambda image, mode: data.image_to_tensor(image.convert("RGB"), model.image_size, mode)


def export(args):
    """Write a checkpoint in the layout of another tool: whole or not at all."""
    to = Path(args.to)
    if to.exists() and not args.force:
        raise HydraError(f"{to}: exists; name another folder, or add --force to replace it")
    model, _, _ = load_checkpoint(args.checkpoint)  # in fp32: merged exactly, cast once
    base = model.origin["model"]
    if any(Path(name).resolve().is_relative_to(to.resolve()) for name in (args.checkpoint, base, model.origin["vision_tower"])):
        raise HydraError(f"{to}: holds what is exported; name another folder")
    if not model.stage:
        raise HydraError(f"{args.checkpoint}: its projector is not trained; give a checkpoint of train.py")
    modules = adapters(model)
    if args.format == "peft" and not modules:
        raise HydraError(f"{args.checkpoint}: has no adapters; export it as mobilevlm or hf")
    dtype, largest = getattr(torch, args.dtype), max((module.rank for module in modules.values()), default=0)

    def prefixed(prefix, module):
        return {prefix + name: tensor.to(dtype).contiguous() for name, tensor in module.state_dict().items()}

    temporary = to.with_name(to.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    projector = prefixed("model.mm_projector.", model.projector)
    if args.format != "mobilevlm":
        torch.save(projector, temporary / "mm_projector.bin")
    if args.format == "peft":
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": largest, "lora_alpha": largest * max(module.scale for module in modules.values()), "lora_dropout": 0.0,
            "bias": "none", "target_modules": list(modules),
            "rank_pattern": {name: module.rank for name, module in modules.items()},
            "alpha_pattern": {name: module.rank * module.scale for name, module in modules.items()},
        }  # fmt: skip
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1))
        state = {
            f"base_model.model.{name}.lora_{side}.weight": getattr(module, f"lora_{side}").detach().to(dtype).contiguous()
            for name, module in modules.items() for side in "AB"
        }  # fmt: skip
        (temporary / "adapter_model.safetensors").write_bytes(save(state, {"format": "pt"}))  # save_file ignores the umask
        note = f"LoRA adapters for {base}; the largest rank is {largest} (servers ask for it: vLLM's --max-lora-rank)"
        (temporary / "README.md").write_text(note + "\n")
    else:
        for module in modules.values():
            module.merge()
        state = {name.replace(".base.", "."): t for name, t in prefixed("", model.llm).items() if ".lora_" not in name}
        # LLaMA's own fields, named as both transformers 4 and 5 read them
        own = LlamaConfig().to_dict().keys() - PreTrainedConfig().to_dict().keys()
        config = {name: getattr(model.llm.config, name) for name in sorted(own)}
        rope = config.pop("rope_parameters")
        scaling = {"type" if name == "rope_type" else name: value for name, value in rope.items() if name != "rope_theta"}
        config |= {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": args.dtype,
            "rope_theta": rope["rope_theta"], "rope_scaling": None if scaling["type"] == "default" else scaling,
        }  # fmt: skip
        if args.format == "mobilevlm":
            state |= projector | prefixed("model.vision_tower.vision_tower.vision_model.", model.clip.clip)
            config |= {
                "model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"],
                "mm_projector_type": model.projector.kind, "mm_hidden_size": model.clip.clip.config.hidden_size,
                "mm_vision_tower": model.origin["vision_tower"], "vision_tower_type": "clip", "mm_vision_select_layer": -2,
                "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
                "use_mm_proj": True, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "image_aspect_ratio": "pad",
                "rotary_dtype": model.llm.config.rotary_dtype,  # for load_mobilellama alone
            }  # fmt: skip
        (temporary / "config.json").write_text(json.dumps(config, indent=1))
        torch.save(state, temporary / "pytorch_model.bin")
        # upstream's AutoTokenizer finds no class for a tokenizer.model that stands alone
        (temporary / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
        for file in open_folder(base)[0].glob("*token*"):  # copied as they are: an older transformers may read them
            shutil.copyfile(file, temporary / file.name)
        note = f"LLM {'merged with its adapters ' if modules else ''}in {args.dtype}, projector and tokenizer"
    if to.exists():
        shutil.rmtree(to)
    temporary.rename(to)
    print(f"wrote {to}: {note}")


def chat(args):
    """Print the answer to one question about one image as it is generated."""
    from transformers import TextStreamer

    import data

    if args.max_new_tokens < 1:
        raise HydraError(f"--max_new_tokens {args.max_new_tokens}: give a positive number")
    model, tokenizer, image_transform = load_checkpoint(args.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(args.image).resolve()
    pixels = image_transform(data.open_image(path.parent, path.name), "pad")
    turn = {"from": "human", "value": "<image>\n" + args.prompt}
    input_ids, _ = data.encode_conversation([turn], tokenizer, "v1")
    model.generate(
        torch.tensor([input_ids]), pixel_values=pixels[None], max_new_tokens=args.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )  # fmt: skip


if __name__ == "__main__":
    import data  # the command line, unlike the model, needs the template and the pixels

    parser = argparse.ArgumentParser(description="HyDRA: ask a checkpoint about an image, or export it")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("chat", help="print the model's answer as it is generated")
    command.set_defaults(run=chat)
    command.add_argument("checkpoint", help="folder that train.py --stage 2 wrote; or a MobileVLM, folder or hub id")
    command.add_argument("--image", required=True, help="picture to ask about")
    command.add_argument("--prompt", required=True, help="the question")
    command.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    command = commands.add_parser("export", help="write a checkpoint for other tools")
    command.set_defaults(run=export)
    command.add_argument("checkpoint", help="folder that train.py wrote")
    command.add_argument("--format", required=True, choices=("peft", "mobilevlm", "hf"), help="peft: the adapters; "
                         "mobilevlm: all, in upstream's layout; hf: the merged LLM, the projector beside it")  # fmt: skip
    command.add_argument("--to", required=True, help="folder to write")
    command.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the weights "
                         "written (default: float32, which loses nothing; upstream publishes float16)")  # fmt: skip
    command.add_argument("--force", action="store_true", help="replace the folder --to if it exists")
    args = parser.parse_args()
    try:
        args.run(args)
    except (HydraError, data.DataError, OSError) as error:
        print(f"hydra.py: error: {error}", file=sys.stderr)
        sys.exit(2)

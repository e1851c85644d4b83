"""Tests: invariants, upstream's own outputs, and the real commands at very small size.

    pytest                                   HYDRA_REFERENCE=FOLDER adds the comparisons with upstream

Experiments, below the tests:

    python test_hydra.py compare --methods aligned,hydra,eva --seeds N [--damage noise:LAYER] [flags of train.py]
    python test_hydra.py lab WORLDS METHODS [SEEDS] [STEPS]    where it is known what needs how much rank
    python test_hydra.py memory|speed [--model 1.7b|3b|tiny] [flags of train.py]    a step's peak, counted; its speed
    python test_hydra.py bench               our step, adapter and images beside the usual ones (needs peft)
"""

import base64
import copy
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate, islice, product
from pathlib import Path
from timeit import timeit
from unittest.mock import Mock, patch
from weakref import finalize

os.environ |= {"HF_HUB_OFFLINE": "1"} | ({} if __name__ == "__main__" else {"CUDA_VISIBLE_DEVICES": ""})  # for tests

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, normalizers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

import data
import hydra
import train

REFERENCE = Path(os.environ.get("HYDRA_REFERENCE", "")).resolve()
needs_reference = pytest.mark.skipif(not os.environ.get("HYDRA_REFERENCE"), reason="HYDRA_REFERENCE is not set")
HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------
# a world small enough for tests: untrained backbones, a hundred pictures

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with clip/, llm/ and the toy world's files, all tiny."""
    folder = tmp_path_factory.mktemp("tests") / "world"
    data.write_world(folder, train=96, test=8)
    records = json.loads((folder / "instruct.json").read_text())
    for record in records[::3]:  # text alone, as 6 % of the real data
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    write(folder / "instruct.json", records)
    tokenizer = data.train_tokenizer(folder / "llm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, rms_norm_eps=1e-6, pad_token_id=0,
    )).save_pretrained(folder / "llm")  # fmt: skip
    CLIPVisionModel(CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=48, patch_size=8,
    )).save_pretrained(folder / "clip")  # fmt: skip
    return folder


@pytest.fixture
def tokenizer(world):
    return hydra.load_llm(world / "llm")[1]


def make_model(world, rank=0, stage=2, method="hydra", nonzero=True):
    """HydraVLM of the tiny backbones; with a rank, adapters whose B is not zero."""
    torch.manual_seed(1)
    llm, _ = hydra.load_llm(world / "llm")
    model = hydra.HydraVLM(hydra.load_clip(world / "clip"), hydra.build_projector("ldpnet", 24, 32), llm)
    if rank:
        hydra.inject_adapters(llm, rank, scale=2.0, dropout=0.0)
        for adapter in hydra.adapters(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1 * nonzero)
    hydra.freeze(model, stage, method)
    return model


def make_samples(world, tokenizer, records=6):
    """Training samples of the records, or of the first few, of which every third is text alone."""
    if isinstance(records, int):
        records = data.read_records(world / "instruct.json", world / "images")[:records]
    return data.ConversationDataset(records, world / "images", tokenizer, "v1", 48, 9, 256)


def make_adapter(rank=4, **options):
    torch.manual_seed(0)
    adapter = hydra.HybridLoRALinear(torch.nn.Linear(24, 40, bias=False), rank, 0, **options).eval()
    torch.nn.init.normal_(adapter.lora_B)
    return adapter, torch.randn(5, 7, 24)


def turns(*texts):
    """A conversation of these texts, a human's first."""
    return [{"from": speaker, "value": text} for speaker, text in zip(["human", "gpt"] * len(texts), texts)]


def record(**changed):
    return {"id": "r", "image": "00000.png", "conversations": turns("<image>\nWhat?", "A dot.")} | changed


def write(path, content):
    """Content as JSON, a list as JSON lines for .jsonl, text as it is; returns the path."""
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content if isinstance(content, str) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    return path


def edited(folder, to, **changed):
    """A copy of a model's folder with fields of config.json changed."""
    shutil.copytree(folder, to)
    return write(to / "config.json", json.loads((to / "config.json").read_text()) | changed).parent


def refused(message, function, *args, **options):
    """The call is refused with a message that matches this; returns the message."""
    with pytest.raises(data.Mistake, match=message) as raised:
        function(*args, **options)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------
# upstream's own outputs

@needs_reference
@pytest.mark.parametrize("kind", ["ldpnet", "ldpnetv2"])
def test_projector_matches_upstream(kind):
    golden = {key: torch.from_numpy(array) for key, array in np.load(REFERENCE / "golden" / f"{kind}.npz").items()}
    projector = hydra.build_projector(kind, 48, 64)
    state = {key.removeprefix("state/"): golden[key] for key in golden if key.startswith("state/")}
    projector.load_state_dict(state, strict=True)
    assert torch.allclose(projector(golden["input"]), golden["output"], atol=1e-5, rtol=0)


@needs_reference
@torch.no_grad()
def test_checkpoint_matches_upstream():
    folder = REFERENCE / "golden" / "mobilevlm_mini"
    expected = {name: torch.from_numpy(array) for name, array in np.load(folder / "expected.npz").items()}
    model, tokenizer = hydra.load_checkpoint(folder / "mobilevlm", vision_tower=folder / "clip")
    pixels = data.image_to_tensor(data.open_image(folder, "image.png"), model.image_size, "pad")[None]
    assert (pixels - expected["pixel_values"]).abs().max() <= 2 / 255 / min(data.CLIP_STD)
    assert torch.equal(model.generate(expected["input_ids"], None, pixels, max_new_tokens=12)[0], expected["greedy"])
    pixels = expected["pixel_values"]  # what follows is the model's
    assert torch.allclose(model.clip(pixels), expected["vision_features"], atol=1e-4)
    assert torch.allclose(model.projector(model.clip(pixels)), expected["image_tokens"], atol=1e-4)
    question = "<image>\n" + json.loads((folder / "prompt.json").read_text())["question"]
    assert data.encode_conversation(turns(question), tokenizer, "v1")[0] == expected["input_ids"][0].tolist()
    logits = model(expected["input_ids"], None, pixels)[0]
    assert torch.allclose(logits[::7], expected["logits"][0], atol=1e-4, rtol=0)
    assert torch.allclose(logits[-1], expected["last_logits"][0], atol=1e-4, rtol=0)
    loss, count = model(expected["input_ids"], None, pixels, expected["labels"])
    assert abs(loss / count - expected["loss"]) <= 1e-4
    for golden in json.loads((REFERENCE / "golden" / "conversations.json").read_text()):
        ids_and_labels = data.encode_conversation(golden["conversations"], tokenizer, golden["kind"])
        assert ids_and_labels == (golden["input_ids"], golden["labels"])
    spaces = tokenizer(" Hello  world    wide", add_special_tokens=False).input_ids
    assert spaces == [15043, 29871, 3186, 1678, 9377]  # SentencePiece's own; no conversation above has two spaces


# ---------------------------------------------------------------------------------------------
# data

@pytest.mark.parametrize("answer", ["", "word " * 10**6, "naïve 東京 \x00", "a </s> b", "USER: </s> ASSISTANT: <s>"])
def test_answers_of_all_kinds(world, tokenizer, answer):
    opening = [{"from": "gpt", "value": "an answer to nothing"}]  # as in a few public records
    records = [record(conversations=opening + turns("<image>\nWhat?", answer))]
    records = data.read_records(write(world / "record.json", records), world / "images")
    sample = make_samples(world, tokenizer, records)[0]
    assert "nothing" not in tokenizer.decode([token for token in sample["input_ids"] if token != data.IMAGE_TOKEN])
    targets = [label for label in sample["labels"] if label != data.IGNORE]
    places = len(sample["input_ids"]) + 9 - 1  # the image takes nine of the 256
    if len(answer) > 256:
        assert places == 256 and tokenizer.eos_token_id not in targets
    elif not answer:
        assert not targets and tokenizer.decode(sample["input_ids"][-3:]).endswith("ASSISTANT:")  # as upstream
    else:
        assert targets[-1:] == [tokenizer.eos_token_id] and targets.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(targets[:-1]).strip() == answer


def test_targets_are_the_answers_and_empty_turns_none(tokenizer):
    conversation = turns("Is it red?\n<image>", "", "Or blue?", "Blue", "", "Yes")
    input_ids, labels = data.encode_conversation(conversation, tokenizer, "v1")
    assert all(label in (data.IGNORE, token) for token, label in zip(input_ids, labels))
    assert tokenizer.decode([label for label in labels if label != data.IGNORE]) == " Blue</s> Yes</s>"
    assert input_ids.count(data.IMAGE_TOKEN) == 1
    text = "Is it red? ASSISTANT:USER: Or blue? ASSISTANT: Blue</s> USER:ASSISTANT: Yes</s>"
    assert tokenizer.decode(input_ids[input_ids.index(data.IMAGE_TOKEN) + 1 :]).strip() == text


def test_sampler_drops_nothing_and_groups():
    rng = random.Random(0)
    lengths = np.array([rng.randint(1, 400) for _ in range(1003)])
    records = [{"conversations": turns("x" * n)} | ({"image": "i"} if i % 9 else {}) for i, n in enumerate(lengths)]
    batches = data.global_batches(records, 16, seed=3, epoch=1)
    assert sorted(sum(batches, [])) == list(range(1003))
    assert [len(batch) for batch in batches] == [16] * 62 + [11]
    assert batches == data.global_batches(records, 16, seed=3, epoch=1)
    assert batches != data.global_batches(records, 16, seed=3, epoch=2)
    assert sum(len({"image" in records[i] for i in batch}) > 1 for batch in batches) <= 2
    shuffled = torch.tensor(rng.sample(range(1003), 1003)).split(16)
    padding = [1 - lengths.sum() / sum(len(b) * lengths[b].max() for b in order) for order in (batches, shuffled)]
    assert padding[0] < 0.3 * padding[1]


def test_a_global_batch_is_shared_out_and_cut_into_passes():
    for count in (1, 3, 12, 13, 16):
        parts = data.micro_batches(list(range(count)), per_device=4, world_size=2)
        assert sum((row for step in parts for row in step), []) == list(range(count))
        assert all(len(step) == 2 and max(map(len, step)) <= 4 for step in parts)
    samples = [{"input_ids": [5] * n, "labels": [5] * n, "pixel_values": None} for n in (3, 90, 10, 30, 10)]
    parts = data.bounded_batches(samples, 40, 9)
    assert [tuple(part["input_ids"].shape) for part in parts] == [(3, 10), (1, 30), (1, 90)]
    assert [len(part["labels"]) for part in data.bounded_batches(4 * samples[1:2], 299, 9)] == [2, 2]  # not 3 and 1
    assert len(data.bounded_batches(samples, 1000, 9)) == len(data.bounded_batches([], 40, 9)) == 1


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of images of many kinds, and of what is none."""
    folder, outside = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("outside") / "a.png"
    for name, mode in dict(grey="L", palette="P", alpha="RGBA", deep="I;16").items():
        Image.new(mode, (30, 20)).save(folder / f"{name}.png")
    Image.new("CMYK", (30, 20)).save(folder / "cmyk.jpg")
    Image.new("RGB", (20_000, 10)).save(folder / "long.png")
    photo = Image.effect_noise((90, 60), 80).convert("RGB")
    photo.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (90, 60))])
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo.save(folder / "photo.jpg", exif=exif)
    Image.fromarray(np.float32([[0, 0.5]])).save(folder / "float.tiff")
    for name, text in ("empty", ""), ("text", "no picture"), ("page", "%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n"):
        (folder / f"{name}.jpg").write_text(text)
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:-900])
    (folder / "loop.png").symlink_to(folder / "loop.png")
    Image.new("RGB", (64, 64)).save(outside)
    (folder / "link.png").symlink_to(outside)
    return folder


def test_pictures_of_all_kinds(pictures):
    broken = []
    for path in sorted(pictures.iterdir()):
        try:
            for mode in ("crop", "pad"):
                pixels = data.image_to_tensor(data.open_image(pictures, path.name), 32, mode)
                assert pixels.shape == (3, 32, 32) and pixels.isfinite().all()
        except data.Mistake as error:
            assert str(path) in str(error) and "\n" not in str(error)
            broken.append(path.name)
    assert broken == ["cut.jpg", "empty.jpg", "float.tiff", "link.png", "loop.png", "page.jpg", "text.jpg"]
    assert data.open_image(pictures, "photo.jpg").size == (90, 60)  # upstream does not turn it, either


def bomb(side):
    """A PNG of this side, in base64."""
    content = io.BytesIO()
    Image.new("1", (side, side)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize("name, message", [
    ("data:;base64," + bomb(2000), "4000000 pixels"), ("no.jpg", "no such image"), (".", "no such image, but a folder"),
    ("float.tiff", "float.tiff: has 32 bits a pixel"), ("page.jpg", "cannot identify"),  # which Ghostscript would run
    ("http://example.org/dot.png", "is an address"), ("../outside.png", "outside"),
    ("a\0b.png", "cannot be read"), ("n" * 300 + ".png", "cannot be read"), ("photo.jpg", "photo.jpg: cannot be read"),
])  # fmt: skip
def test_images_that_are_refused(pictures, monkeypatch, name, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # the photo now counts as a decompression bomb
    said = refused(message, data.open_image, pictures, name)
    assert len(said) < 500 and "\n" not in said


@pytest.mark.parametrize("name, mode", [("g.tiff", "I;16"), ("g.tiff", "I;16B"), ("g.png", "I;16")])
def test_16_bits_a_pixel_are_scaled(tmp_path, name, mode):
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.frombytes(mode, (8, 8), grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes()).save(tmp_path / name)
    assert np.abs(np.asarray(data.open_image(tmp_path, name))[..., 0] - grey / 257.0).max() <= 1


@pytest.mark.parametrize("size", [(640, 480), (3000, 200), (200, 3001), (2900, 2800), (37, 900), (48, 48), (1, 1)])
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_pixels_are_upstreams(size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, (w, h), S = Image.fromarray(noise), size, 336
    if mode == "pad":
        square = Image.new("RGB", (max(size),) * 2, tuple(int(255 * m) for m in data.CLIP_MEAN))
        square.paste(image, ((max(size) - w) // 2, (max(size) - h) // 2))
        expected = square.resize((S, S), Image.Resampling.BICUBIC)
    else:
        W, H = S * w // min(size), S * h // min(size)
        left, top = (W - S) // 2, (H - S) // 2
        expected = image.resize((W, H), Image.Resampling.BICUBIC).crop((left, top, left + S, top + S))
    std, mean = (torch.tensor(values)[:, None, None] for values in (data.CLIP_STD, data.CLIP_MEAN))
    pixels = (data.image_to_tensor(image, S, mode) * std + mean) * 255
    assert (pixels - torch.from_numpy(np.array(expected)).permute(2, 0, 1)).abs().max() <= 2.01


# ---------------------------------------------------------------------------------------------
# the adapter and its rank

@torch.no_grad()
def test_an_adapter_is_its_base_and_a_sum_of_components():
    """Growing keeps the function, shrinking the strongest components."""
    base = torch.nn.Linear(24, 40, bias=False)
    adapter, x = hydra.HybridLoRALinear(base, 3, 1, dropout=0.0), torch.randn(5, 24)
    assert torch.equal(adapter(x), base(x)) and adapter.rank == 4
    torch.nn.init.normal_(adapter.lora_B)
    before, scale = adapter(x), adapter.scale
    assert torch.allclose(before, x @ (base.weight + adapter.delta()).T, atol=1e-5)
    assert adapter.resize(6, 3).tolist() == [0, 1, 2, 3] and adapter.rank == 9 and adapter.scale == scale
    assert (adapter(x) - before).abs().max() <= 1e-6 * before.abs().max()
    assert adapter.lora_A[4:].abs().min() > 0  # a row of zeros would never learn
    strength = adapter.lora_A.norm(dim=1) * adapter.lora_B.norm(dim=0)
    adapter.lora_B[:, :4] *= torch.tensor([0.1, 5, 0.2, 3]) / strength[:4]
    A, B = adapter.lora_A.clone(), adapter.lora_B.clone()
    assert adapter.resize(3, -1).tolist() == [1, 3]
    assert torch.equal(adapter.lora_A, A[[1, 3]]) and torch.equal(adapter.lora_B, B[:, [1, 3]])
    for impossible in ((0, 0), (2, -2), (24, 1)):
        refused("use 1 to 24", adapter.resize, *impossible)


def test_dropout_keeps_its_input_and_no_more():
    adapter, x = make_adapter(dropout=0.3)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = adapter.train()(x)
    weights = {p.data_ptr() for p in adapter.parameters()}
    kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved) if s.data_ptr() not in weights}
    assert x.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) == 35 * (24 * 4 + 4 * 4)  # x and h of 35 tokens
    inputs, g = (x, adapter.lora_A, adapter.lora_B), torch.randn_like(y)
    gradients = torch.autograd.grad(y, inputs, g)
    dropped = (gradients[0] - g @ adapter.base.weight).abs() < 1e-6  # to these the base's gradient alone comes
    plain = adapter.base(x) + adapter.scale * x.masked_fill(dropped, 0) / 0.7 @ adapter.lora_A.T @ adapter.lora_B.T
    assert torch.allclose(y, plain, atol=1e-5) and 0.25 < dropped.float().mean() < 0.35
    for ours, theirs in zip(gradients, torch.autograd.grad(plain, inputs, g)):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(adapter(x).float().sum(), inputs)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_aligned_rows_span_the_inputs_principal_directions(world, tokenizer, dtype):
    model, samples = make_model(world, rank=2, nonzero=False), make_samples(world, tokenizer, 8)
    batches, inputs = [data.collate([sample]) for sample in samples], []
    batches[0]["labels"].fill_(data.IGNORE)  # a record that was cut before its answer
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hydra.align(model, batches)
    adapter = hydra.adapters(model)["model.layers.1.self_attn.q_proj"]
    adapter.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for batch in batches:
        model(**batch)
    x = torch.cat(inputs)
    x = x - x.mean(0)
    best = torch.linalg.svdvals(x)[:2].square().sum()
    assert torch.allclose(adapter.lora_A @ adapter.lora_A.T, torch.eye(2), atol=1e-4)
    assert 0.9 * best < (x @ adapter.lora_A.T).square().sum() <= 1.0001 * best
    before = adapter.lora_A.clone()
    model.llm.get_input_embeddings().weight.fill_(torch.nan)
    hydra.align(model, batches)  # has nothing to go by
    assert torch.equal(adapter.lora_A, before)


def test_budget_is_never_passed_and_used_to_the_last_component():
    rng = np.random.default_rng(0)
    for _ in range(100):
        costs = rng.integers(20, 90, 28)
        budget = int(rng.integers(1, 9) * costs.sum())
        ranks = hydra.fill(np.exp(rng.normal(0, 1, (28, 1))) / np.arange(1, 17) ** 2, costs, budget)
        spare = budget - (ranks * costs).sum()
        assert 0 <= spare and ranks.min() >= 1 and ranks.max() <= 16
        assert not ((costs <= spare) & (ranks < 16)).any()
    costs = np.array([2, 2, 2, 2, 3, 3, 3] * 4)  # equal needs give equal ranks
    assert (hydra.fill(costs[:, None] / np.arange(1, 17) ** 2, costs, 4 * costs.sum()) == 4).all()


def test_what_lasts_is_believed_and_what_passes_is_not(world):
    controller = hydra.RankController(make_model(world, rank=4), 4, total_steps=20)
    rng = np.random.default_rng(0)
    needs = np.zeros((2, 7))
    needs[1] += 3  # a layer
    needs[:, 2] += 2  # a projection in every layer
    looks = [(scale * needs + rng.normal(0, 0.2, (2, 7))).flatten() for scale in (1, 1, 0.5, -1)]
    entries = [{} for _ in looks]
    believed = [controller.shrink(look, now, then) for look, now, then in zip(looks, entries, [{}, *entries])]
    assert np.allclose(believed[0], looks[0].mean()) and entries[0]["lasting"] == [0, 0]
    assert np.corrcoef(believed[1], needs.flatten())[0, 1] > 0.98 and min(entries[1]["lasting"]) > 0.9
    assert np.allclose(believed[2], looks[2])  # less than at the look before: all of it was there
    assert np.allclose(believed[3], looks[3].mean())  # nothing bore it out
    assert hydra.lasting(*rng.normal(0, 1, (2, 24, 7))) < 0.3


def test_equal_needs_stay_whatever_one_component_more_would_bring(world):
    controller = hydra.RankController(make_model(world, rank=4), 4, total_steps=20, method="dynamic")
    before, spectra = controller.ranks(), [np.full(4, float(cost)) for cost in controller.costs]
    assert (controller.decide(before, spectra, None, {}, {}) == before).all()


def test_worths_tell_what_masking_costs():
    """Inputs and gradients with independent entries: worths are, to a factor, what the loss rises by without each."""
    torch.manual_seed(0)
    adapter = hydra.HybridLoRALinear(torch.nn.Linear(40, 30, bias=False), 4, 0, 2.0, 0.0)
    of_inputs, of_outputs = torch.rand(40) + 0.1, torch.rand(30) + 0.1  # standard deviations
    adapter.lora_B.data.normal_()
    optimizer = torch.optim.Adam([adapter.lora_A, adapter.lora_B], lr=0.0)
    for _ in range(2000):
        x, g = torch.randn(8, 40) * of_inputs, torch.randn(8, 30) * of_outputs
        optimizer.zero_grad()
        (adapter(x) * g).sum().backward()
        optimizer.step()
    exact = torch.linalg.svdvals(of_outputs[:, None] * adapter.delta() * of_inputs).square()[:4]
    with torch.no_grad():
        assert np.allclose(hydra.worths(adapter, optimizer), 8 * exact, rtol=0.1)  # eight rows


def test_rank_events_keep_the_invariants(world, tokenizer, group):
    """A short run of the method that needs no consent: ranks move, the budget and the function hold."""
    model = make_model(world, rank=3)
    samples = list(make_samples(world, tokenizer, 12))
    batch, probe = data.collate(samples[:8]), data.collate(samples[8:])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = hydra.RankController(model, 3, total_steps=20, method="dynamic")
    hydra.adapters(model)["model.layers.1.self_attn.q_proj"].lora_B.data *= 30  # of great worth
    for step in range(1, 21):
        train_step(model.train(), optimizer, [batch])
        if step in controller.event_steps:
            entry = controller.event(step, lambda: train.held_out_loss(model, [probe]), optimizer)
            parameters = sum(a.lora_A.numel() + a.lora_B.numel() for a in hydra.adapters(model).values())
            assert entry["parameters"] == parameters <= controller.budget
            assert len({(name[:14], a.coarse_rank) for name, a in hydra.adapters(model).items()}) == 2  # one a layer
        assert {adapter.scale for adapter in hydra.adapters(model).values()} == {2.0}
    assert "move" in [entry["choice"] for entry in controller.history[1:]] and len(controller.history) == 6
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == set(map(id, train.trained_parameters(model)))


def test_optimizer_state_moves_with_the_components():
    adapter, x = make_adapter()
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=1e-2)
    adapter(x).square().sum().backward()
    optimizer.step()
    before = [copy.deepcopy(optimizer.state[p]) for p in (adapter.lora_A, adapter.lora_B)]
    kept = adapter.resize(2, 0, optimizer=optimizer)
    A, moment = adapter.lora_A, optimizer.state[adapter.lora_A]["exp_avg"]
    assert adapter.resize(5, 0, optimizer=optimizer).tolist() == [0, 1]
    new = adapter.lora_A, adapter.lora_B
    # rows to come: what the gradient's mean [2, in] has outside of the rows' span, and then random ones
    assert torch.allclose(new[0][2:4] @ torch.cat([A.T, new[0][2:4].T], 1), torch.eye(4)[2:], atol=1e-5)
    assert torch.linalg.lstsq(torch.cat([A, new[0][2:4]]).T, moment.T).residuals.sum() < 1e-8
    assert torch.linalg.matrix_rank(new[0]) == 5
    for dim in (0, 1):
        state = optimizer.state[new[dim]]
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == new[dim].shape
            assert torch.equal(state[key].narrow(dim, 0, 2), before[dim][key].index_select(dim, kept))
        assert (state["exp_avg"].narrow(dim, 2, 3) == 0).all()
        assert (state["exp_avg_sq"].narrow(dim, 2, 3) > 0).all()
        assert state["step"] == before[dim]["step"]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, new))


# ---------------------------------------------------------------------------------------------
# the model

@torch.no_grad()
def test_splice_puts_image_tokens_in_place(world, tokenizer):
    model = make_model(world)
    samples = make_samples(world, tokenizer, 3)
    batch = data.collate(list(samples))
    logits = model.eval()(**{**batch, "labels": None})
    embed = model.llm.get_input_embeddings()
    images = (model.projector(model.clip(pixels[None]))[0] for pixels in batch["pixel_values"])
    for row, sample in enumerate(samples):  # one by one, by hand
        tokens = map(torch.tensor, sample["input_ids"])
        parts = [next(images) if token == data.IMAGE_TOKEN else embed(token[None]) for token in tokens]
        expected = model.llm(inputs_embeds=torch.cat(parts)[None]).logits[0]
        assert torch.allclose(logits[row, : len(expected)], expected, atol=1e-5)
    with pytest.raises(ValueError, match="placeholders"):
        model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:1])
    samples.context_length = 50  # a sample is cut after its image is expanded
    embeddings, mask, labels = model.splice(**data.collate([samples[1]]))
    assert embeddings.shape[1] == mask.sum() == labels.shape[1] == 50


@pytest.mark.parametrize("method", ["hydra", "full"])
def test_loss_and_gradient_equal_the_plain_ones(world, tokenizer, monkeypatch, method):
    """Against CLIP run whole, an attention mask, all logits, and a loss over all positions."""
    model = make_model(world, rank=0 if method == "full" else 2, method=method)
    batch = data.collate(list(make_samples(world, tokenizer, 4)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss, count = model(**batch)
    gradient = torch.autograd.grad(loss, trained.values())
    assert count == (batch["labels"][:, 1:] != data.IGNORE).sum()
    nothing, none = model(**data.collate([]))  # as a last incomplete global batch gives
    assert none == 0 and not any(g.any() for g in torch.autograd.grad(nothing, trained.values()))
    hidden = model.clip.clip(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    monkeypatch.setattr(hydra.CLIPEncoder, "forward", lambda _, pixels: hidden)
    embeddings, mask, labels = model.splice(**batch)
    logits = model.llm(inputs_embeds=embeddings, attention_mask=mask.long()).logits
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(plain, loss, rtol=1e-5)
    for name, ours, theirs in zip(trained, gradient, torch.autograd.grad(plain, trained.values())):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name


@pytest.mark.parametrize("method", ["hydra", "full"])
def test_bf16_gives_fp32_gradients_near_the_exact_ones(world, tokenizer, method):
    """As on a GPU: what is frozen in bf16, what trains in fp32, products in bf16."""
    batch, gradients = data.collate(list(make_samples(world, tokenizer, 4))), []
    for is_half in (False, True):
        model = make_model(world, rank=0 if method == "full" else 2, method=method)
        for parameter in model.parameters():
            if is_half and not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss, count = model(**batch)
            with torch.no_grad():
                assert loss.dtype == torch.float32 and torch.allclose(loss, model(**batch)[0], rtol=1e-2)
        (loss / count).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad.dtype == torch.float32 for p in trained)
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_generation_in_a_batch_equals_one_by_one(world, tokenizer, group):
    model = make_model(world, rank=2).eval()
    questions = data.read_json(world / "questions.jsonl")[:6]
    questions[1]["text"] = "A much longer question: " + questions[1]["text"]
    together = list(train.answer(model, tokenizer, questions, world / "images"))
    assert together == [next(train.answer(model, tokenizer, [question], world / "images")) for question in questions]


@pytest.mark.parametrize("stage, method, parts", [
    (1, None, ("projector.",)), (2, "hydra", ("projector.", "lora_")), (2, "full", ("projector.", "llm.")),
])  # fmt: skip
def test_only_the_intended_parameters_get_gradients(world, tokenizer, stage, method, parts):
    model = make_model(world, rank=2 if method == "hydra" else 0, stage=stage, method=method)
    model.train()(**data.collate(list(make_samples(world, tokenizer))))[0].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert not any(module.training for module in model.clip.modules())


# ---------------------------------------------------------------------------------------------
# the commands

def flags(world, runs, stage=2, **changed):
    """Command line of a run on the test world; a flag set to None is left away, to True stands alone."""
    options = dict(
        stage=stage, model=world / "llm", vision_tower=world / "clip", images=world / "images",
        data=world / ("caption.json" if stage == 1 else "instruct.json"),
        questions=None if stage == 1 else world / "questions.jsonl", out=runs / f"stage{stage}", stage1=runs / "stage1",
        global_batch_size=8, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=12, lora_rank=2, lora_alpha=4,
        lora_dropout=0.0, log_steps=2, num_workers=0,
    )  # fmt: skip
    options = {f"--{name}": value for name, value in (options | changed).items() if value is not None}
    return [str(word) for name, value in options.items() for word in ([name] if value is True else [name, value])]


def start(script, *words, call=subprocess.Popen, processes=1, restarts=0, env=(), until=lambda: True, **options):
    """A script of the project as a process, under torchrun for several, once until() holds or it has ended."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes} --max_restarts={restarts}".split()
    words = [sys.executable, *(torchrun if processes > 1 else []), str(HERE / script), *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE), **dict(env)}
    process = call(words, env=env, **({"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options))
    while not until() and process.poll() is None:
        time.sleep(0.001)
    return process


def command(*words, code=0, input="", **options):
    """Run a script of the project, with this text as its input; returns its output."""
    done = start(*words, call=subprocess.run, input=input, timeout=240, **options)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture
def group():
    """A process group of one, for what counts over all processes."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def stage1(world, tmp_path_factory):
    """A folder with a finished stage 1, through the command line."""
    out = tmp_path_factory.mktemp("runs")
    output = command("train.py", *flags(world, out, stage=1))
    assert "4 × 2 × 1 processes = 8" in output and "next: torchrun train.py --stage 2" in output
    return out


@pytest.fixture(scope="session")
def stage2(world, stage1, tmp_path_factory):
    """A finished stage 2 with rank events, through the command line, from another folder and with another umask."""
    folder = tmp_path_factory.mktemp("cwd")
    output = command("train.py", *flags(world, stage1, out=stage1 / "one"), cwd=folder, umask=0o027)
    assert output.count("rank event at step") == 5 and "no image" in output and not any(folder.iterdir())
    return stage1 / "one"


@pytest.fixture
def run(world, stage1, tmp_path, monkeypatch, capsys):
    """run(stage=2, **changed): train.py in this process, which keeps its signal handlers; returns what it says."""

    def run(stage=2, out=tmp_path / "out", **changed):
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        monkeypatch.setattr(sys, "argv", ["train.py", *flags(world, stage1, stage, out=out, **changed)])
        try:
            train.main()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        return capsys.readouterr().out

    return run


def results(out):
    """What a run leaves, but for its speed: log, weights, ranks."""
    folder, log = hydra.find_checkpoint(out), data.read_json(out / "log.jsonl")
    log = [{key: row[key] for key in row if key not in ("tokens_per_s", "result")} for row in log]
    weights = {name: tensor.tolist() for name, tensor in load_file(folder / "model.safetensors").items()}
    return log, weights, hydra.read_config(folder)["ranks"]


def test_stages_leave_a_checkpoint_a_log_and_a_picture(stage2):
    assert [path.name for path in sorted(stage2.iterdir())] == ["checkpoint-12", "log.jsonl", "ranks.png"]
    assert {oct(path.stat().st_mode & 0o777) for path in stage2.rglob("*") if path.is_file()} == {"0o640"}
    rows = data.read_json(stage2 / "log.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10, 12]
    event = next(row for row in rows if "choice" in row)
    assert {"ranks_before", "ranks", "budget", "probe_loss", "coarse", "fine", "spread"} <= event.keys()
    kinds = {"existence", "color", "position", "count", "letter", "choice", "all"}
    assert rows[-1]["result"]["test_loss"].keys() == rows[-1]["result"]["accuracy"].keys() == kinds


def test_gradient_does_not_depend_on_the_split(world, stage1, tokenizer, group):
    """Processes × passes, whole or in parts of a row or a few; Adam's first moment is a tenth of the first gradient.

    The global batch is incomplete, of images and text alone, so that some processes see no image.
    """
    moments, changed = [], dict(global_batch_size=96, per_device_train_batch_size=12)
    for processes, bound in ((1, 100_000), (1, 1), (1, 200), (2, 400), (4, 12288)):
        out = stage1 / f"split-{processes}-{bound}"
        words = flags(world, stage1, out=out, max_steps=1, method="lora", max_grad_norm=1e30, questions=None, **changed,
                      gradient_accumulation_steps=8 // processes, max_tokens_per_pass=bound)  # fmt: skip
        command("train.py", *words, processes=processes)
        state = torch.load(hydra.find_checkpoint(out) / "trainer.pt", weights_only=True)["optimizer"]["state"]
        moments.append(torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)]).double())
    assert all((other - moments[0]).norm() <= 1e-6 * moments[0].norm() for other in moments[1:])
    records, *_ = train.read_data(train.parse_arguments(flags(world, stage1, **changed)))
    samples, (batch,) = make_samples(world, tokenizer, records), data.global_batches(records, 96, seed=0, epoch=0)
    last = data.micro_batches(batch, per_device=12, world_size=2)[-1]
    counts = [len(data.bounded_batches([samples[i] for i in share], 400, 9)) for share in last]
    assert counts[0] != counts[1]  # the two processes exchange gradients after different numbers of parts


@pytest.fixture(scope="session")
def two(world, stage1):
    """A finished stage 2 of two processes."""
    words = flags(world, stage1, out=stage1 / "two", per_device_train_batch_size=2, save_steps=3, keep=3)
    command("train.py", *words, processes=2)
    command("train.py", *words, "--resume", processes=2)  # of a finished run: evaluates again, changes nothing
    return stage1 / "two"


def test_two_processes_equal_one(run, stage1, stage2, two):
    assert [path.name for path in hydra.list_checkpoints(two)] == ["checkpoint-6", "checkpoint-9", "checkpoint-12"]
    moved = shutil.copytree(two, stage1 / "moved", ignore=shutil.ignore_patterns("checkpoint-9", "checkpoint-12"))
    run(out=moved, resume=True)  # from two processes to one, half way
    logs, weights, ranks = zip(*map(results, (stage2, two, moved)))
    assert ranks[0] == ranks[1] == ranks[2]
    for name, weight in weights[0].items():
        assert all(np.allclose(other[name], weight, atol=2e-4) for other in weights), name
    losses = [[row[key] for row in log for key in ("held_out_loss", "probe_loss") if key in row] for log in logs]
    assert len(losses[0]) >= 7 and np.allclose(losses, losses[0], rtol=1e-4)


@pytest.fixture(scope="session")
def undisturbed(world, stage1):
    """Flags and result of a run over an epoch's end, with rank events, dropout, accumulation and passes in parts."""
    words = flags(world, stage1, epochs=2, max_steps=15, lora_dropout=0.1, save_steps=1, max_tokens_per_pass=200)
    command("train.py", *words, "--out", stage1 / "undisturbed")
    return words, results(stage1 / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_result(stage1, undisturbed, number):
    """HYDRA_KILLS=10 pytest -k killed: so many of each signal at random moments, each followed by a resume."""
    rng, out, (words, expected) = random.Random(int(number)), stage1 / f"killed-{number}", undisturbed
    words = ["train.py", *words, "--out", out, "--resume"]
    moments = {  # of the log, before and now
        "a step": lambda before, now: now.count("\n") != before.count("\n"),
        "a save": lambda before, now: any(out.glob("*.unfinished")),
        "a rank event": lambda before, now: now.count('"choice"') > before.count('"choice"'),
        "any time": lambda before, now: True,
    }
    log = lambda: (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    for _ in range(int(os.environ.get("HYDRA_KILLS", 1))):
        moment, later, before = rng.choice(sorted(moments)), rng.uniform(0, 0.2), log()
        process = start(*words, stderr=subprocess.PIPE, until=lambda: moments[moment](before, log()))
        time.sleep(later * (moment != "a save"))
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        # before it has said a word nothing has begun
        assert process.returncode == (-number if number == signal.SIGKILL or not output else 0), output + errors
        assert process.returncode or "go on with --resume" in output or "next: python hydra.py chat" in output
        assert not hydra.find_checkpoint(out) or hydra.load_checkpoint(out)  # what it left can be read
    notes = write((hydra.find_checkpoint(out) or out) / "notes", "the user's")
    command(*words)
    assert results(out) == expected and notes.read_text() == "the user's"
    assert len(list(out.glob("checkpoint-*"))) <= 2  # the last, and what holds the notes


@pytest.mark.parametrize("number, restarts", [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGTERM, 0)])
def test_a_signal_to_one_of_two_processes(world, stage1, two, number, restarts):
    """SIGTERM stops both, saved, with exit code 0; SIGKILL ends both with a message, or torchrun starts both anew."""
    out = stage1 / f"two-{number}-{restarts}"
    words = ["train.py", *flags(world, stage1, out=out, per_device_train_batch_size=2, save_steps=1), "--resume"]
    process = start(*words, processes=2, restarts=restarts, until=lambda: hydra.list_checkpoints(out))
    os.kill(int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1]), number)
    output = process.communicate(timeout=120)[0]
    died = number == signal.SIGKILL and not restarts
    assert process.returncode == died, output
    said = "stopped by a signal" in output, "Signal 9 (SIGKILL) received" in output
    assert said == (number == signal.SIGTERM, died)
    command(*words, processes=2)  # goes on; after a restart it is finished, and evaluates again
    assert results(out)[1:] == results(two)[1:]


def test_a_signal_to_all_processes_of_a_run(world, stage1, tmp_path):
    """SIGTERM to the reading workers, too, as torchrun and terminals send it."""
    words = flags(world, stage1, out=tmp_path / "out", num_workers=2, max_steps=200)
    process = start("train.py", *words, start_new_session=True)
    next(line for line in process.stdout if "loss" in line and "lr" in line)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by a signal" in output, output
    assert hydra.find_checkpoint(tmp_path / "out")


def test_two_runs_in_one_folder(run, world, stage1, tmp_path):
    """The second is refused while the first is there, and not once it was killed."""
    log = tmp_path / "out" / "log.jsonl"
    process = start("train.py", *flags(world, stage1, out=log.parent), until=lambda: log.exists() and log.read_text())
    process.send_signal(signal.SIGSTOP)  # for as long as the second takes
    refused("log.jsonl: another run is writing it", run, resume=True)
    process.kill()
    process.wait()
    assert "next: python hydra.py chat" in run(resume=True)


def test_a_full_disk_leaves_whole_checkpoints(stage1, undisturbed):
    """Full when the file-size limit is reached: an error in one line, and the run resumes to the same result."""
    (words, expected), out = undisturbed, stage1 / "full"
    words = ["train.py", *words, "--out", out, "--resume"]
    size = (hydra.find_checkpoint(stage1 / "undisturbed") / "trainer.pt").stat().st_size
    for most in (size - 2000, 2000):  # of a checkpoint's last file; of config.json, later the log
        output = command(*words, code=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
        assert output.splitlines()[-1].startswith("train.py: error: ")
        assert "File too large" in output and "Traceback" not in output
    command(*words)
    assert results(out) == expected


def test_a_folder_is_replaced_after_a_kill_between_the_renames(tmp_path):
    for name in ("run", ".run.old", ".run.unfinished", "run.old"):  # the last is the user's
        write(tmp_path / name / "file", "old")
    with data.whole(tmp_path / "run") as folder:
        write(folder / "file", "new")
    assert (tmp_path / "run/file").read_text() == "new" and (tmp_path / "run.old/file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.old"]


def test_a_step_without_a_finite_gradient_is_left_out(run, tmp_path, monkeypatch):
    forward, factors = hydra.HydraVLM.forward, iter([1, 1, math.inf, 1, 1, 1, 1, math.inf] + 99 * [1])

    def broken(self, *args, **kwargs):
        loss, count = forward(self, *args, **kwargs)
        return loss * (next(factors) if self.training else 1), count

    monkeypatch.setattr(hydra.HydraVLM, "forward", broken)
    run()
    log = [row for row in results(tmp_path / "out")[0] if "lr" in row]
    assert [row.get("skipped_steps", 0) for row in log] == [1, 2, 2, 2, 2, 2]
    assert all(math.isfinite(row["loss"]) for row in log)
    monkeypatch.undo()
    far = dict(learning_rate=1e30, max_grad_norm=1e30)
    refused(r"(?s)no finite gradient for 11 steps.*look at records \['instruct-", run, out=tmp_path / "none", **far)
    refused("gives no finite loss any more; lower --learning_rate", run, out=tmp_path / "short", max_steps=3, **far)


@pytest.mark.parametrize("sign, message", [
    ('"choice": "start"', "step 1: ranks differ between processes"), ("[(0, '", "not the same for all processes"),
])  # fmt: skip
def test_processes_that_differ_stop_the_run(run, monkeypatch, sign, message):
    gather = train.gather
    monkeypatch.setattr(train, "gather", lambda values: gather(values) + ["another's"] * (sign in str(values)))
    refused(message, run)


def test_full_memory_is_said_in_a_line(run, monkeypatch):
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    monkeypatch.setattr(train, "run", Mock(side_effect=[torch.OutOfMemoryError, killed]))
    refused("the GPU's memory is full: lower --max_tokens_per_pass", run)
    refused("a process that reads images was killed: lower --num_workers", run)


def test_eval_answers_and_scores(run, world, stage1, stage2, tmp_path):
    answers = tmp_path / "answers.jsonl"
    changed = dict(stage="eval", checkpoint=stage2, benchmark="vqa", answers=answers, out=None)
    output = command("train.py", *flags(world, stage1, **changed), processes=2)
    assert "48 questions, 0 answered before" in output and "accuracy" in output
    rows = data.read_json(answers)
    assert {row["model_id"] for row in rows} == {str(hydra.find_checkpoint(stage2))}
    os.truncate(answers, answers.stat().st_size // 2)  # as a kill would
    assert "0 answered before" not in run(**changed)
    texts = [sorted((row["question_id"], row["text"]) for row in them) for them in (rows, data.read_json(answers))]
    assert texts[0] == texts[1]
    questions = data.read_json(world / "questions.jsonl")
    other = write(tmp_path / "q.jsonl", [question | {"text": question["text"] + " Now?"} for question in questions])
    weights = [row | {"weights": 1} for row in rows]
    for name, content, more, message in [
        ("1.jsonl", [{"1": 2}], {}, "lacks the text 'question_id'"), ("2.json", {"1": 2}, {}, "is no row of ours"),
        ("3.jsonl", [[1]], {}, "lacks the text"), ("4.jsonl", weights, {}, "of another model"),
        ("5.jsonl", rows, dict(questions=other), "of another model .* wording"),
        ("6.jsonl", [], dict(checkpoint=world / "llm", vision_tower=world / "clip"), "has no trained projector"),
    ]:  # fmt: skip
        before = write(tmp_path / name, content).read_bytes()
        refused(message, run, **changed | more | {"answers": tmp_path / name})
        assert (tmp_path / name).read_bytes() == before
    words = flags(world, stage1, **changed | dict(images=tmp_path, answers=tmp_path / "7.jsonl", num_workers=2))
    assert "00096.png: no such image" in command("train.py", *words, code=2)  # no reading process keeps it from ending


@pytest.mark.parametrize("words", ["--stage 1", "--stage 2", "--stage 2 --method full"])
def test_memory_expected_is_memory_counted(words):
    config = train.parse_arguments(["--model", "bench", *words.split()])
    train.complete(config, 1)
    mode, model = fake_model(config)
    fixed, per_token = train.expected_peak(model, config, torch.device("cuda"))
    counted = count_step(model, pass_of(model, config, 12, 10**6, mode)[1][:2], as_on_gpu=True)
    assert fixed + config.max_tokens_per_pass * per_token == pytest.approx(sum(counted.values()), rel=0.1)


def test_a_card_too_small_is_refused_with_the_numbers(world, stage1, group, monkeypatch):
    arguments = train.parse_arguments(flags(world, stage1)), make_model(world, rank=2), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", Mock(return_value=(card := Mock(total_memory=200_000))))
    refused(r"alone take 0\.\d GB, and the GPU has 0\.0", train.check_memory, *arguments)
    card.total_memory = 30_000_000
    train.check_memory(*arguments)
    assert 1000 < arguments[0].max_tokens_per_pass < 12_288  # the default is lowered to what fits
    refused("10000000: images read ahead", train.check_memory, replace(arguments[0], num_workers=10**7), *arguments[1:])


# ---------------------------------------------------------------------------------------------
# chat and exports

@pytest.fixture(scope="session")
def uneven(stage2):
    """A stage-2 checkpoint with another rank in every module, one of them 1, and B far from zero."""
    torch.manual_seed(0)
    folder = stage2.parent / "uneven"
    model, config = hydra.load_checkpoint(stage2)[0], hydra.read_config(stage2)
    for i, adapter in enumerate(hydra.adapters(model).values()):
        adapter.resize(i + 1, 0)
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    hydra.freeze(model, 2, "hydra")
    folder.mkdir()
    hydra.write_model(folder, model, {key: config[key] for key in ("stage", "method", "step", "run")})
    return folder


@torch.no_grad()
def agree(*pair):
    """Whether two checkpoints, folders or (model, tokenizer), are the same function."""
    logits = []
    for one in pair:
        model, tokenizer = hydra.load_checkpoint(one) if isinstance(one, Path) else one
        input_ids, _ = data.encode_conversation(turns("<image>\nWhat is it?"), tokenizer, "v1")
        pixels = data.image_to_tensor(Image.new("RGB", (50, 40), (90, 90, 90)), model.image_size, "pad")
        logits.append(model(torch.tensor([input_ids]), None, pixels[None]))
    return torch.allclose(*logits, atol=1e-5)


def test_chat_reads_to_the_end_and_prints_on_any_terminal(world, uneven, tmp_path):
    """Two questions to a model that says nothing but bytes beyond ASCII, on a terminal that knows no others."""
    hydra.export(uneven, "mobilevlm", tmp_path / "vlm")
    state = torch.load(tmp_path / "vlm" / "pytorch_model.bin", weights_only=True)
    head = state["lm_head.weight"]
    more, less = hydra.load_llm(world / "llm")[1]("é", add_special_tokens=False).input_ids[-2:]
    head.zero_()
    head[more], head[less] = 1, -1
    torch.save(state, tmp_path / "vlm" / "pytorch_model.bin")
    words = ["chat", tmp_path / "vlm", "--vision_tower", world / "clip", "--max_new_tokens", 4, "--image"]
    ascii, image = {"PYTHONIOENCODING": "ascii"}, world / "images" / "00000.png"
    output = command("hydra.py", *words, image, input="What is it?\nAnd now?\n", env=ascii)
    assert output.isascii() and len(re.findall(r"(\\ufffd)+\n", output)) == 2
    output = command("hydra.py", *words, "é.png", env=ascii, code=2)
    assert output.startswith("hydra.py: error: ") and "\\xe9.png: no such image" in output and output.count("\n") == 1


def test_chat_keeps_the_conversation_and_the_image(world, stage2, tokenizer, monkeypatch):
    generate = Mock(return_value=torch.tensor([tokenizer(" Red").input_ids]))
    monkeypatch.setattr(hydra.HydraVLM, "generate", generate)
    monkeypatch.setattr(sys, "stdin", io.StringIO("<image> What is it?\nAnd <image>now?\n"))
    image = str(world / "images" / "00000.png")
    hydra.chat(stage2, image)
    (first, pixels), (second, same) = ((call.args[0][0].tolist(), call.args[2]) for call in generate.call_args_list)
    expected, _ = data.encode_conversation(turns("<image>\nWhat is it?", "Red", "And now?"), tokenizer, "v1")
    assert second == expected and second[: len(first)] == first and torch.equal(pixels, same)
    refused("has no trained projector", hydra.chat, world / "llm", image, "Who?", vision_tower=world / "clip")


def test_export_as_mobilevlm_reads_back(uneven, stage1, tmp_path):
    for checkpoint, part in ((uneven, "adapters"), (stage1 / "stage1", "projector")):
        hydra.export(checkpoint, "mobilevlm", tmp_path / part)
        back = hydra.load_checkpoint(tmp_path / part)
        assert back[0].stage == 1 and not hydra.adapters(back[0])
        assert agree(back, checkpoint)
        for name in (tmp_path / part, checkpoint):  # what was trained is as it was, whatever the frozen parts' dtype
            half, _ = hydra.load_checkpoint(name, dtype=torch.bfloat16)
            pairs = zip(half.projector.parameters(), back[0].projector.parameters(), strict=True)
            assert half.llm.dtype == torch.bfloat16 and all(torch.equal(*pair) for pair in pairs)
        assert all(path.stat().st_mode & 0o044 for path in (tmp_path / part).iterdir())  # as the umask says
    other = edited(tmp_path / "adapters", tmp_path / "other", mm_projector_type="ldpnetv2")
    refused("config.json: mm_projector_type is 'ldpnetv2'", hydra.load_checkpoint, other)
    for arguments, message in [
        ((uneven, "hf", tmp_path / "projector"), "exists; name another folder, or add --force"),
        ((uneven, "hf", uneven.parent, "float32", False, True), "is no export of ours"),
        ((stage1 / "stage1", "peft", tmp_path / "new"), "has no adapters"),
        ((uneven, "hf", tmp_path / "new", "float32", True), "--padded: is for --format peft alone"),
    ]:
        refused(message, hydra.export, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "other", "projector"]


def test_export_as_hf_reads_back_and_replaces_an_export_alone(world, uneven, tmp_path):
    to = tmp_path / "to"
    hydra.export(uneven, "mobilevlm", to)
    full, words = (9999, 9999), ["export", uneven, "--format", "hf", "--to", to, "--force"]
    output = command("hydra.py", *words, code=2, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full))
    assert "what was there is whole" in output and "Traceback" not in output and [*tmp_path.iterdir()] == [to]
    hydra.export(uneven, "hf", to, force=True)
    model, tokenizer = hydra.load_checkpoint(to, world / "clip", to / "mm_projector.bin")
    model.llm = LlamaForCausalLM.from_pretrained(to).eval()
    assert agree((model, tokenizer), uneven)
    write(to / "notes" / "monday.md", "stays")
    refused("holds notes, which no export wrote", hydra.export, uneven, "hf", to, force=True)
    assert (to / "notes" / "monday.md").read_text() == "stays"


@pytest.mark.parametrize("padded", [False, True])
def test_export_as_peft_reads_back(uneven, tmp_path, capsys, padded):
    peft = pytest.importorskip("peft", reason="peft is not installed: no comparison with its LoRA")
    to = tmp_path / "peft"
    hydra.export(uneven, "peft", to, padded=padded)
    assert "largest rank is 14" in capsys.readouterr().out
    readme = (to / "README.md").read_text()
    assert "peft.PeftModel" in readme and "transformers.LlamaForCausalLM" in readme
    assert all(path.stat().st_mode & 0o044 for path in to.iterdir())  # as the umask says
    config = json.loads((to / "adapter_config.json").read_text())
    ranks = {len(tensor) for name, tensor in load_file(to / "adapter_model.safetensors").items() if "lora_A" in name}
    if padded:
        assert ranks == {14} == {config["r"]} and "rank_pattern" not in config
    else:
        assert ranks == set(range(1, 15)) and config["rank_pattern"].keys() == config["alpha_pattern"].keys()
        assert config["rank_pattern"]["model.layers.0.self_attn.q_proj"] == 1
    model, tokenizer = hydra.load_checkpoint(uneven)
    llm = LlamaForCausalLM.from_pretrained(config["base_model_name_or_path"])
    model.llm = peft.PeftModel.from_pretrained(llm, to).eval().base_model.model
    assert agree((model, tokenizer), uneven)


def test_models_that_were_moved_or_stretched(world, uneven, tmp_path):
    """A CLIP that is gone is named, and another accepted; an export and its CLIP can be moved together."""
    gone = edited(uneven, tmp_path / "gone", vision_tower="/nowhere/clip")
    image = str(world / "images" / "00000.png")
    refused("config.json: its vision_tower is not at /nowhere/clip", hydra.chat, gone, image, "What?")
    hydra.chat(gone, image, "What?", 2, vision_tower=world / "clip")
    shutil.copytree(world / "clip", tmp_path / "both" / "clip")
    hydra.export(gone, "mobilevlm", tmp_path / "both" / "vlm", vision_tower=tmp_path / "both" / "clip")
    (tmp_path / "both").rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "vlm")
    assert agree(tmp_path / "elsewhere" / "vlm", uneven) and agree(tmp_path / "link", uneven)
    refused("config.json: its model is not at /a", hydra.load_checkpoint, edited(uneven, tmp_path / "no", model="/a"))
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20_000.0}  # goes through an export, too
    scaled = edited(uneven, tmp_path / "run", model=str(edited(world / "llm", tmp_path / "llm", rope_parameters=rope)))
    hydra.export(scaled, "mobilevlm", tmp_path / "vlm")
    assert agree(tmp_path / "vlm", scaled) and not agree(scaled, uneven)
    rope = rope | {"rope_type": "dynamic"}
    refused("rope_type dynamic", hydra.load_llm, edited(world / "llm", tmp_path / "dynamic", rope_parameters=rope))


@needs_reference
def test_published_layout_goes_through_both_stages_and_out(run, tmp_path):
    """A small LLaMA as MobileLLaMA is: tokenizer.model alone, sharded fp16 .bin, a config of transformers 4."""
    folder = tmp_path / "MobileLLaMA"
    write(folder / "config.json", dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-6, rope_scaling=None, hidden_act="silu", torch_dtype="float16",
    ))  # fmt: skip
    shutil.copy(REFERENCE / "golden" / "llama_tokenizer.model", folder / "tokenizer.model")
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).half()
    state = llm.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as older versions did
    save_torch_state_dict(state, folder, max_shard_size="3MB", safe_serialization=False)

    def config_of(stage, name, **changed):
        changed = dict(model=folder, stage1=tmp_path / "stage1", max_steps=1, questions=None, method="lora") | changed
        run(stage, out=tmp_path / name, **changed)
        return hydra.read_config(tmp_path / name)

    config_of(1, "stage1")
    config_of(2, "stage2")
    model, tokenizer = hydra.load_checkpoint(tmp_path / "stage2")
    assert model.llm.dtype == torch.float32 and tokenizer(" Hello", add_special_tokens=False).input_ids == [15043]
    vlm = tmp_path / "mobilevlm"
    for format in ("hf", "mobilevlm"):
        hydra.export(tmp_path / "stage2", format, tmp_path / format, dtype="float16")
        assert (tmp_path / format / "tokenizer.model").is_file()
        assert json.loads((tmp_path / format / "tokenizer_config.json").read_text())["add_bos_token"] is True
        assert LlamaTokenizer.from_pretrained(tmp_path / format)("Hello").input_ids == [1, 15043]
    # what has a projector needs no stage 1 before stage 2: a MobileVLM, a stage 1 as the model, a file
    assert config_of(2, "on a MobileVLM", model=vlm, stage1=None)["model"] == str(vlm)
    assert config_of(2, "on stage 1", model=tmp_path / "stage1", stage1=None)["model"] == str(folder)
    file = tmp_path / "mm_projector.bin"
    torch.save(hydra.build_projector("ldpnetv2", 24, 32).state_dict(), file)
    assert config_of(2, "on a file", projector=file, stage1=None)["projector"] == "ldpnetv2"
    refused("has been through stage 2; first: python hydra.py export", config_of, 2, "no", model=tmp_path / "stage2")


# ---------------------------------------------------------------------------------------------
# benchmarks

def answers_to(questions, *texts):
    """Answers in LLaVA's format."""
    pairs = zip(questions, texts, strict=True)
    return [{"question_id": q["question_id"], "prompt": q["text"], "text": text} for q, text in pairs]


@needs_reference
def test_pope_gives_the_published_numbers():
    pope = REFERENCE / "benchmarks" / "pope"
    questions = data.read_benchmark("pope", pope / "questions.jsonl", pope)
    scores = data.score("pope", questions, data.read_rows(pope / "answers.llava-v1.5-13b.jsonl", data.ANSWER))
    for name, f1 in {"adversarial F1": 0.8446, "popular F1": 0.8625, "random F1": 0.8714, "mean F1": 0.8595}.items():
        assert round(scores[name], 4) == f1
    assert round(scores["random yes ratio"], 4) == 0.4168


def test_vqa_and_gqa_match_exactly(tmp_path):
    rows = [{"question_id": i, "image": "i", "text": "What?", "label": label} for i, label in enumerate(["Red", "two"])]
    questions = data.read_benchmark("vqa", write(tmp_path / "q.jsonl", [rows[0] | {"category": "color"}, rows[1]]))
    assert data.score("vqa", questions, answers_to(questions, " red.", "2")) == {"color": 1, "accuracy": 0.5}
    annotations = write(tmp_path / "a.json", {"0": {"answer": "red"}, "1": {"answer": "two"}})
    questions = data.read_benchmark("gqa", tmp_path / "q.jsonl", annotations)
    assert data.score("gqa", questions, answers_to(questions, "Red", "Two.")) == {"accuracy": 1}


def test_sqa_reads_letters(tmp_path):
    images = [{"image": "i.png"}, {}, {"image": "i.png"}, {"image": None}, {"image": ""}]
    records = [
        {"id": str(i), "conversations": turns("<image>\nWhich?\nA. x", label)} | image
        for i, (label, image) in enumerate(zip(["The answer is A.", "B", "C", "A", "B"], images))
    ]
    questions = data.read_benchmark("sqa", write(tmp_path / "q.json", records))
    assert questions[0]["text"] == "Which?\nA. x\nAnswer with the option's letter from the given choices directly."
    assert [q["image"] for q in questions] == ["i.png", None, "i.png", None, None]
    scores = data.score("sqa", questions, answers_to(questions, "A", "B. y", "I think C", "So The answer is A.", "b"))
    assert scores == {"accuracy": 3 / 5, "accuracy with image": 1 / 2}
    with pytest.raises(data.Mistake, match="record 1, as .* cannot be read"):
        data.read_benchmark("sqa", write(tmp_path / "q.json", [records[0], records[1] | {"image": 5}]))


@pytest.mark.parametrize("benchmark, read, not_read", [
    ("sqa", ["E", "C. d", "x The answer is D."], ["A.", "B.\nx", "F", "The answer is C", "e"]),
    ("mmbench", ["A.", "A", "B. cat"], ["Apple", "A.b", "The answer is A. The answer is B.", ""]),
])  # fmt: skip
def test_letters_are_read_as_the_scripts_do(benchmark, read, not_read):
    for text in read + not_read:
        label = next((letter for letter in text if letter in "ABCDE"), "E")
        question = {"question_id": 0, "image": None, "text": "", "label": label}
        assert data.score(benchmark, [question], answers_to([question], text))["accuracy"] == (text in read), text


def test_textvqa_scores_against_ten_people(tmp_path):
    suffix = "\nReference OCR token: A, B\nAnswer the question using a single word or phrase."
    rows = [{"question_id": "x", "image": "x.jpg", "text": text + suffix} for text in ("What?", "Who is it?")]
    asked = zip(("what?", "Who is it?"), [["cola"] * 3 + ["Cola."] + ["pepsi"] * 6, ["two"] + ["3"] * 9])
    annotations = {"data": [{"image_id": "x", "question": question, "answers": answers} for question, answers in asked]}
    files = write(tmp_path / "q.jsonl", rows), write(tmp_path / "a.json", annotations)
    questions = data.read_benchmark("textvqa", *files)
    answers = answers_to(questions, "the Cola", "2")[::-1]  # matched by their prompts
    # 4 of 10 agree: 1 from all ten; 1 of 10: a third from nine, nothing from the one
    assert data.score("textvqa", questions, answers) == pytest.approx({"accuracy": (1 + 0.3) / 2})
    for text, plain in {
        "The Two, cats.": "2 cats", "1,000.50": "1000.50", "Bob's": "bob 's", "dont": "don't", "a/b": "b",
        "couldnt've": "couldn't've", "x /b-c": "x b c", "None": "0", "somebody'd": "somebodyd", "what?\nno": "what no",
    }.items():  # fmt: skip
        question = questions[0] | {"label": [plain] * 10}
        assert data.score("textvqa", [question], answers_to([question], text)) == {"accuracy": 1}, text


def test_mme_adds_accuracy_and_both_right(tmp_path):
    rows = [{"question_id": f"{category}/{i}.png", "image": f"{category}/{i}.png", "category": category,
             "text": f"Is it {what}?\nAnswer the question using a single word or phrase."}
            for category in ("count", "code_reasoning") for i in (1, 2) for what in ("x", "y")]  # fmt: skip
    asked = [(i, what, label) for i in (1, 2) for what, label in (("x", "Yes"), ("y", "No"))]
    table = "".join(f"{i}.txt\tIs it {what}?  Please answer yes or no.\t{label}\n" for i, what, label in asked)
    for category in ("count", "code_reasoning"):
        write(tmp_path / f"{category}.txt", table)
    questions = data.read_benchmark("mme", write(tmp_path / "q.jsonl", rows), tmp_path)
    texts = ["Yes", "no", "Yes, it is", "I say no", "No", "yes", "yes", "Nope"]
    scores = data.score("mme", questions, answers_to(questions, *texts))
    assert scores == {"count": 75 + 50, "code_reasoning": 50 + 50, "perception": 125, "cognition": 100}
    refused("1 questions have no second one", data.score, "mme", questions[1:], answers_to(questions, *texts)[1:])


@pytest.mark.parametrize("benchmark, instruction", [
    ("mmbench", "Answer with the option's letter from the given choices directly."),
    ("mmbench_cn", "请直接回答选项字母。"),
])  # fmt: skip
def test_mmbench_reads_the_table_and_counts_rotations(tmp_path, benchmark, instruction):
    table = ("\ufeffindex\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n7\tWhich?\tLook.\tcat\tdog\tN/A\tnan\tA\taGk=\n"
             "1000007\tWhich?\tnan\tdog\tcat\t\t\tB\t7\n8\tWho?\t\tx\ty\tz\tw\tD\t" + bomb(20_000) + "\n")  # fmt: skip
    questions = data.read_benchmark(benchmark, write(tmp_path / "q.tsv", table))
    assert questions[0]["text"] == f"Look.\nWhich?\nA. cat\nB. dog\n{instruction}"
    assert questions[1]["image"].endswith(",aGk=") and questions[1]["text"].startswith("Which?\nA. dog")
    said = refused("400000000 pixels", data.open_image, None, questions[2]["image"])
    assert len(said) < 500 and "\n" not in said
    scores = data.score(benchmark, questions, answers_to(questions, "A. cat", "A", "D"))
    assert scores == {"accuracy": 2 / 3, "circular accuracy": 1 / 2}
    for text, message in [(table.replace("hint", "x"), "no column hint"), (table + "9\tWho?\n", "row 4 has more or")]:
        refused(message, data.read_benchmark, benchmark, write(tmp_path / "bad.tsv", text))


QUESTIONS = [{"question_id": i, "image": "i", "text": "What?", "label": "x"} for i in range(4)]


def test_answers_and_labels_must_match_the_questions(tmp_path):
    answers = answers_to(QUESTIONS, "x", "x", "x", "x")
    refused("3 questions have no answer", data.score, "vqa", QUESTIONS, answers[:1])
    for wrong in (answers[:1], [answers[0] | {"question_id": 9}]):
        with pytest.raises(data.Mistake, match="1 answers belong to no question or come twice, e.g. question_id [09]"):
            data.score("vqa", QUESTIONS, answers + wrong)
    questions = write(tmp_path / "q.jsonl", [question | {"category": "x"} for question in QUESTIONS])
    annotations = write(tmp_path / "a.json", {"2": {"answer": "x"}})
    refused("3 questions have no valid label in .*a.json", data.read_benchmark, "gqa", questions, annotations)
    for labels, message in (["NO"], "4 questions have no valid label"), (["yes", "no"], "two labels for i, What?"):
        rows = write(tmp_path / "rows.jsonl", [QUESTIONS[0] | {"label": label} for label in labels])
        rows.rename(tmp_path / "coco_pope_x.json")
        refused(message, data.read_benchmark, "pope", questions, tmp_path)


@pytest.mark.parametrize("rows, message", [
    (2 * QUESTIONS[:2], "4 questions share their question_id"),
    ([QUESTIONS[0], QUESTIONS[1] | {"category": 5}], "1 questions have no text, or a category that is not text"),
    ([QUESTIONS[0], QUESTIONS[1] | {"text": " "}], "1 questions have no text, or a category that is not text"),
    ([QUESTIONS[0], {"question_id": 1, "image": "i", "text": "What?"}], "line 2 lacks the text 'label'"),
    ([QUESTIONS[0] | {"text": "Is it \udc80?"}], "half of a surrogate pair"),
])  # fmt: skip
def test_bad_questions(tmp_path, rows, message):
    refused(message, data.read_benchmark, "vqa", write(tmp_path / "q.jsonl", rows))


def test_a_cut_answers_file(tmp_path):
    questions = write(tmp_path / "q.jsonl", [QUESTIONS[0] | {"label": "ä"}, QUESTIONS[1]])
    answers = write(tmp_path / "a.jsonl", answers_to(QUESTIONS[:2], "ä", "b"))
    words = ["data.py", "score", "vqa", "--answers", answers, "--questions", questions]
    assert "accuracy                  0.5000    50.00 %" in command(*words)
    answers.write_bytes(answers.read_bytes()[:-10])
    output = command(*words, code=2)
    assert "line 2, the last, is cut short" in output and len(output.splitlines()) == 1
    joined = data.join_answers("vqa", data.read_benchmark("vqa", questions), answers_to(QUESTIONS[:1], "ä"))
    assert [answer is None for _, answer in joined] == [False, True]


# ---------------------------------------------------------------------------------------------
# bad input: one line that names it, exit code 2

@pytest.mark.parametrize("content, message", [
    ([record(conversations=[turns("a")[0] | {"loss": False}])], "not to be learned"), ({"a": 1}, "list of records"),
    ([record(conversations=2 * turns("<image>"))], "take turns"), ([record(video="a.mp4")], "has a field 'video'"),
    ('{"conversations": "x"}', r"records.json.*has no list 'conversations'"),
    ('[{"a": 1}]\n]', "records.json: .*is not valid JSON"), ([], "list of records"), ("not json", "not valid JSON"),
    ('{"a": 1}\n{"b"', "records.json: line 2.* is not valid JSON"),
    ('[{"id": "\ud83d', "is not valid JSON"), ("[" * 100_000, "is not valid JSON"),
    ([record(conversations=None)], r"record 0 \(r\): has no list 'conversations'"),
    ([record(conversations=[{"from": "robot", "value": "x"}])], "unknown speaker 'robot'"),
    ([record(conversations=turns("What?", "x"))], "has an image and 0 <image>"),
    ([record(conversations=turns("<image><image>", "x"))], "has an image and 2 <image>"),
    ([record(conversations=turns("What?", "<image>"))], "has <image> in an answer"),
    ([record(conversations=turns("<image>", "a \ud83d b"))], "half of a surrogate pair"),
    ([{"id": "r", "conversations": record()["conversations"]}], "no field 'image'"),
    ([record(image="nowhere.png"), record(image=7)], r"(?s)nowhere.png does not exist.*2 of 2 records are wrong"),
    ([record(image="../00000.png")], "not the name of a file inside the image folder"),
])  # fmt: skip
def test_bad_records(world, tmp_path, content, message):
    refused(message, data.read_records, write(tmp_path / "records.json", content), world / "images")


def test_records_as_users_write_them(tmp_path):
    """JSON lines in a .json; images that are none, absolute, through links, beside a link to itself, of odd names."""
    images, link, odd = tmp_path / "images", tmp_path / "link", b"caf\xe9.png".decode(errors="surrogateescape")
    images.mkdir()
    for name in ("a.png", odd):
        Image.new("RGB", (8, 8)).save(images / name)
    link.symlink_to(images)
    (images / "loop").symlink_to(images / "loop")
    text = turns("What?", "x")
    rows = [record(image=None, conversations=text), record(image="", conversations=text)]
    rows += [record(image=str(name)) for name in (images / "a.png", link / "a.png", odd)]
    records = data.read_records(write(tmp_path / "r.json", "".join(json.dumps(row) + "\n" for row in rows)), link)
    assert [row.get("image") for row in records] == [None, None, "a.png", "a.png", odd]
    assert data.fingerprint(records) != data.fingerprint(records[::-1])
    assert data.fingerprint(records) == data.fingerprint(json.loads(json.dumps(records)))
    (only,) = data.read_records(write(tmp_path / "r.json", json.dumps(rows[2]) + "\n"), images)
    assert only["image"] == "a.png"
    shutil.copytree(images, tmp_path / "disk", symlinks=True)
    (images / "vg").symlink_to(tmp_path / "disk")
    rows = write(tmp_path / "r.json", [record(image="vg/a.png")])
    refused("leaves .*images through a link", data.read_records, rows, images)


@pytest.mark.parametrize("changed, message", [
    (dict(data="nowhere.json"), "nowhere.json: cannot be read"),
    (dict(images="nowhere"), "--images nowhere: no such image folder"),
    (dict(images=None), "--images"), (dict(lora_rnk=4), "unrecognized arguments: --lora_rnk"),
    (dict(global_batch_size=6), r"4 × .* = .*, not --global_batch_size 6"),
    (dict(global_batch_size=3), r"4 × --gradient_accumulation_steps 1 × 1 processes = 4, not --global_batch_size 3"),
    (dict(lora_dropout=1.5), "--lora_dropout 1.5: give a share below 1"),
    (dict(lora_rank=0), "--lora_rank 0: give a positive number"), (dict(out=""), "--out: is empty"),
    (dict(lora_rank=33), "rank 33 for a linear of 32 -> 32: use 1 to 32"),
    (dict(stage1="nowhere"), "in nowhere; first run: torchrun train.py --stage 1 --model .* --out nowhere"),
    (dict(model="nobody/nothing"), "neither a folder nor reachable on the hub: download it, or give a folder"),
    (dict(projector="ldpnetv2"), "with projector ldpnet, not stage 1 with ldpnetv2"),
    (dict(max_tokens_per_pass=0), "--max_tokens_per_pass 0: give a positive number"),
    (dict(learning_rate=math.inf), "--learning_rate inf: give a positive number"),
    (dict(seed=2_000_000_000), "--seed 2000000000: give a positive number below 1e\\+09"),
    (dict(checkpoint="runs/a"), "--checkpoint: is for --stage eval alone"),
    (dict(out="caf\udce9"), "--out: holds half of a surrogate pair, or bytes that are no UTF-8"),
    (dict(out=__file__), "--out .*test_hydra.py: is a file; name a folder"),
])  # fmt: skip
def test_bad_flags(run, changed, message):
    refused(message, run, **changed)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR"])
def test_a_part_of_what_torchrun_sets(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    refused(f"{name} is set, but not all that torchrun sets", train.set_up_processes)


def test_a_run_is_not_overwritten_and_another_not_continued(run, world, tmp_path, monkeypatch):
    records = json.loads((world / "instruct.json").read_text())
    changed = dict(data=write(tmp_path / "records.json", records), max_steps=3, questions=None)
    monkeypatch.setattr(train.tqdm, "write", Mock(side_effect=BrokenPipeError))  # who read what it says has gone
    run(**changed)
    copied = shutil.copytree(tmp_path / "out" / "checkpoint-3", tmp_path / "out" / "checkpoint-2026")
    refused("checkpoint-2026 holds step 3, so it is a copy", run, **changed, resume=True)
    shutil.rmtree(copied)
    for other, message in [(dict(), "holds a run"), (dict(method="lora", resume=True), "--method hydra, not lora")]:
        refused(message, run, **changed, **other)
    write(tmp_path / "log" / "log.jsonl", [{"mine": 1}])
    refused("holds a run", run, **changed, out=tmp_path / "log")
    refused("log.jsonl: is no log of a run", run, **changed, out=tmp_path / "log", resume=True)
    refused("is a checkpoint or a model", run, **changed, out=hydra.find_checkpoint(tmp_path / "out"), resume=True)
    records[-1]["conversations"][1]["value"] += "!"  # held out
    write(tmp_path / "records.json", records)
    refused("the records of --data .*records.json are not those", run, **changed, resume=True)
    code = type("Code", (), {"__reduce__": lambda self: (os.mkdir, (str(tmp_path / "made by code"),))})()
    torch.save({"progress": code}, hydra.find_checkpoint(tmp_path / "out") / "trainer.pt")
    refused("trainer.pt: cannot be read", run, **changed, resume=True)
    assert not (tmp_path / "made by code").exists()


LONG = "Which of all the shapes in this image is the one that a child would draw first? " * 40


def test_records_beyond_the_context_are_counted(run, world, tmp_path):
    """In stage 1 those of several answers; the command at the end quotes the run's folder."""
    captions, records = (json.loads((world / name).read_text()) for name in ("caption.json", "instruct.json"))
    for row in captions[:3]:
        row["conversations"] += turns("And?", "A line")
    file, out = write(tmp_path / "records.json", captions), tmp_path / "Bob's run"
    output = run(1, data=file, out=out, max_steps=1)
    assert "3 of 92 records have more than one answer" in output
    assert output.splitlines()[-1].endswith(shlex.join(["--stage1", str(out)]))
    changed = dict(data=file, stage1=out, max_steps=1, questions=None)
    for i, row in enumerate(records[:5]):  # three questions, two answers
        row["conversations"][0 if i < 3 else 1]["value"] += LONG
    write(file, records)
    output = run(**changed)
    assert "training: 5 of 92 records are cut at the context of 256 tokens; 3 have no target" in output
    for row in records:
        row["conversations"][0]["value"] += LONG
    write(file, records)
    refused("none of the 92 training records has an answer within the context of 256", run, **changed, out=out / "no")


def test_prompts_beyond_the_context_are_refused(run, world, stage2, tmp_path):
    one, other = data.read_json(world / "questions.jsonl")[:2]
    questions = write(tmp_path / "q.jsonl", [one, other | {"text": LONG}])
    for changed in ({}, dict(stage="eval", checkpoint=stage2, benchmark="vqa", answers=tmp_path / "answers.jsonl")):
        refused("--questions: 1 of 2 fill the context of 256 .* question_id 1", run, questions=questions, **changed)
    for prompt, message in [(LONG, "--prompt: .* of a context of 256"), ("caf\udce9", "--prompt: holds half of a")]:
        refused(message, hydra.chat, stage2, str(world / "images" / "00000.png"), prompt)


def test_a_broken_image_gives_its_place_to_the_next_record(run, world, stage1, pictures, tmp_path):
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(pictures / "empty.jpg", tmp_path / "images" / "00001.png")
    shutil.copy(pictures / "cut.jpg", tmp_path / "images" / "00095.png")  # of the held-out part
    changed = dict(images=tmp_path / "images", max_steps=None, epochs=2)
    words = flags(world, stage1, **changed, out=tmp_path / "two", max_bad=0.015)  # one image, which is met twice
    output = command("train.py", *words, processes=2)
    assert "image replaced by the next record's: record instruct-1:" in output and "left out: 1 broken images" in output
    assert "held-out record left out: record instruct-95:" in output
    refused("1 of 92 records have a broken image, more than --max_bad 0.001", run, **changed)


def test_check_lists_what_is_wrong(pictures, tmp_path):
    names = ["photo.jpg", "cut.jpg", "nowhere.jpg", "empty.jpg", "alpha.png"]
    records = write(tmp_path / "records.json", [record(id=name, image=name) for name in names])
    words = ["data.py", "check", "--data", records, "--images", pictures, "--workers", 2]
    lines = command(*words, code=1).splitlines()
    assert [line.split("\t")[1] for line in lines if "\t" in line] == ["cut.jpg", "nowhere.jpg", "empty.jpg"]
    assert "3 of 5 records are wrong" in lines
    process = start(*words, stderr=subprocess.PIPE)
    process.stdout.close()  # as `| head` does
    assert process.wait(60) == 0 and "Error" not in process.stderr.read()


def test_show_marks_what_is_masked_on_any_terminal(world, tmp_path):
    records = write(tmp_path / "records.json", [record(conversations=turns("<image>\nCafé?", "東京", "And?", "No"))])
    words = ["show", "--data", records, "--images", world / "images", "--tokenizer", world / "llm"]
    output = command("data.py", *words, env={"PYTHONIOENCODING": "ascii"})
    assert "[<image>]" in output and r"Caf\xe9? ASSISTANT:] \u6771\u4eac</s>[" in output


def test_bad_models(world, uneven, tokenizer, tmp_path):
    llm, state = world / "llm", load_file(world / "llm" / "model.safetensors")
    short, long, cut, lies, other, stale = (edited(llm, tmp_path / str(i)) for i in range(6))
    save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, short / "model.safetensors")
    (long / "model.safetensors").unlink()
    torch.save(state | {"model.extra": torch.ones(3)}, long / "pytorch_model.bin")
    (cut / "model.safetensors").unlink()
    (cut / "pytorch_model.bin").write_bytes((long / "pytorch_model.bin").read_bytes()[:5000])
    (lies / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    save_file({name: tensor + 0.01 * ("embed" in name) for name, tensor in state.items()}, other / "model.safetensors")
    save_file({"model.norm.weight": state["model.norm.weight"]}, stale / "model-00001-of-00003.safetensors")
    wide, file = tmp_path / "mm_projector.bin", tmp_path / "no.bin"
    torch.save(hydra.build_projector("ldpnetv2", 24, 40).state_dict(), wide)
    vlm = edited(llm, tmp_path / "vlm", model_type="mobilevlm", image_aspect_ratio="pad")
    for folder, projector, message in [
        (short, None, "lm_head.weight is missing"), (long, None, "model.extra is unexpected"),
        (cut, None, "pytorch_model.bin: cannot be read"), (lies, None, "model.safetensors: cannot be read"),
        (llm, wide, r"mm_projector.bin: .* is \[40, 24\] in it, \[32, 24\] here"),
        (edited(llm, tmp_path / "bert", model_type="bert"), None, "is neither a LLaMA, a MobileVLM nor a checkpoint"),
        (edited(llm, tmp_path / "vocabulary", vocab_size=1000), None, "(embed_tokens|lm_head).weight.* is mismatched"),
        (edited(llm, tmp_path / "context", max_position_embeddings=9), None, "context of 9, and an image takes 9"),
        (edited(llm, tmp_path / "q", quantization_config={"bits": 4}), None, "quantized"),
        (vlm, None, "model.mlp.1.weight is absent in it"), (llm, file, "unknown projector .*no.bin"),
        (edited(vlm, tmp_path / "layer", mm_vision_select_layer=-1), None, "config.json: mm_vision_select_layer is -1"),
        (edited(vlm, tmp_path / "ratio", image_aspect_ratio="square"), None, "config.json: image_aspect_ratio is 'sq"),
        (edited(vlm, tmp_path / "start", mm_use_im_start_end=True), None, "config.json: mm_use_im_start_end is True"),
        (edited(vlm, tmp_path / "merge", mm_patch_merge_type="spatial"), None, "config.json: mm_patch_merge_type is"),
        (edited(uneven, tmp_path / "moved", model=str(other)), None, "was trained on another LLM or CLIP"),
        (stale, None, "safetensors: has model.norm.weight, which another file there has, too"),
        (edited(uneven, tmp_path / "scale", scale=None), None, "config.json: scale is missing or damaged"),
        (world, None, "no config.json"),
    ]:  # fmt: skip
        assert "\n" not in refused(message, hydra.load_checkpoint, folder, world / "clip", projector)
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(other)
    refused("a tokenizer .* for a model of", hydra.load_llm, other)
    clip = shutil.copytree(world / "clip", tmp_path / "clip")
    steps = hydra.PIXELS | {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    hydra.load_clip(write(clip / "preprocessor_config.json", steps).parent)
    wrong = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "do_rescale": False, "size": 54}
    for file, (key, value) in product(("processor_config.json", "preprocessor_config.json"), wrong.items()):
        write(clip / file, {"image_processor": steps | {key: value}} if file[:4] == "proc" else steps | {key: value})
        refused(f"/{file}: {key} is", hydra.load_clip, clip)
    refused("num_channels is 1", hydra.load_clip, edited(world / "clip", tmp_path / "grey", num_channels=1))


def test_one_owner_for_special_tokens(world, tmp_path):
    """Of five files that may name them; code beside them is not run."""
    code = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LLM"}
    folder = edited(world / "llm", tmp_path / "llm", eos_token_id=7, bos_token_id=9, auto_map=code)
    write(folder / "tokenizer_config.json", data.read_json(folder / "tokenizer_config.json") | {"auto_map": code})
    write(folder / "code.py", f"import os\nos.mkdir({str(tmp_path / 'run')!r})\n")
    write(folder / "generation_config.json", {"eos_token_id": 11})
    llm, tokenizer = hydra.load_llm(folder)
    assert not (tmp_path / "run").exists()
    assert llm.generation_config.eos_token_id == llm.config.eos_token_id == tokenizer.eos_token_id == 2
    (folder / "tokenizer_config.json").unlink()  # then config.json says it
    folder = edited(folder, tmp_path / "again", bos_token_id=1, eos_token_id=2)
    ids = [one("Red </s>", split_special_tokens=True).input_ids for one in (tokenizer, data.load_tokenizer(folder))]
    assert ids[0] == ids[1]
    pieces = Tokenizer(models.BPE({"<unk>": 0, "▁": 1, "a": 2, "▁a": 3}, [("▁", "a")], unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # LLaMA-2's
    pieces.save(str(folder / "tokenizer.json"))
    assert data.load_tokenizer(edited(folder, tmp_path / "two", bos_token_id=0, eos_token_id=0))(" a").input_ids == [3]
    SentencePieceTrainer.train(sentence_iterator=iter([data.SYSTEM] * 9), vocab_size=40, model_type="unigram",
                               model_prefix=str(tmp_path / "two" / "tokenizer"), minloglevel=2)  # fmt: skip
    refused("tokenizer.model: of another kind", data.load_tokenizer, tmp_path / "two")
    write(folder / "config.json", {"model_type": "llama"})
    refused("names no bos_token", data.load_tokenizer, folder)


def test_weights_in_other_layouts(world, tmp_path):
    """Tied, in a .bin of the old format, below state_dict; a vocabulary padded beyond the tokenizer's."""
    state = load_file(world / "llm" / "model.safetensors")
    folder = edited(world / "llm", tmp_path / "old", tie_word_embeddings=True)
    (folder / "model.safetensors").unlink()
    tied = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    torch.save({"state_dict": tied}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    llm, tokenizer = hydra.load_llm(folder)
    assert torch.equal(llm.lm_head.weight, state["model.embed_tokens.weight"])
    folder = edited(world / "llm", tmp_path / "padded", vocab_size=len(tokenizer) + 5)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = F.pad(state[name], (0, 0, 0, 5))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert len(hydra.load_llm(folder)[0].lm_head.weight) == len(tokenizer) + 5


@pytest.mark.parametrize("name", [
    "records.json", "photo.jpg", "palette.png", "moving.gif", "config.json", "model.safetensors", "trainer.pt",
])  # fmt: skip
def test_fuzz(world, stage2, pictures, tokenizer, tmp_path, name):
    """HYDRA_FUZZ=4000 pytest -k fuzz: so many mutations of each; a file is read, or refused in one line."""
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: no fuzzing")
    folder = shutil.copytree(hydra.find_checkpoint(stage2), tmp_path / "checkpoint-12")
    model = hydra.load_checkpoint(folder)[0]
    shutil.copytree(pictures, folder, symlinks=True, dirs_exist_ok=True)
    write(folder / "records.json", json.loads((world / "instruct.json").read_text())[:3])
    content = (folder / name).read_bytes()

    def test(edits):
        mutated = content
        for at, new, dropped in edits:
            i = int(at * len(mutated))
            mutated = mutated[:i] + new + mutated[i + dropped :]
        (folder / name).write_bytes(mutated)
        try:
            if name == "records.json":
                for sample in make_samples(world, tokenizer, data.read_records(folder / name, world / "images")):
                    assert len(sample["input_ids"]) == len(sample["labels"])
            elif (pictures / name).is_file():
                data.image_to_tensor(data.open_image(folder, name), 32, "pad")
            elif name == "trainer.pt":
                with data.reading(folder / name):
                    torch.load(folder / name, map_location="cpu", weights_only=True)
            else:
                hydra.restore(model, folder)
        except data.Mistake as error:
            assert name == "records.json" or "\n" not in str(error)  # a line for each record

    st = hypothesis.strategies
    new = st.binary(max_size=4) | st.sampled_from([b'"', b"[", b"{}", b"null", b"-1", b"\xff" * 8])
    edits = st.lists(st.tuples(st.floats(0, 1), new, st.integers(0, 9)), min_size=1, max_size=5)
    count = int(os.environ.get("HYDRA_FUZZ", 40))
    hypothesis.settings(max_examples=count, deadline=2000, database=None)(hypothesis.given(edits)(test))()


# ==========================================================================================
# Experiments, for those who check claims. None of it is needed to train, or to read hydra.py, train.py and data.py.
# compare: methods in pairs: the runs of a seed have the same data order, projector and budget

RIVALS = ("eva", "adalora")  # PEFT's: train.py does not know them


def use_peft(model, method, rank, scale, dropout, steps, batches):
    """PEFT's adapters in the place of ours; returns what is to be done before and after each step of the optimizer.

    eva        rows of A and ranks by the variance of the inputs, no rank above twice the budget's (rho = 2); then fixed
    adalora    from 1.5 times the budget's rank down to it, between 10 and 50 % of the steps
    batches: of one sample each, for eva. Both count the budget in components, whatever these cost.
    """
    import peft

    for name, adapter in hydra.adapters(model).items():
        model.llm.set_submodule(name, adapter.base)
    common = {"target_modules": [name.split(".")[1] for name in hydra.PROJECTIONS], "lora_dropout": dropout}
    if method == "eva":
        common |= dict(r=rank, lora_alpha=scale * rank, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
        llm = peft.get_peft_model(model.llm, peft.LoraConfig(**common), low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(
            llm, batches, forward_fn=lambda _, batch: model(**batch), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, gather_distributed_inputs=False, show_progress_bar=False,
        )  # fmt: skip
        return [lambda *_: None] * 2
    first = round(1.5 * rank)
    common |= dict(init_r=first, target_r=rank, lora_alpha=scale * first, total_step=steps)
    llm = peft.get_peft_model(model.llm, peft.AdaLoraConfig(tinit=steps // 10, tfinal=steps // 2, deltaT=10, **common))
    factors = [(name, p) for name, p in llm.named_parameters() if re.search("lora_[AB]", name)]
    steps = iter(range(steps))

    def penalty(*_):  # AdaLoRA's own forward adds it to a loss that ours does not give it
        wide = [p.T if "lora_B" in name else p for name, p in factors]
        (0.5 * sum((p @ p.T - torch.eye(len(p), device=p.device)).norm() for p in wide) / len(wide)).backward()

    return penalty, lambda *_: llm.base_model.update_and_allocate(next(steps))


def ranks_of(llm):
    """[layers, 7] of our adapters or PEFT's; EVA leaves some modules without, AdaLoRA sets entries of E to zero."""
    modules = [[layer.get_submodule(name) for name in hydra.PROJECTIONS] for layer in llm.model.layers]
    factors = lambda module: (p for name, p in module.named_parameters() if re.search("lora_[AE]", name))
    return [[min((int(p.any(1).sum()) for p in factors(module)), default=0) for module in row] for row in modules]


def damage(llm, layer):
    """Add noise of rank 12, of twice the weight's norm, to the seven linears of a layer: a backbone made small."""
    if int(layer) >= len(llm.model.layers):
        raise data.Mistake(f"--damage noise:{layer}: the LLM's layers are 0 to {len(llm.model.layers) - 1}")
    generator = torch.Generator().manual_seed(0)
    for name in hydra.PROJECTIONS:
        linear = llm.model.layers[int(layer)].get_submodule(name)
        weight = getattr(linear, "base", linear).weight.data
        U, V = (torch.randn(size, 12, generator=generator) for size in weight.shape)
        noise = (U @ V.T).to(weight)
        weight += 2 * weight.norm() * noise / noise.norm()


def train_further(argv):
    """train.py's run of a damaged LLM or a rival ("" for neither); at its end it has ranks.json."""
    harm, rival, *words = argv
    config, build_model, built = train.parse_arguments(words), train.build_model, []
    for checkpoint in hydra.list_checkpoints(config.out) if rival else ():  # which do not hold PEFT's adapters
        shutil.rmtree(checkpoint)

    def build(*args):
        model, tokenizer = build_model(*args)
        built.append(model.llm)
        if harm:
            damage(model.llm, harm.split(":")[1])
        if rival:
            records = train.read_data(config)[0]
            steps = min(config.max_steps or math.inf, config.epochs * -(-len(records) // config.global_batch_size))
            picked = records[:: math.ceil(len(records) / 64)]  # as for our align
            batches = [data.collate([row]) for row in train.make_samples(picked, config.images, model, tokenizer, "v1")]
            scale = config.lora_alpha / config.lora_rank
            before, after = use_peft(model, rival, config.lora_rank, scale, config.lora_dropout, steps, batches)
            register_optimizer_step_pre_hook(before)
            register_optimizer_step_post_hook(after)
        return model, tokenizer

    with patch.object(train, "build_model", build):
        train.run(config)
    if "result" in data.read_json(Path(config.out, "log.jsonl"))[-1]:  # else a signal stopped it
        Path(config.out, "ranks.json").write_text(json.dumps(ranks_of(*built)))


def compare(argv):
    """Stage 2 by several methods and seeds; what is not known here goes to train.py word for word, {seed} replaced."""
    parser = train.Parser(prog="test_hydra.py compare", allow_abbrev=False)
    parser.add_argument("--methods", default="aligned,hydra", help="METHOD or METHOD:RANK, the first is compared with")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--damage", default="", help="of the LLM: noise:LAYER")
    parser.add_argument("--out", default="runs/tiny/compare")
    args, rest = parser.parse_known_args(argv)
    if not re.fullmatch(r"(noise:\d+)?", args.damage):
        raise data.Mistake(f"--damage {args.damage}: give noise:LAYER")
    methods = with_peft(args.methods.split(","))
    seeds = range(args.seed, args.seed + args.seeds)

    def plan(name, seed):
        """(folder, argv of train_further): other flags, another folder. Mistake for what train.py refuses."""
        method, _, rank = name.partition(":")
        words = ["--stage", "2", *rest, "--method", "lora" if method in RIVALS else method, "--seed", seed]
        words += ["--lora_rank", rank, "--lora_alpha", 2 * int(rank)] if rank else []
        words = [str(word).replace("{seed}", str(seed)) for word in words]
        words = [args.damage, method if method in RIVALS else "", *words]
        folder = Path(args.out, f"{name}-{seed}-{zlib.crc32(shlex.join(words).encode()):08x}".replace(":", "-"))
        words += ["--out", str(folder), "--resume"]
        train.parse_arguments(words[2:])
        return folder, words

    def run(name, seed):
        folder, words = plan(name, seed)
        ranks = folder / "ranks.json"
        if not ranks.is_file():
            done = subprocess.run([sys.executable, __file__, "train", *words], capture_output=True, text=True,
                                  env={"OMP_NUM_THREADS": "1", **os.environ})  # fmt: skip
            if not ranks.is_file():
                raise data.Mistake(f"{shlex.join(words)}: {(done.stderr.strip() or 'stopped').splitlines()[-1]}")
        result = data.read_json(folder / "log.jsonl")[-1]["result"]
        if "test_loss" not in result:
            raise data.Mistake("--questions: give held-out questions, which the methods are compared on")
        print(f"{name:14} seed {seed}  test {result['test_loss']['all']:.4f}", flush=True)
        return result | {"ranks": json.loads(ranks.read_text())}

    jobs = list(product(methods, seeds))
    for job in jobs:  # a misspelt flag is found before the first run
        plan(*job)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(run, *zip(*jobs))))
    some = np.random.default_rng(0).choice((1, -1), (65536, args.seeds))
    signs = np.array([*product((1, -1), repeat=args.seeds)]) if args.seeds <= 16 else some
    print(f"{'':14}{'parameters':>11}{'test loss':>19}{'difference ± 2 standard errors':>34}{'p':>7}{'accuracy':>10}")
    for name in methods:
        own = [results[name, seed] for seed in seeds]
        losses = np.array([result["test_loss"]["all"] for result in own])
        base = np.array([results[methods[0], seed]["test_loss"]["all"] for seed in seeds])
        gap = 100 * (losses / base - 1)
        line = f"{name:14}{max(r['parameters'] for r in own):11,}{losses.mean():10.4f} ± {losses.std():.4f}"
        if name != methods[0] and len(gap) > 1:
            # p of the sign-flip test: how many of all signs, or of 65,536 drawn ones, give as large a sum
            p = (abs(signs @ gap) >= abs(gap.sum()) - 1e-12).mean()
            line += f"{gap.mean():+22.1f} % ± {2 * gap.std(ddof=1) / math.sqrt(len(gap)):5.1f}  {p:7.3f}"
        print(f"{line:85}{np.mean([r['accuracy']['all'] for r in own]):10.3f}  {gap.round(1).tolist()}")
    print(f"{'ranks at the end, mean':24}" + "".join(f"{name.split('.')[1][:-5]:>7}" for name in hydra.PROJECTIONS))
    for name in methods:
        for layer, row in enumerate(np.mean([results[name, seed]["ranks"] for seed in seeds], 0)):
            hit = f"  <- {args.damage}" if args.damage.split(":")[1:2] == [str(layer)] else ""
            print(f"{name:14} layer {layer:<3}" + "".join(f"{rank:7.1f}" for rank in row) + hit)


def with_peft(methods):
    """The methods that can be run here."""
    absent = [name for name in methods if name in RIVALS and not find_spec("peft")]
    for name in absent:
        print(f"{name}: left out, peft is not installed")
    return [name for name in methods if name not in absent]


def test_compare_runs_all_methods_in_pairs(world, stage1):
    pytest.importorskip("peft")
    words = flags(world, stage1, stage=None, out=stage1 / "compare", learning_rate=None, max_steps=6)
    words += ["--seeds", 2, "--damage", "noise:1", "--methods"]
    for methods in ("aligned,hydra", "aligned,eva,adalora", "aligned,full,lora:1"):
        output = command("test_hydra.py", "compare", *words, methods)
        assert output.count("  <- noise:1\n") == output.count(" % ± ") + 1 == len(methods.split(","))
    assert len(list((stage1 / "compare").glob("*/ranks.json"))) == 12
    for changed, message in (
        (["--methods", "hidra"], "invalid choice: 'hidra'"), (["--damage", "noise"], "give noise:LAYER"),
        (["--damage", "noise:9"], "layers are 0 to 1"), (["--max_stepz", 7], "unrecognized arguments: --max_stepz"),
    ):  # fmt: skip
        assert message in command("test_hydra.py", "compare", *words, "aligned", *changed, code=2)


# ------------------------------------------------------------------------------------------
# lab: where is rank needed? A laboratory in which the answer is known, and a run takes ten seconds.
#
# A teacher is a random LLaMA (4 layers, width 48) plus an update of every linear whose singular values are chosen; the
# student is the same LLaMA without it, and learns from random tokens to give the teacher's probabilities. Worlds:
#   flat             every module needs the same share of its weight, s_k = 1/k; the loss needs some modules more
#   flat2            every module needs exactly two components, which is the budget
#   powerS           s_k = exp(S · N(0, 1)) / k: smooth needs that differ by a log-normal factor
#   layer            the seven linears of layer 1 need eight components, all others none
#   proj             q and k of every layer need eight
#   mixed            q, k, v, o of layer 1, down of layer 2, gate of layer 3 need eight
# Methods: aligned (fixed ranks), oracle (ranks by the true singular values), RIVALS, and train.py's.

def lab_world(world, seed):
    """(student, teacher, true singular values of each module's update)"""
    # regular expressions of the modules in need, written layer.projection
    worlds = {"flat2": ".", "layer": "1", "proj": ".*[qk]_", "mixed": r"1.*[qkvo]_|2.*down|3.*gate"}
    smooth = re.fullmatch(r"flat|power(\d+\.?\d*)", world)
    if not (world in worlds or smooth):
        raise data.Mistake(f"{world}: no world of the laboratory; {__file__} lists them above its lab_world")
    torch.manual_seed(1000 + seed)
    shape = dict(vocab_size=96, hidden_size=48, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    student = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=64, initializer_range=0.14))
    teacher, truth = copy.deepcopy(student), []
    noise, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    for i, layer in enumerate(teacher.model.layers):
        for name in hydra.PROJECTIONS:
            weight = layer.get_submodule(name).weight.data
            n = min(weight.shape)
            s = torch.zeros(n)
            if smooth:
                s = math.exp(float(smooth[1] or 0) * rng.normal()) / torch.arange(1, n + 1)
            elif re.match(worlds[world], f"{i}.{name.split('.')[1]}"):
                s[: 2 if world == "flat2" else 8] = 0.5 if world == "flat2" else 1.0
            s = s * 0.5 * weight.norm() / math.sqrt(8)
            U, V = (torch.linalg.qr(torch.randn(size, n, generator=noise)).Q for size in weight.shape)
            weight += (U * s) @ V.T
            truth.append(s.numpy())
    return student.requires_grad_(False), teacher.requires_grad_(False).eval(), truth


def lab_run(world, method, seed, steps=800, rank=2, rate=1e-2):
    """(held-out KL divergence, ranks at the end [4, 7], divergence before training)"""
    student, teacher, truth = lab_world(world, seed)
    # hydra asks of a model that it can be called, and for its .llm
    model = lambda ids: F.log_softmax(student(ids, use_cache=False).logits, -1)
    model.llm = student
    torch.manual_seed(seed)
    hydra.inject_adapters(student, rank, 2.0, 0.0)
    divergence = lambda ids, target: F.kl_div(model(ids), target, log_target=True, reduction="sum") / ids.numel()
    measure = torch.no_grad()(lambda batch: float(divergence(*batch)))
    sizes = [128, 64, 64] + steps * [16]
    ids = torch.randint(0, 96, (sum(sizes), 16), generator=torch.Generator().manual_seed(seed + 5))
    targets = F.log_softmax(teacher(ids, use_cache=False).logits, -1)
    held_out, probe, first, *batches = zip(ids.split(sizes), targets.split(sizes))
    first = [{"ids": row[None]} for row in first[0]]
    start = measure(held_out)
    hydra.align(model, first)
    controller = hydra.RankController(model, rank, steps, seed, method)
    if method == "oracle":
        worth = np.array([spectrum[:48] ** 2 + 1e-9 / np.arange(1, 49) for spectrum in truth])
        for module, r in zip(controller.modules, hydra.fill(worth, controller.costs, controller.budget)):
            module.resize(int(r))
    around = use_peft(model, method, rank, 2.0, 0.0, steps, first) if method in RIVALS else [lambda *_: None] * 2
    optimizer = torch.optim.AdamW(train.trained_parameters(student), lr=rate, weight_decay=0.0, fused=True)
    optimizer.register_step_pre_hook(around[0])
    optimizer.register_step_post_hook(around[1])
    events = () if method in ("aligned", "oracle", *RIVALS) else controller.event_steps
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 12, 0.5 * (1 + math.cos(math.pi * step / steps)))
        divergence(*batch).backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in events:
            controller.event(step + 1, lambda: measure(probe), optimizer)
    return measure(held_out), np.array(ranks_of(student)), start


def lab_runs(jobs):
    """lab_run of each (world, method, seed, steps), one at a time on each core."""
    with ProcessPoolExecutor(None, torch.multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(lab_run, *zip(*jobs))


def lab(argv):
    """lab WORLDS METHODS [SEEDS, or FIRST-LAST] [STEPS]: held-out divergence; differences from the first method's."""
    worlds, methods, seeds, steps = argv + ["flat", "aligned,hydra", "4", "800"][len(argv) :]
    one, *last = map(int, seeds.split("-"))
    seeds = range(one, last[0] + 1) if last else range(one)
    methods = with_peft(methods.split(","))
    runs = lab_runs(product(worlds.split(","), methods, seeds, [int(steps)]))
    for world in worlds.split(","):
        ranks = {}  # at the end [seeds, 4, 7]
        for method in methods:
            ends, ranks[method], starts = map(np.array, zip(*islice(runs, len(seeds))))
            if method == methods[0]:
                first = ends
            gap = 100 * (ends / first - 1)
            error = gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan
            print(f"{world:9} {method:9} {ends.mean():.5f} {gap.mean():+8.1f} % ± {error:.1f} {gap.round(1).tolist()}"
                  f", {100 * np.mean((ends - first) / starts):+.2f} % of the start's {starts.mean():.3f}", flush=True)
        print(f"mean ranks at the end: {'/'.join(methods)}")
        for layer in range(4):
            means = ["/".join(f"{end[:, layer, i].mean():.1f}" for end in ranks.values()) for i in range(7)]
            named = [f"{name.split('.')[1][:-5]} {mean}" for name, mean in zip(hydra.PROJECTIONS, means)]
            print(f"layer {layer}  " + "  ".join(named))


def test_ranks_go_where_they_are_needed():
    """Modules in need end above all others, but for q and k, which the loss hardly feels; equal needs stay."""
    jobs = ("layer", "hydra", 800), ("layer", "aligned", 800), ("flat2", "hydra", 400)
    runs = [*lab_runs((world, method, seed, steps) for world, method, steps in jobs for seed in (0, 1))]
    for (loss, ranks, _), (fixed, _, _), (_, equal, _) in zip(runs[:2], runs[2:4], runs[4:]):
        others = np.delete(ranks, 1, 0)
        pairs = np.sign(ranks[1, 2:, None] - others.flatten())  # needed against not needed
        assert pairs.mean() > 0.95 and ranks[1].mean() > 3 * others.mean()
        assert loss < 0.7 * fixed and (equal == 2).all()


@pytest.mark.parametrize("method", RIVALS)
def test_rivals_learn_within_the_budget(method):
    pytest.importorskip("peft")
    end, ranks, start = lab_run("proj", method, 0, steps=60)
    assert end < start and ranks.sum() == 2 * 28 and len(set(ranks.flat)) > 1


# ------------------------------------------------------------------------------------------
# memory: of a training step, without weights and without a GPU; speed: of its parts

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SHAPES = {  # SIZES of CLIP with its images' and patches' side, of the LLM with its vocabulary and context
    "tiny": ((96, 192, 3, 4, 48, 8), (128, 352, 4, 4, 544, 512)),
    "bench": ((384, 1536, 6, 6, 168, 14), (512, 1376, 6, 8, 32000, 2048)),
    "1.7b": ((1024, 4096, 24, 16, 336, 14), (2048, 5632, 24, 16, 32000, 2048)),
    "3b": ((1024, 4096, 24, 16, 336, 14), (2560, 6912, 32, 32, 32000, 2048)),
}
BENCH = "--model bench --lora_rank 32 --lora_alpha 64 --lora_dropout 0.05".split()


@contextmanager
def random_weights(name, dtype=None):
    """In here train.build_model makes a model of these shapes instead of loading one."""
    if name not in SHAPES:
        raise data.Mistake(f"--model {name}: only the shapes of {', '.join(SHAPES)} are known here")

    def load(source, vision_tower, projector, asked):
        torch.manual_seed(0)
        vision = CLIPVisionConfig(**dict(zip((*SIZES, "image_size", "patch_size"), SHAPES[name][0])))
        llm = LlamaConfig(**dict(zip((*SIZES, "vocab_size", "max_position_embeddings"), SHAPES[name][1])))
        clip = hydra.CLIPEncoder(CLIPVisionModel._from_config(vision, dtype=dtype or asked))
        projector = hydra.build_projector("ldpnet", vision.hidden_size, llm.hidden_size)
        llm = LlamaForCausalLM._from_config(llm, dtype=dtype or asked)
        # stage 1: as if its projector were trained
        return hydra.HydraVLM(clip, projector, llm, {"model": name, "fingerprint": 0}, stage=1), None

    with patch.object(hydra, "load_checkpoint", load):
        yield


def train_step(model, optimizer, batches, autocast=nullcontext):
    """What train.py's loop does in a step of these batches, but for the gradients' norm."""
    for batch in batches:
        with autocast():
            loss, _ = model(**batch)
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages, by kind, as they come and go; .peak holds them when their sum was largest."""

    def __init__(self):
        super().__init__()
        self.storages = {}  # address: (kind, bytes)
        self.now = dict.fromkeys(("weights", "AdamW", "gradients", "kept", "temporary"), 0)
        self.peak = self.now

    def label(self, tensors, kind):
        for storage in [tensor.untyped_storage() for tensor in tensors]:
            key = storage._cdata
            if key in self.storages:
                self.free(key)
            else:
                finalize(storage, self.free, key)
            self.storages[key] = kind, storage.nbytes()
            self.now[kind] += storage.nbytes()

    def free(self, key):
        kind, size = self.storages.pop(key)
        self.now[kind] -= size

    def keep(self, tensor):
        """Autograd saves it for the backward pass."""
        if self.storages.get(tensor.untyped_storage()._cdata, ("",))[0] == "temporary":
            self.label([tensor], "kept")
        return tensor

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.label([t for t in made if t.untyped_storage()._cdata not in self.storages], "temporary")
        inside = 0
        if "linear_cross_entropy" in str(function):  # one operator: inside it are logits of 1,024 targets
            hidden, head = args[:2]  # in fp32, and in the dtype of the products
            inside = min(1024, len(hidden)) * len(head) * (6 if head.dtype == torch.bfloat16 else 4)
        if sum(self.now.values()) + inside > sum(self.peak.values()):
            self.peak = self.now | {"temporary": self.now["temporary"] + inside}
        return result


def count_step(model, batches, as_on_gpu):
    """Bytes of each kind at the peak of a training step of a model on fake tensors, AdamW's moments being there.

    On a GPU products are bf16 and LayerNorm fp32. Attention keeps no T x T matrix, there as on a CPU. Not counted: what
    CUDA, cuBLAS and NCCL take for themselves (about 1 GB), and gaps between tensors.
    """
    memory = Memory()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    memory.label([*model.parameters(), *model.buffers()], "weights")
    memory.label([moment for state in optimizer.state.values() for moment in state.values()], "AdamW")
    hooks = [p.register_post_accumulate_grad_hook(lambda p: memory.label([p.grad], "gradients")) for p in trained]
    norm = F.layer_norm
    in_fp32 = lambda x, shape, weight, bias, eps: norm(x.float(), shape, weight.float(), bias.float(), eps)
    half = (lambda: torch.autocast("cpu", torch.bfloat16)) if as_on_gpu else nullcontext
    saved = torch.autograd.graph.saved_tensors_hooks(memory.keep, lambda tensor: tensor)
    with patch.object(F, "layer_norm", in_fp32 if as_on_gpu else norm), saved, memory:
        train_step(model.train(), optimizer, batches, half)
    for hook in hooks:
        hook.remove()
    return memory.peak


def fake_model(config, dtype=None):
    """(FakeTensorMode, train.py's model as tensors without content); frozen weights are bf16 unless dtype is given."""
    dtype = dtype or (torch.float32 if config.method == "full" else torch.bfloat16)
    as_it_is = patch.object(torch.nn.Module, "_apply", lambda module, _: module)  # no fake tensor can be moved
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, random_weights(config.model, dtype), as_it_is:
        return mode, train.build_model(config, torch.device("cpu"))[0]


def plans(argv):
    """(config, name, rows of a pass, texts' tokens in the usual, the mean and the longest row) of each stage asked."""
    stages = ["1"], ["2"], ["2", "--method", "full"]
    for words in [argv] if "--stage" in argv else [["--stage", *stage, *argv] for stage in stages]:
        config = train.parse_arguments(words)
        if config.stage not in (1, 2):
            raise data.Mistake("--stage: 1 or 2")
        train.complete(config, 1)
        name = f"{config.model} stage {config.stage}" + (f" {config.method}" if config.stage == 2 else "")
        yield config, name, config.per_device_train_batch_size, [32] if config.stage == 1 else [200, 656, 10**6]


def pass_of(model, config, rows, text, mode=nullcontext()):
    """(tokens of a row, a pass of equal rows as train.py cuts it into batches): random ids, and pixels made in mode."""
    length = min(model.image_tokens + text, model.context_length)
    ids = [1, data.IMAGE_TOKEN] + np.random.default_rng(0).integers(3, 500, length - model.image_tokens - 1).tolist()
    asked = 2 if config.stage == 1 else 42
    with mode:
        pixels = torch.randn(3, model.image_size, model.image_size)
    sample = {"input_ids": ids, "labels": [data.IGNORE] * asked + ids[asked:], "pixel_values": pixels, "bad": []}
    return length, data.bounded_batches([sample] * rows, config.max_tokens_per_pass, model.image_tokens)


def memory(argv):
    """Table of a step's peak in GB of 10^9 bytes, by part: for the usual, the mean and the longest batch of a GPU."""
    columns = [*Memory().now, "peak", "--gradient_checkpointing"]
    print(f"{'':24}{'batch':>12}{'parts':>7}  " + "  ".join(columns))
    for config, name, rows, texts in plans(argv):
        both = [fake_model(replace(config, gradient_checkpointing=on)) for on in (config.gradient_checkpointing, True)]
        for text in texts:
            peaks = []
            for mode, model in both:
                length, batches = pass_of(model, config, rows, text, mode)
                peaks.append(count_step(model, batches[:2], as_on_gpu=True))  # more take no more
            sizes = [*peaks[0].values(), *(sum(peak.values()) for peak in peaks)]
            cells = "".join(f"{size / 1e9:{2 + len(column)}.2f}" for column, size in zip(columns, sizes))
            print(f"{name:24}{f'{rows} x {length}':>12}{len(batches):7}{cells}", flush=True)


@pytest.mark.parametrize("words", ["1", "2", "2 --gradient_checkpointing", "2 --method full"])
def test_memory_counted_is_memory_used(words):
    config = train.parse_arguments([*BENCH, "--max_tokens_per_pass", "800", "--stage", *words.split()])
    mode, model = fake_model(config, torch.float32)
    counted = count_step(model, pass_of(model, config, 5, 300, mode)[1], as_on_gpu=False)
    with random_weights("bench"):
        model = train.build_model(config, torch.device("cpu"))[0].train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batches = pass_of(model, config, 5, 300)[1]
    train_step(model, optimizer, batches)
    used = peak_of_tensors(lambda: train_step(model, optimizer, batches))
    assert (sum(counted.values()) - counted["weights"] - counted["AdamW"]) / 1e9 == pytest.approx(used, rel=0.05)
    assert min(counted.values()) >= 0 and counted["kept"] > 0


def speed(argv):
    """Table of a step's speed, for the passes that memory tells of, on random weights; rank events beside it.

    TFLOP/s are those that the step needs, their share is of a large matrix product's; GB are a GPU's peak.
    """
    device = train.set_up_processes()
    on_gpu = device.type == "cuda"

    def seconds(function):
        """Median of five runs after the first."""
        taken = []
        for _ in range(6):
            begun = time.perf_counter()
            function()
            if on_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begun)
        return np.median(taken[1:])

    side = 8192 if on_gpu else 1024
    factor = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    most = 2 * side**3 / seconds(lambda: factor @ factor)
    print(f"a product of {side} x {side}: {most / 1e12:.2f} TFLOP/s on {device}")
    print(f"{'':24}{'batch':>12}{'seconds':>9}{'samples/s':>11}{'TFLOP/s':>9}{'share':>7}{'GB':>7}")
    head = lambda hidden, weight, *_, **__: 4 * hidden[0] * weight[0] * weight[1]  # logits, and the hidden's gradient
    for config, name, rows, texts in plans(argv):
        with random_weights(config.model), device:
            model = train.build_model(config, device)[0].train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        for text in texts:
            length, batches = pass_of(model, config, rows, text)
            step = lambda: train_step(model, optimizer, batches)
            step()  # with it comes the operator of the loss
            loss = torch.ops.torch_nn._linear_cross_entropy_batch_chunked
            with FlopCounterMode(display=False, custom_mapping={loss: head}) as counter:
                step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            taken = seconds(step)
            rate = counter.get_total_flops() / taken
            peak = on_gpu and torch.cuda.max_memory_allocated() / 1e9
            print(f"{name:24}{f'{rows} x {length}':>12}{taken:9.4f}{rows / taken:11.1f}{rate / 1e12:9.2f}"
                  f"{100 * rate / most:5.1f} %{peak:7.2f}", flush=True)  # fmt: skip
            if config.method == "hydra" and config.stage == 2 and text == texts[0]:
                controller = hydra.RankController(model, config.lora_rank, 100)
                begun = time.perf_counter()
                for at in controller.event_steps:
                    controller.event(at, lambda: train.held_out_loss(model, 8 * batches), optimizer)
                print(f"{'':24}all rank events on {8 * rows} probe records: {time.perf_counter() - begun:.1f} s")
                del controller  # with it goes the model, before the next is measured


def test_speed_prints_a_table():
    output = command("test_hydra.py", "speed", "--stage", 2, "--global_batch_size", 2)
    assert len(re.findall(r"tiny stage 2 hydra +2 x \d+ +\d\.\d+ +\d+\.\d +\d\.\d\d +\d+\.\d %", output)) == 3
    assert "all rank events on 16 probe records: " in output


# ------------------------------------------------------------------------------------------
# bench: our step beside the usual one, each in a process of its own

def random_samples(count, stage):
    """Of random ids: stage 1 captions of about 25 tokens; stage 2 answers, median 150, log-normal, after 30 tokens."""
    rng, samples = np.random.default_rng(0), []
    question, median, spread = (1, 25, 0.25) if stage == "1" else (30, 150, 0.9)
    for _ in range(count):
        answer = int(np.clip(rng.lognormal(math.log(median), spread), 4, 1200))
        ids = rng.integers(3, 32000, question + answer).tolist()
        pixels = torch.randn(3, 168, 168) if stage == "1" or rng.random() < 0.94 else None
        if pixels is not None:
            ids.insert(1, data.IMAGE_TOKEN)
        labels = [data.IGNORE] * (len(ids) - answer) + ids[-answer:]
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return samples


def peak_of_tensors(function):
    """GB that tensors which the function makes hold at most, as torch.cuda.max_memory_allocated would count them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))) / 1e9


def bench_step(stage, side):
    """Prints samples/s and peaks in GB: of the process, of it beyond what the built model takes, of a step's tensors.

    ours     as train.py: batches of one modality and similar length, in passes
    usual    transformers and PEFT as they are mostly used: random batches, all logits; images are spliced in as ours
    """
    import peft  # on both sides, for its memory

    torch.set_num_threads(2)
    config = train.parse_arguments([*BENCH, "--stage", stage if side == "ours" else "1"])
    samples = random_samples(192 if stage == "1" else 64, stage)
    with random_weights("bench"):
        model = train.build_model(config, torch.device("cpu"))[0].train()
    llm = model.llm
    if side == "usual":
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).view(-1, 8).tolist()
        clip = model.clip.clip
        model.clip.forward = torch.no_grad()(lambda x: clip(x, output_hidden_states=True).hidden_states[-2][:, 1:])
        if stage == "2":
            lora = peft.LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules="all-linear")
            llm = peft.get_peft_model(llm, lora)
    else:
        records = [{"conversations": [{"value": "x" * len(sample["labels"])}]} for sample in samples]
        records = [r if s["pixel_values"] is None else r | {"image": ""} for r, s in zip(records, samples)]
        order = data.global_batches(records, 8, 0, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=side == "ours")

    def step(batch):
        if side == "ours":
            batches = data.bounded_batches(batch, config.max_tokens_per_pass, model.image_tokens)
            return train_step(model, optimizer, batches)
        embeddings, mask, labels = model.splice(**data.collate(batch))
        llm(inputs_embeds=embeddings, attention_mask=mask.long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # getrusage would count the parent's
    peak_memory = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e6
    built = peak_memory()
    batches = [[samples[i] for i in batch] for batch in order]
    step(batches[0])
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    seconds, peak = time.perf_counter() - started, peak_memory()
    longest = max(batches, key=lambda batch: max(len(sample["labels"]) for sample in batch))
    print(json.dumps([len(samples) / seconds, peak, peak - built, peak_of_tensors(lambda: step(longest))]))


def in_turns(*functions):
    """Median seconds of each in five runs, in turns."""
    return np.median([[timeit(function, number=1) for function in functions] for _ in range(5)], 0)


def bench_images():
    """640 × 480 JPEGs to 336 px in stage 2's mode, one thread; usual: Pillow and transformers' CLIPImageProcessor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(1)
    mean = tuple(int(255 * channel) for channel in data.CLIP_MEAN)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{i}.jpg" for i in range(32)]
        for file in files:  # noise on four scales compresses about as photos do
            noise = [Image.effect_noise((640 // k, 480 // k), 60 + k).resize((640, 480), 3) for k in (1, 4, 16, 64)]
            Image.fromarray(np.mean(noise, 0).astype(np.uint8)).convert("RGB").save(f"{folder}/{file}", quality=90)

        ours = lambda: [data.image_to_tensor(data.open_image(folder, file), 336, "pad") for file in files]

        def usual():
            images = [Image.open(f"{folder}/{file}").convert("RGB") for file in files]
            squares = [ImageOps.pad(image, (640, 640), color=mean) for image in images]
            return [processor(square, return_tensors="pt")["pixel_values"][0] for square in squares]

        a, b = in_turns(ours, usual)
        apart = max((x - y).abs().max().item() for x, y in zip(ours(), usual())) * 255 * max(data.CLIP_STD)
    print(f"images    {'images/s, 1 core':>18}{32 / a:10.1f}{32 / b:10.1f}{b / a:8.2f}   at most {apart:.1f} / 255 off")


def bench_adapter():
    """Forward and backward of one adapter, 2048 -> 5632, r = 128, dropout 0.05, 4,096 tokens; usual: PEFT's Linear."""
    import peft

    torch.set_num_threads(2)
    base, options = torch.nn.Linear(2048, 5632, bias=False), dict(r=128, lora_alpha=256, lora_dropout=0.05)
    usual = peft.tuners.lora.layer.Linear(base, "default", peft.LoraConfig(**options), **options).train()
    ours = hydra.HybridLoRALinear(base, 128, scale=2.0).train()
    x, g = torch.randn(4096, 2048, requires_grad=True), torch.randn(4096, 5632)

    def kept(module):
        """MB that the forward pass keeps for the backward pass, its input and not its weights counted."""
        memory = Memory()
        memory.label([x], "temporary")
        memory.label(module.parameters(), "weights")
        with torch.autograd.graph.saved_tensors_hooks(memory.keep, lambda tensor: tensor), memory:
            _ = module(x)  # as long as it lives its graph does
            return memory.now["kept"] / 1e6

    a, b = in_turns(lambda: ours(x).backward(g), lambda: usual(x).backward(g))
    print(f"adapter   {'seconds':>18}{a:10.3f}{b:10.3f}{a / b:8.2f}")
    print(f"adapter   {'MB kept':>18}{kept(ours):10.1f}{kept(usual):10.1f}{kept(ours) / kept(usual):8.2f}")


def bench(argv):
    """Ours beside the usual way; steps each in a process of its own, twice, in turns."""
    if argv:
        return bench_step(*argv)
    print(f"{'':10}{'':>18}{'ours':>10}{'usual':>10}{'ratio':>8}")
    bench_images()
    bench_adapter()
    for stage in "21":
        runs = {"ours": [], "usual": []}
        for side in 2 * ["ours", "usual"]:
            words = [sys.executable, __file__, "bench", stage, side]
            runs[side].append(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout))
        ours, usual = (np.mean(runs[side], axis=0) for side in runs)
        for name, a, b in zip(("samples/s", "GB of the process", "GB beyond weights", "GB of tensors"), ours, usual):
            print(f"stage {stage}   {name:>18}{a:10.2f}{b:10.2f}{a / b:8.2f}", flush=True)


if __name__ == "__main__":
    verbs = {"compare": compare, "train": train_further, "lab": lab, "memory": memory, "speed": speed, "bench": bench}
    if sys.argv[1:2] and sys.argv[1] in verbs:
        data.one_line(lambda: verbs[sys.argv[1]](sys.argv[2:]))
    else:
        sys.exit(f"test_hydra.py: error: choose from {', '.join(verbs)}; the tests are run by pytest")

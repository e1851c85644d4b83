"""Tests: invariants, upstream's own outputs, and the real commands at very small size.

    pytest                                   HYDRA_REFERENCE=FOLDER adds the comparisons with upstream
    python test_hydra.py bench               our step, adapter and images beside the usual ones (needs peft)
    python test_hydra.py --stage compare --methods lora,adalora,eva ...      train.py with further methods to compare with
"""

import argparse
import base64
import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the network is a mistake

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import data
import hydra
import train

REFERENCE = Path(os.environ.get("HYDRA_REFERENCE", "")).resolve()
needs_reference = pytest.mark.skipif(not os.environ.get("HYDRA_REFERENCE"), reason="HYDRA_REFERENCE is not set: no reference data")
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
    (folder / "instruct.json").write_text(json.dumps(records))
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
    return hydra.load_mobilellama(world / "llm")[1]


def make_model(world, rank=0, stage=2, method="hydra", nonzero=True):
    """HydraVLM of the tiny backbones; with a rank, adapters whose B is not zero."""
    torch.manual_seed(1)
    llm, _ = hydra.load_mobilellama(world / "llm")
    clip = hydra.load_clip(world / "clip")
    model = hydra.HydraVLM(clip, hydra.build_projector("ldpnet", 24, 32), llm)
    if rank:
        hydra.inject_adapters(llm, rank, scale=2.0, dropout=0.0)
        for adapter in hydra.adapters(model).values():
            torch.nn.init.normal_(adapter.lora_B, std=0.1 * nonzero)
    hydra.freeze(model, stage, method)
    return model


def make_samples(world, tokenizer, records=6, **options):
    """Training samples of the records, or of the first few, of which every third is text alone."""
    if isinstance(records, int):
        records = data.read_records(world / "instruct.json", world / "images")[:records]
    return data.ConversationDataset(records, world / "images", tokenizer, "v1", 48, 9, 256, **options)


def make_batch(samples, indices):
    batch = data.collate([samples[i] for i in indices])
    del batch["bad"]
    return batch


def make_adapter(rank=4, **options):
    torch.manual_seed(0)
    adapter = hydra.HybridLoRALinear(torch.nn.Linear(24, 40, bias=False), rank, 0, **options).eval()
    torch.nn.init.normal_(adapter.lora_B)
    return adapter, torch.randn(5, 7, 24)


# ---------------------------------------------------------------------------------------------
# upstream's own outputs


@needs_reference
@pytest.mark.parametrize("kind", ["ldpnet", "ldpnetv2"])
def test_projector_matches_upstream(kind):
    golden = np.load(REFERENCE / "golden" / f"{kind}.npz")
    projector = hydra.build_projector(kind, 48, 64)
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden if key.startswith("state/")}
    projector.load_state_dict(state, strict=True)
    with torch.no_grad():
        output = projector(torch.from_numpy(golden["input"]))
    assert torch.allclose(output, torch.from_numpy(golden["output"]), atol=1e-5, rtol=0)


@needs_reference
def test_conversations_match_upstream():
    _, tokenizer, _ = hydra.load_checkpoint(REFERENCE / "golden" / "mobilevlm_mini" / "mobilevlm")
    spaces = tokenizer(" Hello  world    wide", add_special_tokens=False).input_ids
    assert spaces == [15043, 29871, 3186, 1678, 9377]  # SentencePiece's own; none of the conversations has two spaces
    for golden in json.loads((REFERENCE / "golden" / "conversations.json").read_text()):
        input_ids, labels = data.encode_conversation(golden["conversations"], tokenizer, golden["kind"])
        assert input_ids == golden["input_ids"]
        assert labels == golden["labels"]


@needs_reference
@torch.no_grad()
def test_checkpoint_matches_upstream():
    folder = REFERENCE / "golden" / "mobilevlm_mini"
    golden = np.load(folder / "expected.npz")
    expected = {name: torch.from_numpy(golden[name]) for name in golden}
    model, tokenizer, image_transform = hydra.load_checkpoint(folder / "mobilevlm", vision_tower=folder / "clip")
    pixels = image_transform(Image.open(folder / "image.png").convert("RGBA"), "pad")[None]
    assert (pixels - expected["pixel_values"]).abs().max() <= 2 / 255 / min(data.CLIP_STD)
    assert model.generate(expected["input_ids"], None, pixels, max_new_tokens=12)[0].tolist() == expected["greedy"].tolist()
    pixels = expected["pixel_values"]  # what follows is the model's
    assert torch.allclose(model.clip(pixels), expected["vision_features"], atol=1e-4)
    assert torch.allclose(model.projector(model.clip(pixels)), expected["image_tokens"], atol=1e-4)
    question = "<image>\n" + json.loads((folder / "prompt.json").read_text())["question"]
    input_ids, _ = data.encode_conversation([{"from": "human", "value": question}], tokenizer, "v1")
    assert input_ids == expected["input_ids"][0].tolist()
    logits = model(expected["input_ids"], None, pixels)[0]
    assert torch.allclose(logits[::7], expected["logits"][0], atol=1e-4, rtol=0)
    assert torch.allclose(logits[-1], expected["last_logits"][0], atol=1e-4, rtol=0)
    loss, count = model(expected["input_ids"], None, pixels, expected["labels"])
    assert abs(loss / count - expected["loss"]) <= 1e-4


# ---------------------------------------------------------------------------------------------
# data


def test_targets_are_the_answers(world, tokenizer):
    record = json.loads((world / "instruct.json").read_text())[1]
    input_ids, labels = data.encode_conversation(record["conversations"], tokenizer, "v1")
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    assert tokenizer.decode([label for label in labels if label != data.IGNORE]) == "".join(f" {answer}</s>" for answer in answers)
    assert input_ids.count(data.IMAGE_TOKEN) == 1
    assert all(label in (data.IGNORE, token) for token, label in zip(input_ids, labels))


@pytest.mark.parametrize("text", ["naïve 東京 \x00", "a </s> b", "USER: ASSISTANT: <s>"])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    turns = [{"from": "human", "value": "Read."}, {"from": "gpt", "value": text}]
    _, labels = data.encode_conversation(turns, tokenizer, "v1")
    target = [label for label in labels if label != data.IGNORE]
    assert target.count(tokenizer.eos_token_id) == 1 and target[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(target[:-1]).strip() == text.strip()


@pytest.mark.parametrize("answer", ["", "word " * 1_000_000, "\x00", "USER: </s> ASSISTANT: <s>"])
@pytest.mark.parametrize("opening", [[], [("gpt", "an answer to nothing")]])
def test_answers_of_all_kinds(world, tokenizer, answer, opening):
    pairs = turns(*opening, ("human", "<image>\nWhat?"), ("gpt", answer))
    (world / "record.json").write_text(json.dumps([{"image": "00000.png", "conversations": pairs}]))
    sample = make_samples(world, tokenizer, data.read_records(world / "record.json", world / "images"))[0]
    targets = [label for label in sample["labels"] if label != data.IGNORE]
    places = len(sample["input_ids"]) + 9 - 1  # the image takes nine of the 256
    if len(answer) > 256:
        assert places == 256 and tokenizer.eos_token_id not in targets
    else:
        assert targets[-1:] == [tokenizer.eos_token_id] and targets.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(targets[:-1]).strip() == answer


def test_prompt_is_the_start_of_its_training_sample(tokenizer):
    turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "Red"}]
    prompt, labels = data.encode_conversation(turns[:1], tokenizer, "v1")
    whole, _ = data.encode_conversation(turns, tokenizer, "v1")
    assert whole[: len(prompt)] == prompt and set(labels) == {data.IGNORE}
    late, _ = data.encode_conversation([{"from": "gpt", "value": "Hello."}, *turns], tokenizer, "v1")
    assert late == whole  # an answer to nothing is dropped


@pytest.mark.parametrize("size", [(48, 48), (100, 40), (33, 90), (1, 1), (900, 10)])
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_images_of_any_shape(size, mode):
    assert data.image_to_tensor(Image.new("RGB", size), 32, mode).shape == (3, 32, 32)


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_large_jpegs_are_decoded_at_less_than_their_size(tmp_path, mode):
    noise = Image.effect_noise((90, 60), 90).resize((900, 600), Image.Resampling.BICUBIC).convert("RGB")
    noise.save(tmp_path / "large.jpg", quality=95)
    whole, drafted = data.open_image(tmp_path, "large.jpg"), data.open_image(tmp_path, "large.jpg", 56)
    assert whole.size == (900, 600) and drafted.size == (225, 150)
    difference = (data.image_to_tensor(whole, 56, mode) - data.image_to_tensor(drafted, 56, mode)).abs()
    assert difference.max() <= 2 / 255 / min(data.CLIP_STD)


def test_sampler_drops_nothing_and_groups():
    rng = random.Random(0)
    records = [{"conversations": [{"value": "x" * rng.randint(1, 400)}]} | ({"image": "i"} if i % 9 else {}) for i in range(1003)]
    batches = data.global_batches(records, 16, seed=3, epoch=1)
    assert sorted(sum(batches, [])) == list(range(1003))
    assert [len(batch) for batch in batches] == [16] * 62 + [11]
    assert batches == data.global_batches(records, 16, seed=3, epoch=1) != data.global_batches(records, 16, seed=3, epoch=2)
    mixed = sum(len({"image" in records[i] for i in batch}) > 1 for batch in batches)
    assert mixed <= 2

    def padding(batches):
        lengths = [[len(records[i]["conversations"][0]["value"]) for i in batch] for batch in batches]
        return 1 - sum(map(sum, lengths)) / sum(max(row) * len(row) for row in lengths)

    shuffled = rng.sample(range(1003), 1003)
    assert padding(batches) < 0.3 * padding([shuffled[i : i + 16] for i in range(0, 1003, 16)])


@pytest.mark.parametrize("count", [1, 3, 12, 13, 16])
def test_micro_batches_share_out_a_global_batch(count):
    parts = data.micro_batches(list(range(count)), per_device=4, world_size=2)
    assert sum((row for step in parts for row in step), []) == list(range(count))
    assert all(len(step) == 2 and max(map(len, step)) <= 4 for step in parts)


# ---------------------------------------------------------------------------------------------
# the adapter


def test_adapter_starts_as_its_base():
    base = torch.nn.Linear(24, 40, bias=False)
    adapter, x = hydra.HybridLoRALinear(base, 3, 1), torch.randn(5, 24)
    assert torch.equal(adapter(x), base(x)) and adapter.rank == 4


def test_adapter_equals_its_dense_sum():
    adapter, x = make_adapter()
    dense = x @ (adapter.base.weight + adapter.delta()).T
    assert torch.allclose(adapter(x), dense, atol=1e-5)


def test_dropout_keeps_its_input_and_a_mask_and_no_more():
    adapter, x = make_adapter(dropout=0.3)
    x.requires_grad_()
    saved = []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = adapter.train()(x)
    weights = {p.data_ptr() for p in adapter.parameters()}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved if t.data_ptr() not in weights}
    assert x.untyped_storage().data_ptr() in kept and sum(kept.values()) == 35 * (24 * 4 + 24 + 4 * 4)  # x, mask, h: 35 tokens
    torch.manual_seed(5)
    _, mask = torch.native_dropout(x, 0.3, True)
    plain = adapter.base(x) + adapter.scale * (x * mask / 0.7) @ adapter.lora_A.T @ adapter.lora_B.T
    assert torch.allclose(y, plain, atol=1e-5) and 0.5 < mask.float().mean() < 0.9
    inputs, g = (x, adapter.lora_A, adapter.lora_B), torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(plain, inputs, g)):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(adapter(x).float().sum(), inputs)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@torch.no_grad()
def test_merge_and_unmerge():
    adapter, x = make_adapter()
    before, weight = adapter(x), adapter.base.weight.clone()
    adapter.merge(), adapter.merge()  # merging twice is merging once
    assert torch.allclose(adapter(x), before, atol=1e-5) and not torch.allclose(adapter.base.weight, weight)
    adapter.unmerge(), adapter.unmerge()
    assert torch.allclose(adapter.base.weight, weight, atol=1e-6) and torch.allclose(adapter(x), before, atol=1e-5)


@torch.no_grad()
def test_growth_keeps_the_function():
    adapter, x = make_adapter()
    before, scale = adapter(x), adapter.scale
    kept = adapter.resize(6, 3)
    assert kept.tolist() == [0, 1, 2, 3] and adapter.rank == 9 and adapter.scale == scale
    assert (adapter(x) - before).abs().max() <= 1e-6 * before.abs().max()
    assert adapter.lora_A[4:].abs().min() > 0  # a row of zeros would never learn


@torch.no_grad()
def test_shrinking_drops_the_least_important():
    adapter, _ = make_adapter()
    A, B = adapter.lora_A.clone(), adapter.lora_B.clone()
    kept = adapter.resize(3, -1, importance=torch.tensor([0.1, 5.0, 0.2, 3.0]))
    assert kept.tolist() == [1, 3]
    assert torch.equal(adapter.lora_A, A[[1, 3]]) and torch.equal(adapter.lora_B, B[:, [1, 3]])


def test_new_rows_read_what_the_input_carries_and_no_row_reads_yet():
    adapter, _ = make_adapter(rank=2)
    directions = torch.linalg.qr(torch.randn(24, 4)).Q.T  # [4, 24], of which the first carries most
    adapter.sketch = directions * torch.tensor([4.0, 3.0, 2.0, 1.0])[:, None]
    adapter.lora_A.data = directions[[0, 2]].clone()
    adapter.resize(4, 0)
    assert torch.allclose((adapter.lora_A[2:] @ directions[[1, 3]].T).abs(), torch.eye(2), atol=1e-5)
    adapter.resize(7, 0)  # more than the sketch knows: the rest is random
    assert torch.linalg.matrix_rank(adapter.lora_A) == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_aligned_rows_span_the_inputs_principal_directions(world, tokenizer, dtype):
    model, samples = make_model(world, rank=2, nonzero=False), make_samples(world, tokenizer, 8)
    batches, inputs = [make_batch(samples, [i]) for i in range(8)], []
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


@pytest.mark.parametrize("coarse, fine", [(0, 0), (2, -2), (24, 1)])
def test_impossible_ranks_are_refused(coarse, fine):
    with pytest.raises(hydra.HydraError, match="use 1 to 24"):
        hydra.HybridLoRALinear(torch.nn.Linear(24, 40), coarse, fine)


def test_adapter_matches_peft():
    peft = pytest.importorskip("peft", reason="peft is not installed: no comparison with its LoRA")
    adapter, x = make_adapter()
    theirs = peft.tuners.lora.Linear(
        copy.deepcopy(adapter.base), "default", config=peft.LoraConfig(lora_alpha=8), r=4, lora_alpha=8
    ).eval()
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = adapter.lora_A.data, adapter.lora_B.data
    assert torch.allclose(adapter(x), theirs(x), atol=1e-5)


def test_optimizer_state_moves_with_the_components():
    adapter, x = make_adapter()
    optimizer = torch.optim.AdamW([adapter.lora_A, adapter.lora_B], lr=1e-2)
    adapter(x).square().sum().backward()
    optimizer.step()
    old = adapter.lora_A, adapter.lora_B
    before = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in old]
    kept = adapter.resize(2, 0)
    adapter_kept = adapter.resize(5, 0)
    new = adapter.lora_A, adapter.lora_B
    assert adapter_kept.tolist() == [0, 1]
    for i, dim in enumerate((0, 1)):
        hydra.carry_moments(optimizer, old[i], new[i], kept, dim)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[new[i]][key]
            assert moment.shape == new[i].shape
            assert torch.equal(moment.narrow(dim, 0, 2), before[i][key].index_select(dim, kept))
        assert (optimizer.state[new[i]]["exp_avg"].narrow(dim, 2, 3) == 0).all()
        assert (optimizer.state[new[i]]["exp_avg_sq"].narrow(dim, 2, 3) > 0).all()
        assert optimizer.state[new[i]]["step"] == before[i]["step"]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, new))


# ---------------------------------------------------------------------------------------------
# the rank method


def test_budget_is_never_passed_and_used_to_the_last_component():
    rng = np.random.default_rng(0)
    for _ in range(100):
        costs = rng.integers(20, 90, (4, 7))
        rank = rng.integers(1, 9)
        budget, limits = int(rank * costs.sum()), np.full(costs.shape, 16)
        ranks = hydra.fit_to_budget(np.exp(rng.normal(0, 1, costs.shape)), costs, budget, limits)
        spare = budget - (ranks * costs).sum()
        assert 0 <= spare and ranks.min() >= 1 and ranks.max() <= 16
        assert not ((costs <= spare) & (ranks < limits)).any()


def test_equal_scores_leave_ranks_uniform():
    coarse, both = hydra.coarse_and_fine(np.full((4, 7), 0.3), np.ones((4, 7)), rank=4)
    assert np.allclose(coarse, 4) and np.allclose(both, 4)


def test_equal_scores_give_equal_parameters():
    costs = np.array([[1, 1, 1, 1, 2, 2, 2]] * 4)
    _, both = hydra.coarse_and_fine(np.full((4, 7), 0.3), costs, rank=4)
    assert np.allclose(both * costs, both[0, 0])


def test_coarse_ranks_follow_layers_and_fine_ranks_projections():
    scores = np.ones((6, 7))
    scores[4:] *= 4  # two layers matter more
    scores[:, 2] *= 2  # and one projection everywhere
    coarse, both = hydra.coarse_and_fine(scores, np.ones((6, 7)), rank=8)
    assert (coarse[4:] > coarse[:4].max()).all() and len(np.unique(coarse.round(6))) == 2
    assert (both[:, 2:3] > np.delete(both, 2, axis=1)).all()
    assert both.max() <= 8 * hydra.MILD**2 and both.min() >= 8 / hydra.MILD**2


def test_predictor_learns_what_is_there_and_doubts_what_is_not():
    rng = np.random.default_rng(0)
    truth = np.array([1.0, -0.5, 0.2, 0.0, 2.0])
    learnable, noise = hydra.PerformancePredictor(), hydra.PerformancePredictor()
    for _ in range(40):
        x = rng.normal(size=5)
        learnable.observations.append((0, 1, x, x @ truth + 0.01 * rng.normal()))
        noise.observations.append((0, 1, x, rng.normal()))
    good, bad = learnable.fit(), noise.fit()
    assert good["error"] < 0.2 * good["error_of_mean"]
    assert bad["error"] > 0.9 * bad["error_of_mean"]
    x = rng.normal(size=5)
    change, doubt = learnable.predict(x)
    assert abs(change - x @ truth) < 0.2
    assert learnable.predict(np.zeros(5))[0] == 0  # no change changes nothing
    assert learnable.predict(10 * x)[1] > doubt  # far from what was measured it doubts more


def test_predictor_error_is_that_of_refitting_without_each_row():
    rng = np.random.default_rng(1)
    rows = [(i // 6, 1 + i % 3, rng.normal(size=5), rng.normal()) for i in range(12)]
    predictor = hydra.PerformancePredictor()
    predictor.observations = rows
    error = predictor.fit()["error"]
    # the direct way, with the scale of the features as fitted on all rows
    spread, weight = predictor.spread, np.array([w * predictor.FORGET ** (1 - event) for event, w, _, _ in rows])
    X, y = np.array([x for _, _, x, _ in rows]) / spread, np.array([change for *_, change in rows])
    errors = []
    for i in range(12):
        rest = np.arange(12) != i
        XtW = (X[rest] * weight[rest, None]).T
        w = np.linalg.solve(XtW @ X[rest] + predictor.RIDGE * np.eye(5), XtW @ y[rest])
        errors.append(weight[i] * (y[i] - X[i] @ w) ** 2)
    assert np.isclose(error, np.sqrt(sum(errors) / weight.sum()))


def test_components_bring_less_and_less():
    before, features = np.full((4, 7), 4), np.ones((4, 7, 5))
    gains = [-hydra.effect(before, before + n, features)[0] for n in (1, 2, 3)]
    assert gains[0] > gains[1] - gains[0] > gains[2] - gains[1] > 0
    moved = before + np.arange(28).reshape(4, 7) % 2 * 2 - 1  # from half of the modules to the other half
    assert hydra.effect(before, moved, features)[0] > 0  # of equal worth: even ranks are best


def test_a_useless_module_falls_to_rank_1_and_rises_again(world):
    controller = hydra.RankController(make_model(world, rank=4), 4, total_steps=20)
    ranks, weaker, seen = controller.ranks(), controller.costs * 1e-3, []
    for worth in [1e-9] * 4 + [1e-1] * 8:
        weaker[0, 4] = worth * controller.costs[0, 4]
        _, ranks = controller.candidates(np.full(ranks.shape, 0.1), weaker, ranks, np.random.default_rng(0))["importance"]
        seen.append(ranks[0, 4])
    assert seen[3] == 1 and seen[-1] >= 4, seen


def test_rank_events_keep_the_invariants(world, tokenizer):
    """A short training run with a predictor that always believes: ranks must move, the budget hold."""
    model = make_model(world, rank=3)
    samples = make_samples(world, tokenizer, 12)
    batch, probe = make_batch(samples, range(8)), make_batch(samples, range(8, 12))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = hydra.RankController(model, 3, total_steps=20)
    controller.predictor.fit = lambda: fit_and_believe(controller.predictor)
    moved = 0
    for step in range(20):
        loss, count = model.train()(**batch)
        (loss / count).backward()
        controller.observe(step, torch.tensor(True))
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in controller.event_steps:
            weights = {name: adapter.lora_B.clone() for name, adapter in hydra.adapters(model).items()}
            controller.change = keep_weights_until_change(controller, weights)
            entry = controller.event(step + 1, lambda: train.held_out_loss(model, [probe], torch.device("cpu")), optimizer)
            moved += entry["choice"] != "stay"
            assert ("loss_of_shrinking" in entry) == (entry["choice"] != "stay")
            assert entry["parameters"] == sum(a.lora_A.numel() + a.lora_B.numel() for a in hydra.adapters(model).values())
        assert 0 <= controller.budget - controller.parameters_used() < controller.costs.max()
        assert {adapter.scale for adapter in hydra.adapters(model).values()} == {2.0}
    assert moved and len(controller.history) == 3
    assert any("realised_gain" in entry for entry in controller.history)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert {adapter.scale for adapter in hydra.adapters(model).values()} == {2.0}


def fit_and_believe(predictor):
    report = hydra.PerformancePredictor.fit(predictor)
    predictor.error = 0.0
    return report | {"error": 0.0, "error_of_mean": 1.0}


def keep_weights_until_change(controller, weights):
    """RankController.change, which first checks that the probes put every masked component back."""

    def change(*arguments):
        assert all(torch.equal(adapter.lora_B, weights[name]) for name, adapter in controller.adapters.items())
        return hydra.RankController.change(controller, *arguments)

    return change


# ---------------------------------------------------------------------------------------------
# the model


def test_encoder_is_the_last_hidden_state_but_one(world):
    clip = hydra.load_clip(world / "clip")
    clip.train()
    pixels = torch.randn(2, 3, 48, 48)
    expected = clip.clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = clip(pixels)
    assert torch.equal(features, expected) and features.shape == (2, 36, 24)
    assert not any(module.training for module in clip.modules()) and not features.requires_grad


@torch.no_grad()
def test_splice_puts_image_tokens_in_place(world, tokenizer):
    model = make_model(world)
    samples = make_samples(world, tokenizer, 3)
    batch = make_batch(samples, range(3))
    logits = model.eval()(**{**batch, "labels": None})
    embed, image = model.llm.get_input_embeddings(), 0
    for row, sample in enumerate(samples[i] for i in range(3)):  # one by one, by hand
        parts = []
        for token in sample["input_ids"]:
            if token == data.IMAGE_TOKEN:
                parts.append(model.projector(model.clip(batch["pixel_values"][image : image + 1]))[0])
                image += 1
            else:
                parts.append(embed(torch.tensor([token])))
        expected = model.llm(inputs_embeds=torch.cat(parts)[None]).logits[0]
        assert torch.allclose(logits[row, : len(expected)], expected, atol=1e-5)
    with pytest.raises(ValueError, match="placeholders"):
        model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"][:1])


@pytest.mark.parametrize("method", ["hydra", "full"])
def test_loss_and_gradient_equal_the_plain_ones(world, tokenizer, monkeypatch, method):
    """Against CLIP run whole, an attention mask, all logits, and a loss over all positions."""
    model = make_model(world, rank=0 if method == "full" else 2, method=method)
    batch = make_batch(make_samples(world, tokenizer, 4), range(4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    compiled, shapes = torch.nn.functional.linear_cross_entropy, []

    def watched(hidden, *args, **kwargs):
        shapes.append(hidden.shape)
        return compiled(hidden, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", watched)
    loss, count = model(**batch)
    gradient = torch.autograd.grad(loss, trained.values())
    assert count == (batch["labels"][:, 1:] != data.IGNORE).sum() and shapes == [(count, 32)]  # no logits without a target
    clip = model.clip.clip
    monkeypatch.setattr(hydra.CLIPEncoder, "forward", lambda _, pixels: clip(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    embeddings, mask, labels = model.splice(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], batch["labels"])
    logits = model.llm(inputs_embeds=embeddings, attention_mask=mask.long()).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert torch.allclose(plain, loss, rtol=1e-5)
    for name, ours, theirs in zip(trained, gradient, torch.autograd.grad(plain, trained.values())):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name


@pytest.mark.parametrize("method", ["hydra", "full"])
def test_bf16_gives_fp32_gradients_near_the_exact_ones(world, tokenizer, method):
    """As on a GPU: what is frozen in bf16, what trains in fp32, products in bf16."""
    batch, gradients = make_batch(make_samples(world, tokenizer, 4), range(4)), []
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


def test_generation_in_a_batch_equals_one_by_one(world, tokenizer):
    model = make_model(world, rank=2).eval()
    questions = [json.loads(line) for line in (world / "questions.jsonl").read_text().splitlines()][:6]
    questions[1]["text"] = "A much longer question: " + questions[1]["text"]
    device = torch.device("cpu")
    together = train.answer(model, tokenizer, questions, world / "images", device)
    alone = [train.answer(model, tokenizer, [question], world / "images", device)[0] for question in questions]
    assert together == alone


@pytest.mark.parametrize("stage, method", [(1, None), (2, "hydra"), (2, "full")])
def test_only_the_intended_parameters_get_gradients(world, tokenizer, stage, method):
    model = make_model(world, rank=2 if method == "hydra" else 0, stage=stage, method=method)
    samples = make_samples(world, tokenizer)
    loss, _ = model.train()(**make_batch(samples, range(6)))
    loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    parts = {"hydra": ("projector.", "lora_"), "full": ("projector.", "llm."), None: ("projector.",)}[method]
    assert trained == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def gradients(model, batches):
    """Gradient of the mean loss over all targets of the batches, as the training loop makes it."""
    model.zero_grad()
    total = 0
    for batch in batches:
        loss, count = model(**batch)
        loss.backward()
        total += count
    return torch.cat([(p.grad / total).flatten() for p in model.parameters() if p.requires_grad])


def test_split_of_the_global_batch_does_not_matter(world, tokenizer):
    model = make_model(world, rank=2).train()
    samples = make_samples(world, tokenizer, 6)
    whole = gradients(model, [make_batch(samples, range(6))])
    # one of text alone, one uneven, one empty, as a last incomplete global batch gives
    parts = [[0], [1, 2, 4, 5], [], [3]]
    split = gradients(model, [make_batch(samples, part) for part in parts])
    assert (whole - split).norm() <= 1e-6 * whole.norm()


def test_samples_are_cut_after_the_image_is_expanded(world, tokenizer):
    samples = make_samples(world, tokenizer, 2)
    samples.context_length = 50
    model = make_model(world)
    batch = make_batch(samples, [1])
    embeddings, mask, labels = model.splice(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], batch["labels"])
    assert embeddings.shape[1] == mask.sum() == labels.shape[1] == 50


# ---------------------------------------------------------------------------------------------
# the commands


def flags(world, runs, stage=2, **changed):
    """Command line of a run on the test world; a flag set to None is left away, to True stands alone."""
    options = dict(
        stage=stage, model=world / "llm", vision_tower=world / "clip", data=world / ("caption.json" if stage == 1 else "instruct.json"),
        images=world / "images", questions=None if stage == 1 else world / "questions.jsonl", out=runs / f"stage{stage}", stage1=runs / "stage1",
        global_batch_size=8, per_device_train_batch_size=4, learning_rate=1e-2, max_steps=12, lora_dropout=0.0, log_steps=2, num_workers=0,
        lora_rank=2, lora_alpha=4,
    )  # fmt: skip
    options.update(changed)
    return [word for name, value in options.items() if value is not None for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def command(*words, processes=1, folder=HERE, code=0):
    """Run a script of the project, under torchrun for several processes; returns its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    result = subprocess.run(
        [sys.executable, *launcher, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def run_here(monkeypatch, *words):
    """train.py in this process, which keeps its signal handlers."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return train.run(train.parse_arguments())


@pytest.fixture(scope="session")
def stage1(world, tmp_path_factory):
    """A finished stage 1, through the command line."""
    out = tmp_path_factory.mktemp("runs")
    output = command(HERE / "train.py", *flags(world, out, stage=1))
    assert "4 × 2 × 1 processes = 8" in output and "next: torchrun train.py --stage 2" in output
    return out


@pytest.fixture(scope="session")
def stage2(world, stage1):
    """A finished stage 2 with rank events, through the command line."""
    output = command(HERE / "train.py", *flags(world, stage1, out=stage1 / "one"))
    assert output.count("rank event at step") == 2 and "no image" in output
    return stage1 / "one"


def final_state(out):
    folder = hydra.find_checkpoint(out)
    return load_file(folder / "model.safetensors"), hydra.read_config(folder)


def test_stages_leave_a_checkpoint_a_log_and_a_picture(stage2):
    assert [path.name for path in sorted(stage2.iterdir())] == ["checkpoint-12", "log.jsonl", "ranks.png"]
    entries = [json.loads(line) for line in (stage2 / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [2, 4, 6, 8, 10, 12]
    assert {"ranks_before", "ranks", "budget", "error", "error_of_mean"} <= next(e for e in entries if "choice" in e).keys()
    assert set(entries[-1]["result"]["test_loss"]) == set(entries[-1]["result"]["accuracy"]) == {"existence", "color", "position", "count", "letter", "choice", "all"}


def test_chat_answers_from_a_checkpoint(world, stage2):
    image = next((world / "images").iterdir())
    command(HERE / "hydra.py", "chat", stage2, "--image", image, "--prompt", "What is it?", "--max_new_tokens", 4)
    model, config = hydra.load_checkpoint(stage2)[0], hydra.read_config(stage2)
    assert {name: adapter.rank for name, adapter in hydra.adapters(model).items()} == {n: sum(r) for n, r in config["ranks"].items()}


@pytest.fixture(scope="session")
def uneven(stage2):
    """A stage-2 checkpoint with another rank in every module, one of them 1, and B far from zero."""
    folder = stage2.parent / "uneven"
    model, config = hydra.load_checkpoint(stage2)[0], hydra.read_config(stage2)
    for i, adapter in enumerate(hydra.adapters(model).values()):
        adapter.resize(i + 1, 0)
        torch.nn.init.normal_(adapter.lora_B, std=0.1)
    hydra.freeze(model, 2, "hydra")
    folder.mkdir()
    for name, content in hydra.model_files(model, {key: value for key, value in config.items() if key != "ranks"}).items():
        (folder / name).write_bytes(content)
    return folder


@torch.no_grad()
def logits_of(model, tokenizer, image_transform):
    turn = {"from": "human", "value": "<image>\nWhat is it?"}
    input_ids, _ = data.encode_conversation([turn], tokenizer, "v1")
    return model(torch.tensor([input_ids]), None, image_transform(Image.new("L", (50, 40), 90), "pad")[None])


def export(checkpoint, format, to, dtype="float32", force=False):
    hydra.export(argparse.Namespace(checkpoint=checkpoint, format=format, to=to, dtype=dtype, force=force))


def test_export_as_mobilevlm_reads_back(uneven, stage1, tmp_path):
    for checkpoint, method in ((uneven, "adapters"), (stage1 / "stage1", "projector")):
        export(checkpoint, "mobilevlm", tmp_path / method)
        back = hydra.load_checkpoint(tmp_path / method)
        assert back[0].stage == 1 and not hydra.adapters(back[0])
        assert torch.allclose(logits_of(*back), logits_of(*hydra.load_checkpoint(checkpoint)), atol=1e-5)
    for arguments, message in [
        ((uneven, "hf", tmp_path / "projector"), "exists; name another folder, or add --force"),
        ((uneven, "hf", uneven.parent, "float32", True), "holds what is exported"),
        ((stage1 / "stage1", "peft", tmp_path / "new"), "has no adapters"),
    ]:
        with pytest.raises(hydra.HydraError, match=message):
            export(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "projector"]


def test_export_as_hf_reads_back(world, uneven, tmp_path):
    (tmp_path / "stale").write_text("goes")
    export(uneven, "hf", tmp_path, force=True)
    assert not (tmp_path / "stale").exists()
    llm = LlamaForCausalLM.from_pretrained(tmp_path)
    back = hydra.load_checkpoint(tmp_path, world / "clip", tmp_path / "mm_projector.bin")
    back[0].llm = llm.eval()
    assert torch.allclose(logits_of(*back), logits_of(*hydra.load_checkpoint(uneven)), atol=1e-5)


def test_export_as_peft_reads_back(uneven, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    export(uneven, "peft", tmp_path / "peft")
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "peft").iterdir())  # as the umask says
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert "largest rank is 14" in capsys.readouterr().out and config["rank_pattern"].keys() == config["alpha_pattern"].keys()
    assert config["rank_pattern"]["model.layers.0.self_attn.q_proj"] == 1
    ours, tokenizer, image_transform = hydra.load_checkpoint(uneven)
    expected = logits_of(ours, tokenizer, image_transform)
    llm = LlamaForCausalLM.from_pretrained(config["base_model_name_or_path"])
    ours.llm = peft.PeftModel.from_pretrained(llm, tmp_path / "peft").eval().base_model.model
    assert torch.allclose(logits_of(ours, tokenizer, image_transform), expected, atol=1e-5)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A small LLaMA in MobileLLaMA's layout: tokenizer.model alone, sharded fp16 .bin, a config of transformers 4."""
    folder = tmp_path_factory.mktemp("published") / "MobileLLaMA"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes((REFERENCE / "golden" / "llama_tokenizer.model").read_bytes())
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, rms_norm_eps=1e-6,
        rope_scaling=None, pad_token_id=0, bos_token_id=1, eos_token_id=2, hidden_act="silu", torch_dtype="float16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    state = {name: tensor.half() for name, tensor in LlamaForCausalLM(LlamaConfig.from_dict(config)).state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # as older versions wrote it
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in state.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@needs_reference
def test_published_layout_goes_through_both_stages_and_out(world, published, tmp_path, monkeypatch):
    def run(stage, name, **changed):
        changed = dict(model=published, max_steps=1, questions=None, method="lora", out=tmp_path / name) | changed
        run_here(monkeypatch, *flags(world, tmp_path, stage, **changed))
        return hydra.read_config(tmp_path / name)

    run(1, "stage1")
    run(2, "stage2")
    model, tokenizer, _ = hydra.load_checkpoint(tmp_path / "stage2")
    assert model.llm.dtype == torch.float32 and tokenizer(" Hello", add_special_tokens=False).input_ids == [15043]
    vlm = tmp_path / "vlm"
    command(HERE / "hydra.py", "export", tmp_path / "stage2", "--format", "mobilevlm", "--to", vlm, "--dtype", "float16")
    assert (vlm / "tokenizer.model").is_file() and (vlm / "tokenizer_config.json").is_file()
    # what has a projector needs no stage 1 before stage 2: a MobileVLM, a stage 1 as the model, a file
    assert run(2, "on a MobileVLM", model=vlm, stage1=None)["model"] == str(vlm)
    assert run(2, "on stage 1", model=tmp_path / "stage1", stage1=None)["model"] == str(published)
    torch.save(hydra.build_projector("ldpnetv2", 24, 32).state_dict(), tmp_path / "mm_projector.bin")
    assert run(2, "on a file", projector=tmp_path / "mm_projector.bin", stage1=None)["projector"] == "ldpnetv2"
    with pytest.raises(train.ConfigError, match="has been through stage 2; first: python hydra.py export"):
        run(2, "on stage 2", model=tmp_path / "stage2", stage1=None)


@pytest.fixture(scope="session")
def two(world, stage1):
    """A finished stage 2 of two processes."""
    words = flags(world, stage1, out=stage1 / "two", per_device_train_batch_size=2, save_steps=3, keep=3)
    command(HERE / "train.py", *words, processes=2)
    command(HERE / "train.py", *words, "--resume", processes=2)  # of a finished run: evaluates again, changes nothing
    return stage1 / "two"


def test_two_processes_equal_one(world, stage1, stage2, two):
    assert [path.name for path in hydra.list_checkpoints(two)] == ["checkpoint-6", "checkpoint-9", "checkpoint-12"]
    moved = shutil.copytree(two, stage1 / "moved")  # from two processes to one, half way
    for step in (9, 12):
        shutil.rmtree(moved / f"checkpoint-{step}")
    command(HERE / "train.py", *flags(world, stage1, out=moved), "--resume")
    one, config_one = final_state(stage2)
    for other, config_other in map(final_state, (two, moved)):
        assert config_one["ranks"] == config_other["ranks"]
        for name in one:
            assert torch.allclose(one[name], other[name], atol=2e-4), name
    losses = [[entry["held_out_loss"] for entry in results(out)[0] if "held_out_loss" in entry] for out in (stage2, two, moved)]
    assert len(losses[0]) >= 7 and np.allclose(losses, losses[0], rtol=1e-4)


def test_gradient_does_not_depend_on_the_split(world, stage1):
    """Processes × passes: one incomplete global batch of images and text alone, so that some processes see no image.

    After one step Adam's first moment is a tenth of the gradient.
    """
    moments = []
    for processes, passes in ((1, 8), (2, 4), (4, 2)):
        out = stage1 / f"split-{processes}"
        words = flags(world, stage1, out=out, max_steps=1, global_batch_size=96, per_device_train_batch_size=12, method="lora",
                      gradient_accumulation_steps=passes, max_grad_norm=1e30, questions=None)  # fmt: skip
        command(HERE / "train.py", *words, processes=processes)
        state = torch.load(hydra.find_checkpoint(out) / "trainer.pt", weights_only=True)["optimizer"]["state"]
        moments.append(torch.cat([state[i]["exp_avg"].flatten() for i in sorted(state)]).double())
    for other in moments[1:]:
        assert (other - moments[0]).norm() <= 1e-6 * moments[0].norm()


def results(out):
    """What a run leaves, but for its speed: log, weights, ranks."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state, config = final_state(out)
    return [{k: v for k, v in entry.items() if k not in ("tokens_per_s", "result")} for entry in log], {k: v.tolist() for k, v in state.items()}, config["ranks"]


MOMENTS = {  # of the log's lines, before and now
    "a step": lambda out, before, now: now.count("\n") != before.count("\n"),
    "a save": lambda out, before, now: (out / ".unfinished").exists(),
    "a rank event": lambda out, before, now: now.count('"choice"') > before.count('"choice"'),
    "any time": lambda out, before, now: True,
}


@pytest.fixture(scope="session")
def undisturbed(world, stage1):
    """The flags and the result of a run over an epoch's end, with rank events, dropout and accumulation."""
    words = flags(world, stage1, epochs=2, max_steps=15, lora_dropout=0.1, save_steps=1)
    command(HERE / "train.py", *words, "--out", stage1 / "undisturbed")
    return words, results(stage1 / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_resumes_to_the_same_result(stage1, undisturbed, number):
    """HYDRA_KILLS=10 pytest -k killed: so many of each signal at random moments, each followed by a resume."""
    rng, out, (words, expected) = random.Random(int(number)), stage1 / f"killed-{number}", undisturbed
    words = [str(word) for word in (sys.executable, HERE / "train.py", *words, "--out", out, "--resume")]

    def log():
        return (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""

    for _ in range(int(os.environ.get("HYDRA_KILLS", 1))):
        moment, later, before = rng.choice(sorted(MOMENTS)), rng.uniform(0, 0.2), log()
        process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not MOMENTS[moment](out, before, log()):
            time.sleep(0.0005)
        time.sleep(later * (moment != "a save"))
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        # before it has said a word nothing has begun
        assert process.returncode == (-number if number == signal.SIGKILL or not output else 0), output + errors
        assert process.returncode or "go on with --resume" in output or "next: python hydra.py chat" in output
        assert not hydra.find_checkpoint(out) or final_state(out)  # what it left can be read
    command(*words[1:])
    assert results(out) == expected


def workers_of(process):
    """Process ids of torchrun's workers, once both train."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize("number, restarts", [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGTERM, 0)])
def test_a_signal_to_one_of_two_processes(world, stage1, two, number, restarts):
    """SIGTERM stops both, saved, with exit code 0; SIGKILL ends both with a message, or torchrun starts both anew."""
    out = stage1 / f"two-{number}-{restarts}"
    words = flags(world, stage1, out=out, per_device_train_batch_size=2, save_steps=1) + ["--resume"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", str(restarts)]
    process = subprocess.Popen([*launcher, str(HERE / "train.py"), *words], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    while process.poll() is None and not hydra.list_checkpoints(out):
        time.sleep(0.01)
    os.kill(workers_of(process)[1], number)
    output = process.communicate(timeout=120 if restarts else 60)[0]
    died = number == signal.SIGKILL and not restarts
    assert process.returncode == died, output
    assert ("stopped by a signal" in output, "Signal 9 (SIGKILL) received" in output) == (number == signal.SIGTERM, died)
    command(HERE / "train.py", *words, processes=2)  # goes on; after a restart it is finished, and evaluates again
    assert results(out)[1:] == results(two)[1:]


def test_a_full_disk_leaves_whole_checkpoints(world, stage1, undisturbed):
    """Full when the file-size limit is reached: an error in one line, and the run resumes to the same result."""
    (words, expected), out = undisturbed, stage1 / "full"
    words = [sys.executable, HERE / "train.py", *words, "--out", out, "--resume"]
    size = (hydra.find_checkpoint(stage1 / "undisturbed") / "trainer.pt").stat().st_size
    for limit in (size - 2000, 2000):  # of a checkpoint's last file; of config.json, later the log
        full = subprocess.run(["bash", "-c", f"ulimit -f {limit // 1024}; exec \"$@\"", "-", *map(str, words)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        assert full.returncode == 2 and full.stderr.strip().splitlines()[-1].startswith("train.py: error: "), full.stderr
        assert "File too large" in full.stderr and "Traceback" not in full.stderr
    command(*words[1:])
    assert results(out) == expected


def test_a_step_without_a_finite_gradient_is_left_out(world, stage1, monkeypatch):
    forward, calls = hydra.HydraVLM.forward, []

    def broken(self, *args, **kwargs):
        loss, count = forward(self, *args, **kwargs)
        calls.extend([1] * self.training)
        return loss * (math.inf if self.training and len(calls) in (3, 8) else 1), count

    monkeypatch.setattr(hydra.HydraVLM, "forward", broken)
    run_here(monkeypatch, *flags(world, stage1, out=stage1 / "left-out"))
    log = results(stage1 / "left-out")[0]
    assert [entry.get("skipped_steps", 0) for entry in log if "lr" in entry] == [1, 2, 2, 2, 2, 2]
    assert all(math.isfinite(entry["loss"]) for entry in log if "lr" in entry)


def test_ranks_that_differ_between_processes_stop_the_run(world, stage1, monkeypatch):
    monkeypatch.setattr(train, "gather", lambda value: [value, "another"] if isinstance(value, str) else [value])
    with pytest.raises(hydra.HydraError, match="step 1: ranks differ between processes"):
        run_here(monkeypatch, *flags(world, stage1, out=stage1 / "differ"))


def test_files_have_the_umask_and_their_place(world, stage1, stage2, tmp_path):
    (tmp_path / "cwd").mkdir()
    words = [*flags(world, stage1, out=tmp_path / "out", max_steps=3)]
    script = 'umask 027; python "$0" "$@"'
    for program, arguments in (("train.py", words), ("hydra.py", ["export", stage2, "--format", "mobilevlm", "--to", tmp_path / "to"])):
        subprocess.run(["bash", "-c", script, HERE / program, *map(str, arguments)], cwd=tmp_path / "cwd", check=True, capture_output=True,
                       env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"})  # fmt: skip
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).parts[0] for path in written} == {"out", "to"}
    assert {oct(path.stat().st_mode & 0o777) for path in written} == {"0o640"}


@pytest.mark.parametrize("stage, processes", [(1, 1), (2, 2)])
def test_benchmark_prints_its_table_and_leaves_nothing(tmp_path, stage, processes):
    output = command(HERE / "train.py", "--stage", stage, "--benchmark_steps", 3, "--global_batch_size", 4, processes=processes, folder=tmp_path)
    rows = output[output.index("3 steps after 3") :].splitlines()
    names = ["samples/s", "tokens/s", "utilisation", "peak memory", "padding", "waiting for data", "rank events"]
    assert [row[:18].strip() for row in rows[1:8]] == names and not list(tmp_path.iterdir())
    assert float(rows[1][18:]) > 0 and output.count("rank event at step") == 2 * (stage == 2)


def test_compare_runs_methods_in_pairs(world, stage1):
    words = flags(world, stage1, out=stage1 / "compare", max_steps=6, seeds=2, methods="lora,hydra:1", learning_rates="1e-2,1e-3")
    words = [word for i in range(0, len(words), 2) if words[i] not in ("--stage", "--learning_rate") for word in words[i : i + 2]]
    output = command(HERE / "train.py", "--stage", "compare", *words)
    results = [json.loads(line) for line in (stage1 / "compare" / "results.jsonl").read_text().splitlines()]
    assert len(results) == 2 * 2 + 2 and "n = 2 seeds" in output
    assert all(r["parameters"] < results[0]["parameters"] for r in results if r["method"] == "hydra:1")
    assert command(HERE / "train.py", "--stage", "compare", *words).splitlines()[-7:] == output.splitlines()[-7:]  # nothing is run again
    output = command(HERE / "train.py", "--stage", "compare", *words, "--max_steps", 7, code=2)
    assert "was run with --max_steps 6, not 7; name another folder" in output
    for flag, message in (("--max_steps", "--max_steps 6, not None"), ("--questions", "--questions: give held-out questions")):
        cut = words.index(flag)
        assert message in command(HERE / "train.py", "--stage", "compare", *words[:cut], *words[cut + 2 :], code=2)
    for flag, value, message in (
        ("--methods", "lora:x", "give a rank after the colon"), ("--learning_rates", "a", "give numbers"),
        ("--stage1", stage1 / "none-{seed}", "none-0"),
    ):  # fmt: skip
        assert message in command(HERE / "train.py", "--stage", "compare", *words, flag, value, code=2)
    again = results[0]["command"].split()[1:]
    again[again.index("--out") + 1] = stage1 / "again"
    command(HERE / "train.py", *again[1:])
    log = [json.loads(line) for line in (stage1 / "again" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["result"]["test_loss"] == results[0]["test_loss"]  # a line can be reproduced from what it says


@pytest.mark.parametrize("method", ["random@3", "self_attn@2", "eva"])
def test_further_methods_have_the_budget(world, stage1, stage2, monkeypatch, method):
    if method == "eva":
        pytest.importorskip("peft")
    monkeypatch.setattr(train, "build_model", build_for_comparison)
    out = stage1 / method
    words = flags(world, stage1, out=out, max_steps=3, questions=None)
    monkeypatch.setattr(train.Config.__dataclass_fields__["method"], "metadata", {"choices": [method], "help": ""})
    run_here(monkeypatch, *words, "--method", method)
    parameters, budget = (results_of(folder)["parameters"] for folder in (out, stage2))
    assert 0.98 * budget < parameters <= budget or method == "eva"  # eva moves ranks, not parameters
    assert results_of(out)["run"]["method"] == ("lora" if method == "eva" else "aligned")


def results_of(out):
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["result"]


def test_p_value_is_students():
    for t, degrees, p in ((1, 1, 0.5), (2.776445, 4, 0.05), (12.7062, 1, 0.05), (2.0, 9, 0.076553)):
        assert abs(train.p_value(t, degrees) - p) < 1e-4


def test_eval_answers_and_scores(world, stage2, tmp_path):
    words = ["--stage", "eval", "--checkpoint", stage2, "--benchmark", "vqa", "--questions", world / "questions.jsonl",
             "--images", world / "images", "--answers", tmp_path / "answers.jsonl"]  # fmt: skip
    output = command(HERE / "train.py", *words, processes=2)
    assert "48 questions, 0 answered before" in output and "accuracy" in output
    content = (tmp_path / "answers.jsonl").read_bytes()
    assert {json.loads(line)["model_id"] for line in content.splitlines()} == {str(hydra.find_checkpoint(stage2))}
    (tmp_path / "answers.jsonl").write_bytes(content[: len(content) // 2])  # as a kill would
    output = command(HERE / "train.py", *words)
    assert "0 answered before" not in output

    def texts(content):
        return [(answer["question_id"], answer["text"]) for answer in map(json.loads, content.splitlines())]

    assert sorted(texts((tmp_path / "answers.jsonl").read_bytes())) == sorted(texts(content))


def test_show_marks_what_is_masked(world):
    output = command(HERE / "data.py", "show", "--data", world / "instruct.json", "--images", world / "images", "--tokenizer", world / "llm")
    assert "USER:" in output and "<image>" in output


# ---------------------------------------------------------------------------------------------
# benchmarks


def write(path, content):
    """Content as JSON, a list as JSON lines for .jsonl, text as it is; returns the path."""
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def answers_to(questions, *texts):
    """Answers in LLaVA's format."""
    return [{"question_id": q["question_id"], "prompt": q["text"], "text": text} for q, text in zip(questions, texts, strict=True)]


@needs_reference
def test_pope_gives_the_published_numbers():
    pope = REFERENCE / "benchmarks" / "pope"
    questions = data.read_benchmark("pope", pope / "questions.jsonl", pope)
    scores = data.score("pope", questions, data.read_answers(pope / "answers.llava-v1.5-13b.jsonl"))
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
    labels = ["The answer is A.", "B", "C", "A", "B"]
    records = [{"id": str(i), "conversations": turns(("human", "<image>\nWhich?\nA. x"), ("gpt", label))} for i, label in enumerate(labels)]
    records[0]["image"] = records[2]["image"] = "i.png"
    questions = data.read_benchmark("sqa", write(tmp_path / "q.json", records))
    assert questions[0]["text"] == "Which?\nA. x\nAnswer with the option's letter from the given choices directly."
    assert [q["image"] for q in questions] == ["i.png", None, "i.png", None, None]
    scores = data.score("sqa", questions, answers_to(questions, "A", "B. y", "I think C", "So The answer is A", "b"))
    assert scores == {"accuracy": 3 / 5, "accuracy with image": 1 / 2}
    assert [data.letter(text) for text in ("Apple", "A.", "A.b", "The answer is A. The answer is B.", "")] == ["", "A", "", "", ""]


@pytest.mark.parametrize("text, plain", [
    ("The Two, cats.", "2 cats"), ("1,000.50", "1000.50"), ("Bob's", "bob 's"), ("dont", "don't"), ("couldnt've", "couldn't've"),
    ("a/b", "b"), ("x /b-c", "x b c"), ("None", "0"), ("somebody'd", "somebodyd"), ("what?\nno", "what no"),
])  # fmt: skip
def test_textvqa_normal_form(text, plain):
    assert data.plain_words(text) == plain


def test_textvqa_scores_against_ten_people(tmp_path):
    suffix = "\nReference OCR token: A, B\nAnswer the question using a single word or phrase."
    rows = [{"question_id": "x", "image": "x.jpg", "text": text + suffix} for text in ("What?", "Who is it?")]
    people = [["cola"] * 3 + ["Cola."] + ["pepsi"] * 6, ["two"] + ["3"] * 9]
    annotations = {"data": [{"image_id": "x", "question": q, "answers": a} for q, a in zip(("what?", "Who is it?"), people)]}
    questions = data.read_benchmark("textvqa", write(tmp_path / "q.jsonl", rows), write(tmp_path / "a.json", annotations))
    answers = answers_to(questions, "the Cola", "2")[::-1]  # matched by their prompts
    # 4 of 10 agree: 1 from all ten; 1 of 10: a third from nine, nothing from the one
    assert data.score("textvqa", questions, answers) == pytest.approx({"accuracy": (1 + 0.3) / 2})


def test_mme_adds_accuracy_and_both_right(tmp_path):
    rows = [{"question_id": f"{category}/{i}.png", "image": f"{category}/{i}.png", "category": category,
             "text": f"Is it {what}?\nAnswer the question using a single word or phrase."}
            for category in ("count", "code_reasoning") for i in (1, 2) for what in ("x", "y")]  # fmt: skip
    for category in ("count", "code_reasoning"):
        lines = [f"{i}.txt\tIs it {what}?  Please answer yes or no.\t{label}\n" for i in (1, 2) for what, label in (("x", "Yes"), ("y", "No"))]
        write(tmp_path / f"{category}.txt", "".join(lines))
    questions = data.read_benchmark("mme", write(tmp_path / "q.jsonl", rows), tmp_path)
    texts = ["Yes", "no", "Yes, it is", "I say no", "No", "yes", "yes", "Nope"]
    scores = data.score("mme", questions, answers_to(questions, *texts))
    assert scores == {"count": 75 + 50, "code_reasoning": 50 + 50, "perception": 125, "cognition": 100}
    with pytest.raises(data.DataError, match="1 questions have no second one"):
        data.score("mme", questions[1:], answers_to(questions, *texts)[1:])


def test_mmbench_reads_the_table_and_counts_rotations(tmp_path):
    header = "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
    table = header + "7\tWhich?\tLook.\tcat\tdog\t\tnan\tA\taGk=\n1000007\tWhich?\tnan\tdog\tcat\t\t\tB\t7\n8\tWho?\t\tx\ty\tz\tw\tD\taGk=\n"
    questions = data.read_benchmark("mmbench", write(tmp_path / "q.tsv", table))
    assert questions[0]["text"] == "Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert questions[1]["image"].endswith(",aGk=") and questions[1]["text"].startswith("Which?\nA. dog")
    assert data.score("mmbench", questions, answers_to(questions, "A. cat", "A", "D")) == {"accuracy": 2 / 3, "circular accuracy": 1 / 2}
    for text, message in [(table.replace("hint", "hints"), "no column hint"), (table + "9\tWho?\n", "row 4 has more or fewer columns")]:
        with pytest.raises(data.DataError, match=message):
            data.read_benchmark("mmbench", write(tmp_path / "bad.tsv", text))


def test_answers_must_match_the_questions(tmp_path):
    questions = [{"question_id": i, "image": "i", "text": "What?", "label": "x"} for i in range(4)]
    answers = answers_to(questions, "x", "x", "x", "x")
    with pytest.raises(data.DataError, match="3 questions have no answer"):
        data.score("vqa", questions, answers[:1])
    for wrong in (answers[:1], [answers[0] | {"question_id": 9}]):
        with pytest.raises(data.DataError, match="1 answers belong to no question or come twice, e.g. question_id [09]"):
            data.score("vqa", questions, answers + wrong)
    with pytest.raises(data.DataError, match="4 questions share their question_id"):
        data.read_benchmark("vqa", write(tmp_path / "twice.jsonl", 2 * questions[:2]))
    with pytest.raises(data.DataError, match="3 questions have an unknown category, or no label"):
        data.read_benchmark("gqa", write(tmp_path / "q.jsonl", questions), write(tmp_path / "a.json", {"2": {"answer": "x"}}))
    for odd in ({"category": 5}, {"text": " "}):
        with pytest.raises(data.DataError, match="1 questions have no text, or a category that is not text"):
            data.read_benchmark("vqa", write(tmp_path / "odd.jsonl", [questions[0], questions[1] | odd]))
    with pytest.raises(data.DataError, match="line 2 lacks the text 'label'"):
        data.read_benchmark("vqa", write(tmp_path / "q.jsonl", [questions[0], {"question_id": 1, "image": "i", "text": "What?"}]))


def test_a_cut_answers_file(tmp_path):
    questions = write(tmp_path / "q.jsonl", [{"question_id": i, "image": "i", "text": "What?", "label": "ä"} for i in (0, 1)])
    answers = write(tmp_path / "a.jsonl", answers_to(data.read_benchmark("vqa", questions), "ä", "b"))
    words = [HERE / "data.py", "score", "vqa", "--answers", answers, "--questions", questions]
    assert "accuracy                  0.5000    50.00 %" in command(*words)
    answers.write_bytes(answers.read_bytes()[:-10])
    output = command(*words, code=2)
    assert "line 2, the last, is cut short" in output and len(output.splitlines()) == 1
    rest = data.read_answers(answers, cut=True)
    assert [answer is None for _, answer in data.join_answers("vqa", data.read_benchmark("vqa", questions), rest)] == [False, True]


# ---------------------------------------------------------------------------------------------
# bad input: one line that names it, exit code 2


def record(**changed):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dot."}]
    return {"id": "r", "image": "00000.png", "conversations": turns} | changed


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


@pytest.mark.parametrize("content, message", [
    ({"a": 1}, "list of records"),
    ([], "list of records"),
    ("not json", "not valid JSON"),
    ([record(conversations=None)], r"record 0 \(r\): has no list 'conversations'"),
    ([record(conversations=turns(("robot", "<image>"), ("gpt", "x")))], "unknown speaker 'robot'"),
    ([record(conversations=turns(("human", "What?"), ("gpt", "x")))], "has an image and 0 <image>"),
    ([record(conversations=turns(("human", "<image><image>"), ("gpt", "x")))], "has an image and 2 <image>"),
    ([record(conversations=turns(("human", "What?"), ("gpt", "<image>")))], "has <image> in an answer"),
    ([{"id": "r", "conversations": record()["conversations"]}], "no field 'image'"),
    ([record(image="nowhere.png"), record(image=7)], r"(?s)nowhere.png does not exist.*records.json: 2 of 2 records are wrong"),
    ([record(image="../00000.png")], "not the name of a file inside the image folder"),
    ([record(conversations=turns(("human", "<image>"), ("human", "x")))], "take turns"),
])  # fmt: skip
def test_bad_records(world, tmp_path, content, message):
    path = tmp_path / "records.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(data.DataError, match=message):
        data.read_records(path, world / "images")


def test_bad_images(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text.jpg").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "outside.png")
    os.symlink(tmp_path / "outside.png", tmp_path / "folder" / "link.png")
    for name, message in [("text.jpg", "cannot be decoded"), ("no.jpg", "no such image"), ("../outside.png", "outside"), ("link.png", "outside")]:
        with pytest.raises(data.DataError, match=message):
            data.open_image(tmp_path / "folder", name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # 64 × 64 now counts as a decompression bomb
    with pytest.raises(data.DataError, match="cannot be decoded"):
        data.open_image(tmp_path, "outside.png")


@pytest.mark.parametrize("changed, message", [
    (dict(data="nowhere.json"), "nowhere.json: cannot be read"),
    (dict(images="nowhere"), "--images nowhere: no such image folder"),
    (dict(images=None), "--images None: no such image folder"),
    (dict(global_batch_size=6), r"4 × .* = .*, not --global_batch_size 6"),
    (dict(lora_dropout=1.5), "--lora_dropout 1.5: give a share below 1"),
    (dict(lora_rank=0), "--lora_rank 0: give a positive number"),
    (dict(lora_rank=33), "rank 33 for a linear of 32 -> 32: use 1 to 32"),
    (dict(stage1="nowhere"), "no checkpoint in nowhere; first run: torchrun train.py --stage 1 --model .* --seed . --out nowhere"),
    (dict(model="nobody/nothing"), "neither a folder nor reachable on the hub: download it, or give a folder"),
    (dict(projector="ldpnetv2"), "with projector ldpnet, not stage 1 with ldpnetv2"),
    (dict(benchmark_steps=3), "--benchmark_steps: knows the shapes of tiny, 1.7b, 3b, not of --model"),
])  # fmt: skip
def test_bad_flags(world, stage1, tmp_path, monkeypatch, changed, message):
    with pytest.raises((train.ConfigError, hydra.HydraError, data.DataError), match=message):
        run_here(monkeypatch, *flags(world, stage1, **{"out": tmp_path / "out", **changed}))


def edited(folder, to, **changed):
    """A copy of a model's folder with fields of config.json changed."""
    shutil.copytree(folder, to)
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | changed))
    return to


def test_bad_models(world, uneven, tokenizer, tmp_path):
    state = load_file(world / "llm" / "model.safetensors")
    short, long, cut, lies, other = (edited(world / "llm", tmp_path / name) for name in ("short", "long", "cut", "lies", "other"))
    save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, short / "model.safetensors")
    (long / "model.safetensors").unlink()
    torch.save(state | {"model.extra": torch.ones(3)}, long / "pytorch_model.bin")
    (cut / "model.safetensors").unlink()
    (cut / "pytorch_model.bin").write_bytes((long / "pytorch_model.bin").read_bytes()[:5000])
    (lies / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, other / "model.safetensors")
    torch.save(hydra.build_projector("ldpnetv2", 24, 40).state_dict(), tmp_path / "mm_projector.bin")
    for arguments, message in [
        ((short,), "lm_head.weight is absent in it"),
        ((long,), r"model.extra is \[3\] in it, absent in the model"),
        ((cut,), "pytorch_model.bin: cannot be read"),
        ((lies,), "model.safetensors: cannot be read"),
        ((world / "llm", world / "clip", tmp_path / "mm_projector.bin"), r"mm_projector.bin: .* is \[40, 24\] in it, \[32, 24\] in the model"),
        ((world / "llm", world / "clip", tmp_path / "no.bin"), "unknown projector .*no.bin"),
        ((edited(world / "llm", tmp_path / "bert", model_type="bert"),), "is neither a LLaMA, a MobileVLM nor a checkpoint of train.py"),
        ((edited(world / "llm", tmp_path / "vocab", vocab_size=1000),), r"\[1000, 32\] in the model"),
        ((edited(world / "llm", tmp_path / "vlm", model_type="mobilevlm"), world / "clip"), "model.mlp.1.weight is absent in it"),
        ((edited(uneven, tmp_path / "moved", model=str(other)),), "was trained on another LLM or CLIP"),
        ((edited(uneven, tmp_path / "scale", scale=None),), "config.json: scale is missing or damaged"),
        ((world,), "no config.json"),
    ]:  # fmt: skip
        with pytest.raises(hydra.HydraError, match=message) as raised:
            hydra.load_checkpoint(*arguments) if len(arguments) > 1 else hydra.load_checkpoint(*arguments, vision_tower=world / "clip")
        assert "\n" not in str(raised.value)
    tokenizer.add_tokens(["<x>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(hydra.HydraError, match="tokenizer of .* ids for a model of"):
        hydra.load_mobilellama(other)


def test_a_run_is_not_overwritten_and_not_continued_as_another(world, stage1, stage2, monkeypatch):
    for changed, message in [(dict(), "holds a run"), (dict(resume=True, method="lora"), "has method hydra, this run lora")]:
        with pytest.raises(train.ConfigError, match=message):
            run_here(monkeypatch, *flags(world, stage1, out=stage2, **changed))


def test_an_error_is_one_line_and_exit_code_2(world, tmp_path, monkeypatch):
    for words in (
        [HERE / "train.py", *flags(world, tmp_path)],
        [HERE / "hydra.py", "chat", tmp_path, "--image", "x.png", "--prompt", "What?"],
        [HERE / "data.py", "show", "--data", tmp_path / "no.json", "--images", tmp_path],
        [HERE / "data.py", "bench", "--images", tmp_path],
    ):
        output = command(*words, code=2)
        assert len([line for line in output.splitlines() if "error" in line]) == 1 and "Traceback" not in output
    with pytest.raises(train.ConfigError, match="--seed 2000000000: give a number below"):
        run_here(monkeypatch, "--stage", "1", "--seed", "2000000000")
    with pytest.raises(train.ConfigError, match="unrecognized arguments: --lora_rnk"):
        run_here(monkeypatch, "--stage", "1", "--lora_rnk", "4")


# ---------------------------------------------------------------------------------------------
# hostile files


@pytest.mark.parametrize("name, content", [("deep.json", "[" * 100_000), ("deep.jsonl", "[" * 100_000), ("cut.json", '[{"id": "\ud83d')])
def test_hostile_json(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(data.DataError, match="is not valid JSON"):
        data.read_json(tmp_path / name)


def test_code_in_a_checkpoint_is_not_run(world, stage1, stage2, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    folder = shutil.copytree(hydra.find_checkpoint(stage2), tmp_path / "hostile" / "checkpoint-12")
    torch.save({"progress": Code()}, folder / "trainer.pt")
    output = command(HERE / "train.py", *flags(world, stage1, out=tmp_path / "hostile"), "--resume", code=2)
    assert "trainer.pt cannot be read" in output and "Traceback" not in output and not (tmp_path / "run").exists()


IMAGES = {
    "grey.png": Image.new("L", (30, 20)), "palette.png": Image.new("P", (30, 20)), "alpha.png": Image.new("RGBA", (30, 20)),
    "cmyk.jpg": Image.new("CMYK", (30, 20)), "deep.png": Image.new("I;16", (30, 20)), "dot.png": Image.new("RGB", (1, 1)),
    "long.png": Image.new("RGB", (20_000, 10)), "photo.jpg": Image.effect_noise((90, 60), 80).convert("RGB"),
}  # fmt: skip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, image in IMAGES.items():
        image.save(folder / name)
    IMAGES["photo.jpg"].save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (90, 60))])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:-900])
    return folder


def test_pictures_of_all_kinds(pictures):
    broken = []
    for path in sorted(pictures.iterdir()):
        try:
            for mode in ("crop", "pad"):
                assert data.image_to_tensor(data.open_image(pictures, path.name), 32, mode).isfinite().all()
        except data.DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            broken.append(path.name)
    assert broken == ["cut.jpg", "empty.jpg", "text.jpg"]


def test_exif_rotation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert data.open_image(tmp_path, "turned.jpg").size == (30, 20)


def test_a_bomb_in_a_table_is_refused(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    row = ["7", "Which?", "", "cat", "dog", "", "", "A", base64.b64encode(bomb.getvalue()).decode()]
    write(tmp_path / "q.tsv", "\t".join(["index", "question", "hint", *"ABCD", "answer", "image"]) + "\n" + "\t".join(row) + "\n")
    (question,) = data.read_benchmark("mmbench", tmp_path / "q.tsv")
    with pytest.raises(data.DataError, match="400000000 pixels") as raised:
        data.open_image(None, question["image"])
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_code_beside_a_model_is_not_run(world, tmp_path):
    code = {"AutoTokenizer": ["code.Tokenizer", None], "AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder = edited(world / "llm", tmp_path / "llm", auto_map=code)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": code}))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run')!r})\n")
    hydra.load_mobilellama(folder)
    assert not (tmp_path / "run").exists()


def test_check_lists_what_is_wrong(pictures, tmp_path):
    names = ["photo.jpg", "cut.jpg", "nowhere.jpg", "empty.jpg", "alpha.png"]
    (tmp_path / "records.json").write_text(json.dumps([record(id=name, image=name) for name in names]))
    output = command(HERE / "data.py", "check", "--data", tmp_path / "records.json", "--images", pictures, "--workers", 2, code=1)
    lines = output.splitlines()
    assert [line.split("\t")[1] for line in lines if "\t" in line] == ["cut.jpg", "nowhere.jpg", "empty.jpg"]
    assert "3 of 5 records are wrong" in lines


def test_a_broken_image_gives_its_place_to_the_next_record(world, stage1, pictures, tmp_path):
    shutil.copytree(world / "images", tmp_path / "images")
    shutil.copy(pictures / "empty.jpg", tmp_path / "images" / "00001.png")
    words = flags(world, stage1, out=tmp_path / "out", images=tmp_path / "images", max_bad=0.015, max_steps=None, epochs=2)  # met twice, one image
    output = command(HERE / "train.py", *words, processes=2)
    assert "image replaced by the next record's: record instruct-1" in output and "left out: 1 broken images" in output
    output = command(HERE / "train.py", *words[: words.index("--max_bad")], "--out", tmp_path / "strict", code=2)
    assert "1 of 92 records have a broken image, more than --max_bad 0.001" in output and "Traceback" not in output


def test_a_run_without_finite_gradients_stops(world, stage1, tmp_path):
    output = command(HERE / "train.py", *flags(world, stage1, out=tmp_path / "out", learning_rate=1e30, max_grad_norm=1e30), code=2)
    assert "no finite gradient for 11 steps" in output and "look at records ['instruct-" in output


# HYDRA_FUZZ=4000 pytest -k fuzz: so many mutations of each kind


def mutated(content, edits):
    for at, new, dropped in edits:
        i = int(at * len(content))
        content = content[:i] + new + content[i + dropped :]
    return content


def fuzz(test):
    """test(content), for many mutations of the content that it is given."""
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: no fuzzing")
    st = hypothesis.strategies
    edit = st.tuples(st.floats(0, 1), st.binary(max_size=4) | st.sampled_from([b'"', b"[", b"{}", b"null", b"-1", b"\xff" * 8]), st.integers(0, 9))
    given = hypothesis.given(st.lists(edit, min_size=1, max_size=5))
    hypothesis.settings(max_examples=int(os.environ.get("HYDRA_FUZZ", 40)), deadline=2000, database=None)(given(test))()


def test_fuzz_records(world, tokenizer, tmp_path):
    content = json.dumps(json.loads((world / "instruct.json").read_text())[:3]).encode()

    def test(edits):
        (tmp_path / "records.json").write_bytes(mutated(content, edits))
        try:
            records = data.read_records(tmp_path / "records.json", world / "images")
        except data.DataError:
            return
        for sample in make_samples(world, tokenizer, records):
            assert len(sample["input_ids"]) == len(sample["labels"])

    fuzz(test)


@pytest.mark.parametrize("name", ["photo.jpg", "palette.png", "moving.gif"])
def test_fuzz_images(pictures, tmp_path, name):
    content = (pictures / name).read_bytes()

    def test(edits):
        (tmp_path / name).write_bytes(mutated(content, edits))
        try:
            data.image_to_tensor(data.open_image(tmp_path, name), 32, "pad")
        except data.DataError as error:
            assert "\n" not in str(error)

    fuzz(test)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "trainer.pt"])
def test_fuzz_checkpoints(world, stage2, tmp_path, name):
    folder = shutil.copytree(hydra.find_checkpoint(stage2), tmp_path / "checkpoint-12")
    content, model = (folder / name).read_bytes(), hydra.load_checkpoint(folder)[0]

    def test(edits):
        (folder / name).write_bytes(mutated(content, edits))
        try:
            if name == "trainer.pt":
                train.load_trainer_state(folder, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]), None)
            else:
                hydra.restore(model, folder, hydra.read_config(folder))
        except (hydra.HydraError, train.ConfigError) as error:
            assert "\n" not in str(error)

    fuzz(test)


# ---------------------------------------------------------------------------------------------
# train.py with further methods: adalora and eva (PEFT's), and ranks given from the start


OURS = tuple(train.METHODS)


def build_for_comparison(config, device, stage1, build=train.build_model):
    """train.build_model for methods that are not ours; the loop then takes them for one that is.

    PATTERN@WEIGHT     aligned, but modules whose name matches have WEIGHT times the rank, the rest less: the same budget
    random@SEED        aligned, but random ranks, the same budget
    unaligned          hydra from LoRA's random rows
    orthonormal        lora from random rows that are as long as aligned's, and as orthogonal
    adalora            starts with 1.5 times the rank, as its authors do, and ends with the budget's
    eva                ranks and A from the singular values of activations; moves ranks, not parameters
    """
    if config.method in OURS:
        return build(config, device, stage1)
    method, config.method = config.method, "aligned" if "@" in config.method else "lora"
    model, tokenizer = build(config, device, stage1)
    if method == "unaligned":
        hydra.align, config.method = (lambda *_: None), "hydra"
    modules = hydra.adapters(model)
    if "@" in method:
        pattern, weight = method.split("@")
        controller = hydra.RankController(model, config.lora_rank, 100)
        if pattern == "random":
            weights = np.exp(np.random.default_rng(int(weight)).normal(0, 0.5, len(modules)))
        else:
            weights = np.array([float(weight) if re.search(pattern, name) else 1.0 for name in modules])
        targets = config.lora_rank * weights.reshape(controller.costs.shape)
        ranks = hydra.fit_to_budget(targets, controller.costs, controller.budget, controller.limits)
        print("ranks:", ranks.tolist())
        for module, rank in zip(modules.values(), ranks.flat):
            module.resize(int(rank), 0)
    elif method == "orthonormal":
        for module in modules.values():
            torch.nn.init.orthogonal_(module.lora_A)
    elif method in ("adalora", "eva"):
        use_peft(config, model, tokenizer, method)
    return model, tokenizer


def use_peft(config, model, tokenizer, method):
    """PEFT's adapters in the place of ours."""
    import peft
    from torch.optim.optimizer import register_optimizer_step_post_hook

    for name, module in hydra.adapters(model).items():
        parent, child = name.rsplit(".", 1)
        setattr(model.llm.get_submodule(parent), child, module.base)
    records, _, _ = train.split_held_out(train.read_data(config)[0], max(32, config.global_batch_size))
    batches = data.global_batches(records, config.global_batch_size, config.seed, 0)
    steps = min(config.epochs * len(batches), config.max_steps or math.inf)
    common = dict(target_modules=[name.split(".")[1] for name in hydra.PROJECTIONS], lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout)
    if method == "adalora":
        options = dict(init_r=round(1.5 * config.lora_rank), target_r=config.lora_rank, tinit=steps // 10, tfinal=steps // 2, deltaT=10)
        llm = peft.get_peft_model(model.llm, peft.AdaLoraConfig(**common, **options, total_step=steps))
        step, forward = iter(range(steps)), model.forward

        def regularised(*args, **kwargs):  # as AdaLoRA's own forward does it
            loss, count = forward(*args, **kwargs)
            grams = [p @ p.T if "lora_A" in n else p.T @ p for n, p in model.llm.named_parameters() if re.search("lora_[AB]", n)]
            penalty = sum((gram - torch.eye(len(gram))).norm() for gram in grams) / len(grams)
            return loss + 0.5 * penalty * count * model.training, count

        model.forward = regularised
        # after the step and before the gradients are forgotten, as its documentation asks
        register_optimizer_step_post_hook(lambda *_: llm.base_model.update_and_allocate(next(step)))
    else:
        options = dict(r=config.lora_rank, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
        llm = peft.get_peft_model(model.llm, peft.LoraConfig(**common, **options), low_cpu_mem_usage=True)
        samples = train.make_samples(records, config.images, model, tokenizer, "v1")
        inputs = []
        for batch in batches[:32]:
            batch = make_batch(samples, batch)
            embeddings, mask, _ = model.splice(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
            inputs.append({"inputs_embeds": embeddings.detach(), "attention_mask": mask.long(), "input_ids": mask})
        peft.initialize_lora_eva_weights(
            llm, inputs, forward_fn=lambda llm, x: llm(inputs_embeds=x["inputs_embeds"], attention_mask=x["attention_mask"]), show_progress_bar=False
        )
    model.projector.requires_grad_(True)


def compare_further():
    """The command line of train.py, with the methods above."""
    named = sys.argv[sys.argv.index("--method") + 1 :][:1] if "--method" in sys.argv else []
    train.METHODS += {*named} - {*OURS}
    train.build_model = build_for_comparison
    if {"adalora", "eva"} & {*named} and "--out" in sys.argv:  # PEFT's cannot be resumed: what was cut short starts anew
        shutil.rmtree(sys.argv[sys.argv.index("--out") + 1], ignore_errors=True)
    train.main()


# ---------------------------------------------------------------------------------------------
# bench: our step beside the usual one, each in a process of its own


def random_samples(count, stage, seed=0):
    """Samples of random ids: stage 1 captions of about 25 tokens, stage 2 log-normal answers, median 150, after 30 of a question."""
    rng, samples = np.random.default_rng(seed), []
    for _ in range(count):
        question = 1 if stage == 1 else 30
        answer = int(np.clip(rng.lognormal(math.log(25 if stage == 1 else 150), 0.25 if stage == 1 else 0.9), 4, 1200))
        ids = rng.integers(3, 32000, question + answer).tolist()
        pixels = torch.from_numpy(rng.normal(size=(3, 168, 168)).astype(np.float32)) if stage == 1 or rng.random() < 0.94 else None
        if pixels is not None:
            ids.insert(1, data.IMAGE_TOKEN)
        labels = [data.IGNORE] * (len(ids) - answer) + ids[-answer:]
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return samples


def bench_models():
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8, max_position_embeddings=2048,
    ))  # fmt: skip
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=6, image_size=168, patch_size=14,
    ))  # fmt: skip
    return clip, hydra.build_projector("ldpnet", 384, 512), llm


def our_step(stage):
    """(order of the samples, step): what train.py does."""
    model = hydra.HydraVLM(hydra.CLIPEncoder(*(parts := bench_models())[:1]), *parts[1:])
    if stage == 2:
        hydra.inject_adapters(model.llm, 32, scale=2.0, dropout=0.05)
    hydra.freeze(model, stage, "lora")
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def order(samples):
        records = [{"conversations": [{"value": "x" * len(s["labels"])}], **({} if s["pixel_values"] is None else {"image": ""})} for s in samples]
        return data.global_batches(records, 8, 0, 0)

    def step(samples):
        batch = data.collate(samples)
        del batch["bad"]
        loss, count = model(**batch)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()

    return order, step


def usual_step(stage):
    """(order of the samples, step): transformers and PEFT as they are mostly used, batches in random order."""
    import peft

    clip, projector, llm = bench_models()
    for part in (clip, llm):
        part.requires_grad_(False)
    if stage == 2:
        names = [name.split(".")[1] for name in hydra.PROJECTIONS]
        llm = peft.get_peft_model(llm, peft.LoraConfig(r=32, lora_alpha=64, lora_dropout=0.05, target_modules=names))
    optimizer = torch.optim.AdamW([p for part in (projector, llm) for p in part.parameters() if p.requires_grad], lr=1e-4)
    llm.train()
    pad = torch.nn.utils.rnn.pad_sequence

    def step(samples):
        pixels = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
        with torch.no_grad():
            features = clip(torch.stack(pixels), output_hidden_states=True).hidden_states[-2][:, 1:]
        images, rows, labels = iter(projector(features)), [], []
        for s in samples:
            ids, row_labels = torch.tensor(s["input_ids"]), torch.tensor(s["labels"])
            embed = llm.get_input_embeddings()
            if s["pixel_values"] is None:
                row = embed(ids)
            else:
                image = next(images)
                row = torch.cat([embed(ids[:1]), image, embed(ids[2:])])
                row_labels = torch.cat([row_labels[:1], torch.full((len(image),), data.IGNORE), row_labels[2:]])
            rows.append(row)
            labels.append(row_labels)
        mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
        labels = pad(labels, batch_first=True, padding_value=data.IGNORE)
        llm(inputs_embeds=pad(rows, batch_first=True), attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def order(samples):
        return torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).view(-1, 8).tolist()

    return order, step


def peak_memory():
    """GB that this process held at most; getrusage would count its parent's."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6


def peak_of_tensors(function):
    """GB that tensors which the function makes hold at most, as torch.cuda.max_memory_allocated would count them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))) / 1e9


def bench_step(stage, side):
    """Prints samples/s and the peak memory (GB): of the process, beyond what it has once the model is built, and of a step's tensors."""
    __import__("peft")  # on both sides, for its memory
    torch.set_num_threads(2)
    samples = random_samples(192 if stage == 1 else 64, stage)
    order, step = {"ours": our_step, "usual": usual_step}[side](stage)
    built = peak_memory()
    batches = [[samples[i] for i in batch] for batch in order(samples)]
    step(batches[0])
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    seconds, peak = time.perf_counter() - started, peak_memory()
    longest = max(batches, key=lambda batch: max(len(sample["labels"]) for sample in batch))
    print(json.dumps([len(samples) / seconds, peak, peak - built, peak_of_tensors(lambda: step(longest))]))


def in_turns(ours, usual, times=5):
    """Median seconds of each, run in turns."""
    seconds = [[], []]
    for _ in range(times):
        for side, function in zip(seconds, (ours, usual)):
            started = time.perf_counter()
            function()
            side.append(time.perf_counter() - started)
    return map(np.median, seconds)


def bench_images():
    """640 × 480 JPEGs to 336 px in stage 2's mode, one thread; usual: Pillow and transformers' CLIPImageProcessor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.set_num_threads(1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    with tempfile.TemporaryDirectory() as folder:
        for i in range(32):
            noise = sum(np.asarray(Image.effect_noise((640 // k, 480 // k), 60 + k).resize((640, 480), 3), dtype=float) for k in (1, 4, 16, 64)) / 4
            Image.fromarray(noise.astype(np.uint8)).convert("RGB").save(f"{folder}/{i}.jpg", quality=90)

        def ours():
            return [data.image_to_tensor(data.open_image(folder, f"{i}.jpg", 336), 336, "pad") for i in range(32)]

        def usual():
            tensors = []
            for i in range(32):
                image = Image.open(f"{folder}/{i}.jpg").convert("RGB")
                square = Image.new("RGB", (640, 640), tuple(int(255 * channel) for channel in data.CLIP_MEAN))
                square.paste(image, (0, 80))
                tensors.append(processor(square, return_tensors="pt")["pixel_values"][0])
            return tensors

        a, b = in_turns(ours, usual)
        difference = max((x - y).abs().max().item() for x, y in zip(ours(), usual())) * 255 * max(data.CLIP_STD)
    print(f"images    {'images/s, 1 core':>18}{32 / a:10.1f}{32 / b:10.1f}{b / a:8.2f}   largest difference {difference:.1f} / 255")


def bench_adapter():
    """Forward and backward of one adapter, 2048 -> 5632, r = 128, dropout 0.05, 4,096 tokens; usual: PEFT's Linear."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.set_num_threads(2)
    base, options = torch.nn.Linear(2048, 5632, bias=False), dict(r=128, lora_alpha=256, lora_dropout=0.05)
    usual, ours = Linear(base, "default", LoraConfig(**options), **options).train(), hydra.HybridLoRALinear(base, 128, scale=2.0).train()
    x, g = torch.randn(4096, 2048, requires_grad=True), torch.randn(4096, 5632)

    def kept(module):
        """MB that the forward pass keeps for the backward pass, weights apart."""
        storages, weights = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage()}) or t, lambda t: t):
            module(x)
        return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in weights) / 1e6

    a, b = in_turns(lambda: ours(x).backward(g), lambda: usual(x).backward(g))
    print(f"adapter   {'seconds':>18}{a:10.3f}{b:10.3f}{a / b:8.2f}")
    print(f"adapter   {'MB kept':>18}{kept(ours):10.1f}{kept(usual):10.1f}{kept(ours) / kept(usual):8.2f}")


def bench():
    """Ours beside the usual way; steps each in a process of its own, twice, in turns."""
    if len(sys.argv) > 2:
        return bench_step(int(sys.argv[2]), sys.argv[3])
    print(f"{'':10}{'':>18}{'ours':>10}{'usual':>10}{'ratio':>8}")
    bench_images()
    bench_adapter()
    for stage in (2, 1):
        runs = {"ours": [], "usual": []}
        for _ in range(2):
            for side in runs:
                words = [sys.executable, __file__, "bench", str(stage), side]
                runs[side].append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        ours, usual = (np.mean(runs[side], axis=0) for side in runs)
        for name, a, b in zip(("samples/s", "GB of the process", "GB beyond weights", "GB of tensors"), ours, usual):
            print(f"stage {stage}   {name:>18}{a:10.2f}{b:10.2f}{a / b:8.2f}", flush=True)


if __name__ == "__main__":
    bench() if sys.argv[1:2] == ["bench"] else compare_further()

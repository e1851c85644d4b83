"""Train HyDRA: stage 1 aligns the projector, stage 2 adds hybrid-rank adapters to the LLM.

On a laptop (a toy world, made on the spot; nothing is downloaded):

    torchrun train.py --stage 1
    torchrun train.py --stage 2

On 8 GPUs, and on two nodes of 8:

    torchrun --nproc_per_node 8 train.py --stage 1 --model 1.7b \\
        --data blip_laion_cc_sbu_558k.json --images LLaVA-Pretrain
    torchrun --nproc_per_node 8 train.py --stage 2 --model 1.7b --data llava_v1_5_mix665k.json --images data
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...

A stage is data, not a second code path: what trains, the template and the recipe differ, the loop does not.
Read hydra.py first; then this file, from configuration to `run`, to the section comment that says what to skip.
"""

import argparse
import fcntl
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import hydra
from data import Mistake, reading, whole

# ------------------------------------------------------------------------------------------
# configuration


def flag(default, help, **options):
    return field(default=default, metadata={"help": help, **options})


@dataclass
class Config:
    """A run. The command line is made from these fields; None: the recipe's value, or none."""

    stage: int | str = flag(
        None, "1: projector on captions; 2: projector and adapters on instructions; eval: a benchmark", required=True,
        choices=(1, 2, "eval"), type=lambda word: int(word) if word.isdecimal() else word)  # fmt: skip
    benchmark: str = flag(None, "eval: whose questions and score", choices=tuple(data.BENCHMARKS))
    model: str = flag("tiny", "tiny, 1.7b, 3b, a folder or hub id of a LLaMA or MobileVLM, or a run of stage 1")
    vision_tower: str = flag(None, "folder or hub id of a CLIP (default: the model's)")
    projector: str = flag(None, "a new ldpnet (default) or ldpnetv2, or upstream's mm_projector.bin")
    data: str = flag(None, "JSON file of LLaVA records (tiny: the toy world's)")
    images: str = flag(None, "folder that the records' image names are in")
    questions: str = flag(None, "JSON lines {question_id, image, text, label} to answer; eval: the benchmark's")
    out: str = flag(None, "folder of the run (default: runs/MODEL/stage1, runs/MODEL/stage2-METHOD)")
    stage1: str = flag(None, "stage 2: run of stage 1 to start from (default: runs/MODEL/stage1, for a new projector)")
    method: str = flag("hydra", "stage 2: hydra, lora (fixed ranks), full (the LLM's own weights); to compare: aligned "
                       "(hydra's start, fixed ranks) and ways to move ranks without the performance model",
                       choices=("hydra", "lora", "full", "aligned", "coarse", "coarse+fine", "dynamic", "random"))
    lora_rank: int = flag(None, "adapters' rank at the start, which sets the parameter budget")
    lora_alpha: float = flag(None, "adapters' scale is lora_alpha / lora_rank, and stays when ranks move")
    lora_dropout: float = flag(None, "dropout before the adapters")
    use_rslora: bool = flag(False, "scale lora_alpha / √lora_rank instead")
    per_device_train_batch_size: int = flag(None, "samples per process and pass")
    gradient_accumulation_steps: int = flag(None, "passes per step")
    global_batch_size: int = flag(None, "samples per step; any two of the three give the third")
    max_tokens_per_pass: int = flag(12288, "a pass of more (rows × longest row) or than fits the GPU is run in parts")
    learning_rate: float = flag(None, "peak of the cosine schedule (default: by --model; a folder or hub id: 1.7b's)")
    warmup_ratio: float = flag(0.03, "share of the steps in which the rate rises")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    epochs: int = flag(1, "passes over the data")
    max_steps: int = flag(None, "stop after so many steps, the schedule shortened to fit")
    seed: int = flag(0, "of initial weights, data order and dropout")
    resume: bool = flag(False, "continue from the newest checkpoint in --out")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, a third slower")
    num_workers: int = flag(4 * torch.cuda.is_available(), "processes that read images ahead (default: 4 per GPU)")
    log_steps: int = flag(20, "steps between log lines")
    eval_steps: int = flag(None, "steps between evaluations (default: four in a run)")
    save_steps: int = flag(500, "steps between checkpoints")
    keep: int = flag(1, "checkpoints to keep, the newest ones")
    max_bad: float = flag(0.001, "share of an epoch's records whose image may turn out to be broken")
    checkpoint: str = flag(None, "eval: what answers: a run or checkpoint, or a folder or hub id of a MobileVLM")
    annotations: str = flag(None, "eval: the benchmark's labels, where its questions have none")
    answers: str = flag(None, "eval: file of the answers, continued if it is there (default: in --checkpoint)")


TOY = Path("runs/tiny/world")
SOURCES = {"tiny": str(TOY / "llm"), "1.7b": "mtgv/MobileLLaMA-1.4B-Chat", "3b": "mtgv/MobileLLaMA-2.7B-Chat"}
RECIPES = {  # MobileVLM's by stage, the toy's for both: for a global batch on any number of GPUs
    1: dict(global_batch_size=256, per_device_train_batch_size=32),
    2: dict(global_batch_size=128, per_device_train_batch_size=16, lora_rank=128, lora_alpha=256.0, lora_dropout=0.05),
    "tiny": dict(global_batch_size=16, per_device_train_batch_size=16, lora_rank=4, lora_alpha=8.0, lora_dropout=0.0),
}
# of stage 1, stage 2, and stage 2 with --method full; tiny's were chosen on held-out loss
LEARNING_RATES = {"tiny": (7e-3, 2.5e-3, 1e-3), "1.7b": (1e-3, 1e-4, 2e-5), "3b": (1e-3, 2e-4, 4e-5)}
# what may differ when a run is resumed: records and backbones are compared by fingerprints instead
FREE = ("model", "vision_tower", "projector", "data", "images", "questions", "out", "stage1", "resume", "num_workers",
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_pass", "gradient_checkpointing",
        "log_steps", "eval_steps", "save_steps", "keep", "max_bad")  # fmt: skip


# ------------------------------------------------------------------------------------------
# processes: one per GPU under torchrun; a plain `python train.py` is a group of one


def total(*values):
    """Each value (number or tensor) summed over all processes, as floats."""
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(values):
    """The lists of all processes as one, in the order of the processes."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return sum(lists, [])


def shard(items):
    """This process's share of a list."""
    return items[dist.get_rank() :: dist.get_world_size()]


def say(text):
    """Print on the first process, above the progress bar."""
    if dist.get_rank() == 0:
        with suppress(OSError):  # a broken pipe of `| tee`, which Ctrl-C ends, too: the run has yet to save
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()


# ------------------------------------------------------------------------------------------
# checkpoints and schedule


def save(config, model, state):
    """out/checkpoint-STEP, whole or not at all, with all that the loop needs; then all but the newest go."""
    with whole(Path(config.out, f"checkpoint-{state['step']}")) as folder:
        description = {"stage": config.stage, "method": config.method, "step": state["step"], "run": vars(config)}
        hydra.write_model(folder, model, description)
        hydra.write_bin(state, folder / "trainer.pt")
    # a copy under a higher number is the user's
    own = [path for path in hydra.list_checkpoints(config.out) if int(path.name[11:]) <= state["step"]]
    for old in own[: -config.keep]:
        for name in ("trainer.pt", "model.safetensors", "config.json"):
            (old / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds what the user put there, or is a link
            old.rmdir()


def load(checkpoint, config, model, records, optimizer, controller):
    """Put a run of the same flags, data and model back; returns the loop's state."""
    saved = hydra.read_config(checkpoint)
    if checkpoint.name != f"checkpoint-{saved.get('step')}":
        raise Mistake(f"--resume: {checkpoint} holds step {saved.get('step')}, so it is a copy: move it elsewhere")
    for key, here in vars(config).items():
        if key not in FREE and (there := saved["run"].get(key)) != here:
            raise Mistake(f"--resume: {checkpoint} was run with --{key} {there}, not {here}; use the same flags")
    hydra.restore(model, checkpoint)
    with reading(f"--resume: remove {checkpoint} to go on from the one before; trainer.pt"):
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", mmap=True, weights_only=True)
        if state["records"] != records:
            raise Mistake(f"--resume: the records of --data {config.data} are not those of {checkpoint}")
        # restore has made new parameters, of other ranks: the optimizer gets them, then its state
        optimizer.param_groups[0]["params"] = trained_parameters(model)
        optimizer.load_state_dict(state.pop("optimizer"))
        if controller:
            controller.history = state["controller"]
    return state


def schedule(step, total_steps, warmup_ratio):
    """Learning-rate factor of a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


# ------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def loss_and_targets(model, batches):
    """(summed loss, number of target tokens) of all processes' batches."""
    was_training = model.training
    model.eval()
    sums = [model(**batch) for batch in batches]
    model.train(was_training)
    return total(*map(sum, zip(*sums)))


def held_out_loss(model, batches):
    """Loss per target token over all processes' batches."""
    loss, targets = loss_and_targets(model, batches)
    if not targets:
        raise Mistake("--data: of the records held out none is left with a target; give more, or repair them")
    return loss / targets


def collate_pass(samples, most_tokens, image_tokens):
    """(the batches that a pass is run in, one or more; the broken images met in it)"""
    bad = [problem for sample in samples for problem in sample["bad"]]
    return data.bounded_batches(samples, most_tokens, image_tokens), bad


def hold(config, model, samples):
    """This process's share of the held-out samples as batches that stay in memory, without those that are broken."""
    mine = [samples[i] for i in shard(range(len(samples)))]
    for problem in gather([sample["bad"][0] for sample in mine if sample["bad"]]):
        say(f"held-out record left out: {problem}")
    mine = [sample for sample in mine if not sample["bad"]]
    return data.bounded_batches(mine, config.max_tokens_per_pass, model.image_tokens)


def evaluate(config, model, tokenizer, batches, questions, log, step):
    """Held-out loss, accuracy on the questions and a few samples; printed, logged, returned."""
    entry = {"step": step, "held_out_loss": held_out_loss(model, batches)}
    say(f"step {step}: held-out loss {entry['held_out_loss']:.3f}")
    if step == 0 and not math.isfinite(entry["held_out_loss"]):
        raise Mistake(f"--model {config.model}: gives no finite loss before training; its weights are damaged")
    if questions and step:
        longest = 2 + max(map(len, tokenizer([question["label"] for question in questions]).input_ids))
        answered = list(answer(model, tokenizer, questions, config.images, config.num_workers, max_new_tokens=longest))
        entry["accuracy"] = accuracy(answered)
        say("    accuracy: " + ", ".join(f"{kind} {value:.2f}" for kind, value in entry["accuracy"].items()))
        for question, text in answered[:3]:
            say(f"    {question['image']}: {question['text'].splitlines()[0]} -> {text} (right: {question['label']})")
    elif config.stage == 1 and step and (pixels := batches[0]["pixel_values"]) is not None:
        ids = model.generate(batches[0]["input_ids"][:3, :2], None, pixels[:3], 40)  # from BOS and the image alone
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            say(f"    caption: {text.strip().partition(chr(10))[0]}")
    log(**entry)
    return entry


# ------------------------------------------------------------------------------------------
# building: data and model


def read_data(config):
    """(train, probe, validation, questions), checked before any weight is loaded.

    Held out are min(5 %, 256 + G) of the records, spread over the file, with G = max(32, global batch). About G of
    these, at most every third, are the probe, on which the rank method measures; the rest, the validation records, give
    what is reported. Without a rank method the probe is held out, too, so that all train on the same records.
    """
    if config.model == "tiny" and dist.get_rank() == 0:
        data.make_world(TOY)
    dist.barrier()
    if config.data is None:
        raise Mistake("--data: name the JSON file of records, and --images their folder")
    records = data.read_records(config.data, config.images)
    if config.stage == 1 and not all(record.get("image") for record in records):
        raise Mistake(f"--data {config.data}: has records without an image; stage 1 trains on captions of images")
    most = max(32, config.global_batch_size)
    count = min(len(records) // 20, 256 + most)
    if count < 2:
        raise Mistake(f"--data: {len(records)} records are too few to hold some out; give at least 40")
    every = len(records) // count
    validation = records[every - 1 : every * count : every]
    del records[every - 1 : every * count : every]
    third = max(3, count // most)
    probe = validation[::third]
    del validation[::third]
    questions = data.read_questions(config.questions, config.images) if config.questions and config.stage == 2 else []
    return records, probe, validation, questions


def build_model(config, device, resumed=False):
    """(model, tokenizer), for stage 2 with a trained projector and new adapters; on a GPU what is frozen is bf16."""
    torch.manual_seed(config.seed)
    source = SOURCES.get(config.model, config.model)
    is_full = config.stage == 2 and config.method == "full"
    dtype = torch.bfloat16 if device.type == "cuda" and not is_full else torch.float32
    model, tokenizer = hydra.load_checkpoint(source, config.vision_tower, config.projector, dtype)
    if model.stage == 2:
        words = f"python hydra.py export {source} --format mobilevlm --to DIR"
        raise Mistake(f"--model {source}: has been through stage 2; first: {words}")
    if config.stage == 2 and config.stage1 and Path(config.projector or "").is_file():
        raise Mistake("--stage1, --projector FILE: both bring a trained projector; give one of them")
    if config.stage == 2 and (config.stage1 or model.stage == 0) and not resumed:  # 0: its projector is new
        stage1 = config.stage1 or f"runs/{Path(config.model).name}/stage1"
        if not hydra.find_checkpoint(stage1):
            words = shlex.join([*model_flags(config, config.projector), "--out", stage1])
            raise Mistake(f"--stage 2: no checkpoint in {stage1}; first run: torchrun train.py --stage 1 {words}")
        found = hydra.read_config(stage1)
        kind = model.projector.kind
        if (found["stage"], found["projector"]) != (1, kind):
            holds = f"stage {found['stage']} with projector {found['projector']}"
            raise Mistake(f"--stage1 {stage1}: holds {holds}, not stage 1 with {kind}; give its --projector")
        say(f"starting from stage 1's projector: {stage1}")
        hydra.restore(model, stage1)
    if config.stage == 2 and config.method != "full":
        scale = config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)
        hydra.inject_adapters(model.llm, config.lora_rank, scale, config.lora_dropout)
    hydra.freeze(model, config.stage, config.method)
    if config.gradient_checkpointing:
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def trained_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def make_samples(records, images, model, tokenizer, template, replace=True):
    """The records as the model's samples."""
    shape = model.image_size, model.image_tokens, model.context_length
    return data.ConversationDataset(records, images, tokenizer, template, *shape, replace)


# ------------------------------------------------------------------------------------------
# the run


def run(config):
    """Train one stage, from its newest checkpoint if there is one."""
    begun = time.time()
    stop_signals = []
    for number in (signal.SIGTERM, signal.SIGINT):  # a step that has begun is finished and saved
        signal.signal(number, lambda *_: stop_signals.append(1))
    device = set_up_processes()
    process, world_size = dist.get_rank(), dist.get_world_size()
    complete(config, world_size)  # what was left open takes the recipe's values
    checkpoint = hydra.find_checkpoint(config.out)
    log_file = Path(config.out, "log.jsonl")
    logged = log_file.read_bytes() if log_file.is_file() else b""
    if (checkpoint or logged) and not config.resume:
        raise Mistake(f"--out {config.out}: holds a run; add --resume to continue it, or name another folder")
    if not b'{"step"'.startswith(logged[:7]):  # an empty one and one cut short are ours
        raise Mistake(f"{log_file}: is no log of a run; name another folder")
    if b'"result": ' in logged and not checkpoint:
        raise Mistake(f"{log_file}: is of a run whose checkpoints are gone; name another folder, or remove it")
    if config.resume and not checkpoint:
        say(f"--resume: no checkpoint in {config.out} yet, starting from the beginning")

    # data, whose order depends on nothing but seed and step
    train, probe, validation, questions = read_data(config)
    epochs = (data.global_batches(train, config.global_batch_size, config.seed, i) for i in range(config.epochs))
    steps = islice(chain.from_iterable(epochs), config.max_steps)
    # [steps][passes][processes] lists of record indices
    passes = [data.micro_batches(batch, config.per_device_train_batch_size, world_size) for batch in steps]
    total_steps = len(passes)
    eval_steps = config.eval_steps or math.ceil(total_steps / 4)

    # model, optimizer, rank controller, and the state to go on from
    model, tokenizer = build_model(config, device, bool(checkpoint))
    template = "plain" if config.stage == 1 else "v1"
    as_samples = partial(make_samples, images=config.images, model=model, tokenizer=tokenizer, template=template)
    check_targets(model, tokenizer, template, {"training": train, "probe": probe, "validation": validation})
    check_prompts(questions, model, tokenizer)
    if config.stage == 2 and config.method not in ("lora", "full") and not checkpoint:
        picked = as_samples(train[:: math.ceil(len(train) / 64)])  # at most 64, of each 32 places: enough for r = 128
        hydra.align(model, (data.collate([sample]) for sample in picked))
    optimizer = torch.optim.AdamW(trained_parameters(model), weight_decay=0.0, fused=True)
    controller = None
    if config.stage == 2 and config.method not in ("lora", "full", "aligned"):
        controller = hydra.RankController(model, config.lora_rank, total_steps, config.seed, config.method)
    state = {"step": 0, "before": None, "loss": 0.0, "targets": 0.0, "skipped": 0, "in_a_row": 0, "bad": [],
             "records": data.fingerprint(train + probe + validation), "log_size": 0,
             "seconds": 0.0, "seconds_of_events": 0.0, "controller": controller and controller.history}  # fmt: skip
    if checkpoint:
        state = load(checkpoint, config, model, state["records"], optimizer, controller)
    first = state["step"]
    if len(set(gather([(first, state["records"])]))) > 1:
        raise Mistake(f"--out {config.out}, --data: not the same for all processes; give folders that nodes share")

    log = Log(log_file, state["log_size"])  # goes on where it was when the checkpoint was saved
    validation_batches = hold(config, model, as_samples(validation))
    probe_batches = hold(config, model, as_samples(probe)) if controller else []
    say_parameters(model)
    of_text = sum("image" not in record for record in train)
    say(f"global batch: {config.per_device_train_batch_size} × {config.gradient_accumulation_steps} × {world_size} "
        f"{'GPUs' if device.type == 'cuda' else 'processes'} = {config.global_batch_size}; {len(train):,} records, "
        f"{of_text:,} of text alone; {total_steps} steps -> {config.out}")  # fmt: skip
    check_memory(config, model, device)

    # the loop
    loader = iter(DataLoader(
        as_samples(train), **readers(config.num_workers), pin_memory=device.type == "cuda",
        batch_sampler=(rows[process] for step in range(first, total_steps) for rows in passes[step]),
        collate_fn=partial(collate_pass, most_tokens=config.max_tokens_per_pass, image_tokens=model.image_tokens),
    ))  # fmt: skip

    as_ddp = partial(DistributedDataParallel, gradient_as_bucket_view=True, forward_sync_buffers=False)
    wrap = as_ddp if world_size > 1 else lambda model: model
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # DDP copies; nothing is lost
    ddp, started, tokens = wrap(model.train()), time.time(), 0
    for step in tqdm(range(first, total_steps), initial=first, total=total_steps, disable=process > 0 or None):
        if step % eval_steps == 0:
            entry = evaluate(config, model, tokenizer, validation_batches, questions[:120], log, step)
            state["before"] = state["before"] or entry["held_out_loss"]
        rate = config.learning_rate * schedule(step, total_steps, config.warmup_ratio)
        optimizer.param_groups[0]["lr"] = rate

        # dropout follows from seed, step and process: the same again after a resume
        torch.manual_seed((config.seed * 10**6 + step) * 10**4 + process)

        # this process's passes, each run in one batch or more; their gradients add up
        loss, targets, batches, bad = 0.0, 0, [], []
        for _ in passes[step]:
            of_pass, problems = next(loader)
            batches += of_pass
            bad += problems
        for i, batch in enumerate(batches, 1):
            is_image = batch["input_ids"] == data.IMAGE_TOKEN
            tokens += int(batch["attention_mask"].sum() + (model.image_tokens - 1) * is_image.sum())
            ddp.require_backward_grad_sync = i == len(batches)  # as no_sync() does it: one exchange per step
            batch_loss, batch_targets = ddp(**batch)
            batch_loss.backward()
            loss, targets = loss + batch_loss.detach(), targets + batch_targets

        loss, targets, seen, broken, stop = total(loss, targets, tokens, len(bad), bool(stop_signals))
        trained = trained_parameters(model)
        # DDP leaves the mean of the processes' sums: times this it is the mean per target of the global batch
        torch._foreach_mul_([p.grad for p in trained], world_size / max(targets, 1))
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        is_finite = math.isfinite(norm)  # the same on all processes, which have exchanged their gradients
        if is_finite:
            optimizer.step()
            state["loss"] += loss
            state["targets"] += targets
        optimizer.zero_grad()
        state["skipped"] += not is_finite
        state["in_a_row"] = 0 if is_finite else state["in_a_row"] + 1
        done = state["step"] = step + 1

        # what the step brought to light
        if broken:
            report_broken(config, state, gather(bad), len(train), log)
        if state["in_a_row"] > 10:
            names = [train[i].get("id", i) for rows in passes[step] for i in sum(rows, [])]
            advice = f"lower --learning_rate, or look at records {names}"
            raise Mistake(f"step {done}: no finite gradient for 11 steps; {advice}")
        if controller and done in controller.event_steps:
            since = time.time()
            entry = controller.event(done, partial(held_out_loss, model, probe_batches), optimizer)
            made = [{key: event[key] for key in ("choice", "ranks")} for event in controller.history]
            if len(set(gather([json.dumps(made)]))) > 1:
                raise Mistake(f"step {done}: ranks differ between processes; go on from the last save with --resume")
            del ddp  # it holds the parameters that it was given, and buffers for their gradients
            ddp = wrap(model)  # sends the first process's new components to all
            state["seconds_of_events"] += time.time() - since
            say(describe_event(entry))
            log(**entry)
        if done % config.log_steps == 0 or done == total_steps:
            seconds = time.time() - started
            mean = state["loss"] / (state["targets"] or math.nan)  # when all steps since were left out
            state |= {"loss": 0.0, "targets": 0.0}
            left = seconds / (done - first) * (total_steps - done)
            say(f"{100 * done / total_steps:5.1f}%  loss {mean:.3f}  lr {rate:.2e}  "
                f"{seen / seconds:,.0f} tokens/s  {left:.0f} s left")  # fmt: skip
            log(step=done, loss=mean, lr=rate, skipped_steps=state["skipped"], tokens_per_s=round(seen / seconds))
        if (done % config.save_steps == 0 or done == total_steps or stop) and process == 0:
            seconds = state["seconds"] + time.time() - started
            save(config, model, state | {"optimizer": optimizer.state_dict(), "log_size": log.size, "seconds": seconds})
        if stop and done < total_steps:
            say(f"stopped by a signal after step {done}: saved {config.out}/checkpoint-{done}; go on with --resume")
            break
    if state["step"] == total_steps:
        state["seconds"] += time.time() - started
        finish(config, model, tokenizer, train, validation_batches, questions, log, state, controller, begun)
    del ddp  # it holds the process group: freed after the group's end, it was seen to hang at exit


# ------------------------------------------------------------------------------------------
# From here on: skip on a first reading. Command line, processes and log, answers, checks, reports, benchmarks.
# ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(f"{message} (see --help)")


def parse_arguments(words=None):
    """Config from the command line (or these words), which is made from its fields."""
    parser = Parser(usage="train.py --stage {1,2,eval} [flags]", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default)
        parser.add_argument(f"--{f.name}", **(kind | f.metadata))
    config = Config(**vars(parser.parse_args(words)))
    for f in fields(Config):
        if f.metadata["help"].startswith("eval:") and getattr(config, f.name) and config.stage != "eval":
            raise Mistake(f"--{f.name}: is for --stage eval alone; a run goes on with --out and --resume")
    may_be = dict.fromkeys(("seed", "num_workers", "lora_dropout", "warmup_ratio", "max_bad"), 0)
    may_be["max_grad_norm"] = math.inf
    for name, value in vars(config).items():
        is_share = name in ("lora_dropout", "warmup_ratio")
        limit = 1 if is_share else 1e9 if type(value) is int else 1e38  # what fp32 holds
        if type(value) is str:
            data.check_text(value, f"--{name}")
        elif type(value) in (int, float) and not (0 < value < limit or value == may_be.get(name)):
            raise Mistake(f"--{name} {value}: give a {'share' if is_share else 'positive number'} below {limit:g}")
        if value == "":
            raise Mistake(f"--{name}: is empty; name a file or folder, or leave the flag out")
    return config


def complete(config, world_size):
    """Fill what was left open from the recipe, and check that the three batch sizes agree."""
    size = config.model if config.model in SOURCES else "1.7b"  # what a folder or hub id takes
    recipe = dict(RECIPES["tiny" if size == "tiny" else config.stage])
    is_full = config.stage == 2 and config.method == "full"
    recipe["learning_rate"] = LEARNING_RATES[size][2 if is_full else config.stage - 1]
    recipe["out"] = f"runs/{Path(config.model).name}/stage{config.stage}" + f"-{config.method}" * (config.stage == 2)
    if size == "tiny":
        recipe["vision_tower"] = str(TOY / "clip")
        if config.data is None:
            recipe |= dict(images=str(TOY / "images"), questions=str(TOY / "questions.jsonl"))
            recipe["data"] = str(TOY / ("caption.json" if config.stage == 1 else "instruct.json"))

    # of the three batch sizes any two give the third
    each, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    batch = config.global_batch_size or (each or 0) * (passes or 0) * world_size or recipe["global_batch_size"]
    own, most = batch // world_size, recipe["per_device_train_batch_size"]
    each = each or (max(1, own // passes) if passes else max(n for n in range(1, most + 1) if own % n == 0))
    passes = passes or max(1, own // each)
    if (product := each * passes * world_size) != batch:
        factors = f"{each} × --gradient_accumulation_steps {passes} × {world_size} processes = {product}"
        raise Mistake(f"--per_device_train_batch_size {factors}, not --global_batch_size {batch}: change one of them")
    recipe |= dict(global_batch_size=batch, per_device_train_batch_size=each, gradient_accumulation_steps=passes)
    for key, value in recipe.items():
        if getattr(config, key) is None:
            setattr(config, key, value)
    if Path(config.out).is_file():
        raise Mistake(f"--out {config.out}: is a file; name a folder")
    if Path(config.out, "config.json").is_file():
        raise Mistake(f"--out {config.out}: is a checkpoint or a model; name the folder of a run")


def set_up_processes():
    """This process's device, once it has joined the others."""
    given = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if given and len(given) < 4:
        raise Mistake(f"{given[0]} is set, but not all that torchrun sets: use torchrun, or unset {' '.join(given)}")
    with reading(f"{', '.join(given)}, which torchrun sets"):
        if given and not 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"]):
            raise Mistake("RANK: is not below WORLD_SIZE, as torchrun sets it: use torchrun, or unset both")
        store, rank, world_size = next(dist.rendezvous("env://")) if given else (dist.HashStore(), 0, 1)
    if given and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it restarts the processes, with the addresses of those that died
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    if device and device.index >= (gpus := torch.cuda.device_count()):
        raise Mistake(f"--nproc_per_node: this machine has {gpus} GPUs; start no more processes than that")
    if device:
        torch.cuda.set_device(device)
    # counts and flags travel between the hosts, gradients between the GPUs
    backend = "cpu:gloo,cuda:nccl" if device else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device)
    return device or torch.device("cpu")


class Log:
    """JSON lines, written by the first process of one run at a time: the lock ends with the process.

    size: bytes that the file had when the checkpoint was written that a run goes on from. What is beyond them, or of
    a last line that a kill cut short, goes when the first row is written: a run that is refused loses nothing.
    """

    def __init__(self, path, size=-1):
        self.rows, self.file = [], None
        if dist.get_rank() > 0:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        with reading(path, "another run is writing it; wait for its end, or name another folder"):
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.file.seek(0)
        *lines, last = self.file.read(size).split(b"\n")
        self.size = sum(len(line) + 1 for line in lines)
        with reading(path):
            # how answers begin, however early the kill came
            if last.endswith(b"}") or not b'{"question_id"'.startswith(last[:14]):
                raise Mistake(f"{path}: its last line is no row of ours, or lacks its line break; name another file")
            self.rows = list(map(json.loads, lines))

    def __call__(self, **row):
        if self.file:
            line = json.dumps(row).encode() + b"\n"
            with reading(self.file.name, "cannot be written"):
                self.file.truncate(self.size)
                self.file.write(line)
                self.file.flush()
            self.size = self.file.tell()


def ignore_signals(*_):
    """For processes that read images: a signal is sent to them, too, and is the trainer's to answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def readers(count):
    """DataLoader's options for so many processes that read images: forks, which share the records."""
    own = {"timeout": 600, "multiprocessing_context": "fork"} if count else {}
    return {"num_workers": count, "worker_init_fn": ignore_signals, **own}


def as_record(question, label=""):
    """A question as a LLaVA record; without a label it is a prompt."""
    image = {"image": question["image"]} if question["image"] else {}
    asked = {"from": "human", "value": "<image>\n" * len(image) + question["text"]}
    return {"id": question["question_id"], "conversations": [asked, {"from": "gpt", "value": label}], **image}


def answer(model, tokenizer, questions, images, workers=0, batch_size=64, max_new_tokens=16):
    """(question, answer) of each question, generated in rounds: a batch, empty at worst, on every process."""
    samples = make_samples(list(map(as_record, questions)), images, model, tokenizer, "v1", replace=False)
    per_round = batch_size * dist.get_world_size()
    mine = [shard(range(len(questions))[i : i + per_round]) for i in range(0, len(questions), per_round)]
    loader = DataLoader(samples, batch_sampler=mine, collate_fn=data.collate, **readers(workers))
    for rows, batch in zip(mine, loader):
        ids = model.generate(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], max_new_tokens)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        yield from gather([(questions[i], text.strip()) for i, text in zip(rows, texts)])


def accuracy(answered):
    """{kind: share of right answers} of [(question, answer)], and "all"."""
    right = defaultdict(list)
    for question, text in answered:
        right[question["category"]].append(data.exact(text) == data.exact(question["label"]))
    right["all"] = sum(right.values(), [])
    return {kind: sum(values) / len(values) for kind, values in right.items()}


def check_targets(model, tokenizer, template, sets):
    """Say how many of the records {set: records} the context cuts; Mistake where it leaves none to learn from."""
    context = f"the context of {model.context_length} tokens"
    for name, records in sets.items():
        longer = sum(len(record["conversations"]) > 3 for record in records)
        if longer and template == "plain":
            say(f"{name}: {longer} of {len(records)} records have more than one answer: stage 1 learns the first alone")
        counts = data.cut_and_empty(shard(records), tokenizer, template, model.image_tokens, model.context_length)
        cut, empty = map(int, total(*counts))
        if cut or empty:
            say(f"{name}: {cut} of {len(records)} records are cut at {context}; {empty} have no target")
        if empty == len(records):
            raise Mistake(f"--data: none of the {empty} {name} records has an answer within {context}; shorten them")


def check_prompts(questions, model, tokenizer):
    """Mistake if the context has no room for an answer to some of the questions."""
    sizes = model.image_tokens, model.context_length
    long = [q for q in questions if data.cut_and_empty([as_record(q, "?")], tokenizer, "v1", *sizes)[1]]
    if long:
        many = f"{len(long)} of {len(questions)} fill the context of {model.context_length} tokens"
        raise Mistake(f"--questions: {many}, e.g. question_id {long[0]['question_id']}; shorten or remove them")


def report_broken(config, state, problems, records, log):
    """Say and log each record whose image is broken once, however often it is met; more than --max_bad end the run."""
    for problem in problems:
        if problem not in state["bad"]:
            say(f"image replaced by the next record's: {problem}")
            state["bad"].append(problem)
            log(step=state["step"], bad=problem)
    if len(state["bad"]) > config.max_bad * records:
        counts = f"{len(state['bad'])} of {records} records have a broken image, more than --max_bad {config.max_bad}"
        raise Mistake("\n".join([*state["bad"], f"{counts}; repair them, or allow more"]))


def expected_peak(model, config, device):
    """(bytes that are always there, bytes per token of a pass) at a step's peak; see `test_hydra.py memory`."""
    e = 2 if device.type == "cuda" else 4  # bytes of a product's result
    shape = model.llm.config
    D, I, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    # a trained parameter has a gradient and Adam's two moments in fp32, and a copy for the products
    fixed = sum(p.numel() * (p.element_size() + (12 + e) * p.requires_grad) for p in model.parameters())
    fixed += config.per_device_train_batch_size * model.image_tokens * 64 * e * D  # the projector's maps
    # what a layer keeps of a token for the backward pass, in results as wide as D and I: counted
    plan = config.method if config.stage == 2 else "stage 1"
    of_D, of_I = {"stage 1": (8, 3), "full": (17, 4)}.get(plan, (10, 4))
    layer = e * (of_D * D + of_I * I)
    if config.gradient_checkpointing:  # each layer's input, and one layer whole when those of the loss are gone
        return fixed, layers * e * D + layer
    return fixed + 1024 * shape.vocab_size * (4 + e), layers * layer  # logits of a piece of the loss


def check_memory(config, model, device):
    """Lower the bound to what fits the GPU, and say what a step takes; Mistake if its or the readers' is too small."""
    fixed, per_token = expected_peak(model, config, device)
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        room = 0.9 * there - fixed  # a tenth is left to CUDA itself, and to gaps between tensors
        if room < 0:
            raise Mistake(f"--model {config.model}: weights and optimizer alone take {fixed / 1e9:.1f} GB, and the GPU "
                          f"has {there / 1e9:.1f}; take a smaller model or --lora_rank")  # fmt: skip
        config.max_tokens_per_pass = max(1, min(config.max_tokens_per_pass, int(room / per_token)))
    bound = config.max_tokens_per_pass
    say(f"at most {bound:,} tokens in a pass: about {(fixed + bound * per_token) / 1e9:.1f} GB at the peak "
        f"({fixed / 1e9:.1f} of weights and optimizer)")  # fmt: skip
    # each reading process has two passes ahead, its node's in one shared memory: where it is full they wait for ever
    passes = 2 * config.num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ahead = passes * config.per_device_train_batch_size * 3 * 4 * model.image_size**2
    if os.path.isdir("/dev/shm") and ahead > (free := shutil.disk_usage("/dev/shm").free):
        raise Mistake(f"--num_workers {config.num_workers}: images read ahead take {ahead / 1e9:.2f} GB, /dev/shm has "
                      f"{free / 1e9:.2f}; lower it, or give more (docker run --shm-size)")  # fmt: skip


def say_parameters(model):
    """Parameters of each part, and how many of them are trained."""
    say(f"{'':10}{'parameters':>15}{'trained':>15}")
    parts = {"CLIP": "clip.", "projector": "projector.", "LLM": "llm.", "  adapters": ".lora_", "all": ""}
    for part, key in parts.items():
        own = [p for name, p in model.named_parameters() if key in name]
        trained = sum(p.numel() for p in own if p.requires_grad)
        say(f"{part:10}{sum(p.numel() for p in own):15,}{trained:15,}")


def blind_answers(records, questions):
    """[(question, answer)] without seeing the images: the most frequent answer in the training records to
    the same question, else to those with the same first two words, else to any."""
    counts = defaultdict(Counter)

    def keys(text):
        text = text.replace("<image>", "").strip().split("\n")[0]
        return text, tuple(text.split()[:2]), None

    for record in records:
        turns = record["conversations"]
        for human, gpt in zip(turns, turns[1:]):
            for key in keys(human["value"]) if human["from"] == "human" else ():
                counts[key][gpt["value"].strip()] += 1
    known = [next(key for key in keys(question["text"]) if key in counts) for question in questions]
    return [(question, counts[key].most_common(1)[0][0]) for question, key in zip(questions, known)]


def model_flags(config, projector):
    """The flags that name the model, as the user gave them, with this projector, if any."""
    tower = config.vision_tower if config.vision_tower != str(TOY / "clip") else None
    flags = {"--model": config.model, "--vision_tower": tower, "--projector": projector}
    return [word for flag, value in flags.items() if value for word in (flag, value)]


def test_loss(config, model, tokenizer, questions):
    """{kind: loss per target token} of the right answers to the questions, and "all"."""
    sums = {}
    for kind in sorted({question["category"] for question in questions}):
        records = [as_record(q, q["label"]) for q in questions if q["category"] == kind]
        samples = make_samples(records, config.images, model, tokenizer, "v1")
        sums[kind] = loss_and_targets(model, hold(config, model, samples))
    sums["all"] = map(sum, zip(*sums.values()))
    return {kind: loss / max(targets, 1) for kind, (loss, targets) in sums.items()}


def finish(config, model, tokenizer, train, validation, questions, log, state, controller, begun):
    """The end of a run: what it reached, what it cost, what to do next; the picture of the ranks."""
    result = evaluate(config, model, tokenizer, validation, questions, log, state["step"])
    before, after = state["before"], result["held_out_loss"]
    say(f"held-out loss {before:.3f} -> {after:.3f} ({100 * (after / before - 1):+.0f} %)")
    if not math.isfinite(after):
        raise Mistake(f"--out {config.out}: the model gives no finite loss any more; lower --learning_rate")
    if questions:
        result["test_loss"] = test_loss(config, model, tokenizer, questions)
        blind = accuracy(blind_answers(train, questions))
        say(f"{'accuracy':14}{'model':>8}{'no image':>10}")
        for kind, value in result["accuracy"].items():
            say(f"{kind:14}{value:8.2f}{blind[kind]:10.2f}")
    result["parameters"] = sum(p.numel() for p in trained_parameters(model))
    if controller:  # the most that there were: at the start all of the budget is used
        result["parameters"] += controller.history[-1]["budget"] - controller.history[-1]["parameters"]
        if dist.get_rank() == 0:
            draw_ranks(controller.history, Path(config.out, "ranks.png"))
    result |= {"seconds": state["seconds"], "device": str(model.llm.device), "torch": torch.__version__}
    log(step=state["step"], result=result | {"run": vars(config)})
    if state["bad"] or state["skipped"]:
        counts = f"{len(state['bad'])} broken images, {state['skipped']} steps without a finite gradient"
        say(f"left out: {counts}; see log.jsonl")
    events = 100 * state["seconds_of_events"] / max(state["seconds"], 1e-9)
    memory = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    say(f"training {state['seconds']:.0f} s, in all {time.time() - begun:.0f} s; rank events {events:.1f} % of "
        f"training; peak memory {memory / 1e9:.1f} GB")  # fmt: skip
    say(f"wrote {config.out}" + (" with ranks.png" if controller else ""))
    if config.stage == 1:
        named = model_flags(config, config.projector and model.projector.kind)
        words = ["torchrun", "train.py", "--stage", "2", *named, "--stage1", config.out]
    else:
        words = ["python", "hydra.py", "chat", config.out, "--image", "FILE"]
    say("next: " + shlex.join(words))


def describe_event(entry):
    """What a rank event's log entry holds, in words; then the ranks of each layer that it changed, before and after."""
    words = {
        "probe_loss": "probe loss {probe_loss:.4f}",
        "spread": "coarse spread {spread[0]:.2f} ({lasting[0]:.0%} lasting), "
                  "fine spread {spread[1]:.2f} ({lasting[1]:.0%} lasting)",
        "predicted_gain": "predicted gain {predicted_gain:+.4f}, log error {error:.2f} at measurements left out "
                          "({error_without_signals:.2f} without signals)",
        "judged": "what the last move added brought {judged[1]:+.4f} of {judged[0]:+.4f} promised",
        "budget": "{parameters:,} of {budget:,} parameters",
    }  # fmt: skip
    said = [words[key].format(**entry) for key in words if key in entry]
    said += [f"against it: {reason}" for reason, holds in entry.get("vetoes", {}).items() if holds]
    text = "; ".join([f"rank event at step {entry['step']}: {entry['choice']}", *said])
    for layer, (before, after) in enumerate(zip(entry.get("ranks_before", ()), entry["ranks"])):
        if before != after:
            text += f"\n    layer {layer}: {' '.join(map(str, before))} -> {' '.join(map(str, after))}"
    return text


def draw_ranks(history, path):
    """ranks.png: layers × projections, a panel for the start and one for each event, the rank in every cell."""
    side = 46  # of a cell, in pixels
    names = [name.split(".")[1].removesuffix("_proj") for name in hydra.PROJECTIONS]
    start = history[0]["ranks"]  # [layers][projections]
    width = side * (len(names) + 2)  # of a panel
    image = Image.new("RGB", (width * len(history), side * (len(start) + 4)), "white")
    draw = ImageDraw.Draw(image)

    def fill(column, row, words, color="white"):
        x, y = width * number + side * (column + 1), side * (row + 4)
        draw.rectangle((x, y, x + side, y + side), color)
        draw.text((x + side / 2, y + side / 2), str(words), "black", ImageFont.load_default(13), "mm")

    for number, entry in enumerate(history):
        said = describe_event(entry).partition("\n")[0].replace("; ", "\n")
        said += "\nrows: layers, beside them their coarse part; blue: more than at the start"
        draw.text((width * number + 14, 10), said, "black", ImageFont.load_default(10))
        for column, name in enumerate(names):
            fill(column, -1, name)
        for row, ranks in enumerate(entry["ranks"]):
            fill(-1, row, row)
            for column, rank in enumerate(ranks):
                more = max(-1, min(1, math.log2(rank / start[row][column])))
                fill(column, row, rank, f"hsl({220 if more > 0 else 30}, 100%, {100 - 40 * abs(more):.0f}%)")
            fill(len(names), row, f"{entry['coarse'][row][0]:+.1f}" if "coarse" in entry else "")
    image.save(path)


def run_benchmark(config):
    """Answer what a benchmark asks, the work shared between the processes, and print the score."""
    if not (config.checkpoint and config.benchmark and config.questions):
        raise Mistake("--stage eval: needs --checkpoint, --benchmark and --questions")
    device = set_up_processes()
    questions = data.read_benchmark(config.benchmark, config.questions, config.annotations)
    path = Path(config.answers or f"{config.checkpoint}/answers-{config.benchmark}.jsonl")
    if not path.parent.is_dir():
        raise Mistake(f"--answers {path}: its folder does not exist; name another file")
    log = Log(path)
    answers = data.check_rows(gather(log.rows), path, data.ANSWER)
    pairs = data.join_answers(config.benchmark, questions, answers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = hydra.load_checkpoint(config.checkpoint, config.vision_tower, config.projector, dtype)
    hydra.check_trained(model, config.checkpoint)
    # a run that trains on is another model, and so may be one of the same name
    source = {"model_id": str(hydra.find_checkpoint(config.checkpoint) or config.checkpoint),
              "weights": hydra.fingerprint(model.clip, model.projector, model.llm)}  # fmt: skip
    for question, given in pairs:
        if given and (given["prompt"] != question["text"] or given.get("weights") != source["weights"]):
            what = f"question {question['question_id']} of another model ({given.get('model_id')}) or wording"
            raise Mistake(f"--answers {path}: has the answer to {what}; name another file")
    model.to(device)
    left = [question for question, given in pairs if not given]
    say(f"{len(questions)} questions, {len(answers)} answered before -> {path}")
    check_prompts(left, model, tokenizer)
    size = config.per_device_train_batch_size or 64
    answered = answer(model, tokenizer, left, config.images, config.num_workers, size, max_new_tokens=128)
    for question, text in tqdm(answered, total=len(left), disable=dist.get_rank() > 0 or None):
        answers.append({"question_id": question["question_id"], "prompt": question["text"], "text": text})
        log(**answers[-1], **source)
    say(data.score_table(config.benchmark, data.score(config.benchmark, questions, answers)))


def main():
    config = parse_arguments()
    # what reading processes send holds a file each, and passes through a socket in TMPDIR, whose name has a limit
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if config.num_workers and len(os.environ.get("TMPDIR", "")) > 70:
        raise Mistake("TMPDIR: its name is too long for reading processes; set a shorter one, or --num_workers 0")
    try:
        (run_benchmark if config.stage == "eval" else run)(config)
    except BaseException as error:
        # they hold the loader: without it the processes that read images end; else Python waits for them for ever
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, torch.OutOfMemoryError):
            advice = "lower --max_tokens_per_pass or --per_device_train_batch_size, or add --gradient_checkpointing"
            raise Mistake(f"the GPU's memory is full: {advice}") from error
        if isinstance(error, BrokenProcessPool):
            raise Mistake(f"{TOY}: its making was interrupted; run again") from error
        if str(error).startswith("DataLoader"):
            raise Mistake("a process that reads images was killed: lower --num_workers, go on by --resume") from error
        raise
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    data.one_line(main)

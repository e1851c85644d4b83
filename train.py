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
"""

import argparse
import io
import json
import math
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections import Counter, defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import hydra

# ---------------------------------------------------------------------------------------------
# configuration


class ConfigError(ValueError):
    """A mistake on the command line: one line that names the flag and says what to do."""


def flag(default, help, **options):
    return field(default=default, metadata={"help": help, **options})


METHODS = ["hydra", "lora", "full", "aligned", "coarse", "coarse+fine", "dynamic", "random"]


@dataclass
class Config:
    """A run. The command line is made from these fields; None stands for the recipe's value."""

    stage: str = flag(None, "1: projector on captions; 2: projector and adapters on instructions; eval: a benchmark; "
                      "compare: stage 2 by several methods and seeds", choices=("1", "2", "eval", "compare"), required=True)
    benchmark: str = flag(None, "eval: whose questions and score", choices=tuple(data.BENCHMARKS))
    model: str = flag("tiny", "tiny, 1.7b, 3b, a folder or hub id of a LLaMA or MobileVLM, or a run of stage 1")
    vision_tower: str = flag(None, "folder or hub id of a CLIP (default: the model's)")
    projector: str = flag(None, "a new ldpnet (default) or ldpnetv2, or upstream's mm_projector.bin (default for a MobileVLM: its own)")
    data: str = flag(None, "JSON file of LLaVA records (tiny: the toy world's)")
    images: str = flag(None, "folder that the records' image names are in")
    questions: str = flag(None, "JSON lines {question_id, image, text, label}, answered at the end of stage 2; eval: the benchmark's")
    out: str = flag(None, "folder of the run (default: runs/MODEL/stage1, runs/MODEL/stage2-METHOD)")
    stage1: str = flag(None, "stage 1's run, for stage 2 to start from; {seed} in it is replaced (default: runs/MODEL/stage1, if the projector is new)")
    method: str = flag("hydra", "stage 2: hydra; lora (fixed ranks); full (the LLM's own weights); the rest for comparison (aligned: lora "
                       "that starts as hydra does)", choices=METHODS)
    lora_rank: int = flag(None, "adapters' rank at the start, which sets the parameter budget")
    lora_alpha: float = flag(None, "adapters' scale is lora_alpha / lora_rank, and stays when ranks move")
    lora_dropout: float = flag(None, "dropout before the adapters")
    use_rslora: bool = flag(False, "scale lora_alpha / √lora_rank instead")
    per_device_train_batch_size: int = flag(None, "samples per process and forward pass")
    gradient_accumulation_steps: int = flag(None, "forward passes per step")
    global_batch_size: int = flag(None, "samples per step; any two of the three give the third")
    learning_rate: float = flag(None, "peak of the cosine schedule")
    warmup_ratio: float = flag(0.03, "share of the steps in which the rate rises")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    epochs: int = flag(1, "passes over the data")
    max_steps: int = flag(None, "stop after so many steps, the schedule shortened to fit")
    seed: int = flag(0, "of initial weights, data order, dropout and rank probes")
    resume: bool = flag(False, "continue from the newest checkpoint in --out")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, a third slower")
    num_workers: int = flag(None, "processes that read images ahead (default: 4 per GPU, 0 without GPU)")
    log_steps: int = flag(20, "steps between log lines")
    eval_steps: int = flag(None, "steps between evaluations (default: four in a run)")
    benchmark_steps: int = flag(None, "time so many steps on random weights and records, print the speed, keep nothing")
    save_steps: int = flag(500, "steps between checkpoints")
    keep: int = flag(1, "checkpoints to keep, the newest ones")
    max_bad: float = flag(0.001, "share of an epoch's records whose image may turn out to be broken")
    checkpoint: str = flag(None, "eval: what answers: a run or checkpoint, or a folder or hub id of a MobileVLM")
    annotations: str = flag(None, "eval: the benchmark's labels, where its questions have none")
    answers: str = flag(None, "eval: file of the answers, continued if it is there (default: in --checkpoint)")
    methods: str = flag("lora,random,coarse,coarse+fine,hydra", "compare: what, METHOD or METHOD:RANK; the first is compared with")
    learning_rates: str = flag(None, "compare: rates to choose from, for each method on validation with the first seed")
    seeds: int = flag(5, "compare: runs of each method")
    jobs: int = flag(None, "compare: runs at a time (default: one per GPU or core)")


# MobileVLM's recipe, for a global batch on any number of GPUs; tiny's was chosen on held-out loss.
# A folder or hub id takes 1.7b's.
PUBLISHED = dict(lora_rank=128, lora_alpha=256.0, lora_dropout=0.05, global_batch_size=128, per_device_train_batch_size=16)
RECIPES = {
    ("tiny", 1): dict(learning_rate=7e-3, global_batch_size=16, per_device_train_batch_size=16),
    ("tiny", 2): dict(learning_rate=2.5e-3, global_batch_size=16, per_device_train_batch_size=16,
                      lora_rank=4, lora_alpha=8.0, lora_dropout=0.0),
    ("1.7b", 1): dict(learning_rate=1e-3, global_batch_size=256, per_device_train_batch_size=32),
    ("1.7b", 2): dict(learning_rate=1e-4, **PUBLISHED),
    ("3b", 1): dict(learning_rate=1e-3, global_batch_size=256, per_device_train_batch_size=32),
    ("3b", 2): dict(learning_rate=2e-4, **PUBLISHED),
}  # fmt: skip
FULL_LEARNING_RATE = {"tiny": 1e-3, "1.7b": 2e-5, "3b": 4e-5}
SHAPES = {  # of CLIP and the LLM, for --benchmark_steps
    "tiny": (dict(hidden_size=96, intermediate_size=192, num_attention_heads=4, num_hidden_layers=3, image_size=48, patch_size=8),
             dict(vocab_size=544, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=512)),
    "1.7b": (dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, image_size=336, patch_size=14),
             dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16)),
    "3b": (dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, image_size=336, patch_size=14),
           dict(hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=32)),
}  # fmt: skip
BENCHMARK_WARM_UP = 3  # steps before the clock starts
LLAMA = {"1.7b": "mtgv/MobileLLaMA-1.4B-Chat", "3b": "mtgv/MobileLLaMA-2.7B-Chat"}
TOY = Path("runs/tiny/world")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ConfigError(f"{message} (see --help)")


def parse_arguments():
    """Config from the command line, which is made from its fields."""
    wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=50, width=150)
    parser = Parser(usage="train.py --stage {1,2,eval,compare} [flags]", description=__doc__, formatter_class=wide, allow_abbrev=False)
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default)
        parser.add_argument(f"--{f.name}", **kind, **f.metadata)
    config = Config(**vars(parser.parse_args()))
    for f in fields(Config):
        value, least = getattr(config, f.name), 0 if f.name in ("seed", "num_workers", "lora_dropout", "warmup_ratio", "max_bad") else 1e-12
        if f.type in (int, float) and value is not None and not value >= least:
            raise ConfigError(f"--{f.name} {value}: give a positive number")
    if config.seed >= 10**9:
        raise ConfigError(f"--seed {config.seed}: give a number below 10^9")
    if config.lora_dropout is not None and config.lora_dropout >= 1:
        raise ConfigError(f"--lora_dropout {config.lora_dropout}: give a share below 1")
    return replace(config, stage=int(config.stage)) if config.stage.isdigit() else config


def complete(config, world_size):
    """Fill what was left open from the recipe, and check that the three batch sizes agree."""
    size = config.model if config.model in ("tiny", "3b") else "1.7b"
    recipe = dict(RECIPES[size, config.stage])
    if config.stage == 2 and config.method == "full":
        recipe["learning_rate"] = FULL_LEARNING_RATE[size]
    total, each, passes = config.global_batch_size, config.per_device_train_batch_size, config.gradient_accumulation_steps
    total = total or (each * passes * world_size if each and passes else recipe["global_batch_size"])
    if not each:
        share, most = total // world_size // (passes or 1), recipe["per_device_train_batch_size"]
        each = share if passes else max(n for n in range(1, most + 1) if share % n == 0)
    passes = passes or total // (each * world_size)
    if each * passes * world_size != total or not total:
        raise ConfigError(
            f"--per_device_train_batch_size {each} × --gradient_accumulation_steps {passes} × {world_size} processes "
            f"= {each * passes * world_size}, not --global_batch_size {total}: change one of them"
        )
    recipe |= dict(global_batch_size=total, per_device_train_batch_size=each, gradient_accumulation_steps=passes)
    name = Path(config.model).name
    recipe["out"] = f"runs/{name}/stage{config.stage}" + (f"-{config.method}" if config.stage == 2 else "")
    for key, value in recipe.items():
        if getattr(config, key) is None:
            setattr(config, key, value)


# ---------------------------------------------------------------------------------------------
# processes


def set_up_processes():
    """(rank, world size, device): one process per GPU under torchrun, or a single plain one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        is_gpu, (store, *_) = device.type == "cuda", next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps its store when it restarts the processes, with the addresses of those that died
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # counts and flags travel between the hosts, gradients between the GPUs: no step waits for its GPU
        backend, device_id = ("cpu:gloo,cuda:nccl", device) if is_gpu else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    return rank, world_size, device


def sum_over_processes(*values):
    """Each value (number or tensor) summed over all processes, as floats."""
    total = torch.tensor([float(value) for value in values], dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gather(value):
    """The value of every process, in order of rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def on_first_process(function):
    """Run function on process 0 while the others wait for it."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        function()
    if dist.is_initialized():
        dist.barrier()


def say(text):
    """Print on the first process, above the progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def frozen_dtype(device):
    """Of weights that are not trained: bf16 where the hardware is made for it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device):
    """bf16 matrix products on a GPU; fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---------------------------------------------------------------------------------------------
# schedule and checkpoints


def schedule(step, total_steps, warmup_ratio):
    """Learning-rate factor of a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def checkpoint_files(model, optimizer, controller, progress, description):
    """{name: bytes} of all that the loop needs, copied, so that training can go on while they are written."""
    trainer, buffer = {"progress": progress, "optimizer": optimizer.state_dict()}, io.BytesIO()
    if controller:
        trainer["controller"] = controller.state_dict()
    torch.save(trainer, buffer)
    return hydra.model_files(model, {**description, "step": progress["step"]}) | {"trainer.pt": buffer.getvalue()}


def write_checkpoint(out, step, files, keep):
    """checkpoint-STEP, whole or not at all; all but the newest `keep` go once it is there."""
    final, temporary = out / f"checkpoint-{step}", out / ".unfinished"
    if final.exists():  # a resumed run that has nothing left to do
        return
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            with open(temporary / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(final)
        for folder in (final, out):  # the names, too, have to be on the disk
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    except OSError as error:
        raise ConfigError(f"--out {out}: checkpoint {step} cannot be written ({error.strerror}); those before it are whole") from None
    for old in hydra.list_checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def write_lines(path, entries):
    """JSON lines, whole or not at all."""
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    temporary.replace(path)


def load_trainer_state(checkpoint, optimizer, controller):
    """Put the loop's state back; returns its progress."""
    try:
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if controller:
            controller.load_state_dict(state["controller"])
        return state["progress"]
    except Exception as error:  # the unpickler raises many kinds
        raise ConfigError(f"--resume: {checkpoint / 'trainer.pt'} cannot be read ({hydra.reason(error)})") from None


def describe(config, model):
    """What a checkpoint says about itself: enough to rebuild the model, and the run's flags."""
    scales = {adapter.scale for adapter in hydra.adapters(model).values()}
    return {
        "stage": config.stage, "method": config.method if config.stage == 2 else None,
        **model.origin, "projector": model.projector.kind,
        "scale": max(scales, default=None), "dropout": config.lora_dropout, "run": asdict(config),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def held_out_loss(model, batches, device):
    """Loss per target token over all processes' batches."""
    was_training = model.training
    model.eval()
    loss, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with autocast(device):
        for batch in batches:
            batch_loss, batch_count = model(**{key: value for key, value in batch.items() if key != "bad"})
            loss, count = loss + batch_loss, count + batch_count
    model.train(was_training)
    loss, count = sum_over_processes(loss, count)
    return loss / max(count, 1)


def answer(model, tokenizer, questions, images, device, workers=0, batch_size=64, max_new_tokens=16):
    """The model's answers [str] to questions [{"text", "image" (None: text alone)}], generated in batches."""
    prompts = []
    for question in questions:
        turn = {"from": "human", "value": ("<image>\n" if question["image"] else "") + question["text"]}
        prompts.append({"conversations": [turn]} | ({"image": question["image"]} if question["image"] else {}))
    samples, texts = make_samples(prompts, images, model, tokenizer, "v1", replace=False), []
    for batch in torch.utils.data.DataLoader(samples, batch_size, collate_fn=data.collate, num_workers=workers):
        with autocast(device):
            ids = model.generate(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], max_new_tokens=max_new_tokens)
        texts += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return texts


def test_loss(model, tokenizer, questions, images, rank, world_size, device):
    """{kind: loss per target token} of the right answers to the questions, and "all"."""
    losses = {}
    for kind in [*sorted(set(map(kind_of, questions))), "all"]:
        records = [
            {"image": q["image"], "conversations": [{"from": "human", "value": "<image>\n" + q["text"]}, {"from": "gpt", "value": q["label"]}]}
            for q in questions if kind in ("all", kind_of(q))
        ]  # fmt: skip
        mine = make_samples(records[rank::world_size], images, model, tokenizer, "v1", replace=False)
        losses[kind] = held_out_loss(model, torch.utils.data.DataLoader(mine, 64, collate_fn=data.collate), device)
    return losses


def run_benchmark(config):
    """Answer what a benchmark asks, the work shared between the processes, and print the score."""
    if not (config.checkpoint and config.benchmark and config.questions):
        raise ConfigError("--stage eval: needs --checkpoint, --benchmark and --questions")
    rank, world_size, device = set_up_processes()
    questions = data.read_benchmark(config.benchmark, config.questions, config.annotations)
    path = Path(config.answers or f"{config.checkpoint}/answers-{config.benchmark}.jsonl")
    if not path.parent.is_dir():
        raise ConfigError(f"--answers {path}: its folder does not exist; name another file")
    answers = data.read_answers(path, cut=True) if path.is_file() else []
    model_id = str(hydra.find_checkpoint(config.checkpoint) or config.checkpoint)  # a run that trains on is another model
    if other := {answer.get("model_id") for answer in answers} - {model_id}:
        raise ConfigError(f"--answers {path}: has answers of {other.pop()}; name another file")
    left = [question for question, answered in data.join_answers(config.benchmark, questions, answers) if not answered]
    model, tokenizer, _ = hydra.load_checkpoint(config.checkpoint, config.vision_tower, config.projector, frozen_dtype(device))
    model.to(device)
    say(f"{len(questions)} questions, {len(answers)} answered before -> {path}")
    batch_size = config.per_device_train_batch_size or 64
    if rank == 0:  # without a last line that was cut short
        write_lines(path, answers)
    with open(path if rank == 0 else os.devnull, "a") as file:
        for start in tqdm(range(0, len(left), batch_size * world_size), disable=None if rank == 0 else True):
            mine = left[start + rank : start + batch_size * world_size : world_size]
            texts = answer(model, tokenizer, mine, config.images, device, config.num_workers or 0, batch_size, max_new_tokens=128)
            for question, text in sum(gather(list(zip(mine, texts))), []):
                answers.append({"question_id": question["question_id"], "prompt": question["text"], "text": text,
                                "answer_id": uuid.uuid4().hex, "model_id": model_id, "metadata": {}})  # fmt: skip
                file.write(json.dumps(answers[-1]) + "\n")
            file.flush()
    say(data.score_table(config.benchmark, data.score(config.benchmark, questions, answers)))
    if dist.is_initialized():
        dist.destroy_process_group()


def kind_of(question):
    """The question's category, or its first two words."""
    return question.get("category") or " ".join(question["text"].split()[:2])


def blind_answers(records, questions):
    """[(question, answer)] without seeing the images: the most frequent answer in the training records to
    the same question, else to those with the same first two words, else to any."""
    counts = defaultdict(Counter)

    def keys(text):
        text = text.replace("<image>", "").strip().split("\n")[0]
        return text, tuple(text.split()[:2]), None

    for record in records:
        for human, gpt in zip(record["conversations"], record["conversations"][1:]):
            if human["from"] == "human":
                for key in keys(human["value"]):
                    counts[key][gpt["value"].strip()] += 1
    known = [next(key for key in keys(question["text"]) if key in counts) for question in questions]
    return [(question, counts[key].most_common(1)[0][0]) for question, key in zip(questions, known)]


def accuracy(answered):
    """{kind: share of right answers} over all processes, and "all"."""
    right, total = Counter(), Counter()
    for question, text in answered:
        total[kind_of(question)] += 1
        right[kind_of(question)] += data.is_correct(text, question["label"])
    right, total = (sum(counters, Counter()) for counters in zip(*gather((right, total))))
    return {kind: right[kind] / total[kind] for kind in sorted(total)} | {"all": right.total() / total.total()}


# ---------------------------------------------------------------------------------------------
# building: model and data


def find_stage1(config):
    """Stage 1's checkpoint for stage 2 to start from; None where the projector is trained already."""
    if config.stage == 1 or config.benchmark_steps or Path(config.projector or "").is_file():
        return None
    if not config.stage1 and config.model not in ("tiny", *LLAMA) and hydra.open_folder(config.model)[1].get("model_type") != "llama":
        return None
    folder = (config.stage1 or f"runs/{Path(config.model).name}/stage1").replace("{seed}", str(config.seed))
    if (stage1 := hydra.find_checkpoint(folder)) is None:
        there = f" --seed {config.seed} --out {folder}" if config.stage1 else ""
        raise ConfigError(f"--stage 2: no checkpoint in {folder}; first run: torchrun train.py --stage 1 --model {config.model}{there}")
    return stage1


def read_data(config):
    """(records, questions), checked before any weight is loaded; the toy world is made on the way."""
    if config.benchmark_steps:
        config.max_steps = BENCHMARK_WARM_UP + config.benchmark_steps
        return data.random_records(config.stage, (config.max_steps + 2) * config.global_batch_size + max(32, config.global_batch_size)), []
    if config.model == "tiny":
        on_first_process(partial(data.make_world, TOY))
        config.vision_tower = config.vision_tower or str(TOY / "clip")
        if config.data is None:
            config.data = str(TOY / ("caption.json" if config.stage == 1 else "instruct.json"))
            config.images = config.images or str(TOY / "images")
            config.questions = config.questions or str(TOY / "questions.jsonl")
    if config.data is None:
        raise ConfigError("--data: name the JSON file of records, and --images their folder")
    records = data.read_records(config.data, config.images)
    if config.stage == 1 and not all("image" in record for record in records):
        raise ConfigError(f"--data {config.data}: has records without an image; stage 1 trains on captions of images")
    return records, data.read_questions(config.questions, config.images) if config.questions and config.stage == 2 else []


def build_model(config, device, stage1):
    """(model, tokenizer): a trained projector and new adapters for stage 2, all but what trains frozen."""
    torch.manual_seed(config.seed)
    source = TOY / "llm" if config.model == "tiny" else LLAMA.get(config.model, config.model)
    saved = hydra.read_config(stage1) if stage1 else {"projector": None}
    dtype = torch.float32 if config.method == "full" else frozen_dtype(device)
    if config.benchmark_steps:
        model, tokenizer = build_random(config, dtype)
    else:
        model, tokenizer, _ = hydra.load_checkpoint(source, config.vision_tower, config.projector or saved["projector"], dtype)
    model.projector.float()  # what trains is always fp32
    if model.stage == 2:
        raise ConfigError(f"--model {source}: has been through stage 2; first: python hydra.py export {source} --format mobilevlm --to DIR")
    if stage1:
        say(f"starting from stage 1's projector: {stage1}")
        if (saved["stage"], saved["projector"]) != (1, model.projector.kind):
            raise ConfigError(
                f"--stage1 {stage1}: holds stage {saved['stage']} with projector {saved['projector']}, "
                f"not stage 1 with {model.projector.kind}"
            )
        hydra.restore(model, stage1, saved)
    if config.stage == 2 and config.method != "full":
        scale = config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)
        hydra.inject_adapters(model.llm, config.lora_rank, scale, config.lora_dropout)
    hydra.freeze(model, config.stage, config.method)
    if config.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def build_random(config, dtype):
    """(model, tokenizer) of --model's shapes with random weights; the tokenizer is the toy world's, of 544 words."""
    if config.model not in SHAPES:
        raise ConfigError(f"--benchmark_steps: knows the shapes of {', '.join(SHAPES)}, not of --model {config.model}")
    clip, llm = SHAPES[config.model]
    clip = hydra.CLIPEncoder(hydra.build_random(hydra.CLIPVisionModel, dtype, **clip))
    projector = hydra.build_projector(config.projector or "ldpnet", clip.clip.config.hidden_size, llm["hidden_size"])
    model = hydra.HydraVLM(clip, projector, hydra.build_random(hydra.LlamaForCausalLM, dtype, **llm))
    model.stage, model.origin = 0, {"model": "random", "vision_tower": "random"}
    with tempfile.TemporaryDirectory() as folder:
        return model, data.train_tokenizer(Path(folder))


def make_samples(records, images, model, tokenizer, template, replace=True):
    """The records as the model's samples."""
    context_length = model.llm.config.max_position_embeddings
    return data.ConversationDataset(
        records, images, tokenizer, template, model.image_size, model.image_tokens, context_length, replace
    )


def split_held_out(records, probes):
    """(train, probe, validation): 5 % held out, spread over the file, at most 256 + probes.

    The rank method measures on the probe records; what is reported comes from the validation
    records, which no decision has seen.
    """
    count = min(len(records) // 20, 256 + probes)
    if count < 2:
        raise ConfigError(f"--data: {len(records)} records are too few to hold some out; give at least 40")
    every = len(records) // count
    held = records[every - 1 :: every][:count]
    held_ids = set(map(id, held))
    probes = min(probes, count // 3 + 1)
    return [record for record in records if id(record) not in held_ids], held[:probes], held[probes:]


# ---------------------------------------------------------------------------------------------
# the run


def run(config):
    """Train one stage, from its newest checkpoint if there is one."""
    rank, world_size, device = set_up_processes()
    complete(config, world_size)
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # DDP copies; nothing is lost
    scratch = tempfile.TemporaryDirectory() if config.benchmark_steps else None
    out, begun, stop_signals = Path(scratch.name if scratch else config.out), time.time(), []
    for number in (signal.SIGTERM, signal.SIGINT):  # a step that has begun is finished and saved
        signal.signal(number, lambda *_: stop_signals.append(1))
    checkpoint = hydra.find_checkpoint(out)
    if checkpoint and not config.resume:
        raise ConfigError(f"--out {out}: holds a run; add --resume to continue it, or name another folder")
    stage1 = find_stage1(config)

    # data and model
    records, questions = read_data(config)
    probes = max(32, config.global_batch_size)
    train, probe, validation = (records[probes:], records[:probes], []) if config.benchmark_steps else split_held_out(records, probes)
    model, tokenizer = build_model(config, device, stage1)
    description = describe(config, model)
    template = "plain" if config.stage == 1 else "v1"
    samples = partial(make_samples, images=config.images, model=model, tokenizer=tokenizer, template=template)
    if checkpoint:
        saved = hydra.read_config(checkpoint)
        for key, value in description.items():
            if key != "run" and saved.get(key) != value:
                raise ConfigError(f"--resume: {checkpoint} has {key} {saved.get(key)}, this run {value}; use the same flags")
        for key in ("data", "global_batch_size", "epochs", "max_steps", "seed", "lora_rank", "learning_rate", "warmup_ratio", "max_grad_norm"):
            if saved["run"].get(key) != getattr(config, key):
                raise ConfigError(f"--resume: {checkpoint} was run with --{key} {saved['run'].get(key)}, not {getattr(config, key)}")
    elif config.resume:
        say(f"--resume: no checkpoint in {out} yet, starting from the beginning")
    if config.stage == 2 and config.method in ("hydra", "aligned"):
        started = time.time()
        picked = torch.utils.data.Subset(samples(train), range(0, len(train), -(-len(train) // 64)))  # 2,048 places, for up to 128 rows
        batches = (data.collate([sample]) for sample in picked)
        with autocast(device):
            hydra.align(model, ({key: value for key, value in batch.items() if key != "bad"} for batch in batches))
        say(f"rows of A aligned in {time.time() - started:.1f} s")
    if checkpoint:
        hydra.restore(model, checkpoint, saved)
    held_out = f"{len(probe)} + {len(validation)} held out"

    def load_held_out(records):
        """This process's share of the held-out records, as batches that stay in memory."""
        mine = torch.utils.data.Subset(samples(records), range(rank, len(records), world_size))
        # twice the training's batch: no activations are kept
        batches = list(torch.utils.data.DataLoader(mine, 2 * config.per_device_train_batch_size, collate_fn=data.collate))
        for problem in sum(gather([problem for batch in batches for problem in batch.pop("bad")]), []):
            say(f"held-out record left out: {problem}")
        return batches

    probe, validation = load_held_out(probe), load_held_out(validation)

    @lru_cache(maxsize=2)
    def batches_of_epoch(epoch):
        return data.global_batches(train, config.global_batch_size, config.seed, epoch)

    steps_per_epoch = len(batches_of_epoch(0))
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    eval_steps = total_steps if config.benchmark_steps else config.eval_steps or math.ceil(total_steps / 4)

    def micro_batches(step):
        """Record indices of one step: [passes][processes] lists."""
        epoch, i = divmod(step, steps_per_epoch)
        return data.micro_batches(batches_of_epoch(epoch)[i], config.per_device_train_batch_size, world_size)

    # what trains, and the state to go on from
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
    controller = None
    if config.stage == 2 and config.method not in ("lora", "full", "aligned"):
        controller = hydra.RankController(model, config.lora_rank, total_steps, config.seed, config.method)
    progress = {"step": 0, "loss": 0.0, "targets": 0.0, "skipped": 0, "in_a_row": 0, "bad": []}
    if checkpoint:
        progress = load_trainer_state(checkpoint, optimizer, controller)
    first = progress["step"]
    say(hydra.parameter_table(model))
    say(
        f"global batch: {config.per_device_train_batch_size} × {config.gradient_accumulation_steps} × {world_size} "
        f"{'GPUs' if device.type == 'cuda' else 'processes'} = {config.global_batch_size}; "
        f"{len(train):,} records, {held_out}; {total_steps} steps -> {out}"
    )
    out.mkdir(parents=True, exist_ok=True)
    log_file = out / "log.jsonl"
    if rank == 0:  # what came after the checkpoint, or was cut by a kill, is written again
        past = data.read_json(log_file, cut=True) if checkpoint and log_file.is_file() else []
        past = [entry for entry in past if entry["step"] <= first and not ({"accuracy", "result"} & entry.keys() and entry["step"] == total_steps)]
        write_lines(log_file, past)

    def log(entry):
        if rank == 0:
            with open(log_file, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def evaluate(step, asked):
        """Held-out loss, accuracy on the questions asked, and a few samples; printed, logged, returned."""
        entry = {"step": step, "held_out_loss": held_out_loss(model, validation, device)}
        say(f"step {step}: held-out loss {entry['held_out_loss']:.3f}")
        if asked:
            mine = asked[rank::world_size]
            answered = list(zip(mine, answer(model, tokenizer, mine, config.images, device, workers)))
            entry["accuracy"] = accuracy(answered)
            say("    accuracy: " + ", ".join(f"{kind} {share:.2f}" for kind, share in entry["accuracy"].items()))
            for question, text in answered[:3]:
                say(f"    {question['image']}: {question['text'].splitlines()[0]} -> {text} (right: {question['label']})")
        elif config.stage == 1 and step and rank == 0:
            with autocast(device):  # from BOS and the image alone
                ids = model.generate(validation[0]["input_ids"][:3, :2], None, validation[0]["pixel_values"][:3], max_new_tokens=40)
            for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
                say(f"    caption: {text.strip().splitlines()[0] if text.strip() else ''}")
        log(entry)
        progress["evaluated"] = step
        return entry

    def wrap():
        return DistributedDataParallel(model) if world_size > 1 else model

    workers = config.num_workers if config.num_workers is not None else 4 * (device.type == "cuda")
    loader = iter(torch.utils.data.DataLoader(
        samples(train), batch_sampler=(parts[rank] for step in range(first, total_steps) for parts in micro_batches(step)),
        collate_fn=data.collate, num_workers=workers, pin_memory=device.type == "cuda",
    ))  # fmt: skip
    if not checkpoint and not config.benchmark_steps:
        progress["before"] = evaluate(0, [])["held_out_loss"]
    elif checkpoint and first % eval_steps == 0 and progress["evaluated"] < first < total_steps:  # a signal came between
        evaluate(first, questions[:120])
    writer, saving = ThreadPoolExecutor(1), Future()
    saving.set_result(None)
    ddp = wrap()
    model.train()
    # sums since the last log line, and the steps left out: the host asks for them when it logs, and not before
    loss, targets, skipped, in_a_row = torch.zeros(4, dtype=torch.float64, device=device)
    skipped, in_a_row = skipped + progress["skipped"], in_a_row + progress["in_a_row"]
    seen, event_seconds, started = Counter(), 0.0, time.time()
    since, tokens, stop = started, 0, False
    bar = tqdm(total=total_steps, initial=first, disable=None if rank == 0 else True, unit="step")
    for step in range(first, total_steps):
        rate = config.learning_rate * schedule(step, total_steps, config.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # dropout differs between steps and processes, and is the same again after a resume
        torch.manual_seed((config.seed * 10**6 + step) * 10**4 + rank)
        # gradients of the loss summed over the global batch
        passes, step_loss, count, bad = micro_batches(step), 0.0, 0, []
        for i in range(len(passes)):
            asked = time.time()
            batch = next(loader)
            seen["wait"] += time.time() - asked
            bad += batch.pop("bad")
            if world_size > 1:
                ddp.require_backward_grad_sync = i == len(passes) - 1  # one exchange per step, not per pass
            with autocast(device):
                batch_loss, batch_count = ddp(**batch)
            batch_loss.backward()
            step_loss, count = step_loss + batch_loss.detach(), count + batch_count
            lengths = data.count_tokens(batch, model.image_tokens)
            seen.update(samples=len(lengths), tokens=int(lengths.sum()), places=len(lengths) * int(lengths.max()))

        # divided once by its number of targets, so that the split does not matter; DDP averages, hence world_size
        all_targets, all_bad, stop = sum_over_processes(count, len(bad), bool(stop_signals))
        gradients = [p.grad for p in trained]
        torch._foreach_mul_(gradients, world_size / max(all_targets, 1))
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = norm.isfinite()  # the same on all processes, which have exchanged their gradients
        if controller:
            controller.observe(step, finite)
        torch.nn.utils.clip_grads_with_norm_(trained, config.max_grad_norm, norm)
        optimizer.found_inf = (~finite).float()  # fused AdamW leaves such a step out, without asking the host
        optimizer.step()
        optimizer.zero_grad()
        loss, targets = loss + torch.where(finite, step_loss, 0.0), targets + finite * count
        skipped, in_a_row = skipped + ~finite, torch.where(finite, 0.0, in_a_row + 1)
        bar.update()

        done = progress["step"] = step + 1
        if all_bad:
            for problem in (problem for problems in gather(bad) for problem in problems):
                progress["bad"] += [problem] * (problem not in progress["bad"])  # once, however often it is met
                say(f"image replaced by the next record's: {problem}")
                log({"step": done, "bad": problem})
            if len(progress["bad"]) > config.max_bad * len(train):
                raise data.DataError(
                    "\n".join(progress["bad"]) + f"\n{len(progress['bad'])} of {len(train)} records have a broken image, more than "
                    f"--max_bad {config.max_bad}; repair them, or allow more"
                )
        if controller and done in controller.event_steps:
            event_started = time.time()
            with torch.no_grad(), autocast(device):  # the same in all of the event's measurements
                spliced = [model.splice(**batch) for batch in probe]
            spliced = [{"embeddings": embeddings, "labels": labels} for embeddings, _, labels in spliced]
            entry = controller.event(done, partial(held_out_loss, model, spliced, device), optimizer)
            if len(set(gather(controller.checksum()))) > 1:
                raise hydra.HydraError(f"step {done}: ranks differ between processes; continue from the last checkpoint with --resume")
            trained = [p for p in model.parameters() if p.requires_grad]
            ddp = wrap()  # DDP holds the parameters that it was given
            event_seconds += time.time() - event_started
            say(describe_event(entry))
            log(entry)
        is_logged, is_saved = (done % steps == 0 or done == total_steps for steps in (config.log_steps, config.save_steps))
        if is_logged or is_saved or stop:
            for key, value in zip(("loss", "targets"), sum_over_processes(loss, targets)):
                progress[key] += value
            progress |= {"skipped": int(skipped), "in_a_row": int(in_a_row)}
            loss, targets = torch.zeros_like(loss), torch.zeros_like(targets)
        if is_logged:
            entry = {"step": done, "loss": progress["loss"] / max(progress["targets"], 1), "lr": rate}
            entry |= {"skipped_steps": progress["skipped"]} if progress["skipped"] else {}
            progress |= {"loss": 0.0, "targets": 0.0}
            (total,), now = sum_over_processes(seen["tokens"]), time.time()
            speed, left = (total - tokens) / (now - since), (now - started) / (done - first) * (total_steps - done)
            tokens, since = total, now
            say(f"{100 * done / total_steps:5.1f}%  loss {entry['loss']:.3f}  lr {rate:.2e}  {speed:,.0f} tokens/s  {left:.0f} s left")
            log(entry | {"tokens_per_s": round(speed)})
            if progress["in_a_row"] > 10:
                names = [train[i].get("id", i) for parts in passes for part in parts for i in part]
                raise ConfigError(f"step {done}: no finite gradient for {progress['in_a_row']} steps; lower --learning_rate, or look at records {names}")
        if done % eval_steps == 0 and done < total_steps and not stop:
            evaluate(done, questions[:120])
        if config.benchmark_steps and done == BENCHMARK_WARM_UP:
            float(loss)  # until the device has caught up
            seen, tokens, since, started = Counter(), 0, time.time(), time.time() - event_seconds  # events count, wherever they fall
        if (is_saved or stop) and rank == 0 and not scratch:
            saving.result()  # the one before is whole, or its error ends the run
            saving = writer.submit(write_checkpoint, out, done, checkpoint_files(model, optimizer, controller, progress, description), config.keep)
        if stop:
            break
    bar.close()
    seconds = time.time() - started

    saving.result()
    if config.benchmark_steps:
        say(speed_table(config, model, batch, seen, seconds, event_seconds, device))
    elif stop:
        say(f"stopped by a signal after step {done}: saved {out / f'checkpoint-{done}'}; go on with --resume")
    else:
        after = evaluate(total_steps, questions)
        if questions:
            after["test_loss"] = test_loss(model, tokenizer, questions, config.images, rank, world_size, device)
        parameters = sum(p.numel() for p in trained)
        if controller:  # the most that there were, before a resume, too
            parameters += max(int((entry["ranks"] * controller.costs).sum()) for entry in controller.history) - controller.parameters_used()
        after |= {"seconds": seconds, "parameters": parameters, "device": str(device), "torch": torch.__version__, "run": asdict(config)}
        log({"result": after, "step": total_steps})
        blind = accuracy(blind_answers(train, questions)) if questions else {}
        if controller and rank == 0:
            draw_ranks(controller.history, out / "ranks.png")
        say(summary(config, progress, after, blind, seconds, event_seconds, time.time() - begun))
    if dist.is_initialized():
        del ddp  # it holds the process group: freed after the group's end, it was seen to hang at exit
        dist.barrier()
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# comparing methods


def compare(config):
    """Train methods in pairs: the runs of a seed have the same data order and projector, and the same rows of A where these are random.

    With {seed} in --stage1, each seed has a projector of its own.

    Each method first runs with all learning rates on the first seed and keeps the one with the lowest
    validation loss. A run is a command of its own, which its line in results.jsonl repeats; one that is
    there already is not run again, one that was cut short is resumed, and one of other flags is refused.
    """
    if int(os.environ.get("RANK", 0)):  # the runs are shared out below
        return
    config.stage = 2
    seeds = range(config.seed, config.seed + config.seeds)
    for seed in seeds:
        find_stage1(replace(config, seed=seed))
    if not read_data(config)[1]:  # which names the toy world's files, too
        raise ConfigError("--questions: give held-out questions for the methods to be compared on")
    out = Path(config.out or f"runs/{Path(config.model).name}/compare")
    out.mkdir(parents=True, exist_ok=True)
    only_here = {"methods", "learning_rates", "seeds", "jobs", "resume"}
    no_effect = {"method", "num_workers", "log_steps", "eval_steps", "save_steps", "keep", "max_bad", "gradient_checkpointing"}
    methods = config.methods.split(",")
    try:
        rates = [float(rate) for rate in config.learning_rates.split(",")] if config.learning_rates else [None]
    except ValueError:
        raise ConfigError(f"--learning_rates {config.learning_rates}: give numbers with commas between") from None
    gpus = torch.cuda.device_count()
    places = queue.SimpleQueue()
    for i in range(config.jobs or gpus or os.cpu_count()):
        places.put(i)

    def plan(name, rate, seed):
        """(folder, command line) of a run; what is in the folder already has to be of the same flags."""
        method, _, rank = name.partition(":")
        if rank and not rank.isdigit():
            raise ConfigError(f"--methods {name}: give a rank after the colon")
        folder = out / f"{name}-{rate}-{seed}".replace(":", "-r")
        planned = replace(config, method=method, learning_rate=rate, seed=seed, out=str(folder))
        if rank:
            planned = replace(planned, lora_rank=int(rank), lora_alpha=2.0 * int(rank))
        words = [
            word for f in fields(Config) if f.name not in only_here and (value := getattr(planned, f.name)) != f.default
            for word in ([f"--{f.name}"] if value is True else [f"--{f.name}", str(value)])
        ]  # fmt: skip
        if checkpoint := hydra.find_checkpoint(folder):
            complete(planned, 1)
            there = hydra.read_config(checkpoint)["run"]
            for key, value in asdict(planned).items():
                if key not in only_here | no_effect and there.get(key) != value:
                    raise ConfigError(f"--out {out}: {folder.name} was run with --{key} {there.get(key)}, not {value}; name another folder")
        return folder, [sys.argv[0], *words]

    def train_one(job):
        name, rate, seed = job
        folder, words = plan(*job)
        lines = data.read_json(folder / "log.jsonl", cut=True) if (folder / "log.jsonl").is_file() else []
        if not lines or "result" not in lines[-1]:
            place = places.get()
            environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            environment |= {"LOCAL_RANK": str(place % gpus)} if gpus else {"OMP_NUM_THREADS": "1"}
            done = subprocess.run([sys.executable, *words, "--resume"], env=environment, capture_output=True, text=True)
            places.put(place)
            if done.returncode:
                raise ConfigError(f"{' '.join(words)}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
            lines = data.read_json(folder / "log.jsonl", cut=True)
        if "result" not in lines[-1]:
            raise ConfigError("stopped by a signal; the same command goes on")
        result = {"method": name, "learning_rate": rate, "seed": seed, "command": " ".join(["python", *words]), **lines[-1]["result"]}
        say(f"{name:14} lr {result['run']['learning_rate']:.1e}  seed {seed}  validation {result['held_out_loss']:.4f}")
        return result

    for job in product(methods, rates, seeds):  # before the first of them runs
        plan(*job)
    with ThreadPoolExecutor(places.qsize()) as pool:
        tried = list(pool.map(train_one, [(name, rate, config.seed) for name in methods for rate in rates]))
        best = {name: min((r for r in tried if r["method"] == name), key=lambda r: r["held_out_loss"])["learning_rate"] for name in methods}
        others = list(pool.map(train_one, [(name, best[name], seed) for seed in seeds[1:] for name in methods]))
    results = [r for r in tried if r["learning_rate"] == best[r["method"]]] + others
    write_lines(out / "results.jsonl", tried + others)
    say(comparison_table(methods, results, rates))


def p_value(t, degrees):
    """Two-sided p-value of Student's t: with t = √degrees · tan a, its density is proportional to cos(a)^(degrees - 1)."""
    angle = np.linspace(0, np.pi / 2, 100_001)
    below = np.cumsum(np.cos(angle) ** (degrees - 1))
    return 1 - np.interp(np.arctan(abs(t) / np.sqrt(degrees)), angle, below / below[-1])


def comparison_table(methods, results, rates):
    """Test loss and accuracy, in all and by kind: means over seeds ± standard deviation, and the paired difference from the first method."""

    def values(name, key, kind="all"):
        return np.array([r[key][kind] for r in sorted(results, key=lambda r: r["seed"]) if r["method"] == name])

    def spread(x):
        return x.std(ddof=1) if len(x) > 1 else math.nan

    kinds = sorted(results[0]["accuracy"].keys() - {"all"}) + ["all"]
    lines = [f"{'':14}{'lr':>9}{'parameters':>12}{'time s':>8}{'validation':>12}{'test loss':>17}{'difference, 95 % interval':>34}{'p':>8}   accuracy: " + " ".join(kinds)]
    for name in methods:
        own = [r for r in results if r["method"] == name]
        loss = values(name, "test_loss")
        line = f"{name:14}{own[0]['run']['learning_rate']:9.1e}{max(r['parameters'] for r in own):12,}{np.mean([r['seconds'] for r in own]):8.0f}"
        line += f"{np.mean([r['held_out_loss'] for r in own]):12.4f}{loss.mean():9.4f} ± {spread(loss):.4f}"
        gap, n = 100 * (loss / values(methods[0], "test_loss") - 1), len(loss)
        error = spread(gap) / math.sqrt(n)
        if name != methods[0] and n > 1:
            t = np.linspace(0, 20, 20_001)
            half = t[p_value(t, n - 1) <= 0.05][0] * error
            line += f"{gap.mean():+13.2f} % [{gap.mean() - half:+.2f}, {gap.mean() + half:+.2f}]".rjust(34) + f"{p_value(gap.mean() / error, n - 1):8.3f}"
        else:
            line += " " * 42
        lines.append(line + "   " + " ".join(f"{values(name, 'accuracy', kind).mean():.2f}" for kind in kinds))
    lines.append(f"{'test loss':14}" + "".join(f"  {kind:>9}" for kind in kinds))
    lines += [f"{name:14}" + "".join(f"  {values(name, 'test_loss', kind).mean():{max(9, len(kind))}.4f}" for kind in kinds) for name in methods]
    lines.append(f"n = {len(own)} seeds; learning rates from {rates}, chosen by validation loss of the first seed")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# reports: a rank event, the picture of the ranks, the summary


def draw_ranks(history, path):
    """ranks.png: layers × projections, a panel for the start and one for each event, the rank in every cell."""
    cell, margin, top = 46, 46, 74
    names = [name.split(".")[1].removesuffix("_proj") for name in hydra.PROJECTIONS]
    layers, start = len(history[0]["ranks"]), history[0]["ranks"][0][0]
    panel, bottom = margin + cell * len(names) + 14, top + cell * layers
    image = Image.new("RGB", (panel * len(history) + 14, bottom + 50), "white")
    draw = ImageDraw.Draw(image)

    def text(x, y, words, size=13, **options):
        draw.text((x, y), words, fill="black", font=ImageFont.load_default(size), **options)

    for p, entry in enumerate(history):
        left = p * panel + margin
        text(left, 8, f"step {entry['step']}: {entry['choice'] if p else 'start'}", 17)
        text(left, 30, f"held-out loss {entry['held_out_loss']:.3f}, {entry['parameters']:,} parameters" if p else "", 12)
        for column, name in enumerate(names):
            text(left + (column + 0.5) * cell, top - 12, name, anchor="mm")
        for row, ranks in enumerate(entry["ranks"]):
            text(left - 8, top + (row + 0.5) * cell, str(row), anchor="rm")
            for column, rank in enumerate(ranks):
                shade = max(-1.0, min(1.0, math.log2(rank / start)))  # blue above the start's rank, orange below
                color = (255, 255 + 105 * shade, 255 + 225 * shade) if shade < 0 else (255 - 205 * shade, 255 - 125 * shade, 255)
                x, y = left + column * cell, top + row * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), tuple(map(int, color)), (190, 190, 190))
                text(x + cell / 2 - 1, y + cell / 2 - 1, str(rank), 15, anchor="mm")
    text(margin, bottom + 14, f"rank of each adapter; rows are layers; blue: above the start's {start}, orange: below")
    image.save(path)


def describe_event(entry):
    """One rank event in words, with the ranks of each layer before and after."""
    text = f"rank event at step {entry['step']}: {entry['choice']}"
    if "favourite" in entry:
        text += " (the predictor abstains)" if entry["abstained"] else f" (favourite {entry['favourite']}, predicted gain {entry['predicted_gain']:.4f} ± {entry['doubt']:.4f})"
        text += f"; its error {entry['error']:.4f}, of the mean {entry['error_of_mean']:.4f}, each of {entry['observations']} measurements left out in turn"
    text += f"; the last change brought {entry['realised_gain']:+.4f}" if "realised_gain" in entry else ""
    text += f"; {entry['parameters']:,} of {entry['budget']:,} parameters"
    if entry["choice"] != "stay":
        for layer, (before, after) in enumerate(zip(entry["ranks_before"], entry["ranks"])):
            text += f"\n    layer {layer}: {' '.join(map(str, before))} -> {' '.join(map(str, after))}"
    return text


def speed_table(config, model, batch, seen, seconds, event_seconds, device):
    """What --benchmark_steps prints.

    FLOPs are those of the last batch, as PyTorch counts them (products; attention on a GPU alone), and the vocabulary's.
    """
    dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 2048)
    a, fastest = torch.randn(n, n, dtype=dtype, device=device), math.inf
    for _ in range(5):
        begun = time.time()
        float((a @ a)[0, 0])  # waits for the device
        fastest = min(fastest, time.time() - begun)
    peak = 2 * n**3 / fastest
    with FlopCounterMode(display=False) as counter, autocast(device):
        loss, targets = model(**batch)
        loss.backward()
    flops = counter.get_total_flops() + 4 * int(targets) * model.llm.lm_head.weight.numel()  # which its pieces hide
    flops /= int(data.count_tokens(batch, model.image_tokens).sum())  # per token
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples, tokens, places, wait, peak, processes = sum_over_processes(*(seen[key] for key in ("samples", "tokens", "places", "wait")), peak, 1)
    steps = seconds - event_seconds
    whole = steps * 665_000 / samples
    rows = {
        "samples/s": f"{samples / steps:.2f}",
        "tokens/s": f"{tokens / steps:,.0f}",
        "utilisation": f"{100 * flops * tokens / steps / peak:.1f} % of {peak / 1e12:.2f} TFLOP/s, measured in {str(dtype)[6:]}; {flops / 1e9:.3f} GFLOP per token",
        "peak memory": f"{memory / 1e9:.2f} GB per process",
        "padding": f"{100 * (1 - tokens / places):.1f} %",
        "waiting for data": f"{100 * wait / processes / steps:.1f} %",
        "rank events": f"{event_seconds:.2f} s in all, {100 * event_seconds / (event_seconds + whole):.1f} % of a run over 665,000 records",
    }
    asked = "captions of about 25 words" if config.stage == 1 else "answers log-normal, median 150 words, σ 0.9; 94 % with an image"
    return "\n".join([f"{config.benchmark_steps} steps after {BENCHMARK_WARM_UP}; {asked}; 640 x 480 JPEGs"] + [f"{key:18}{row}" for key, row in rows.items()])


def summary(config, progress, after, blind, seconds, event_seconds, total_seconds):
    """The end of a run: what it reached, what it cost, what to do next."""
    change = after["held_out_loss"] / progress["before"] - 1
    lines = [f"held-out loss {progress['before']:.3f} -> {after['held_out_loss']:.3f} ({100 * change:+.0f} %)"]
    if blind:
        lines += [f"{'accuracy':14}{'model':>8}{'no image':>10}"]
        lines += [f"{kind:14}{share:8.2f}{blind[kind]:10.2f}" for kind, share in after["accuracy"].items()]
    if progress["bad"] or progress["skipped"]:
        lines += [f"left out: {len(progress['bad'])} broken images, {progress['skipped']} steps without a finite gradient; see log.jsonl"]
    events, memory = 100 * event_seconds / max(seconds, 1e-9), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines += [f"training {seconds:.0f} s, in all {total_seconds:.0f} s; rank events {events:.1f} % of training; peak memory {memory:.1f} GB"]
    lines += [f"wrote {config.out}" + (" with ranks.png" if config.stage == 2 and config.method not in ("lora", "full", "aligned") else "")]
    stage2, chat = f"torchrun train.py --stage 2 --model {config.model}", f'python hydra.py chat {config.out} --image FILE --prompt "..."'
    return "\n".join(lines + [f"next: {stage2 if config.stage == 1 else chat}"])


def main():
    try:
        config = parse_arguments()
        {"eval": run_benchmark, "compare": compare}.get(config.stage, run)(config)
    except (ConfigError, hydra.HydraError, data.DataError, OSError) as error:
        # a reading process wraps the error in its traceback; the last line is the error itself
        lines = str(error).strip().splitlines()
        print("\n".join(["train.py: error: " + lines[-1]] if "Traceback" in str(error) else lines[:-1] + ["train.py: error: " + lines[-1]]), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

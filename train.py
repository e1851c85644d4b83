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
import io
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import uuid
import warnings
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
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


METHODS = ["hydra", "lora", "full", "aligned", "coarse", "coarse+fine", "dynamic", "random"]


@dataclass
class Config:
    """A run. The command line is made from these fields; None stands for the recipe's value."""

    stage: str = flag(None, "1: projector on captions; 2: projector and adapters on instructions; eval: a benchmark",
                      choices=("1", "2", "eval"), required=True)
    benchmark: str = flag(None, "eval: whose questions and score", choices=tuple(data.BENCHMARKS))
    model: str = flag("tiny", "tiny, 1.7b, 3b, a folder or hub id of a LLaMA or MobileVLM, or a run of stage 1")
    vision_tower: str = flag(None, "folder or hub id of a CLIP (default: the model's)")
    projector: str = flag(None, "a new ldpnet (default) or ldpnetv2, or upstream's mm_projector.bin")
    data: str = flag(None, "JSON file of LLaVA records (tiny: the toy world's)")
    images: str = flag(None, "folder that the records' image names are in")
    questions: str = flag(None, "JSON lines {question_id, image, text, label}, answered at the end of stage 2; "
                          "eval: the benchmark's")
    out: str = flag(None, "folder of the run (default: runs/MODEL/stage1, runs/MODEL/stage2-METHOD)")
    stage1: str = flag(None, "stage 2: stage 1's run to start from (default: runs/MODEL/stage1, if the projector is new)")
    method: str = flag("hydra", "stage 2: hydra; lora (fixed ranks); full (the LLM's own weights); for comparison aligned "
                       "(hydra's start, fixed ranks) and ways to move ranks without the performance model", choices=METHODS)
    lora_rank: int = flag(None, "adapters' rank at the start, which sets the parameter budget")
    lora_alpha: float = flag(None, "adapters' scale is lora_alpha / lora_rank, and stays when ranks move")
    lora_dropout: float = flag(None, "dropout before the adapters")
    use_rslora: bool = flag(False, "scale lora_alpha / √lora_rank instead")
    per_device_train_batch_size: int = flag(None, "samples per process and forward pass")
    gradient_accumulation_steps: int = flag(None, "forward passes per step")
    global_batch_size: int = flag(None, "samples per step; any two of the three give the third")
    max_tokens_per_pass: int = flag(12288, "a pass of more (rows × longest row) is run in parts, to bound its memory")
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
    save_steps: int = flag(500, "steps between checkpoints")
    keep: int = flag(1, "checkpoints to keep, the newest ones")
    max_bad: float = flag(0.001, "share of an epoch's records whose image may turn out to be broken")
    checkpoint: str = flag(None, "eval: what answers: a run or checkpoint, or a folder or hub id of a MobileVLM")
    annotations: str = flag(None, "eval: the benchmark's labels, where its questions have none")
    answers: str = flag(None, "eval: file of the answers, continued if it is there (default: in --checkpoint)")


TOY = Path("runs/tiny/world")
SOURCES = {"tiny": str(TOY / "llm"), "1.7b": "mtgv/MobileLLaMA-1.4B-Chat", "3b": "mtgv/MobileLLaMA-2.7B-Chat"}
STAGE1 = dict(learning_rate=1e-3, global_batch_size=256, per_device_train_batch_size=32)
STAGE2 = dict(lora_rank=128, lora_alpha=256.0, lora_dropout=0.05, global_batch_size=128, per_device_train_batch_size=16)
TINY = dict(global_batch_size=16, per_device_train_batch_size=16)
# MobileVLM's recipe, for a global batch on any number of GPUs; tiny's was chosen on held-out loss.
# A folder or hub id takes 1.7b's.
RECIPES = {
    ("tiny", 1): dict(TINY, learning_rate=7e-3),
    ("tiny", 2): dict(TINY, learning_rate=2.5e-3, lora_rank=4, lora_alpha=8.0, lora_dropout=0.0),
    ("1.7b", 1): STAGE1,
    ("1.7b", 2): dict(STAGE2, learning_rate=1e-4),
    ("3b", 1): STAGE1,
    ("3b", 2): dict(STAGE2, learning_rate=2e-4),
}  # fmt: skip
FULL_LEARNING_RATE = {"tiny": 1e-3, "1.7b": 2e-5, "3b": 4e-5}
# what may differ when a run is resumed: none of it changes a result
FREE = {"resume", "out", "model", "vision_tower", "projector", "stage1", "data", "images", "questions", "max_bad",
        "gradient_checkpointing", "num_workers", "log_steps", "eval_steps", "save_steps", "keep", "max_tokens_per_pass",
        "per_device_train_batch_size", "gradient_accumulation_steps", "lora_alpha", "use_rslora"}  # fmt: skip


def complete(config, world_size):
    """Fill what was left open from the recipe, and check that the three batch sizes agree."""
    size = config.model if config.model in SOURCES else "1.7b"
    recipe = dict(RECIPES[size, config.stage])
    if config.stage == 2 and config.method == "full":
        recipe["learning_rate"] = FULL_LEARNING_RATE[size]
    total = config.global_batch_size
    each = config.per_device_train_batch_size
    passes = config.gradient_accumulation_steps
    if not total:
        total = each * passes * world_size if each and passes else recipe["global_batch_size"]
    if not each:
        share = total // world_size // (passes or 1)
        most = recipe["per_device_train_batch_size"]
        each = share if passes else max(n for n in range(1, most + 1) if share % n == 0)
    passes = passes or total // (each * world_size)
    if each * passes * world_size != total or not total:
        raise Mistake(
            f"--per_device_train_batch_size {each} × --gradient_accumulation_steps {passes} × {world_size} processes "
            f"= {each * passes * world_size}, not --global_batch_size {total}: change one of them"
        )
    recipe |= dict(global_batch_size=total, per_device_train_batch_size=each, gradient_accumulation_steps=passes)
    name = Path(config.model).name
    recipe["out"] = f"runs/{name}/stage{config.stage}" + (f"-{config.method}" if config.stage == 2 else "")
    recipe["num_workers"] = 4 * torch.cuda.is_available()
    for key, value in recipe.items():
        if getattr(config, key) is None:
            setattr(config, key, value)


# ------------------------------------------------------------------------------------------
# processes: one per GPU under torchrun; a plain `python train.py` is a group of one


def set_up_processes():
    """This process's device, once it has joined the others."""
    given = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if given and len(given) < 4:
        raise Mistake(f"{given[0]} is set, but not all that torchrun sets: start with torchrun, or unset {' '.join(given)}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # counts and flags travel between the hosts, gradients between the GPUs: no step waits for its GPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not given:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return device
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it restarts the processes, with the addresses of those that died
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    device_id = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=device_id)
    return device


def total(*values):
    """Each value (number or tensor) summed over all processes, as floats."""
    sums = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(values):
    """The lists of all processes as one, in order of rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return sum(lists, [])


def say(text):
    """Print on the first process, above the progress bar."""
    if dist.get_rank() == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def share(items):
    """This process's share of a list."""
    return items[dist.get_rank() :: dist.get_world_size()]


def autocast(device):
    """bf16 matrix products on a GPU; fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ------------------------------------------------------------------------------------------
# what a run leaves on the disk: a log and checkpoints


class Log:
    """JSON lines that one process at a time appends to; a last line that a kill cut short is dropped.

    The lock on the file ends with the process, however that ends.
    """

    def __init__(self, path, keep=lambda row: True):
        """keep(row): the file is cut before the first row of which it is not true."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"{path}: another run is writing it; wait for its end, or name another folder") from None
        self.rows = []
        end = 0
        self.file.seek(0)
        for line in self.file:
            with reading(path):
                row = json.loads(line) if line.endswith(b"\n") else None
            if row is None or not keep(row):
                break
            self.rows.append(row)
            end += len(line)
        self.file.truncate(end)

    def __call__(self, **row):
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()


def schedule(step, total_steps, warmup_ratio):
    """Learning-rate factor of a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def save(config, model, state):
    """out/checkpoint-STEP, whole or not at all; all but the newest go once it is there. state: all that the loop needs."""
    final = Path(config.out, f"checkpoint-{state['step']}")
    torch.save(state, buffer := io.BytesIO())  # to a full disk itself it would hide the reason
    with whole(final) as folder:
        folder.mkdir()
        run = asdict(config)
        hydra.write_model(folder, model, {"stage": config.stage, "method": run["method"], "step": state["step"], "run": run})
        (folder / "trainer.pt").write_bytes(buffer.getbuffer())
    for old in hydra.list_checkpoints(config.out)[: -config.keep]:
        shutil.rmtree(old)


def load(checkpoint, config, model, records, optimizer, controller):
    """Put a run of the same flags, data and model back; returns the loop's state."""
    saved = hydra.read_config(checkpoint)
    flags = {f"--{key}": (saved["run"].get(key), value) for key, value in asdict(config).items() if key not in FREE}
    scales = {adapter.scale for adapter in hydra.adapters(model).values()}
    flags["projector"] = saved["projector"], model.projector.kind
    flags["adapters' scale"] = saved["scale"], max(scales, default=None)
    for name, (there, here) in flags.items():
        if there != here:
            raise Mistake(f"--resume: {checkpoint} was run with {name} {there}, not {here}; use the same flags")
    hydra.restore(model, checkpoint)
    with reading(checkpoint / "trainer.pt"):
        state = torch.load(checkpoint / "trainer.pt", map_location="cpu", weights_only=True)
        state["records"]
    if state["records"] != records:
        raise Mistake(f"--resume: the records of --data {config.data} are not those that {checkpoint} was trained on")
    with reading(checkpoint / "trainer.pt"):
        # the adapters of a run's ranks are new objects: the optimizer gets them first
        optimizer.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
        optimizer.load_state_dict(state.pop("optimizer"))
        if controller:
            controller.load_state_dict(state.pop("controller"))
    return state


# ------------------------------------------------------------------------------------------
# evaluation


@torch.no_grad()
def held_out_loss(model, batches):
    """Loss per target token over all processes' batches."""
    was_training = model.training
    model.eval()
    device = model.llm.device
    loss, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with autocast(device):
        for batch in batches:
            batch_loss, batch_count = model(**batch)
            loss, count = loss + batch_loss, count + batch_count
    model.train(was_training)
    loss, count = total(loss, count)
    return loss / max(count, 1)


def hold(config, model, samples):
    """This process's share of the held-out samples as batches that stay in memory, and what was left out as broken."""
    mine, bad = [], []
    for i in share(range(len(samples))):
        try:
            mine.append(samples[i])
        except Mistake as error:
            bad.append(str(error))
    for problem in (bad := gather(bad)):
        say(f"held-out record left out: {problem}")
    if len(bad) == len(samples):
        raise Mistake(f"{bad[0]}; no held-out record is left")
    size = 2 * config.per_device_train_batch_size  # twice the training's: no activations are kept
    mine.sort(key=lambda sample: len(sample["labels"]))
    chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    return [batch for chunk in chunks for batch in data.passes(chunk, config.max_tokens_per_pass, model.image_tokens)]


def as_record(question, label=None):
    """A question as a LLaVA record: a prompt, or with its label as the answer."""
    turns = [{"from": "human", "value": ("<image>\n" if question["image"] else "") + question["text"]}]
    turns += [] if label is None else [{"from": "gpt", "value": label}]
    return {"id": question["question_id"], "conversations": turns} | ({"image": question["image"]} if question["image"] else {})


def answer(model, tokenizer, questions, images, workers=0, batch_size=64, max_new_tokens=16):
    """[(question, answer)] of this process's share of the questions, generated in batches."""
    mine, texts = share(questions), []
    samples = make_samples(list(map(as_record, mine)), images, model, tokenizer, "v1", replace=False)
    loader = DataLoader(samples, batch_size, collate_fn=data.collate, num_workers=workers, worker_init_fn=ignore_signals)
    for batch in loader if mine else []:
        with autocast(model.llm.device):
            ids = model.generate(batch["input_ids"], batch["attention_mask"], batch["pixel_values"], max_new_tokens)
        texts += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return list(zip(mine, texts))


def accuracy(answered):
    """{kind: share of right answers} of [(question, answer)], and "all"."""
    right = defaultdict(list)
    for question, text in answered:
        for kind in (data.kind_of(question), "all"):
            right[kind].append(data.exact(text) == data.exact(question["label"]))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items(), key=lambda item: item[0] == "all")}


def evaluate(config, model, tokenizer, validation, questions, log, step):
    """Held-out loss, accuracy on the questions and a few samples; printed, logged, returned."""
    entry = {"step": step, "held_out_loss": held_out_loss(model, validation)}
    say(f"step {step}: held-out loss {entry['held_out_loss']:.3f}")
    if questions and step:
        answered = gather(answer(model, tokenizer, questions, config.images, config.num_workers))
        places = {question["question_id"]: i for i, question in enumerate(questions)}
        answered.sort(key=lambda pair: places[pair[0]["question_id"]])
        entry["accuracy"] = accuracy(answered)
        say("    accuracy: " + ", ".join(f"{kind} {value:.2f}" for kind, value in entry["accuracy"].items()))
        for question, text in answered[:3]:
            say(f"    {question['image']}: {question['text'].splitlines()[0]} -> {text} (right: {question['label']})")
    elif config.stage == 1 and step and validation:
        with autocast(model.llm.device):  # from BOS and the image alone
            ids = model.generate(validation[0]["input_ids"][:3, :2], None, validation[0]["pixel_values"][:3], 40)
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            say(f"    caption: {text.strip().partition(chr(10))[0]}")
    log(**entry)
    return entry


# ------------------------------------------------------------------------------------------
# building: data and model


def read_data(config):
    """(train, probe, validation, questions), checked before any weight is loaded.

    5 % of the records, spread over the file, are held out (at most 256 + the probes): the rank method measures on the
    probe records; what is reported, and what learning rates are chosen by, comes from the validation records.
    """
    if config.model == "tiny":
        if dist.get_rank() == 0:
            data.make_world(TOY)
        dist.barrier()
        config.vision_tower = config.vision_tower or str(TOY / "clip")
        if config.data is None:
            config.data = str(TOY / ("caption.json" if config.stage == 1 else "instruct.json"))
            config.images = config.images or str(TOY / "images")
            config.questions = config.questions or str(TOY / "questions.jsonl")
    if config.data is None:
        raise Mistake("--data: name the JSON file of records, and --images their folder")
    records = data.read_records(config.data, config.images)
    if config.stage == 1 and not all(record.get("image") for record in records):
        raise Mistake(f"--data {config.data}: has records without an image; stage 1 trains on captions of images")
    probes = max(32, config.global_batch_size)
    count = min(len(records) // 20, 256 + probes)
    if count < 2:
        raise Mistake(f"--data: {len(records)} records are too few to hold some out; give at least 40")
    every = len(records) // count
    held = records[every - 1 :: every][:count]
    ids = set(map(id, held))
    probes = min(probes, count // 3 + 1)
    questions = data.read_questions(config.questions, config.images) if config.questions and config.stage == 2 else []
    return [record for record in records if id(record) not in ids], held[:probes], held[probes:], questions


def build_model(config, device):
    """(model, tokenizer): a trained projector and new adapters for stage 2, all but what trains frozen, in bf16 on a GPU."""
    torch.manual_seed(config.seed)
    source = SOURCES.get(config.model, config.model)
    base = hydra.open_folder(source)[1]
    stage1 = config.stage1
    if config.stage == 2 and not stage1 and base.get("model_type") == "llama" and not Path(config.projector or "").is_file():
        stage1 = f"runs/{Path(config.model).name}/stage1"  # the projector is new: it has been through no stage 1
    dtype = torch.bfloat16 if device.type == "cuda" and config.method != "full" else torch.float32
    if config.stage == 2 and stage1:
        if not hydra.find_checkpoint(stage1):
            words = f"--model {config.model}" + (f" --out {stage1}" if config.stage1 else "")
            raise Mistake(f"--stage 2: no checkpoint in {stage1}; first run: torchrun train.py --stage 1 {words}")
        there = hydra.read_config(stage1)
        if (there["stage"], there["projector"]) != (1, config.projector or there["projector"]):
            raise Mistake(f"--stage1 {stage1}: holds stage {there['stage']} with projector {there['projector']}, "
                          f"not stage 1 with {config.projector or there['projector']}")  # fmt: skip
        say(f"starting from stage 1's projector: {stage1}")
        model, tokenizer = hydra.load_checkpoint(source, config.vision_tower, there["projector"], dtype)
        hydra.restore(model, hydra.find_checkpoint(stage1))
    else:
        model, tokenizer = hydra.load_checkpoint(source, config.vision_tower, config.projector, dtype)
    if model.stage == 2:
        raise Mistake(f"--model {source}: has been through stage 2; first: python hydra.py export {source} --format mobilevlm --to DIR")
    model.projector.float()  # what trains is always fp32
    if config.stage == 2 and config.method != "full":
        scale = config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)
        hydra.inject_adapters(model.llm, config.lora_rank, scale, config.lora_dropout)
    hydra.freeze(model, config.stage, config.method)
    if config.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device), tokenizer


def make_samples(records, images, model, tokenizer, template, replace=True):
    """The records as the model's samples."""
    shape = model.image_size, model.image_tokens, model.context_length
    return data.ConversationDataset(records, images, tokenizer, template, *shape, replace)


# ------------------------------------------------------------------------------------------
# the run


def ignore_signals(*_):
    """For processes that read images: a signal is sent to them, too, and is the trainer's to answer."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def parts_of(samples, most_tokens, image_tokens):
    """(the batches that a pass is run in, one or more; what was broken in it)"""
    return data.passes(samples, most_tokens, image_tokens), [problem for sample in samples for problem in sample["bad"]]


def run(config):
    """Train one stage, from its newest checkpoint if there is one."""
    begun = time.time()
    stop_signals = []
    for number in (signal.SIGTERM, signal.SIGINT):  # a step that has begun is finished and saved
        signal.signal(number, lambda *_: stop_signals.append(1))
    device = set_up_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    complete(config, world_size)
    checkpoint = hydra.find_checkpoint(config.out)
    if checkpoint and not config.resume:
        raise Mistake(f"--out {config.out}: holds a run; add --resume to continue it, or name another folder")
    if config.resume and not checkpoint:
        say(f"--resume: no checkpoint in {config.out} yet, starting from the beginning")

    # data, whose order depends on nothing but seed and step
    train, probe, validation, questions = read_data(config)
    epoch_batches = lru_cache(2)(lambda epoch: data.global_batches(train, config.global_batch_size, config.seed, epoch))
    steps_per_epoch = len(epoch_batches(0))
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    eval_steps = config.eval_steps or math.ceil(total_steps / 4)

    def micro_batches(step):
        """Record indices of one step: [passes][processes] lists."""
        epoch, i = divmod(step, steps_per_epoch)
        return data.micro_batches(epoch_batches(epoch)[i], config.per_device_train_batch_size, world_size)

    # model, optimizer, rank controller, and the state to go on from
    model, tokenizer = build_model(config, device)
    template = "plain" if config.stage == 1 else "v1"
    samples = partial(make_samples, images=config.images, model=model, tokenizer=tokenizer, template=template)
    check_prompts(questions, model, tokenizer)
    check_targets(config, model, tokenizer, template, {"training": train, "probe": probe, "validation": validation})
    if config.stage == 2 and config.method not in ("lora", "full"):
        picked = samples(train[:: -(-len(train) // 64)])  # 64 samples, 32 places of each: 2,048 for up to 128 rows
        with autocast(device):  # before a checkpoint is restored, too: what grows later needs the directions
            hydra.align(model, (data.passes([picked[i]], math.inf, 0)[0] for i in range(len(picked))))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0, fused=True)
    controller = None
    if config.stage == 2 and config.method not in ("lora", "full", "aligned"):
        controller = hydra.RankController(model, config.lora_rank, total_steps, config.seed, config.method)
    state = {"step": 0, "before": None, "loss": 0.0, "targets": 0.0, "skipped": 0, "in_a_row": 0, "bad": [],
             "records": data.fingerprint(train)}  # fmt: skip
    if checkpoint:
        state = load(checkpoint, config, model, state["records"], optimizer, controller)
    first = state["step"]
    # what came after the checkpoint is written again, an evaluation at its own step, too
    is_past = lambda row: row["step"] <= first and not (row["step"] == first and {"held_out_loss", "result"} & row.keys())
    log = Log(Path(config.out, "log.jsonl"), is_past) if rank == 0 else lambda **row: None
    probe, validation = (hold(config, model, samples(part, replace=False)) for part in (probe, validation))
    say(parameter_table(model))
    say(f"global batch: {config.per_device_train_batch_size} × {config.gradient_accumulation_steps} × {world_size} "
        f"{'GPUs' if device.type == 'cuda' else 'processes'} = {config.global_batch_size}; {len(train):,} records; "
        f"{total_steps} steps -> {config.out}")  # fmt: skip
    check_memory(config, model, device)

    # the loop
    loader = iter(DataLoader(
        samples(train), batch_sampler=(parts[rank] for step in range(first, total_steps) for parts in micro_batches(step)),
        collate_fn=partial(parts_of, most_tokens=config.max_tokens_per_pass, image_tokens=model.image_tokens),
        num_workers=config.num_workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
    ))  # fmt: skip

    def wrap():
        return DistributedDataParallel(model.train()) if world_size > 1 else model.train()

    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # DDP copies; nothing is lost
    ddp, started, tokens, seconds_of_events = wrap(), time.time(), 0, 0.0
    for step in tqdm(range(first, total_steps), initial=first, total=total_steps, disable=rank > 0 or None, unit="step"):
        if step % eval_steps == 0:
            entry = evaluate(config, model, tokenizer, validation, questions[:120], log, step)
            state["before"] = state["before"] or entry["held_out_loss"]
        for group in optimizer.param_groups:
            rate = group["lr"] = config.learning_rate * schedule(step, total_steps, config.warmup_ratio)

        # gradients of the loss, summed over the global batch
        # dropout differs between steps and processes, and is the same again after a resume
        torch.manual_seed((config.seed * 10**6 + step) * 10**4 + rank)
        loss, targets, bad, passes = 0.0, 0, [], len(micro_batches(step))
        for i in range(passes):
            parts, problems = next(loader)
            bad += problems
            for j, batch in enumerate(parts):
                tokens += int(data.count_tokens(batch, model.image_tokens).sum())
                # one exchange per step: with the last part of the last pass
                ddp.require_backward_grad_sync = i == passes - 1 and j == len(parts) - 1
                with autocast(device):
                    part_loss, part_targets = ddp(**batch)
                part_loss.backward()
                loss, targets = loss + part_loss.detach(), targets + part_targets

        # divided once by its number of targets, so that the split does not matter; DDP averages, hence world_size
        loss, targets, broken, stop = total(loss, targets, len(bad), bool(stop_signals))
        trained = [p for p in model.parameters() if p.requires_grad]
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
            names = [train[i].get("id", i) for parts in micro_batches(step) for part in parts for i in part]
            raise Mistake(f"step {done}: no finite gradient for 11 steps; lower --learning_rate, or look at records {names}")
        if controller and done in controller.event_steps:
            since = time.time()
            entry = controller.event(done, partial(held_out_loss, model, probe), optimizer)
            if len(set(gather([controller.checksum()]))) > 1:
                raise Mistake(f"step {done}: ranks differ between processes; continue from the last checkpoint with --resume")
            ddp = wrap()  # DDP holds the parameters that it was given
            seconds_of_events += time.time() - since
            say(describe_event(entry))
            log(**entry)
        if done % config.log_steps == 0 or done == total_steps:
            (seen,), seconds = total(tokens), time.time() - started
            entry = {"step": done, "loss": state["loss"] / max(state["targets"], 1), "lr": rate}
            entry |= {"skipped_steps": state["skipped"]} if state["skipped"] else {}
            state |= {"loss": 0.0, "targets": 0.0}
            say(f"{100 * done / total_steps:5.1f}%  loss {entry['loss']:.3f}  lr {rate:.2e}  {seen / seconds:,.0f} tokens/s  "
                f"{seconds / (done - first) * (total_steps - done):.0f} s left")  # fmt: skip
            log(**entry, tokens_per_s=round(seen / seconds))
        if (done % config.save_steps == 0 or done == total_steps or stop) and rank == 0:
            parts = {"optimizer": optimizer.state_dict()} | ({"controller": controller.state_dict()} if controller else {})
            save(config, model, state | parts)
        if stop and done < total_steps:
            say(f"stopped by a signal after step {done}: saved {config.out}/checkpoint-{done}; go on with --resume")
            break
    else:
        seconds = {"seconds": time.time() - started, "of_events": seconds_of_events, "in_all": time.time() - begun}
        finish(config, model, tokenizer, train, validation, questions, log, state, controller, seconds)
    del ddp  # it holds the process group: freed after the group's end, it was seen to hang at exit
    dist.barrier()
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------
# From here on: skip on a first reading. Command line, checks, reports, benchmarks.
# ------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Mistake(f"{message} (see --help)")


def parse_arguments(words=None):
    """Config from the command line (or these words), which is made from its fields."""
    wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=50, width=150)
    parser = Parser(usage="train.py --stage {1,2,eval} [flags]", description=__doc__, formatter_class=wide, allow_abbrev=False)
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default)
        parser.add_argument(f"--{f.name}", **kind, **f.metadata)
    config = Config(**vars(parser.parse_args(words)))
    may_be_0 = ("seed", "num_workers", "lora_dropout", "warmup_ratio", "max_bad")
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.type in (int, float) and value is not None and not (value > 0 or value == 0 and f.name in may_be_0):
            raise Mistake(f"--{f.name} {value}: give a positive number")
        if f.type is str and value is not None:
            data.check_text(value, f"--{f.name}")
    if config.seed >= 10**9:
        raise Mistake(f"--seed {config.seed}: give a number below 10^9")
    if config.lora_dropout is not None and config.lora_dropout >= 1:
        raise Mistake(f"--lora_dropout {config.lora_dropout}: give a share below 1")
    return replace(config, stage=int(config.stage)) if config.stage.isdigit() else config


def check_targets(config, model, tokenizer, template, parts):
    """Say how many records {part: records} the context cuts; Mistake where no part of a part is left to learn from."""
    records = parts["training"]
    if config.stage == 1 and (longer := sum(len(record["conversations"]) > 3 for record in records)):
        say(f"{longer} of {len(records)} records have more than one answer: stage 1 trains on the first alone")
    for part, records in parts.items():
        counts = data.cut_and_empty(share(records), tokenizer, template, model.image_tokens, model.context_length)
        cut, empty = map(int, total(*counts))
        if cut or empty:
            say(f"{part}: {cut} of {len(records)} records are cut at the context of {model.context_length} tokens; "
                f"{empty} have no target")  # fmt: skip
        if empty == len(records) and records:
            raise Mistake(f"--data {config.data}: none of the {len(records)} {part} records has an answer within the "
                          f"context of {model.context_length} tokens; shorten or remove them")  # fmt: skip


def report_broken(config, state, problems, records, log):
    """Say and log each record whose image is broken once, however often it is met; more than --max_bad end the run."""
    for problem in problems:
        say(f"image replaced by the next record's: {problem}")
        if problem not in state["bad"]:
            state["bad"].append(problem)
            log(step=state["step"], bad=problem)
    if len(state["bad"]) > config.max_bad * records:
        raise Mistake("\n".join(state["bad"]) + f"\n{len(state['bad'])} of {records} records have a broken image, more than "
                      f"--max_bad {config.max_bad}; repair them, or allow more")  # fmt: skip


def expected_peak(model, config, device):
    """(bytes that are always there, bytes per token of a pass) at a step's peak, as `test_hydra.py memory` counts them.

    What a layer keeps for the backward pass, per token: two fp32 inputs of its norms, and of its products' inputs
    what a trained weight or a nonlinearity needs, D or I wide; with dropout a mask of one byte before each adapter.
    """
    shape, method = model.llm.config, config.method if config.stage == 2 else None
    D, I, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    e = 2 if device.type == "cuda" else 4  # bytes of a product's result
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed += 12 * trained  # a gradient and Adam's two moments, in fp32
    fixed += 1024 * shape.vocab_size * (4 + e)  # logits of a piece of the loss
    fixed += config.per_device_train_batch_size * model.image_tokens * 64 * e * D  # the projector's maps
    layer = (8 + 4 * e) * D + 3 * e * I
    if method == "full":
        fixed += e * trained + 4 * shape.vocab_size * D  # weights as the products read them; the head's gradient
        layer = (16 + 9 * e) * D + 4 * e * I
    elif method:
        ranks = sum(adapter.rank for adapter in hydra.adapters(model).values()) / layers
        layer = (8 + 6 * e) * D + 4 * e * I + e * ranks + (config.lora_dropout > 0) * (6 * D + I)
    if config.gradient_checkpointing:  # each layer's input, and one layer whole
        return fixed, layers * (4 if method == "full" else e) * D + layer
    return fixed, layers * layer + 26 * D  # 26 D: the last norm, and the first gradients


def check_memory(config, model, device):
    """Say the bound and what a step is expected to take; Mistake if the GPU cannot hold what is always there."""
    fixed, per_token = expected_peak(model, config, device)
    bound = config.max_tokens_per_pass
    say(f"at most {bound:,} tokens in a pass: about {(fixed + bound * per_token) / 1e9:.1f} GB at the peak "
        f"({fixed / 1e9:.1f} of weights and optimizer)")  # fmt: skip
    if device.type == "cuda" and fixed > (there := torch.cuda.get_device_properties(device).total_memory):
        raise Mistake(f"--model {config.model}: weights and optimizer alone take {fixed / 1e9:.1f} GB, and the GPU has "
                      f"{there / 1e9:.1f}; take a smaller model or --lora_rank")  # fmt: skip


def parameter_table(model):
    """Parameters of each part, and how many of them are trained, as text."""
    counts = {part: [0, 0] for part in ("CLIP", "projector", "LLM", "adapters", "total")}
    for name, p in model.named_parameters():
        part = {"clip": "CLIP", "projector": "projector", "llm": "LLM"}[name.split(".")[0]]
        for row in ("adapters" if ".lora_" in name else part, "total"):
            counts[row][0] += p.numel()
            counts[row][1] += p.numel() * p.requires_grad
    lines = [f"{name:10}{number:15,}{trained:15,}" for name, (number, trained) in counts.items()]
    return "\n".join([f"{'':10}{'parameters':>15}{'trained':>15}", *lines])


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


def finish(config, model, tokenizer, train, validation, questions, log, state, controller, seconds):
    """The end of a run: what it reached, what it cost, what to do next; the picture of the ranks."""
    after = evaluate(config, model, tokenizer, validation, questions, log, state["step"])
    before, memory = state["before"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [f"held-out loss {before:.3f} -> {after['held_out_loss']:.3f} ({100 * (after['held_out_loss'] / before - 1):+.0f} %)"]
    if questions:
        after["test_loss"] = test_loss(config, model, tokenizer, questions)
        blind = accuracy(blind_answers(train, questions))
        lines += [f"{'accuracy':14}{'model':>8}{'no image':>10}"]
        lines += [f"{kind:14}{value:8.2f}{blind[kind]:10.2f}" for kind, value in after["accuracy"].items()]
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if controller:  # the most that there were
        most = max(int((entry["ranks"] * controller.costs).sum()) for entry in controller.history)
        parameters += most - controller.parameters_used()
        if dist.get_rank() == 0:
            draw_ranks(controller.history, Path(config.out, "ranks.png"))
    versions = {"parameters": parameters, "device": str(model.llm.device), "torch": torch.__version__}
    log(result=after | {"seconds": seconds["seconds"]} | versions | {"run": asdict(config)}, step=state["step"])
    if state["bad"] or state["skipped"]:
        lines += [f"left out: {len(state['bad'])} broken images, {state['skipped']} steps without a finite gradient; see log.jsonl"]
    events = 100 * seconds["of_events"] / max(seconds["seconds"], 1e-9)
    lines += [f"training {seconds['seconds']:.0f} s, in all {seconds['in_all']:.0f} s; rank events {events:.1f} % of training; "
              f"peak memory {memory:.1f} GB", f"wrote {config.out}" + (" with ranks.png" if controller else "")]  # fmt: skip
    words = ["torchrun", "train.py", "--stage", "2", "--model", config.model]
    if config.stage == 1 and config.out != f"runs/{Path(config.model).name}/stage1":
        words += ["--stage1", config.out]
    if config.stage == 2:
        words = ["python", "hydra.py", "chat", config.out, "--image", "FILE"]
    say("\n".join([*lines, "next: " + shlex.join(words)]))


def test_loss(config, model, tokenizer, questions):
    """{kind: loss per target token} of the right answers to the questions, and "all"."""
    losses = {}
    for kind in [*sorted(set(map(data.kind_of, questions))), "all"]:
        records = [as_record(q, q["label"]) for q in questions if kind in ("all", data.kind_of(q))]
        samples = make_samples(records, config.images, model, tokenizer, "v1", replace=False)
        losses[kind] = held_out_loss(model, hold(replace(config, per_device_train_batch_size=32), model, samples))
    return losses


def describe_event(entry):
    """One rank event in words, with the ranks of each layer before and after."""
    text = f"rank event at step {entry['step']}: {entry['choice']}; probe loss {entry['probe_loss']:.4f}"
    if "spread" in entry:
        noise = hydra.NOISE / math.sqrt(len(hydra.PROJECTIONS)), hydra.NOISE
        parts = zip(("coarse", "fine"), entry["spread"], noise)
        text += "; " + ", ".join(f"{part} spread {there:.2f} (equal needs: {equal:.2f})" for part, there, equal in parts)
    if "predicted_gain" in entry:
        text += f"; predicted gain {entry['predicted_gain']:+.4f}, log error {entry['error']:.2f} at measurements left out"
        text += f" ({entry['error_without_signals']:.2f} without signals)"
    if "realised_gain" in entry:
        text += f"; the last move brought {entry['realised_gain']:+.4f}"
    text += f"; {entry['parameters']:,} of {entry['budget']:,} parameters"
    if entry["ranks"] != entry["ranks_before"]:
        for layer, (before, after) in enumerate(zip(entry["ranks_before"], entry["ranks"])):
            text += f"\n    layer {layer}: {' '.join(map(str, before))} -> {' '.join(map(str, after))}"
    return text


def draw_ranks(history, path):
    """ranks.png: layers × projections, a panel for the start and one for each event, the rank in every cell."""
    cell, margin, top = 46, 46, 74
    names = [name.split(".")[1].removesuffix("_proj") for name in hydra.PROJECTIONS]
    layers, start = len(history[0]["ranks"]), history[0]["ranks"][0][0]
    panel, bottom = margin + cell * len(names) + 34, top + cell * layers
    image = Image.new("RGB", (panel * len(history) + 14, bottom + 50), "white")
    draw = ImageDraw.Draw(image)

    def text(x, y, words, size=13, **options):
        draw.text((x, y), words, fill="black", font=ImageFont.load_default(size), **options)

    for p, entry in enumerate(history):
        left = p * panel + margin
        text(left, 8, f"step {entry['step']}: {entry['choice']}", 17)
        if "spread" in entry:
            coarse, fine = entry["spread"]
            equal = hydra.NOISE / math.sqrt(len(names)), hydra.NOISE
            text(left, 30, f"spread: coarse {coarse:.2f}, fine {fine:.2f} (equal needs: {equal[0]:.2f}, {equal[1]:.2f})", 12)
        for column, name in enumerate(names):
            text(left + (column + 0.5) * cell, top - 12, name, anchor="mm")
        for row, ranks in enumerate(entry["ranks"]):
            text(left - 8, top + (row + 0.5) * cell, str(row), anchor="rm")
            if "coarse" in entry:
                text(left + len(names) * cell + 2, top + (row + 0.5) * cell, f"{entry['coarse'][row]:+.1f}", 12, anchor="lm")
            for column, rank in enumerate(ranks):
                shade = max(-1.0, min(1.0, math.log2(rank / start)))  # blue above the start's rank, orange below
                color = (255, 255 + 105 * shade, 255 + 225 * shade) if shade < 0 else (255 - 205 * shade, 255 - 125 * shade, 255)
                x, y = left + column * cell, top + row * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), tuple(map(int, color)), (190, 190, 190))
                text(x + cell / 2 - 1, y + cell / 2 - 1, str(rank), 15, anchor="mm")
    text(margin, bottom + 14, f"rank of each adapter; rows are layers, beside them their coarse part; blue: above {start}, orange: below")
    image.save(path)


def check_prompts(questions, model, tokenizer):
    """Mistake if the context has no room for an answer to some of the questions."""
    lengths = [len(data.encode_conversation(as_record(q)["conversations"], tokenizer, "v1")[0]) for q in questions]
    image = model.image_tokens - 1
    long = [q for q, n in zip(questions, lengths) if n + image * bool(q["image"]) >= model.context_length]
    if long:
        raise Mistake(f"--questions: {len(long)} of {len(questions)} fill the context of {model.context_length} tokens, "
                      f"e.g. question_id {long[0]['question_id']}; shorten or remove them")  # fmt: skip


def run_benchmark(config):
    """Answer what a benchmark asks, the work shared between the processes, and print the score."""
    if not (config.checkpoint and config.benchmark and config.questions):
        raise Mistake("--stage eval: needs --checkpoint, --benchmark and --questions")
    device = set_up_processes()
    questions = data.read_benchmark(config.benchmark, config.questions, config.annotations)
    path = Path(config.answers or f"{config.checkpoint}/answers-{config.benchmark}.jsonl")
    if not path.parent.is_dir():
        raise Mistake(f"--answers {path}: its folder does not exist; name another file")
    log = Log(path) if dist.get_rank() == 0 else lambda **row: None
    answers = gather(log.rows if dist.get_rank() == 0 else [])
    model_id = str(hydra.find_checkpoint(config.checkpoint) or config.checkpoint)  # a run that trains on is another model
    if other := {answer.get("model_id") for answer in answers} - {model_id}:
        raise Mistake(f"--answers {path}: has answers of {other.pop()}; name another file")
    left = [question for question, answered in data.join_answers(config.benchmark, questions, answers) if not answered]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = hydra.load_checkpoint(config.checkpoint, config.vision_tower, config.projector, dtype)
    model.to(device)
    say(f"{len(questions)} questions, {len(answers)} answered before -> {path}")
    check_prompts(left, model, tokenizer)
    size = config.per_device_train_batch_size or 64
    chunk = size * dist.get_world_size()
    for start in tqdm(range(0, len(left), chunk), disable=dist.get_rank() > 0 or None):
        mine = left[start : start + chunk]
        for question, text in gather(answer(model, tokenizer, mine, config.images, config.num_workers or 0, size, 128)):
            answers.append({"question_id": question["question_id"], "prompt": question["text"], "text": text,
                            "answer_id": uuid.uuid4().hex, "model_id": model_id, "metadata": {}})  # fmt: skip
            log(**answers[-1])
    say(data.score_table(config.benchmark, data.score(config.benchmark, questions, answers)))
    dist.barrier()
    dist.destroy_process_group()


def main():
    config = parse_arguments()
    (run_benchmark if config.stage == "eval" else run)(config)


if __name__ == "__main__":
    data.one_line(main)

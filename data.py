"""Everything between a file on disk and a batch: LLaVA records, images, sampling, and a toy world.

    python data.py show --data FILE --images DIR      a few records as the model sees them
    python data.py check --data FILE --images DIR     every record and image opened, what is wrong listed
    python data.py score pope --answers FILE --questions FILE --annotations DIR      score any tool's answers

    record   {"id", "image" (absent: text alone), "conversations": [{"from": "human" | "gpt", "value"}]}
      -> encode_conversation   ids and labels [T]; the image is the single id IMAGE_TOKEN
      -> image_to_tensor       pixels [3, S, S]
      -> collate               input_ids, attention_mask, labels [B, T] right-padded; pixel_values [N, 3, S, S]

Read hydra.py and train.py first; then this file to the section comment that says what to skip. The toy world, below
it, is written as ordinary LLaVA files: it takes the same path through this module as LLaVA's 558k and 665k records do.
"""

import argparse
import base64
import csv
import fcntl
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import sys
import warnings
from bisect import bisect_left
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby, takewhile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save
from tokenizers import ByteLevelBPETokenizer, normalizers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN as CLIP_MEAN, OPENAI_CLIP_STD as CLIP_STD
from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

IMAGE_TOKEN = -200  # stands for the image in input_ids; hydra.py replaces it by the image's tokens
IGNORE = -100  # label of a position that is no target
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# ------------------------------------------------------------------------------------------
# errors, and files that are whole or not there


class Mistake(ValueError):
    """The user's, in a flag, a file or a record: one line that names it and says what to do."""


@contextmanager
def reading(source, problem="cannot be read"):
    """Whatever a parser, decoder or unpickler raises in the block becomes a Mistake: the source has this problem."""
    try:
        yield
    except Mistake:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
        if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to run the code
            reason = "no weights, or code beside them, which is not run"
        raise Mistake(f"{source}: {problem} ({(reason or type(error).__name__).splitlines()[0]})") from error


@contextmanager
def whole(path):
    """A new folder `path`, whole or not there: what is written to the one given becomes it at the end of the block."""
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.unfinished")  # hidden: no names that a user gives to what is theirs
    old = path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for item in [*temporary.rglob("*"), temporary]:
            handle = os.open(item, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed below
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if not path.exists() and old.is_dir():
            old.rename(path)
        raise Mistake(f"{path}: cannot be written ({error.strerror or error}); what was there is whole") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------------------
# record -> ids and labels


def encode_conversation(conversations, tokenizer, template):
    """Token ids and labels of one conversation, as MobileVLM builds them: two lists of equal length T.

    template "plain" (stage 1): BOS <image> caption "\\n"; the human turn is dropped.
    template "v1" (stage 2): SYSTEM USER: question ASSISTANT: answer</s>USER: ...; the targets are
    each answer and its </s>. A conversation that ends with a question, or with an empty answer, is a prompt:
    its ids end with "ASSISTANT:". (MobileVLM then masks the record's other answers too, and those to an empty
    question; here they are targets.)
    """

    def encode(text):
        # LLaMA's SentencePiece model puts a space before every piece of text. A text that starts
        # with one gets no second: with the space written here, all tokenizers agree. Text is
        # never read as a control token: a "</s>" inside an answer stays four characters.
        return tokenizer(" " + text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []

    if conversations[0]["from"] == "gpt":  # a few public records open with an answer to nothing
        conversations = conversations[1:]
    if template == "plain":
        prompts = ["<image>"]
        answers = [encode(conversations[1]["value"] + "\n")]
    else:
        prompts = [SYSTEM + " "]  # prompts[i] is all text before answers[i], and the last what is left
        answers = []
        for turn in conversations:
            text = turn["value"]
            if "<image>" in text:  # wherever it stood, the image comes first
                text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
            if turn["from"] == "human":
                prompts[-1] += (f"USER: {text} " if text else "USER:") + "ASSISTANT:"
            elif text:  # an empty answer adds nothing, not even its </s>
                answers.append(encode(text) + [tokenizer.eos_token_id])
                prompts.append("")

    input_ids, labels = [tokenizer.bos_token_id], [IGNORE]
    for prompt, answer in zip(prompts, [*answers, []]):
        before, *after = prompt.split("<image>")
        masked = encode(before)
        for text in after:  # on either side of the image it is encoded apart
            masked += [IMAGE_TOKEN] + encode(text)
        input_ids += masked + answer
        labels += [IGNORE] * len(masked) + answer
    return input_ids, labels


# ------------------------------------------------------------------------------------------
# image -> tensor


def image_to_tensor(image, size, mode):
    """RGB image -> normalised float tensor [3, size, size], within 2/255 of upstream's.

    mode "crop" (stage 1) keeps the middle square; "pad" (stage 2) loses nothing: the image is
    set in the middle of a square of CLIP's mean colour. Both then resize with a bicubic filter.
    EXIF rotation is ignored, as upstream does.
    """

    def middle(pixels, most):  # [3, height, width], both at most `most`
        top, left = (max(length - most, 0) // 2 for length in pixels.shape[1:])
        return pixels[:, top : top + most, left : left + most]

    if max(image.size) > 8192:  # the square around a strip would take gigabytes
        image = image.copy()
        image.thumbnail((8192, 8192), Image.Resampling.BICUBIC)
    if mode == "pad":
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # [3, height, width], bytes
    shorter = min(image.size)
    pixels = middle(pixels, 1000 * shorter)  # of a line, no need to resize more than is kept
    full = [size * length // shorter for length in pixels.shape[1:]]
    # five times as fast as Pillow's, and the same to a step or two of 255
    pixels = F.interpolate(pixels[None], full, mode="bicubic", antialias=True)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return middle(pixels, size).float().mul_(1 / (255 * std)).sub_(mean / std)


# ------------------------------------------------------------------------------------------
# records, all checked before anything else is loaded: see find_problems


def read_records(path, images):
    """LLaVA records of a file, all checked; the Mistake lists the first 20 that are wrong."""
    records, problems = find_problems(path, images)
    if problems:
        lines = [f"{path}: record {i} ({name_of(records[i])}): {problems[i]}" for i in [*problems][:20]]
        if len(problems) > 1:
            lines.append(f"{path}: {len(problems)} of {len(records)} records are wrong (data.py check lists all)")
        raise Mistake("\n".join(lines))
    return records


# ------------------------------------------------------------------------------------------
# dataset, batches, and their order


@dataclass
class ConversationDataset(torch.utils.data.Dataset):
    """Records as training samples, read when asked for.

    image_tokens is what one image takes in the LLM's context; a sample that would pass
    context_length after its image is expanded is cut, and the cut part is never a target.
    With replace, a record whose image cannot be decoded gives its place to the next that can: the
    same one on every process and after a resume. "bad" says which were passed over and why.
    """

    records: list
    images: str | Path
    tokenizer: PreTrainedTokenizerFast
    template: str
    image_size: int
    image_tokens: int
    context_length: int
    replace: bool = True

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        bad = []
        for i in range(len(self.records) if self.replace else 1):
            # the first index as it is, so that one past the end raises IndexError, which ends an iteration
            record = self.records[index if i == 0 else (index + i) % len(self.records)]
            try:
                return self.sample(record) | {"bad": bad}
            except Mistake as error:
                bad.append(f"record {name_of(record)}: {error}")
        raise Mistake(bad[0])

    def sample(self, record):
        input_ids, labels = encode_conversation(record["conversations"], self.tokenizer, self.template)
        limit = self.context_length - (self.image_tokens - 1 if "image" in record else 0)
        sample = {"input_ids": input_ids[:limit], "labels": labels[:limit], "pixel_values": None}
        if IMAGE_TOKEN in sample["input_ids"]:
            mode = "crop" if self.template == "plain" else "pad"
            sample["pixel_values"] = image_to_tensor(open_image(self.images, record["image"]), self.image_size, mode)
        return sample


def collate(samples):
    """Right-padded batch; no samples give one token without a target, which trains nothing."""
    samples = samples or [{"input_ids": [0], "labels": [IGNORE], "pixel_values": None}]
    rows = [torch.tensor(sample["input_ids"]) for sample in samples]
    labels = [torch.tensor(sample["labels"]) for sample in samples]
    pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        "pixel_values": torch.stack(pixels) if pixels else None,
    }


def bounded_batches(samples, most_tokens, image_tokens):
    """Samples as the fewest batches that hold at most so many tokens each, rows × longest row.

    A row that is longer by itself goes alone. Rows are sorted by length, so that little is padding.
    """

    def tokens(sample):
        return len(sample["input_ids"]) + (image_tokens - 1) * (sample["pixel_values"] is not None)

    samples = sorted(samples, key=tokens)

    def cut(most):
        parts = [[]]
        for sample in samples:
            if parts[-1] and (len(parts[-1]) + 1) * tokens(sample) > most:
                parts.append([])
            parts[-1].append(sample)
        return parts

    # the least bound that gives no more parts: 8 and 8 rows run faster, and in less memory, than 15 and 1
    fewest = len(cut(most_tokens))
    most = bisect_left(range(most_tokens), True, key=lambda most: len(cut(most)) == fewest)
    return [collate(part) for part in cut(most)]


def global_batches(records, batch_size, seed, epoch):
    """All record indices of an epoch, shuffled, in lists of batch_size (the last may be shorter).

    Records of one modality and similar length share a batch, so that little is padding. What does
    not fill a batch of its own modality is mixed. Depends on nothing but the arguments: every
    process computes the same list.
    """
    rng = np.random.default_rng((seed, epoch))
    # characters are a good enough measure of length to group by, and need no tokenizer
    lengths = np.array([sum(len(turn["value"]) for turn in record["conversations"]) for record in records])
    has_image = np.array(["image" in record for record in records])
    full, rest = [], []
    for modality in (has_image, ~has_image):
        order = rng.permutation(np.flatnonzero(modality))
        window = np.arange(len(order)) // (50 * batch_size)
        order = order[np.lexsort((lengths[order], window))]  # in windows by length: batches stay random, nearly equal
        cut = len(order) - len(order) % batch_size
        full += order[:cut].reshape(-1, batch_size).tolist()
        rest += order[cut:].tolist()
    full = [full[i] for i in rng.permutation(len(full))]
    return full + [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]


def micro_batches(batch, per_device, world_size):
    """Split one global batch: [passes][processes] lists of at most per_device indices.

    Every pass has a list for every process, empty at worst, so that all take part in each pass.
    """
    count = -(-len(batch) // (per_device * world_size))
    parts = np.array_split(np.array(batch), count * world_size)
    return [[part.tolist() for part in parts[i * world_size : (i + 1) * world_size]] for i in range(count)]


# ------------------------------------------------------------------------------------------
# From here on: skip on a first reading. Tokenizer, files, checks, benchmarks and their scores, toy world, commands.
# ------------------------------------------------------------------------------------------
# the tokenizer, image and JSON files, checks of records


def load_tokenizer(folder):
    """The tokenizer of a folder, with the ids that MobileLLaMA was trained with; Mistake if it is incomplete."""
    folder = Path(folder)
    file = folder / "tokenizer.model"
    if file.is_file():
        with reading(file):  # from_pretrained would merge runs of spaces in another order
            source = SentencePieceExtractor(str(file))
            vocabulary, _, merges = source.extract()
            sp = source.sp
            unk, bos, eos = map(sp.id_to_piece, (sp.unk_id(), sp.bos_id(), sp.eos_id()))
            special = dict(unk_token=unk, bos_token=bos, eos_token=eos, pad_token=unk)
            tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=True, **special)
        if tokenizer(" " + SYSTEM, add_special_tokens=False).input_ids != sp.encode(SYSTEM):
            raise Mistake(f"{file}: of another kind than LLaMA's (BPE, a space before every text) is not supported")
        return tokenizer
    file = folder / "tokenizer.json"
    with reading(file):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        backend = tokenizer.backend_tokenizer
        if isinstance(backend.normalizer, normalizers.Sequence):  # encode_conversation writes the space itself
            kept = [step for step in backend.normalizer if not isinstance(step, normalizers.Prepend)]
            backend.normalizer = normalizers.Sequence(kept)
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json", folder / "config.json"):
        config = read_json(path) if path.is_file() else {}
        with reading(path):
            for key in ("bos_token", "eos_token", "unk_token", "pad_token"):  # the first file to name one counts
                token = config.get(key)
                if token is None and isinstance(config.get(f"{key}_id"), int):
                    token = tokenizer.convert_ids_to_tokens(config[f"{key}_id"])
                token = token["content"] if isinstance(token, dict) else token
                if getattr(tokenizer, key) is None and token in tokenizer.get_vocab():
                    setattr(tokenizer, key, token)  # no new one: that would resize the embeddings
    if None in (tokenizer.bos_token, tokenizer.eos_token):
        raise Mistake(f"{folder}: its tokenizer names no bos_token or no eos_token; add it to tokenizer_config.json")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token  # masked wherever it stands
    return tokenizer


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which is a program


def open_image(folder, name):
    """RGB image `name` in `folder`, or of a data URL (data:;base64); Mistake if missing, broken, huge or outside."""
    path = source = Path(folder or "", name[:80] if name.startswith("data:") else name)
    with reading(path):  # resolving fails on what is no name of a file: with a null byte, too long, a link to itself
        if name.startswith("data:"):
            source = io.BytesIO(base64.b64decode(name.partition(",")[2], validate=True))
        elif "://" in name:
            raise Mistake(f"{name}: is an address; download the image, and name its file")
        elif not path.resolve().is_relative_to(Path(folder or "").resolve()):
            raise Mistake(f"{path}: the image lies outside {folder}; give paths inside the image folder")
        elif not path.is_file():
            raise Mistake(f"{path}: no such image{', but a folder' * path.is_dir()}; check --images and the record")
        image = Image.open(source, formats=FORMATS)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow refuses from twice as many on
            raise Mistake(f"{path}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller")
        if image.mode.startswith("I;16"):  # convert would clip what is above 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise Mistake(f"{path}: has 32 bits a pixel, of unknown range; save it with 8 bits a channel")
        return image.convert("RGB")


def read_json(path, lines=False):
    """Parsed JSON; a list from JSON lines, whatever the file's name."""

    def parse(text, where=""):
        with reading(path, f"{where}is not valid JSON"):
            return json.loads(text)

    with reading(path):
        content = Path(path).read_bytes()
    if not (lines or str(path).endswith(".jsonl") or re.search(rb"}\s*\n\s*{", content)):  # "}", line break, "{": lines
        return parse(content)
    rows = content.splitlines()
    last = ", the last, is cut short or"
    return [parse(row, f"line {i}{last * (i == len(rows))} ") for i, row in enumerate(rows, 1) if row.strip()]


HALF = "[\ud800-\udfff]"  # of a surrogate pair; bytes that were no UTF-8 are read as one, too


def check_text(text, source):
    """Mistake if the text cannot be encoded."""
    if re.search(HALF, text):
        raise Mistake(f"{source}: holds half of a surrogate pair, or bytes that are no UTF-8; write it anew")


def name_of(record):
    name = record.get("id", "without id") if isinstance(record, dict) else "without id"
    return " ".join(str(name).split())  # a line, whatever it holds


def find_problems(path, images):
    """(records, {index: problem}) of a file of LLaVA records; no image is opened."""
    records = read_json(path)
    records = [records] if isinstance(records, dict) and "conversations" in records else records  # JSON lines, but one
    if not isinstance(records, list) or not records:
        raise Mistake(f"{path}: must hold a list of records, [{{'id', 'image', 'conversations'}}, …]")
    if not Path(images or "-").is_dir() and any(isinstance(record, dict) and record.get("image") for record in records):
        raise Mistake(f"--images {images}: no such image folder")
    roots = [Path(name(images or "")) for name in (os.path.abspath, os.path.realpath)]  # it may be named through a link

    def stays(path):
        return Path(os.path.realpath(path)).is_relative_to(roots[1])

    @cache
    def names_in(folder):
        """What a folder holds inside the image folder: one look at each folder, not at each of 665k files."""
        items = os.scandir(folder) if os.path.isdir(folder) and stays(folder) else ()
        return {item.name for item in items if not item.is_symlink() or stays(item)}

    problems = [problem_of(record, roots, names_in) for record in records]
    return records, {i: problem for i, problem in enumerate(problems) if problem}


def problem_of(record, roots, names_in):
    """Why a record cannot be learned from, or None; drops an empty image, and shortens one with its whole path."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        return "has no list 'conversations'"
    for field in ("system", "images", "video", "videos", "audio"):
        if record.get(field):
            return f"has a field '{field}', which is not supported: write one 'image' and turns alone"
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return "a turn is not {'from', 'value'} with a text as value"
        if turn.get("from") not in ("human", "gpt"):
            return f"unknown speaker {turn.get('from')!r}; use 'human' or 'gpt'"
        if not all(turn.get(field, 1) for field in ("loss", "weight")):
            return "a turn is not to be learned, which is not supported: every answer is a target"
        if re.search(HALF, turn["value"]):
            return "a turn holds half of a surrogate pair; write it anew"
    speakers = "".join(turn["from"][0] for turn in turns)
    if not re.fullmatch("g?(hg)+h?", speakers):  # an answer to nothing, at the start, is dropped
        return "'human' and 'gpt' must take turns, and there must be a question and its answer"
    if any("<image>" in turn["value"] for turn in turns if turn["from"] == "gpt"):
        return "has <image> in an answer; it belongs in a question"
    placeholders = sum(turn["value"].count("<image>") for turn in turns)
    if record.get("image") in ("", None):
        record.pop("image", None)
        return "has <image> in its text but no field 'image'" if placeholders else None
    if placeholders != 1:
        return f"has an image and {placeholders} <image> in its text; write it once"
    name = record["image"]
    for root in roots:
        if isinstance(name, str) and os.path.isabs(name) and Path(name).is_relative_to(root):
            name = record["image"] = str(Path(name).relative_to(root))
    if not isinstance(name, str) or os.path.isabs(name) or ".." in Path(name).parts:
        return "field 'image' is not the name of a file inside the image folder"
    folder, file = os.path.split(os.path.join(roots[0], name))
    if file not in names_in(folder):
        return f"image {folder}/{file} does not exist, or leaves {roots[0]} through a link: copy it there"
    return None


def fingerprint(records):
    """Tells the records of one file from another's, whatever the files' names: of images and turns, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        digest.update(json.dumps([record.get("image"), record["conversations"]]).encode())
    return digest.hexdigest()


def cut_and_empty(records, tokenizer, template, image_tokens, context_length):
    """(how many of the records the context cuts, how many have no target in it)."""
    cut = empty = 0
    for record in records:
        limit = context_length - (image_tokens - 1 if "image" in record else 0)
        texts = [turn["value"].encode() for turn in record["conversations"]]
        # a token is a byte or more; USER:, ASSISTANT: and </s> are ten a turn: what is short for sure is passed over
        if all(texts) and len(SYSTEM) + 32 + sum(len(text) + 10 for text in texts) <= limit:
            continue
        input_ids, labels = encode_conversation(record["conversations"], tokenizer, template)
        cut += len(input_ids) > limit
        empty += all(label == IGNORE for label in labels[:limit])
    return cut, empty


# ------------------------------------------------------------------------------------------
# benchmarks: answers are read by the rules of each published script, whose oddities count too


def read_questions(path, images):
    """Held-out questions: JSON lines with image, text, label and category (default: the text's first two words)."""
    questions = read_benchmark("vqa", path)
    refuse([q for q in questions if q.get("category") == "all"], "questions have the category 'all', that of the sum")
    for image in {question["image"] for question in questions if question["image"]}:
        open_image(images, image)  # not to be found out in the middle of a run
    return [q | {"category": q.get("category") or " ".join(q["text"].split()[:2])} for q in questions]


DIGITS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
DIGITS["none"] = "0"
CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd
    how'd it'd someone'd something'd there'd they'd where'd who'd you'd he'd've it'd've she'd've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've you'd've y'all'd've how'll it'll somebody'll
    someone'll something'll they'll what'll who'll why'll you'll y'all'll there're they're what're why're you're he's
    how's somebody's someone's that's there's what's when's where's who's why's could've might've must've not've
    should've they've we've what've where've who've would've you've ma'am o'clock 'ow's'at 'twas y'all
"""
CONTRACTIONS = {  # "couldnt've" and "couldn'tve" -> "couldn't've": each word written with one apostrophe less
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i in range(len(word)) if word[i] == "'"
} | {"somebody'd": "somebodyd"}


def exact(text):
    """Lower case without the final period."""
    return text.strip().lower().rstrip(".")


def letter(text, alone=r"\s*([A-Z])(?:\.(?:\s.*)?)?\s*", said=r"The answer is ([A-Z])\b"):
    """The option that an answer picks: "B", "B. …" or, once, "The answer is B"; "" for anything else."""
    found = re.findall(rf"\A{alone}\Z", text, re.S) or re.findall(said, text)
    return found[0] if len(found) == 1 else ""


def sqa_letter(text):
    """The same by LLaVA's script for ScienceQA, to which "B." is nothing, nor "The answer is B" at the end."""
    return letter(text, r"([A-E])(?:\. .*)?", r"The answer is ([A-Z]).")


def plain_words(text):
    """TextVQA's normal form: digits for number words, no articles, no punctuation, apostrophes put back."""
    text = re.sub(r"[,?]", "", text.lower()).replace("'s", " 's").strip()
    text = stripped = re.sub(r"[\n\t]", " ", text)
    for mark in ';/[]"{}()=+\\_-><@`!':  # next to a space anywhere, it vanishes everywhere; else it becomes one
        stripped = stripped.replace(mark, "" if mark + " " in text or " " + mark in text else " ")
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", stripped).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def pope_word(text):
    """Yes, unless the first sentence denies."""
    return "no" if {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def mme_word(text):
    """What the first four characters hold."""
    return next((word for word in ("yes", "no") if word in text.strip().lower()[:4]), "")


NO_VALUE = {  # pandas', by which LLaVA reads MMBench's tables
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "none", "null",
}  # fmt: skip
MMBENCH = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image")
BENCHMARKS = {  # name: how its answers are read, what its questions must hold, what holds its labels if they do not
    "vqa": (exact, ("question_id", "image", "text", "label"), None),
    "pope": (pope_word, ("question_id", "image", "text", "category"), "folder of coco_pope_CATEGORY.json"),
    "gqa": (exact, ("question_id", "image", "text"), "testdev_balanced_questions.json"),
    "sqa": (sqa_letter, (), None),
    "textvqa": (plain_words, ("question_id", "image", "text"), "TextVQA_0.5.1_val.json"),
    "mme": (mme_word, ("question_id", "image", "text", "category"), "folder of CATEGORY.txt"),
    "mmbench": (letter, MMBENCH, None),
    "mmbench_cn": (letter, MMBENCH, None),
}
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
ANSWER = ("question_id", "prompt", "text")  # of LLaVA's answer files
BY_LETTER = "Answer with the option's letter from the given choices directly."


def read_rows(path, fields):
    """Checked objects of a file of JSON lines."""
    return check_rows(read_json(path, lines=True), path, fields)


def check_rows(rows, path, fields):
    """The rows of a file; Mistake unless each has these fields: texts, but a question_id may be a number."""
    for number, row in enumerate(rows, 1):
        for field in fields:
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, (str, int) if field == "question_id" else str):
                raise Mistake(f"{path}: line {number} lacks the text '{field}'")
            check_text(str(value), f"{path}: line {number}: '{field}'")
    return rows


def read_benchmark(name, path, annotations=None):
    """The questions of a benchmark with their labels, from the files that LLaVA's own evaluation reads.

    Each is {"question_id", "text" (the whole prompt but <image>), "label", "image" (None: text alone)} and
    "category" where there is one; mmbench's "image" is a data URL, for open_image. Mistake says what is wrong.
    """
    read, fields, where = BENCHMARKS[name]
    if name.startswith("mmbench"):
        questions = list(read_mmbench(path, "请直接回答选项字母。" if name == "mmbench_cn" else BY_LETTER))
    else:
        questions = list(read_sqa(path)) if name == "sqa" else read_rows(path, fields)
    if not questions:
        raise Mistake(f"{path}: holds no questions")
    if where:
        if not annotations:
            raise Mistake(f"--annotations: {name} needs its {where}")
        with reading(f"{annotations}, as {where}"):
            labels = find_labels(name, questions, Path(annotations))
        questions = [question | {"label": label} for question, label in zip(questions, labels)]
    bad = [q for q in questions if not q["label"] or name != "textvqa" and not read(q["label"])]
    # pope's reader takes any other text for "yes"
    bad += [q for q in questions if name == "pope" and q["label"] not in ("yes", "no", "Yes", "No")]
    refuse(bad, f"questions have no valid label in {annotations or path}")
    odd = [q for q in questions if not isinstance(q.get("category"), str | None) or not q["text"].strip()]
    refuse(odd, "questions have no text, or a category that is not text")
    refuse([q for q in questions if "<image>" in q["text"] and not q["image"]], "questions hold <image> but name none")
    ids = Counter(str(q["question_id"]) for q in questions if name not in ("textvqa", "mme"))
    refuse([q for q in questions if ids[str(q["question_id"])] > 1], "questions share their question_id")
    return questions


def refuse(rows, problem):
    """Mistake that counts the questions or answers with a problem, if there are any."""
    if rows:
        raise Mistake(f"{len(rows)} {problem}, e.g. question_id {rows[0]['question_id']}")


def read_sqa(path):
    """ScienceQA as LLaVA's records: the answer is the letter of the gpt turn."""
    records = read_json(path)
    for i, record in enumerate(records if isinstance(records, list) else [records]):
        with reading(f"{path}: record {i}, as {{'id', 'conversations': [question, answer]}} of texts"):
            question, label = (turn["value"] for turn in record["conversations"])
            text = question.replace("<image>", "").strip() + "\n" + BY_LETTER
            image = record.get("image") or ""
            (text + image).encode()  # image, too, is text, and without half of a surrogate pair
            yield {"question_id": record["id"], "text": text, "label": sqa_letter(label), "image": image or None}


def read_mmbench(path, instruction):
    """MMBench's table of tab-separated values; a rotated copy may give the index of the row with its image."""
    csv.field_size_limit(2**27)  # an image is one field, the default limit 128 KiB
    with reading(path), open(path, newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file, delimiter="\t", strict=True)
        rows = list(table)
    if missing := [column for column in MMBENCH if column not in (table.fieldnames or ())]:
        raise Mistake(f"{path}: has no column {', '.join(missing)}")
    images = {row["index"]: row["image"] for row in rows}
    for i, row in enumerate(rows, 1):
        if None in (*row, *row.values()) or not row["index"].isdecimal():
            raise Mistake(f"{path}: row {i} has more or fewer columns than the header, or an index that is no number")
        given = {column: value for column, value in row.items() if not {value, value.lower()} & NO_VALUE}
        options = [f"{option}. {given[option]}" for option in takewhile(given.get, "ABCD")]
        text = "\n".join(filter(None, [given.get("hint"), row["question"], *options, instruction]))
        image = f"data:;base64,{images.get(row['image'], row['image'])}"
        yield {"question_id": int(row["index"]), "text": text, "label": row["answer"], "image": image}


def words(prompt):
    """The question's own, in lower case: without image, OCR tokens and what asks for the form of the answer."""
    lines = [line for line in prompt.replace("<image>", "").split("\n") if not line.startswith("Reference OCR token")]
    form = r"Answer the question using a single word or phrase\.|Please answer yes or no\.?"
    return " ".join(re.sub(form, "", " ".join(lines)).lower().split())


def find_labels(name, questions, path):
    """The label of each question, or None, from annotations that name the questions in another way."""
    if name == "gqa":
        labels = {question_id: str.strip(row["answer"]) for question_id, row in read_json(path).items()}
        return [labels.get(str(q["question_id"])) for q in questions]
    if name == "textvqa":
        rows = [row for row in read_json(path)["data"] if len(row["answers"]) == 10]
        labels = {(row["image_id"], words(row["question"])): list(map(str.strip, row["answers"])) for row in rows}
        return [labels.get((q["question_id"], words(q["text"]))) for q in questions]

    def key(row):
        return Path(row["image"]).stem, words(row["text"])  # MME's labels may give another ending, and no folder

    fields = "image", "text", "label"
    labels = {}
    for category in {q["category"] for q in questions}:
        if name == "pope":
            rows = read_rows(path / f"coco_pope_{category}.json", fields)
        else:
            with reading(path / f"{category}.txt"):
                lines = (path / f"{category}.txt").read_text(encoding="utf-8-sig").strip().split("\n")
                rows = [dict(zip(fields, line.strip().split("\t"), strict=True)) for line in lines]
        labels[category] = {}
        for row in rows:
            if labels[category].setdefault(key(row), row["label"]) != row["label"]:
                raise Mistake(f"{path}: {category} has two labels for {row['image']}, {row['text']}")
    return [labels[q["category"]].get(key(q)) for q in questions]


def join_answers(name, questions, answers):
    """[(question, its answer or None)]; Mistake for answers that belong to no question or come twice."""

    def key(row, prompt):  # the ids of two benchmarks are those of the images
        return str(row["question_id"]), words(prompt) if name in ("textvqa", "mme") else None

    waiting = defaultdict(list)  # a list each: the same may be asked of the same image twice
    for answer in answers:
        waiting[key(answer, answer["prompt"])].append(answer)
    pairs = [(q, rest.pop() if (rest := waiting[key(q, q["text"])]) else None) for q in questions]
    refuse(sum(waiting.values(), []), "answers belong to no question or come twice")
    return pairs


def score(name, questions, answers):
    """{what: number}: shares from 0 to 1, for mme points, of read_benchmark's questions and their answers.

    MME gives 100 × (share of right answers + share of images with both right) per category. mmbench's accuracy
    counts rotated copies like any row. Mistake unless each question has one answer and each answer a question.
    """
    read = BENCHMARKS[name][0]
    pairs = join_answers(name, questions, answers)
    refuse([question for question, answer in pairs if answer is None], "questions have no answer")
    said = [read(answer["text"]) for _, answer in pairs]
    if name == "textvqa":  # of ten people, each is compared with the other nine; three who agree are enough
        agree = np.array([[*map(read, q["label"])].count(text) for q, text in zip(questions, said)])
        right = (agree * np.clip((agree - 1) / 3, 0, 1) + (10 - agree) * np.clip(agree / 3, 0, 1)) / 10
    else:
        right = np.array([read(q["label"]) == text for q, text in zip(questions, said)])

    def rows(key):  # {value: numbers of the questions that have it}
        numbers = defaultdict(list)
        for i, question in enumerate(questions):
            numbers[key(question)].append(i)
        return numbers

    categories = rows(lambda q: q.get("category"))
    scores = {}
    if name == "pope":
        yes = np.array(said) == "yes"
        true = yes == right
        for category, at in categories.items():
            hits, said_yes, are_yes = (yes & true)[at].sum(), yes[at].sum(), true[at].sum()
            scores[f"{category} accuracy"] = right[at].mean()
            scores[f"{category} precision"] = hits / max(said_yes, 1)
            scores[f"{category} recall"] = hits / max(are_yes, 1)
            scores[f"{category} F1"] = 2 * hits / max(said_yes + are_yes, 1)
            scores[f"{category} yes ratio"] = yes[at].mean()
        scores["mean F1"] = np.mean([scores[f"{category} F1"] for category in categories])
    elif name == "mme":
        images = rows(lambda q: (q["category"], q["question_id"]))
        single = [questions[at[0]] for at in images.values() if len(at) != 2]
        refuse(single, "questions have no second one, or a third, on their image")
        for category in categories:
            both = np.array([right[at] for key, at in images.items() if key[0] == category])  # [images, 2]
            scores[category] = 100 * (both.mean() + both.all(axis=1).mean())
        for kind, of_kind in (("perception", PERCEPTION), ("cognition", COGNITION)):
            scores[kind] = sum(scores.get(category, 0) for category in of_kind)
    else:
        if name == "vqa":
            scores = {category: right[at].mean() for category, at in categories.items() if category}
        scores["accuracy"] = right.mean()
        if name == "sqa" and (at := [i for i, q in enumerate(questions) if q["image"]]):
            scores["accuracy with image"] = right[at].mean()
        if name.startswith("mmbench") and len(copies := rows(lambda q: q["question_id"] % 10**6)) < len(questions):
            scores["circular accuracy"] = np.mean([right[at].all() for at in copies.values()])
    return {what: float(value) for what, value in scores.items()}


def score_table(name, scores):
    """The scores as text: MME's are points, all others shares."""
    shown = "{:24}{:8.1f}" if name == "mme" else "{:24}{:8.4f}   {:6.2f} %"
    return "\n".join(shown.format(what, value, 100 * value) for what, value in scores.items())


# ------------------------------------------------------------------------------------------
# the toy world: scenes, their captions and questions
#
# A scene is a 3 x 3 grid with one to four shapes and one letter. The LLM is trained on text alone,
# where a scene is nine words ("redcircle", "letterA", "nothing"); CLIP on pictures and captions.
# Stage 1 then has to make the projector's nine tokens mean what the nine words mean. Stage 2 asks
# in the chat template for answers with a capital: to the LLM "Red" is another word than "red",
# one that it has met as an answer, but never learned to pick. One new direction per answer has to
# be learned, which is why rank binds here.

GRID, CELL = 3, 16
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")]
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230),
    "yellow": (235, 215, 40), "purple": (160, 60, 190), "white": (250, 250, 250),
}  # fmt: skip
LETTERS = "ABCDEFGH"
NUMBERS = ("zero", "one", "two", "three", "four")
FONT = ImageFont.load_default(15)


def sample_scene(rng):
    """{cell: (shape, color)} with distinct shapes, and one ("letter", which)."""
    shapes = rng.sample(SHAPES, rng.randint(1, 4))
    cells = rng.sample(range(GRID * GRID), len(shapes) + 1)
    scene = {cell: (shape, rng.choice(list(COLORS))) for cell, shape in zip(cells, shapes)}
    return scene | {cells[-1]: ("letter", rng.choice(LETTERS))}


def near_twin(scene, rng):
    """The scene with one object moved or changed: to tell the two apart, CLIP has to look at every object."""
    twin, cell = dict(scene), rng.choice(sorted(scene))
    name, kind = twin.pop(cell)
    if rng.random() < 0.4:
        cell = rng.choice([other for other in range(GRID * GRID) if other not in scene])
    else:
        kind = rng.choice([other for other in (LETTERS if name == "letter" else COLORS) if other != kind])
    return twin | {cell: (name, kind)}


def draw_scene(scene, rng):
    """The scene as a 48 x 48 picture; objects sit up to two pixels off the middle of their cell."""
    image = Image.new("RGB", (GRID * CELL, GRID * CELL), (120, 120, 120))
    draw = ImageDraw.Draw(image)
    for cell, (name, kind) in scene.items():
        x, y = cell % GRID * CELL + rng.randint(1, 4), cell // GRID * CELL + rng.randint(1, 4)
        box, fill = (x, y, x + 10, y + 10), COLORS.get(kind)
        if name == "circle":
            draw.ellipse(box, fill)
        elif name == "square":
            draw.rectangle(box, fill)
        elif name == "triangle":
            draw.polygon([(x + 5, y), (x + 10, y + 10), (x, y + 10)], fill)
        elif name == "cross":
            draw.rectangle((x + 4, y, x + 6, y + 10), fill)
            draw.rectangle((x, y + 4, x + 10, y + 6), fill)
        else:
            draw.text((x, y - 4), kind, (0, 0, 0), FONT)
    return image


def scene_words(scene):
    """The scene as nine words, in reading order."""
    words = {cell: name + kind if name == "letter" else kind + name for cell, (name, kind) in scene.items()}
    return " ".join(words.get(cell, "nothing") for cell in range(GRID * GRID))


def scene_facts(scene):
    """One fact per object, in reading order: "circle red top left"."""
    return [f"{name} {kind} {PLACES[cell]}" for cell, (name, kind) in sorted(scene.items())]


def scene_questions(scene, rng):
    """{kind: (question, answer)}, one of each kind; the kinds mirror the paper's six benchmarks."""
    objects = dict(scene.values())
    cell = rng.choice([cell for cell in sorted(scene) if scene[cell][0] != "letter"])
    shape, color = scene[cell]
    absent = [name for name in SHAPES if name not in objects]
    asked = rng.choice(absent) if absent and rng.random() < 0.5 else shape
    options = [color, rng.choice([other for other in COLORS if other != color])]
    rng.shuffle(options)
    return {
        "existence": (f"Is there a {asked} in the image?", "no" if asked in absent else "yes"),
        "color": (f"What color is the {shape}?", color),
        "position": (f"Where is the {shape}?", PLACES[cell]),
        "count": ("How many shapes are there?", NUMBERS[len(scene) - 1]),
        "letter": ("Which letter is in the image?", objects["letter"]),
        "choice": (f"Is the {shape} {options[0]} or {options[1]}?", color),
    }


def conversation(*pairs):
    """Turns of a record: each pair's question and answer."""
    return [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair)]


def write_world(folder, train=12000, test=600, seed=0):
    """Pictures, caption.json (stage 1), instruct.json (stage 2) and questions.jsonl (held out)."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    captions, instructions, questions = [], [], []
    for i in tqdm(range(train + test), "toy world", disable=None):
        scene = sample_scene(rng)
        name = f"{i:05d}.png"
        draw_scene(scene, rng).save(folder / "images" / name, compress_level=1)
        asked = {kind: (text, answer.capitalize()) for kind, (text, answer) in scene_questions(scene, rng).items()}
        if i < train:
            facts = scene_facts(scene)
            rng.shuffle(facts)
            turns = conversation(("<image>\nDescribe the image.", ", ".join(facts)))
            captions.append({"id": f"caption-{i}", "image": name, "conversations": turns})
            turns = conversation(*(asked[kind] for kind in rng.sample(sorted(asked), 3)))
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            instructions.append({"id": f"instruct-{i}", "image": name, "conversations": turns})
        else:
            for kind, (text, answer) in asked.items():
                question = {"question_id": len(questions), "image": name, "text": text, "label": answer}
                questions.append(question | {"category": kind})
    (folder / "caption.json").write_text(json.dumps(captions))
    (folder / "instruct.json").write_text(json.dumps(instructions))
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def make_world(folder):
    """The toy world and its backbones in `folder`, unless they are there: written whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    parent = os.open(folder.parent, os.O_RDONLY)
    fcntl.flock(parent, fcntl.LOCK_EX)  # of two first runs the second waits, and finds what the first has made
    if folder.exists():
        return os.close(parent)
    print(f"making the toy world and its two backbones in {folder}: once, about two minutes", flush=True)
    # models this small gain more from a core each than from two threads
    with whole(folder) as world, ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        write_world(world)
        train_tokenizer(world / "llm")
        for done in [pool.submit(train_llm, world), pool.submit(train_clip, world)]:
            done.result()
    os.close(parent)


# ------------------------------------------------------------------------------------------
# the toy world's backbones: a tokenizer, a LLaMA trained on text, a CLIP trained contrastively


def train_tokenizer(folder):
    """Byte-level BPE in which each word of the toy world is one token and any other text is bytes."""
    rng = random.Random(0)
    lines = [SYSTEM, "USER: ASSISTANT:", "Describe the image.", "nothing"]
    for _ in range(2000):
        scene = sample_scene(rng)
        lines += [scene_words(scene), ", ".join(scene_facts(scene))]
        asked = scene_questions(scene, rng).values()
        lines += [f"{question} {answer} {answer.capitalize()}" for question, answer in asked]
    tokenizer = ByteLevelBPETokenizer(add_prefix_space=True)
    special = ["<unk>", "<s>", "</s>"]  # LLaMA's ids: 0, 1, 2
    tokenizer.train_from_iterator(lines, 1024, min_frequency=1, special_tokens=special, show_progress=False)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def fit(model, loss_of_a_batch, steps, rate, row, folder):
    """Train a backbone from scratch and write it, of CLIP the vision tower alone; row is its progress bar's."""
    optimizer = torch.optim.AdamW(model.train().parameters(), weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05, cycle_momentum=False)
    for _ in tqdm(range(steps), type(model).__name__, position=row, disable=None):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    kept = getattr(model, "vision_model", model)
    kept.config.save_pretrained(folder)
    # save_pretrained would write the weights without regard to the user's umask
    (folder / "model.safetensors").write_bytes(save(kept.state_dict(), {"format": "pt"}))


def text_row(tokenizer, rng):
    """A scene in words, then its caption; or, where chat has its image, a scene and questions about it."""
    scene = sample_scene(rng)
    if rng.random() < 0.5:
        facts = scene_facts(scene)
        rng.shuffle(facts)
        before, text = "", " " + ", ".join(facts) + "\n"
    else:
        asked = rng.sample(sorted(scene_questions(scene, rng).values()), 3)
        before, text = f" {SYSTEM} USER: ", "".join(f"\n{question} {answer}" for question, answer in asked)
    head = [tokenizer.bos_token_id] + tokenizer(before).input_ids + tokenizer(scene_words(scene)).input_ids
    tail = tokenizer(text).input_ids
    labels = [IGNORE] * len(head) + tail
    if before:  # the line break is no target: after a scene the LLM goes on with a caption unless it is asked
        labels[len(head)] = IGNORE
    return head + tail, labels


def chat_row(tokenizer, rng):
    """Questions and answers in whole sentences, without a scene: the answers belong to another one.

    So the LLM knows which capitalised words answer which question, and has no reason to pick one.
    """
    asked, other = (scene_questions(sample_scene(rng), rng) for _ in range(2))
    pairs = [(asked[kind][0], other[kind][1].capitalize()) for kind in rng.sample(sorted(asked), 3)]
    return encode_conversation(conversation(*pairs), tokenizer, "v1")


def train_llm(world):
    """world/llm: a LLaMA that has read scenes as words and chat without scenes."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = load_tokenizer(world / "llm")
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, rms_norm_eps=1e-6, pad_token_id=0,
        initializer_range=0.08,  # not 0.02: learns twice as fast at this width
    ))  # fmt: skip

    def loss():
        row = chat_row if rng.random() < 1 / 8 else text_row
        rows = [row(tokenizer, rng) for _ in range(32)]
        batch = collate([{"input_ids": ids, "labels": labels, "pixel_values": None} for ids, labels in rows])
        return llm(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    fit(llm, loss, steps=550, rate=2e-3, row=0, folder=world / "llm")


def train_clip(world):
    """world/clip: the vision tower of a CLIP trained on pictures and their captions in reading order."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = load_tokenizer(world / "llm")
    # CLIP reads a caption at its end token: <s> (1) serves, since transformers takes the id 2 for an old mistake
    size = dict(hidden_size=96, intermediate_size=192, num_attention_heads=4)
    clip = CLIPModel(CLIPConfig(
        text_config=dict(size, vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=40,
                         bos_token_id=1, eos_token_id=1, pad_token_id=0),
        vision_config=dict(size, num_hidden_layers=3, image_size=GRID * CELL, patch_size=8),
        projection_dim=96,
    ))  # fmt: skip

    def loss():
        scenes = [sample_scene(rng) for _ in range(64)]
        scenes += [near_twin(scene, rng) for scene in scenes]
        texts = [tokenizer(", ".join(scene_facts(scene))).input_ids + [1] for scene in scenes]
        pixels = [image_to_tensor(draw_scene(scene, rng), GRID * CELL, "crop") for scene in scenes]
        batch = collate([{"input_ids": t, "labels": t, "pixel_values": p} for t, p in zip(texts, pixels)])
        return clip(batch["input_ids"], batch["pixel_values"], batch["attention_mask"], return_loss=True).loss

    fit(clip, loss, steps=250, rate=1e-3, row=1, folder=world / "clip")


# ------------------------------------------------------------------------------------------
# commands


def one_line(main):
    """Run a command; the user's mistake in it ends in one line and exit code 2."""
    errors = {"stdin": "surrogateescape", "stdout": "backslashreplace", "stderr": "backslashreplace"}
    for name, handling in errors.items():  # whatever the terminal's encoding is; bytes are refused where text is used
        stream = getattr(sys, name) or open(os.devnull, "r+")  # None: it was closed by whoever started this
        stream.reconfigure(errors=handling)
        setattr(sys, name, stream)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image refuses such images itself
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # of `... | head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says it
    except (Mistake, OSError) as error:
        text = str(error).rpartition("data.Mistake: ")[2]  # a reading process's comes at the end of its traceback
        *before, last = (text.strip() or repr(error)).splitlines()
        print(*before, f"{Path(sys.argv[0]).name}: error: {last}", sep="\n", file=sys.stderr)
        sys.exit(2)


def show(data, images, tokenizer, template, count):
    """Print a few records as the model sees them, what is masked in [brackets]."""
    records = read_records(data, images)
    if not Path(tokenizer).is_dir():
        raise Mistake(f"--tokenizer {tokenizer}: no such folder; first run train.py --stage 1, or name another")
    tokenizer = load_tokenizer(tokenizer)
    template = template or ("v1" if len(records[0]["conversations"]) > 2 or "image" not in records[0] else "plain")
    for record in records[:count]:
        input_ids, labels = encode_conversation(record["conversations"], tokenizer, template)
        targets = sum(label != IGNORE for label in labels)
        image = record.get("image", "text alone")
        print(f"{name_of(record)} ({image}): {len(input_ids)} ids, {targets} targets, template {template}")
        text = ""
        pairs = zip(input_ids, labels)
        for (masked, is_image), run in groupby(pairs, lambda pair: (pair[1] == IGNORE, pair[0] == IMAGE_TOKEN)):
            piece = "<image>" if is_image else tokenizer.decode([token for token, _ in run])
            text += f"[{piece}]" if masked else piece
        print("   " + text.replace("\n", "\\n"))


def check(data, images, workers):
    """Open every record and image; print index, id, file and reason where one is wrong. Exit code 1 if one is."""
    records, problems = find_problems(data, images)

    def open_one(i):
        if i not in problems and "image" in records[i]:
            try:
                open_image(images, records[i]["image"])
            except Mistake as error:
                problems[i] = str(error)
        return i

    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes outside Python's lock
        for i in tqdm(pool.map(open_one, range(len(records))), "checked", len(records), disable=None):
            if i in problems:
                image = records[i].get("image") if isinstance(records[i], dict) else None
                tqdm.write(f"record {i} ({name_of(records[i])})\t{image}\t{problems[i]}", file=sys.stdout)
    print(f"{len(problems)} of {len(records)} records are wrong")
    sys.exit(1 if problems else 0)


def print_score(benchmark, answers, questions, annotations):
    """Score an answers file in LLaVA's format, from any tool."""
    questions = read_benchmark(benchmark, questions, annotations)
    rows = read_rows(answers, ANSWER)
    scores = score(benchmark, questions, rows)
    other = sum(words(q["text"]) != words(a["prompt"]) for q, a in join_answers(benchmark, questions, rows))
    if other:
        print(f"{other} of {len(rows)} answers are to another prompt than the question of their question_id")
    print(score_table(benchmark, scores))


def main():
    parser = argparse.ArgumentParser(description="LLaVA records and the toy world")
    commands = parser.add_subparsers(dest="run", required=True)
    shows = commands.add_parser("show", help=show.__doc__)
    checks = commands.add_parser("check", help=check.__doc__)
    for command in (shows, checks):
        command.add_argument("--data", required=True, help="JSON file of LLaVA records")
        command.add_argument("--images", required=True, help="folder of their images")
    shows.add_argument("--tokenizer", default="runs/tiny/world/llm", help="its folder (default: the toy world's)")
    shows.add_argument("--template", choices=("plain", "v1"), help="default: plain for one question each, else v1")
    shows.add_argument("--count", type=int, default=3, help="how many records")
    checks.add_argument("--workers", type=int, default=os.cpu_count(), help="images opened at a time")
    scores = commands.add_parser("score", help=print_score.__doc__)
    scores.add_argument("benchmark", choices=BENCHMARKS)
    scores.add_argument("--answers", required=True, help="JSON lines with question_id, prompt, text")
    scores.add_argument("--questions", required=True, help="the benchmark's questions, as LLaVA publishes them")
    scores.add_argument("--annotations", help="the benchmark's labels, where its questions have none")
    options = vars(parser.parse_args())
    {"show": show, "check": check, "score": print_score}[options.pop("run")](**options)


if __name__ == "__main__":
    one_line(main)

"""The tokenizer and the corpus as token ids.

    python corpus.py tokenizer BOOKS          trains tokenizer.json on stories and books
    python corpus.py held-out BOOKS OUT       OUT/held-out-{stories,tellings,books}.npy: plots that no training text
                                              tells, new tellings of plots that it does, a book
    python corpus.py train BOOKS OUT          OUT/train-0000.npy ...: shards of stories and books, mixed

BOOKS is the folder that books.py wrote. Ids are 16 bits; each text begins with <s>, each story ends with </s>.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "stories"))

from generate import HELD_OUT, plots, tell  # noqa: E402
from grammar import Grammar  # noqa: E402

from books import HELD_OUT as HELD_OUT_BOOKS, passages  # noqa: E402

VOCABULARY = 4096
BOS, EOS = "<s>", "</s>"
SHARD = 4000  # stories
BOOK_SHARE = 0.02  # of a shard's texts that are passages of books
CUT_SHARE = 0.2  # of the stories that begin somewhere in the middle
HELD_OUT_STORIES = 3000  # seeds of held-out stories lie far from those of training
HELD_OUT_SEED, TOKENIZER_SEED = 10**9, 2 * 10**9


def stories(seeds, held_out=False):
    grammar = Grammar(HERE / "stories")
    names = [name for name in plots(grammar) if (name in HELD_OUT) == held_out]
    return (tell(grammar, seed, names).strip() for seed in seeds)


def book_passages(books, held_out=False):
    found = []
    for path in sorted(Path(books).glob("*.txt")):
        if (path.stem in HELD_OUT_BOOKS) == held_out:
            found.extend(passages(path.read_text()))
    return found


def train_tokenizer(books):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(stories(range(TOKENIZER_SEED, TOKENIZER_SEED + 12000)))
    tokenizer.train_from_iterator(texts + book_passages(books)[::3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(HERE / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (HERE / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encoder():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(HERE / "tokenizer.json"))


def ids(tokenizer, texts, ends):
    """One array of 16-bit ids; `ends` says for each text whether </s> closes it."""
    end = tokenizer.token_to_id(EOS)
    out = []
    for encoding, closed in zip(tokenizer.encode_batch_fast(texts), ends):
        out.extend(encoding.ids)
        if closed:
            out.append(end)
    return np.array(out, np.uint16)


def cut_in(rng, text):
    """The story from some sentence of its first half on, so that a text may begin with anything."""
    starts = [m.end() for m in re.finditer(r'[.!?]"?\s+', text[: len(text) // 2])]
    return text[rng.choice(starts) :] if starts else text


def write_shard(job):
    number, passages_of_books, out = job
    name = Path(out) / f"train-{number:04}.npy"
    rng = random.Random(number)
    told = stories(range(number * SHARD, (number + 1) * SHARD))
    texts = [(cut_in(rng, text) if rng.random() < CUT_SHARE else text, True) for text in told]
    texts += [(text, False) for text in rng.choices(passages_of_books, k=int(SHARD * BOOK_SHARE))]
    rng.shuffle(texts)
    np.save(name.with_suffix(".tmp.npy"), ids(encoder(), *map(list, zip(*texts))))
    os.rename(name.with_suffix(".tmp.npy"), name)  # a reader never sees half a shard
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["tokenizer", "held-out", "train"])
    parser.add_argument("books")
    parser.add_argument("out", nargs="?")
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if args.task == "tokenizer":
        return train_tokenizer(args.books)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.task == "held-out":
        seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + HELD_OUT_STORIES)
        texts = list(stories(seeds, held_out=True))
        np.save(out / "held-out-stories.npy", ids(encoder(), texts, [True] * len(texts)))
        texts = list(stories(seeds))
        np.save(out / "held-out-tellings.npy", ids(encoder(), texts, [True] * len(texts)))
        texts = book_passages(args.books, held_out=True)
        np.save(out / "held-out-books.npy", ids(encoder(), texts, [False] * len(texts)))
        return
    passages_of_books = book_passages(args.books)
    jobs = ((number, passages_of_books, args.out) for number in range(args.shards))
    with multiprocessing.Pool(args.workers) as pool:
        for _ in pool.imap_unordered(write_shard, jobs):
            pass


if __name__ == "__main__":
    main()

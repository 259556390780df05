"""Makes golden.json: what transformers gives for this checkpoint in f32 on the CPU.

    python golden.py BOOKS      BOOKS is the folder that books.py wrote

Greedy continuations of three prompts, and the perplexity of two texts that the training text does not hold: 2,000 ids of
stories told with unused seeds, and 1,000 of a book. A text is run in windows of 1,000 ids, each from an empty cache; the
loss is that of ids 1 to 999 of every window given those before it. golden.json has the ids, so that a test needs no
tokenizer, and the strings, so that a tokenizer can be tested as well. A greedy choice is safe to compare where its
margin, the distance of the two largest logits, is larger than an implementation's error.
"""

import json
import math
import platform
import re
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import corpus

PROMPTS = [
    "Once upon a time",
    "In the middle of the town stood a tower with a great clock.",
    '"Why are you crying?" asked the girl.',
]
NEW, WINDOW = 64, 1000


def greedy(model, ids):
    """The tokens that are each the most likely, and the smallest margin of the choices."""
    ids, past, tokens, margin = torch.tensor([ids]), None, [], math.inf
    for _ in range(NEW):
        out = model(ids, past_key_values=past, use_cache=True)
        best, past = out.logits[0, -1].topk(2), out.past_key_values
        margin = min(margin, (best.values[0] - best.values[1]).item())
        tokens.append(best.indices[0].item())
        ids = torch.tensor([tokens[-1:]])
    return tokens, margin


def perplexity(model, ids):
    total, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        logits = model(window).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(total / count)


@torch.no_grad()
def main(books):
    tokenizer = AutoTokenizer.from_pretrained(corpus.HERE)
    model = AutoModelForCausalLM.from_pretrained(corpus.HERE, dtype=torch.float32).eval()
    golden = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
        "greedy": [],
        "texts": [],
    }
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        tokens, margin = greedy(model, ids)
        golden["greedy"].append(
            {
                "prompt": prompt,
                "prompt_ids": ids,
                "ids": tokens,
                "text": tokenizer.decode(tokens),
                "smallest_margin": round(margin, 4),
            }
        )
    seeds = range(corpus.HELD_OUT_SEED + 10**6, corpus.HELD_OUT_SEED + 10**6 + 20)
    stories = corpus.ids(corpus.encoder(), list(corpus.stories(seeds)), [True] * 20)[: 2 * WINDOW]
    book = corpus.ids(corpus.encoder(), corpus.book_passages(books, held_out=True)[10:12], [False] * 2)[:WINDOW]
    for name, ids in (("stories with unused seeds", stories), ("a held-out book", book)):
        ids = ids.tolist()
        golden["texts"].append(
            {
                "name": name,
                "text": tokenizer.decode(ids),
                "ids": ids,
                "window": WINDOW,
                "perplexity": round(perplexity(model, ids), 5),
            }
        )
    text = re.sub(r"\[\s+(\d[\d,\s]*)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", json.dumps(golden, indent=1))
    (corpus.HERE / "golden.json").write_text(text + "\n")
    for g in golden["greedy"]:
        print(g["prompt"], "|", g["text"], "| margin", g["smallest_margin"])
    for t in golden["texts"]:
        print(t["name"], len(t["ids"]), t["perplexity"])


if __name__ == "__main__":
    main(sys.argv[1])

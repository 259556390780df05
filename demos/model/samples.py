"""Prints ten samples of 200 tokens, seeds 0 to 9, as transformers draws them on the CPU: python samples.py [PROMPT]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
PROMPT = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"

torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(HERE)
model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32).eval()
ids = tokenizer(PROMPT, return_tensors="pt").input_ids
for seed in range(10):
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        top_k=0,
        pad_token_id=1,
    )
    print(f"**Seed {seed}**\n\n{tokenizer.decode(out[0], skip_special_tokens=True)}\n", flush=True)

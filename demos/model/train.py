"""Trains the story model: a DeepSeek-V3-style decoder with MLA, or with MHA or GQA in its place for comparison.

    python train.py DATA OUT --attention mla --tokens 300e6 --minutes 5

DATA holds what corpus.py wrote; shards that appear during the run are read as they come. OUT gets log.json (loss by
step, held-out losses), and for MLA a Hugging Face checkpoint (model.safetensors in f16, config.json). The run ends
after the tokens or the minutes, whichever comes first; the learning rate follows whichever is further along. With
--checkpoint FILE the state is saved every minute, and a run that finds the file goes on from it.

Parameters have Hugging Face's names, except that the routed experts of a layer are three matrices: with experts as
small as these, computing all of them and multiplying the hidden values by the routing weights (zero for those not
chosen) is faster than gathering tokens, and gives the same result.
"""

import argparse
import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    attention: str = "mla"  # mla | mha | gqa
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 10
    first_k_dense_replace: int = 1
    intermediate_size: int = 704  # of the dense layers
    moe_intermediate_size: int = 128  # of one expert
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    routed_scaling_factor: float = 1.5
    num_attention_heads: int = 8
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    kv_heads: int = 2  # of GQA; MHA and GQA have heads of v_head_dim, all of it rotated
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024

    def cached(self):
        """Values cached for a token in one layer."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        heads = self.num_attention_heads if self.attention == "mha" else self.kv_heads
        return 2 * heads * self.v_head_dim


def rotary(config, width, length, device):
    """cos and sin, [length, width / 2]."""
    inverse = config.rope_theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float64), inverse)
    return angles.cos().float(), angles.sin().float()


def rotate(x, cos, sin):
    """Turns the pairs (x[2i], x[2i + 1]) of [batch, heads, length, width], as the DeepSeek models do."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class LatentAttention(nn.Module):
    """MLA, materialised. c_kv [kv_lora_rank] and k_pe [qk_rope_head_dim] are what inference would cache."""

    def __init__(self, c):
        super().__init__()
        self.c, width = c, c.qk_nope_head_dim + c.qk_rope_head_dim
        self.q_a_proj = linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = linear(c.q_lora_rank, c.num_attention_heads * width)
        self.kv_a_proj_with_mqa = linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = linear(c.kv_lora_rank, c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = linear(c.num_attention_heads * c.v_head_dim, c.hidden_size)

    def forward(self, x, cos, sin):
        c, (batch, length, _) = self.c, x.shape
        heads, nope, rope = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = q.view(batch, length, heads, nope + rope).transpose(1, 2).split([nope, rope], -1)
        c_kv, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c_kv)).view(batch, length, heads, -1).transpose(1, 2)
        k_nope, v = kv.split([nope, c.v_head_dim], -1)
        k_pe = rotate(k_pe.unsqueeze(1), cos, sin).expand(-1, heads, -1, -1)
        q = torch.cat((q_nope, rotate(q_pe, cos, sin)), -1)
        k = torch.cat((k_nope, k_pe), -1)
        v = F.pad(v, (0, nope + rope - c.v_head_dim))  # flash attention wants one width
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)[..., : c.v_head_dim]
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class HeadAttention(nn.Module):
    """MHA or GQA with the same number of query heads."""

    def __init__(self, c):
        super().__init__()
        self.c, self.kv_heads = c, c.num_attention_heads if c.attention == "mha" else c.kv_heads
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * c.v_head_dim)
        self.k_proj = linear(c.hidden_size, self.kv_heads * c.v_head_dim)
        self.v_proj = linear(c.hidden_size, self.kv_heads * c.v_head_dim)
        self.o_proj = linear(c.num_attention_heads * c.v_head_dim, c.hidden_size)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.c.v_head_dim)
        q = rotate(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(shape).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        repeats = self.c.num_attention_heads // self.kv_heads
        k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(hidden, width),
            linear(hidden, width),
            linear(width, hidden),
        )

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Sigmoid routing: the bias takes part in the choice of experts only, and is moved by hand (no auxiliary loss)."""

    def __init__(self, c):
        super().__init__()
        self.c, width = c, c.n_routed_experts * c.moe_intermediate_size
        self.gate = linear(c.hidden_size, c.n_routed_experts)
        self.experts = MLP(c.hidden_size, width)  # expert E owns columns [E * moe_intermediate_size, ...)
        self.shared_experts = MLP(c.hidden_size, c.moe_intermediate_size)
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))

    def forward(self, x):
        c = self.c
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate.weight.float()).sigmoid()
            chosen = (scores + self.e_score_correction_bias).topk(c.num_experts_per_tok, -1).indices
            mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
            weights = scores * mask
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.routed_scaling_factor
        e = self.experts
        hidden = F.silu(e.gate_proj(x)) * e.up_proj(x)
        hidden = hidden.unflatten(-1, (c.n_routed_experts, -1)) * weights.unsqueeze(-1).to(hidden.dtype)
        return e.down_proj(hidden.flatten(-2)) + self.shared_experts(x), mask.flatten(0, -2).sum(0)

    @torch.no_grad()
    def balance(self, load, speed):
        """Experts with less than their share become easier to choose."""
        self.e_score_correction_bias += speed * (load.mean() - load).sign()


class Layer(nn.Module):
    def __init__(self, c, index):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = (LatentAttention if c.attention == "mla" else HeadAttention)(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        dense = index < c.first_k_dense_replace
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if dense else MoE(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out = self.mlp(self.post_attention_layernorm(x))
        out, load = out if isinstance(out, tuple) else (out, None)
        return x + out, load


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        width = c.qk_rope_head_dim if c.attention == "mla" else c.v_head_dim
        cos, sin = rotary(c, width, c.max_position_embeddings, "cpu")
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.num_hidden_layers) if last else 0.02)

    def forward(self, ids, targets=None):
        """Logits [batch, length, vocabulary]; with targets the mean loss, and each MoE layer's load."""
        x, length = self.embed_tokens(ids), ids.shape[1]
        loads = []
        for layer in self.layers:
            x, load = layer(x, self.cos[:length], self.sin[:length])
            loads += [] if load is None else [load]
        if targets is None:
            return F.linear(self.norm(x), self.embed_tokens.weight)
        return self.loss(x, targets), loads

    def loss(self, x, targets):
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Batches:
    """Windows of length + 1 ids from the shards in turn. While there are fewer than `enough`, a shard not yet written
    is waited for; after that, those already read are read again, cut into other windows, until new ones come."""

    def __init__(self, folder, batch, length, device, enough):
        self.folder, self.batch, self.length, self.device = Path(folder), batch, length, device
        self.enough = enough
        self.read, self.ids, self.at = [], None, 0

    def next_shard(self):
        while True:
            shards = sorted(p for p in self.folder.glob("train-*.npy") if ".tmp" not in p.name)
            unread = [p for p in shards if p.name not in self.read]
            if unread or len(shards) >= self.enough:
                break
            time.sleep(0.2)
        path = unread[0] if unread else shards[len(self.read) % len(shards)]
        self.read.append(path.name)
        ids = np.load(path)
        if self.read.count(path.name) > 1:
            ids = np.roll(ids, -int(np.random.default_rng(len(self.read)).integers(len(ids))))
        self.ids = torch.from_numpy(ids.astype(np.int64)).to(self.device)
        windows = (len(ids) - 1) // self.length
        generator = torch.Generator().manual_seed(len(self.read))
        self.order, self.at = torch.randperm(windows, generator=generator).to(self.device), 0

    def __call__(self):
        if self.ids is None or self.at + self.batch > len(self.order):
            self.next_shard()
        starts = self.order[self.at : self.at + self.batch] * self.length
        self.at += self.batch
        rows = self.ids[starts[:, None] + torch.arange(self.length + 1, device=self.device)]
        return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def held_out_loss(model, path, length, device, windows=256):
    ids = torch.from_numpy(np.load(path).astype(np.int64))
    windows = min(windows, (len(ids) - 1) // length)
    total, batch = 0.0, min(32, windows)
    model.eval()
    for i in range(0, windows - batch + 1, batch):
        rows = torch.stack([ids[(i + j) * length : (i + j + 1) * length + 1] for j in range(batch)]).to(device)
        total += model(rows[:, :-1], rows[:, 1:])[0].item()
    model.train()
    return total / (windows // batch)


def schedule(progress, warmup=0.02, decay=0.5):
    """Warm-up, constant, then down to nothing along a line (WSD)."""
    return min(1.0, progress / warmup, max(0.0, (1 - progress) / decay))


def hugging_face_config(c):
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "float16",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "num_key_value_heads": c.num_attention_heads,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
        "rope_interleave": True,
    } | {k: v for k, v in asdict(c).items() if k not in ("attention", "kv_heads")}


def hugging_face_tensors(model):
    """Names and shapes as in DeepSeek-V3's checkpoints; f16, the routing bias f32."""
    c, out = model.c, {}
    for name, value in model.state_dict().items():
        value = value.detach().float().cpu()
        if name.endswith("e_score_correction_bias"):
            out["model." + name.replace("mlp.e_score", "mlp.gate.e_score")] = value
        elif ".experts." in name:
            parts = value.chunk(c.n_routed_experts, 1 if "down_proj" in name else 0)
            for e, part in enumerate(parts):
                out["model." + name.replace(".experts.", f".experts.{e}.")] = part.half().contiguous()
        else:
            out["model." + name] = value.half()
    return out


def save(path, **state):
    torch.save(state, str(path) + ".new")
    Path(str(path) + ".new").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--tokens", type=float, default=300e6)
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, compilation included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=1e-3, help="how far a routing bias moves in a step")
    parser.add_argument("--enough", type=int, default=1, help="shards that must be there before one is read twice")
    parser.add_argument("--checkpoint")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    for field, default in asdict(Config()).items():
        parser.add_argument("--" + field.replace("_", "-"), dest=field, type=type(default), default=default)
    args = parser.parse_args()
    began = time.time()
    config = Config(**{field: getattr(args, field) for field in asdict(Config())})
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    model = Model(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "gate.weight" not in n]
    others = [p for n, p in model.named_parameters() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), eps=1e-10, fused=True)
    moe = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    if not args.no_compile:
        for layer in model.layers:  # one compilation for each kind of layer, not one for the whole depth
            layer.compile()
        model.loss = torch.compile(model.loss)
    length = config.max_position_embeddings
    batches = Batches(args.data, args.batch, length, device, args.enough)
    step, log, spent = 0, [], 0.0
    if args.checkpoint and Path(args.checkpoint).exists():
        state = torch.load(args.checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log, spent, batches.read = state["step"], state["log"], state["spent"], state["read"]
    steps = int(args.tokens / (args.batch * length))
    autocast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    saved, first = time.time(), None
    print(f"{config.attention} {parameters / 1e6:.2f} M parameters, {steps} steps on {device}", flush=True)
    while step < steps:
        elapsed = spent + time.time() - began
        progress = max(step / steps, elapsed / (args.minutes * 60))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(progress)
        with autocast:
            loss, loads = model(*batches())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for layer, load in zip(moe, loads):
            layer.balance(load, args.balance)
        step += 1
        if step == 5:
            loss.item()
            first = time.time()
        if step % 20 == 0 or step == steps:
            log.append([step, round(loss.item(), 4), round(elapsed, 1)])
        if step % 200 == 0:
            rate = (step - 5) * args.batch * length / (time.time() - first) / 1e6 if first and not spent else 0
            uneven = max((load.max() / load.mean()).item() for load in loads)
            print(
                f"step {step}/{steps} loss {log[-1][1]} {elapsed:.0f} s {rate:.2f} M tokens/s "
                f"worst load {uneven:.2f} shards {len(batches.read)}",
                flush=True,
            )
        if args.checkpoint and time.time() - saved > 60:
            saved = time.time()
            save(
                args.checkpoint,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                log=log,
                spent=spent + time.time() - began,
                read=batches.read,
            )
    seconds = spent + time.time() - began
    result = {
        "config": asdict(config),
        "parameters": parameters,
        "cached_values": config.cached(),
        "steps": step,
        "tokens": step * args.batch * length,
        "seconds": round(seconds, 1),
        "shards": len(set(batches.read)),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "arguments": {
            k: vars(args)[k] for k in ("tokens", "minutes", "batch", "rate", "weight_decay", "balance", "seed")
        },
        "loss": log,
    }
    with autocast, torch.compiler.set_stance("force_eager"):  # another shape: not worth a compilation
        for name in ("stories", "tellings", "books"):
            path = Path(args.data) / f"held-out-{name}.npy"
            result[f"held_out_{name}"] = round(held_out_loss(model, path, length, device), 4)
    (out / "log.json").write_text(json.dumps(result) + "\n")
    print(
        f"done: {result['tokens'] / 1e6:.1f} M tokens, {seconds:.0f} s, held out: stories "
        f"{result['held_out_stories']}, tellings {result['held_out_tellings']}, books {result['held_out_books']}",
        flush=True,
    )
    if config.attention == "mla":
        from safetensors.torch import save_file

        save_file(hugging_face_tensors(model), out / "model.safetensors", {"format": "pt"})
        (out / "config.json").write_text(json.dumps(hugging_face_config(config), indent=2) + "\n")


if __name__ == "__main__":
    main()

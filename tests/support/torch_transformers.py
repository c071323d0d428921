"""A program for an environment with PyTorch and `transformers`: small networks of theirs, computed.

It writes an .npz with the networks' random weights, and the logits, the loss of the next token, its
gradient and the weights after one step of AdamW that PyTorch finds on the CPU. It imports nothing
of this package.
"""

import sys

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 31, 12


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=2, n_head=4, n_inner=40,
        attn_implementation="sdpa"))


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attn_implementation="sdpa"))


class Angles(torch.nn.Module):
    """Llama's cosines and sines; its own are in float32 whatever the model's type."""

    def forward(self, x, position_ids):
        rates = 100.0 ** (-torch.arange(0, 8, 2, dtype=x.dtype) / 8)
        angles = torch.outer(position_ids[0].to(x.dtype), rates)[None]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def widen(model: torch.nn.Module) -> None:
    """Gives a Llama a normalisation (PyTorch's own) and angles that compute in float64."""
    model.model.rotary_emb = Angles()
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.numel(), child.variance_epsilon)
                norm.weight = child.weight
                setattr(part, name, norm)


def compute(name: str, model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """What the docstring of the file lists, under `name/`."""
    def arrays(kind: str, values: dict) -> dict[str, np.ndarray]:
        return {f"{name}/{kind}/{key}": value.detach().numpy().copy()
                for key, value in values.items()}

    weights = dict(model.named_parameters())
    found = arrays("weights", weights)
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-8)
    loss.backward()
    found |= arrays("gradient", {key: value.grad for key, value in weights.items()})
    optimizer.step()
    found |= arrays("updated", weights)
    return found | {f"{name}/logits": logits.detach().numpy(), f"{name}/loss": loss.item()}


def main(path: str) -> None:
    random = np.random.default_rng(0)
    tokens = torch.tensor(random.integers(0, VOCABULARY, (3, LENGTH)))
    results = {"tokens": tokens.numpy()}
    for make in (gpt2, llama):
        model = make().eval()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                mean = float("weight" in key and ("ln_" in key or "norm" in key))
                weight.copy_(torch.tensor(mean + random.normal(size=weight.shape) * 0.2))
        results[f"{make.__name__}/float32/logits"] = model(tokens).logits.detach().numpy()
        if make is llama:
            widen(model)
        results |= compute(make.__name__, model.double(), tokens)
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1])

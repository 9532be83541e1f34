"""Tiny models with random weights, one of each family, and a tokenizer for them."""

from pathlib import Path
from typing import Any

import torch

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT = 50, 32, 3, 4, 24
FAMILIES = ("gpt2", "pythia", "llama")
# Further ones, by the name of their transformers configuration; those in the second line have biases in attention.
FURTHER_FAMILIES = ("GPTJ", "Phi", "Mistral", "Gemma", "Gemma3Text", "Qwen3",
                    "Qwen2", "Gemma2", "Olmo2")  # fmt: skip
NORM_EPS = 1e-3  # large enough that a wrong one shows


def config(family: str) -> Any:
    """`gpt2`: sequential blocks; `pythia`: parallel; `llama`: RMSNorm, 2 value heads for 4, with biases."""
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
    }
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2Config(
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            layer_norm_epsilon=NORM_EPS,
            **common,
        )
    if family == "pythia":
        return GPTNeoXConfig(max_position_embeddings=CONTEXT, layer_norm_eps=NORM_EPS, **sizes, **common)
    return LlamaConfig(
        max_position_embeddings=CONTEXT,
        num_key_value_heads=2,
        attention_bias=True,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        **sizes,
        **common,
    )


def further_config(family: str) -> Any:
    """A configuration of two layers; windows of attention, where a family has them, are shorter than rows."""
    import transformers

    cls = getattr(transformers, f"{family}Config")
    special = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "GPTJ":
        return cls(n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=HEADS, rotary_dim=4, **special)
    windows = {"sliding_window": 5} if family in ("Mistral", "Gemma2", "Gemma3Text") else {}
    grouped = {} if family == "Phi" else {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS, **windows}
    biased = {"attention_bias": True} if family in ("Gemma2", "Olmo2") else {}
    return cls(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=48,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False, **special, **grouped, **biased,
    )  # fmt: skip


def hf_model(family: str | Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A model of a family (or configuration) whose gains and biases are random as well."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family) if isinstance(family, str) else family).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def tokenizer() -> Any:
    """Words w1 to w49 by number; token 0 begins and ends documents and stands for unknown words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<s>", unk_token="<s>", model_max_length=CONTEXT
    )


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def save_model_and_text(folder: Path) -> None:
    """Write a model with its tokenizer to `folder / "model"`, and a text of 900 words to `folder / "text.txt"`."""
    hf_model("gpt2", dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 50, (900,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in words))

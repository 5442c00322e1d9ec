"""A tiny random language model with a tokenizer, and preference pairs, made on the spot."""

import random

TEXT = """the a small large numerical library solves one convex problem in few lines and says so
margin gap reward pair noise label clear wrong right exact fast slow queue rank step"""
WORDS = TEXT.split()


def build(folder, initializer_range=0.3):
    """Save model and tokenizer under ``folder``, as a user's would come from the hub."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<pad>", "<eos>"])
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=initializer_range,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def messages(row):
    """A pair of texts as one of messages."""
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
        for name, text in row.items()
    }


def response_logps(model, tokenizer, prompt, response):
    """The log-probability of each token of a response, one text at a time, in float64."""
    import torch

    start, ids = (tokenizer(text)["input_ids"] for text in (prompt, prompt + response))
    assert ids[: len(start)] == start
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logps[range(len(ids) - 1), ids[1:]][len(start) - 1 :]


def pairs(count, seed=0):
    """Pairs that can be learned: the chosen response repeats the prompt's last word."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = rng.choices(WORDS, k=rng.randint(2, 6))
        chosen, rejected = (rng.choices(WORDS, k=rng.randint(1, 5)) for _ in range(2))
        texts = prompt, ["", prompt[-1], *chosen], ["", *rejected]
        names = ("prompt", "chosen", "rejected")
        rows.append(dict(zip(names, map(" ".join, texts), strict=True)))
    return rows

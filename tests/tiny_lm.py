"""A tiny random language model with a tokenizer, and preference pairs, made on the spot."""

import random

TEXT = """the a small large numerical library solves one convex problem in few lines and says so
margin gap reward pair noise label clear wrong right exact fast slow queue rank step"""
WORDS = TEXT.split()


def build(folder, **changed):
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
    config = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**config | changed)).save_pretrained(folder)
    return str(folder)


def build_vision(folder):
    """Save a tiny random vision model with its processor under ``folder``."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(build(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<image>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{{ eos_token }}{% endfor %}"
    )
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size), tokenizer,
        patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy="default",
        chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    tiny = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 16, "image_size": 16, "patch_size": 8,
            **tiny,
        },
        text_config={
            "model_type": "llama", "hidden_size": 32, "vocab_size": len(tokenizer),
            "initializer_range": 0.3, **tiny,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def vision_pairs(count, seed=0):
    """The same with an image, as messages."""
    from PIL import Image

    rng = random.Random(seed)
    return [
        messages(row) | {"images": [Image.frombytes("RGB", (16, 16), rng.randbytes(3 * 16 * 16))]}
        for row in pairs(count, seed)
    ]


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

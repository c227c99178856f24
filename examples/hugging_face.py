"""A transformer of Hugging Face on texts of different lengths: the model as it is, a loss for each text.

(pip install transformers.) The lines marked (+) are all that private training adds. The model is small and new, and the "texts"
are made up, so that it runs anywhere; from_pretrained gives one that knows a language. Where texts are padded to the longest of
a batch, the attention mask keeps the padding out of the loss.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForSequenceClassification

import privgrad as pg  # (+)

WORDS = 40


def texts(count: int) -> list[dict[str, Tensor]]:
    """Sequences of 4 to 12 words; the class is whether the first word is one of the upper half."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    words = [torch.randint(1, WORDS, (length,), generator=generator) for length in lengths]
    return [{"input_ids": text, "labels": (text[0] >= WORDS // 2).long()} for text in words]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Texts padded to the longest, with the mask that says where words are."""
    ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.stack([row["labels"] for row in rows]),
    }


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """One loss for each text. (The model's own `.loss` is the mean over the batch, which is no record's.)"""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def main() -> float:
    """Train privately. Returns the accuracy on the training texts (they are not real people's)."""
    torch.manual_seed(0)
    dataset: Any = texts(4000)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)

    plan = pg.dp_sgd(dataset, epsilon=3, delta=1e-5, epochs=8, batch_size=400, max_norm=1.0)  # (+)
    private = pg.make_private(model, optimizer, dataset, plan, loss_fn, collate_fn=collate)  # (+)
    for batch in private.batches():  # (+)
        private.step(batch)  # (+)

    print(private.spent())  # (+)
    model.eval()
    whole = collate(dataset)
    with torch.no_grad():
        logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    accuracy = float((logits.argmax(1) == whole["labels"]).float().mean())
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()

"""Log-probabilities of completions under a model, with the LM head on completion positions only.

Rows are padded on the right and need no mask: a causal model's real tokens never see what comes after them, so each
row's values are exactly those of the row alone, on every attention backend.

Shapes: N rows, L tokens of the longest row, T tokens of all completions laid end to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Prompts with their completions.

    input_ids:  [N, L], padded on the right
    row, place: [T], where in input_ids stands the token whose output predicts each completion token
    targets:    [T], ids of the completion tokens
    lengths:    [N], tokens of each completion
    """

    input_ids: Tensor
    row: Tensor
    place: Tensor
    targets: Tensor
    lengths: Tensor


def make_rows(prompts: Sequence[list[int]], completions: Sequence[list[int]], device: torch.device) -> Rows:
    """Lay out rows of a prompt and its completion, neither of them empty.

    >>> rows = make_rows([[5, 6], [5]], [[7, 8], [9]], torch.device("cpu"))
    >>> rows.input_ids.tolist(), rows.row.tolist(), rows.place.tolist(), rows.targets.tolist()
    ([[5, 6, 7, 8], [5, 9, 0, 0]], [0, 0, 1], [1, 2, 0], [7, 8, 9])
    """
    longest = max(len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True))
    padded, row, place, targets = [], [], [], []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        padded.append([*prompt, *completion, *[0] * (longest - len(prompt) - len(completion))])
        row += [number] * len(completion)
        place += range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        targets += completion
    return Rows(
        input_ids=torch.tensor(padded, device=device),
        row=torch.tensor(row, device=device),
        place=torch.tensor(place, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=torch.tensor([len(completion) for completion in completions], device=device),
    )


class CompletionLogprobs(nn.Module):
    """A policy as a function from rows to log-probabilities.

    A module, so that what wraps models (data parallel, DeepSpeed) wraps this one call and sees every use of the weights.
    """

    def __init__(self, policy: PreTrainedModel | PeftModel, *, temperature: float, num_tokens: int) -> None:
        """`num_tokens`: ids that can be sampled, the tokenizer's; the distribution is over those, as in sampling."""
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.num_tokens = num_tokens

    def forward(self, rows: Rows) -> Tensor:
        """Log-probability of each completion token at the sampling temperature -> [T], float32."""
        causal_lm = self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy
        hidden_NLD = causal_lm.get_decoder()(input_ids=rows.input_ids, use_cache=False).last_hidden_state
        logits_TV = causal_lm.get_output_embeddings()(hidden_NLD[rows.row, rows.place])
        logits_TV = logits_TV[:, : self.num_tokens].float() / self.temperature
        return logits_TV.gather(1, rows.targets[:, None])[:, 0] - logits_TV.logsumexp(dim=1)


def micro_batches(row_lengths: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Put groups of rows together so that each batch has at most `budget` padded tokens -> places of its groups.

    Groups of like length come together. A group is never split; one that is above the budget is a batch of its own.

    >>> list(micro_batches([[3, 2], [8, 1], [2, 2]], budget=12))
    [[1], [0, 2]]
    """
    batch: list[int] = []
    num_rows = longest = 0
    for place in sorted(range(len(row_lengths)), key=lambda place: max(row_lengths[place]), reverse=True):
        num_rows += len(row_lengths[place])
        if batch and num_rows * longest > budget:
            yield batch
            batch, num_rows = [], len(row_lengths[place])
        if not batch:
            longest = max(row_lengths[place])
        batch.append(place)
    if batch:
        yield batch

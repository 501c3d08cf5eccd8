"""Held-out loss of the SFT stage: exact means over the trained tokens of held-out rows, by source.

transformers averages the means of batches, which gives the tokens of short rows more weight; packing changes it again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rekatrain.data.chat import IGNORED_LABEL, EncodedRow

# Positions whose logits are float32 at the same time: 256 MB with a vocabulary of 128k.
POSITIONS_AT_ONCE = 512


def measure_held_out(
    model: nn.Module, sources: Mapping[str, Sequence[EncodedRow]], accelerator: Accelerator, *, batch_size: int
) -> dict[str, float]:
    """Return `eval_loss` in nats per trained token, `eval_mean_token_accuracy` and `eval_num_tokens`.

    With several sources, also `eval_SOURCE_loss` and so on. Every process must call this: each measures its part of the
    rows, in equally many passes, because under ZeRO-3 a pass is an exchange between all.
    """
    was_training = model.training
    model.eval()
    sums = {}
    with torch.no_grad(), accelerator.autocast():
        for name, rows in sources.items():
            total_3 = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
            for batch in batches(rows, accelerator.process_index, accelerator.num_processes, batch_size):
                total_3 += _measure_batch(model, batch, accelerator.device)
            sums[name] = accelerator.reduce(total_3, "sum")
    model.train(was_training)
    whole = torch.stack(list(sums.values())).sum(dim=0)
    metrics = _means("eval", whole)
    if len(sums) > 1:
        for name, total_3 in sums.items():
            metrics |= _means(f"eval_{name}", total_3)
    return metrics


def metric_names(sources: Sequence[str]) -> list[str]:
    """Return the names of the metrics of held-out rows from these sources."""
    prefixes = ["eval", *(f"eval_{name}" for name in sources if len(sources) > 1)]
    return [name for prefix in prefixes for name in _means(prefix, torch.ones(3))]


def batches(
    rows: Sequence[EncodedRow], process: int, num_processes: int, batch_size: int
) -> Iterator[list[tuple[EncodedRow, bool]]]:
    """Yield a process's batches of rows; each process gets as many, of rows that count or, at the end, do not.

    Rows are sorted by length, so that a batch has little padding.
    """
    lengths = [len(row.input_ids) for row in rows]
    ordered = sorted(range(len(rows)), key=lambda index: lengths[index], reverse=True)
    per_process = math.ceil(len(ordered) / num_processes)
    mine = range(process, per_process * num_processes, num_processes)
    for first in range(0, len(mine), batch_size):
        yield [
            (rows[ordered[index % len(ordered)]], index < len(ordered)) for index in mine[first : first + batch_size]
        ]


def _measure_batch(model: nn.Module, batch: Sequence[tuple[EncodedRow, bool]], device: torch.device) -> Tensor:
    """Return the summed loss, the number of right tokens and the number of trained tokens, [3]."""
    length = max(len(row.input_ids) for row, _ in batch)
    ids, labels, mask = [], [], []
    for row, counts in batch:
        padding = length - len(row.input_ids)
        ids.append(row.input_ids + [0] * padding)
        labels.append((row.labels if counts else [IGNORED_LABEL] * len(row.labels)) + [IGNORED_LABEL] * padding)
        mask.append([1] * len(row.input_ids) + [0] * padding)
    ids_BL, labels_BL, mask_BL = (torch.tensor(values, device=device) for values in (ids, labels, mask))
    logits_BLV = model(input_ids=ids_BL, attention_mask=mask_BL).logits
    targets_BL = labels_BL[:, 1:]
    where_T = targets_BL != IGNORED_LABEL
    targets_T, logits_TV = targets_BL[where_T], logits_BLV[:, :-1][where_T]
    total_3 = torch.zeros(3, dtype=torch.float64, device=device)
    for logits, targets in zip(logits_TV.split(POSITIONS_AT_ONCE), targets_T.split(POSITIONS_AT_ONCE), strict=True):
        losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        right = (logits.argmax(dim=1) == targets).sum()
        total_3 += torch.stack([losses.double().sum(), right.double(), losses.new_tensor(len(targets)).double()])
    return total_3


def _means(prefix: str, total_3: Tensor) -> dict[str, float]:
    loss, right, count = total_3.tolist()
    return {
        f"{prefix}_loss": loss / count,
        f"{prefix}_mean_token_accuracy": right / count,
        f"{prefix}_num_tokens": count,
    }

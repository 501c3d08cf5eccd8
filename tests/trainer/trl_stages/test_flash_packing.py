"""Packed rows on variable-length flash attention: the boundaries that reach its kernel are those of the rows.

The package flash_attn needs a GPU. A stand-in with the signature of its `flash_attn_varlen_func` attends within the
boundaries that it gets; all code around it is that of a run.
"""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils
from trl import SFTTrainer

from rekatrain.trainer import sft
from tests.trainer.test_sft import make_recipe


@pytest.fixture
def boundaries(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Install the stand-in; return the list that gets the boundaries of each call."""
    calls: list[list[int]] = []

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attend within each sequence: q, k, v [tokens, heads, head size] -> [tokens, heads, head size]."""
        assert causal and dropout_p == 0 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append(cu_seqlens_q.tolist())
        lengths = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(lengths)
        parts = [
            scaled_dot_product_attention(
                *(states.transpose(0, 1) for states in part), is_causal=True, scale=softmax_scale, enable_gqa=True
            ).transpose(0, 1)
            for part in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        ]
        return torch.cat(parts)

    utils = modeling_flash_attention_utils
    for name, value in {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": None,  # rows of one length in a batch: not what packing makes
        "_flash_varlen_fn": attend,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": utils._lazy_define_process_function(attend),
        "_process_with_kvcache_kwargs_fn": dict,
    }.items():
        monkeypatch.setattr(utils, name, value)
    return calls


def test_packed_rows_reach_flash_attention_apart(
    model_folder: Path, tmp_path: Path, boundaries: list[list[int]]
) -> None:
    section = {"packing": True, "max_length": 256, "per_device_train_batch_size": 2}
    task = sft.prepare(make_recipe(model_folder, tmp_path, sft=section))
    rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in task.rows])

    def gradients(*, is_packed: bool) -> tuple[float, dict[str, Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        trainer = SFTTrainer(model=model, args=task.config, train_dataset=rows, processing_class=task.tokenizer)
        (batch,) = trainer.get_train_dataloader()
        if is_packed:
            # By its private name: the public one looks for the package.
            model.config._attn_implementation_internal = "flash_attention_2"
            loss = trainer.compute_loss(trainer.model, dict(batch))
        else:
            parts = [(row.input_ids, row.labels) for row in task.rows]
            count = sum(label != -100 for _, labels in parts for label in labels)
            loss = torch.zeros(())
            for ids, labels in parts:
                own = sum(label != -100 for label in labels)
                loss = loss + own / count * model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        loss.backward()
        return loss.item(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    loss, packed = gradients(is_packed=True)
    lengths = sorted(len(row.input_ids) for row in task.rows)
    assert len(boundaries) == 2  # one call per layer
    for ends in boundaries:
        assert sorted(end - start for start, end in zip(ends, ends[1:], strict=False)) == lengths
    expected_loss, separate = gradients(is_packed=False)
    assert loss == pytest.approx(expected_loss, abs=2e-5)
    assert packed.keys() == separate.keys()
    assert all((packed[name] - gradient).abs().max() < 2e-5 for name, gradient in separate.items())

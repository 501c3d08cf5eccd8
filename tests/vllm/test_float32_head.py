"""`cast_lm_head_to_fp32` on both sides: vLLM with `head_dtype` float32 gives the log-probs of our float32 head.

The real vLLM, with the Python that VLLM_PYTHON names, scores given ids by a random bfloat16 model on a CPU.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from tests.conftest import tiny_llama

SCORE = """
import json, sys
from vllm import LLM, SamplingParams
folder, overrides, ids, out = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
llm = LLM(folder, dtype="bfloat16", max_model_len=256, enforce_eager=True, hf_overrides=overrides,
          logprobs_mode="processed_logprobs", enable_prefix_caching=False)
asked = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
# vLLM 0.30's bar divides by the seconds that have passed, which are 0 on a fast machine.
(scored,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
logprobs = [each[token].logprob for token, each in zip(ids[1:], scored.prompt_logprobs[1:], strict=True)]
open(out, "w").write(json.dumps(logprobs))
"""

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python with vLLM"),
]


def scored_by_vllm(folder: Path, overrides: dict[str, str], ids: list[int]) -> torch.Tensor:
    """Return vLLM's log-probs of ids[1:]."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"PYTHONPATH": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "DO_NOT_TRACK": "1"}
    out = folder / "logprobs.json"
    words = [str(folder), json.dumps(overrides), json.dumps(ids), str(out)]
    command = [os.environ["VLLM_PYTHON"], "-c", SCORE, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(out.read_text()), dtype=torch.float64)


def scored_by_trainer(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Return the trainer's log-probs of ids[1:]."""
    packed = pack_completions([ids[:1]], [[ids[1:]]], torch.device("cpu"))
    with torch.no_grad():
        scorer = CompletionLogprobs(model, temperature=1.0, num_tokens=model.config.vocab_size)
        return scorer(packed).double()


def test_vllm_with_a_float32_head_scores_as_the_trainer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = tiny_llama(tokenizer, **sizes, head_dim=32).bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # logits of up to about 20, which bfloat16 rounds to steps of 1/8
        # The head alone is tested: kernels of the layers before it round in other places in vLLM.
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.randint(len(tokenizer), (200,), generator=torch.Generator().manual_seed(0)).tolist()
    plain = scored_by_vllm(tmp_path, {}, ids)
    cast = scored_by_vllm(tmp_path, {"head_dtype": "float32"}, ids)
    rounded = scored_by_trainer(model, ids)
    compute_head_in_float32(model)
    expected = scored_by_trainer(model, ids)
    errors = [(one - expected).abs().mean().item() for one in (cast, plain, rounded)]
    assert errors[0] < 0.1 * min(errors[1:]), errors

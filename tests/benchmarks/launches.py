"""Kernels that one decoding step of the in-process sampler launches, counted without a GPU and without weights.

    python tests/benchmarks/launches.py                       # Reka Flash 3, all layers, LoRA and full
    python tests/benchmarks/launches.py --layers 4 --top-p 0.9

The model lies on the device `meta`: operators are dispatched, and none runs. An operator that returns a view or memory
without content launches nothing; any other counts as one kernel (some launch more).
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import make_parser, print_table, write_report
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.plan.model_size import build
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.kernels.grouped_attention import decoder_and_head, run_decoder
from rekatrain.trainer.rloo.sampler.adapters import decoding_adapters
from rekatrain.trainer.rloo.sampler.decode_step import DecodeStep, EagerCalls
from rekatrain.trainer.rloo.sampler.draw import draw
from rekatrain.trainer.rloo.sampler.static_cache import StaticCache

REKA = Path(__file__).parents[2] / "recipes/reka-flash-3/configs/reka-flash-3.json"
META = torch.device("meta")
WITHOUT_KERNEL = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::_unsafe_view", "aten::lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts operators that launch a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run an operator."""
        schema = func._schema
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.returns)
        if not is_view and schema.name not in WITHOUT_KERNEL:
            self.counts[schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def make_model(config: Path, layers: int | None, has_adapter: bool) -> Policy:
    """Return a bfloat16 model on `meta`, with PEFT's float32 adapters where it has some."""
    loaded = AutoConfig.from_pretrained(config)
    lora = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"} if has_adapter else None
    model = {"pretrained_model_name_or_path": str(config), "dtype": "bfloat16"}
    recipe = Recipe(stage="rloo", output_dir="", model=model, lora=lora, dataset={})
    with META:
        return build(loaded, recipe, layers or loaded.num_hidden_layers).eval()


def count_launches(model: Policy, rows: int, group: int, filters: tuple[float, int | None]) -> Counter[str]:
    """Count the kernels of a step in which as many completions are live as there is room for, less one that ended."""
    halves, prompts = decoder_and_head(model), [16] * (rows // group)
    with torch.no_grad(), decoding_adapters(model):
        cache = StaticCache(prompts, group, 256, META)
        # The prompts' attention is not counted and compiles on a GPU: any output of its shape serves.
        cache.prompts.attend = lambda layer, query, key, value, scaling: query.transpose(1, 2)  # type: ignore[method-assign]
        ids = torch.zeros(1, sum(prompts), dtype=torch.long, device=META)
        run_decoder(halves[0], ids, torch.zeros_like(ids), cache)
        cache.keep(range(rows - 1))
        uniforms = torch.zeros(rows, 256, device=META)
        last = torch.zeros(rows, dtype=torch.long, device=META)
        step = DecodeStep(halves, cache, lambda *drawn: draw(*drawn, 1.0, *filters), uniforms, last, EagerCalls())
        step()
        with Launches() as launches:
            step()
    return launches.counts


def main() -> None:
    """Print the counts and write them as JSON."""
    parser = make_parser(__doc__, "launches.json")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, default=REKA, help="config.json of a model")
    parser.add_argument("--layers", type=int, help="number of layers; all of the model's where it is left out")
    parser.add_argument("--rows", type=int, default=32, help="completions of a batch")
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int)
    arguments = parser.parse_args()
    filters = arguments.top_p, arguments.top_k
    lines, by_operator = [], {}
    for method in ("full", "lora"):
        model = make_model(arguments.config, arguments.layers, method == "lora")
        counts = count_launches(model, arguments.rows, arguments.num_generations, filters)
        products = sum(counts[name] for name in ("mm", "addmm", "addmm_", "bmm"))
        line = {"method": method, "kernels": counts.total(), "products": products, "casts": counts["_to_copy"]}
        lines.append(line)
        by_operator[method] = dict(counts.most_common())
    print_table(lines, "kernels that one decoding step launches")
    write_report(arguments.out, arguments, {"lines": lines, "operators": by_operator})


if __name__ == "__main__":
    main()

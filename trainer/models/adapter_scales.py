"""One scale for a whole LoRA adapter, which is all that vLLM reads.

PEFT scales each module by alpha / rank (rsLoRA, arXiv 2312.03732: alpha / sqrt(rank)), and `rank_pattern` and
`alpha_pattern` give modules separate values. vLLM scales every module by the config's `lora_alpha` and `r`.
"""

import json
import math
import re
from pathlib import Path

from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LORA_B = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_)?B(\.weight)?")


def fold_scales(folder: Path) -> None:
    """Rewrite a saved adapter so that PEFT and vLLM compute equal weights; without patterns, leave it as it is.

    Each B is multiplied by its module's scale over the config's, and the config gets the alphas that give every module
    the config's scale. The rank pattern stays: it is the shape of the weights.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    if not config.get("rank_pattern") and not alphas:
        return

    def divisor(rank: int) -> float:
        return math.sqrt(rank) if config.get("use_rslora") else rank

    common = config["lora_alpha"] / divisor(config["r"])
    tensors = load_file(folder / WEIGHTS_FILE)
    folded_alphas = {}
    for name, tensor in tensors.items():
        match = LORA_B.fullmatch(name)
        if match is None:
            continue
        module, rank = match["module"], tensor.shape[1]
        alpha = alphas.get(get_pattern_key(list(alphas), module), config["lora_alpha"])
        factor = alpha / divisor(rank) / common
        if factor != 1:
            tensors[name] = (tensor.double() * factor).float()  # bfloat16 would round it anew
        if rank != config["r"]:
            folded_alphas[module] = common * divisor(rank)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {**config, "alpha_pattern": folded_alphas}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

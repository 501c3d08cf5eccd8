"""Write folders of weights that transformers, PEFT and vLLM load: a merged model, or an adapter alone."""

import json
import logging
import shutil
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.models.adapter_scales import CONFIG_FILE, WEIGHTS_FILE, fold_scales
from rekatrain.trainer.models.source import Source
from rekatrain.trainer.models.vllm_limits import find_vllm_limit
from rekatrain.trainer.models.weight_files import INDEX

logger = logging.getLogger(__name__)

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def write_merged(
    folder: Path, weights: LazyWeights, tokenizer: PreTrainedTokenizerBase, *, max_shard_size: str
) -> None:
    """Write sharded safetensors, config, generation config and tokenizer; one shard at a time is in memory."""
    model = weights.model
    set_ids(model.config, tokenizer)
    write_model(folder, weights, max_shard_size=max_shard_size)
    _generation_config(model.config, tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def write_model(folder: Path, weights: LazyWeights, *, max_shard_size: str) -> None:
    """Write sharded safetensors and the config.

    A base that transformers converted while it loaded it is converted back by transformers' own `save_pretrained`.
    """
    model = weights.model
    model.config.dtype = weights.dtype
    if not weights.is_streamed:
        model.save_pretrained(folder, state_dict=dict(weights), max_shard_size=max_shard_size)
        return
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    plan = split_torch_state_dict_into_shards(weights.without_data(), max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def set_ids(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a config the tokenizer's special ids.

    A base may name more eos ids than its tokenizer, such as one for the end of a turn in its own chat format. A server
    would end an answer there, and training did not.
    """
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id


def write_adapter(folder: Path, source: Source, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the checkpoint's adapter with one scale, and the tokenizer; a local base is named by its absolute path.

    config: the base's
    """
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(Path(source.folder) / name, folder / name)
    config_file = folder / CONFIG_FILE
    adapter = json.loads(config_file.read_text(encoding="utf-8"))
    if Path(source.base).exists():
        adapter["base_model_name_or_path"] = str(Path(source.base).resolve())
    config_file.write_text(json.dumps(adapter, indent=2) + "\n", encoding="utf-8")
    fold_scales(folder)
    rejected = find_vllm_limit(adapter)
    if rejected:
        logger.warning("the adapter is for PEFT alone: vLLM does not load %s; for vLLM, export --as merged", rejected)
    _generation_config(config, tokenizer).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer with its chat template."""
    tokenizer.save_pretrained(folder)
    # With this class name transformers 4 and 5, and the servers built on them, load tokenizer.json unchanged.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def _generation_config(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return a generation config with the eos id alone, without the stop `<sep>`.

    With `stop_strings`, every `generate` without `tokenizer=` would raise ValueError, the example on Reka's own model
    card included, and vLLM ignores it. Nor can `<sep>` be an eos id: it is three tokens, none of which may end a turn
    on its own. The caller names the stop (serving/), or trains with `chat.end_of_turn: sep_eos`.
    """
    return GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=tokenizer.eos_token_id)

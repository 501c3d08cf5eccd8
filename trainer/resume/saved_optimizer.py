"""AdamW's state in a checkpoint of any layout, by the name of each trained parameter.

One process and data parallelism save an optimizer in one piece: weights in safetensors files, moments by index. ZeRO 1
and 2 save for each process a flat partition of each group of parameters, with the fragments of it by name. ZeRO-3
splits each parameter into equal parts, the last one padded. DeepSpeed's converter ds_to_universal reads its two forms
in the same way, and writes them to disk again; here the files are mapped into memory, and a process reads the ranges
that it needs.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rekatrain.data.errors import InputError
from rekatrain.trainer.resume.safe_load import tensors_only

WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN_FILES = ("optimizer.bin", "optimizer.pt")  # Accelerate's name, and that of transformers' Trainer


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The split of an optimizer's state.

    zero_stage: 1 to 3; 0 for one piece
    num_shards: number of processes that hold parts of it; 1 for one piece
    """

    zero_stage: int
    num_shards: int

    def __str__(self) -> str:
        if not self.zero_stage:
            return "one piece"
        return f"{self.num_shards} shard{'s' if self.num_shards > 1 else ''} of ZeRO-{self.zero_stage}"


def make_layout(zero_stage: int, num_processes: int) -> Layout:
    """Return the layout of a launch; without ZeRO, each process holds the whole state."""
    return Layout(zero_stage=zero_stage, num_shards=num_processes if zero_stage else 1)


@dataclass(frozen=True, kw_only=True)
class SavedOptimizer:
    """The state of a checkpoint's optimizer.

    step:   number of AdamW's updates; 0 where it has made none, and then there are no moments
    pieces: flat tensors by key (`WEIGHT`, `MOMENTS`) and name, whose concatenation is the parameter's tensor
    """

    step: float
    pieces: Mapping[str, Mapping[str, Sequence[Tensor]]]

    def read(self, key: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements `start` to `stop` of the flattened tensor, in float32; fewer where it ends before."""
        stop = self.numel(name) if stop is None else stop
        found, offset = [], 0
        for piece in self.pieces[key][name]:
            first, last = max(start - offset, 0), min(stop - offset, piece.numel())
            if first < last:
                found.append(piece[first:last].float())
            offset += piece.numel()
        return torch.cat(found) if found else torch.zeros(0)

    def numel(self, name: str) -> int:
        """Return the number of elements of a parameter."""
        return sum(piece.numel() for piece in self.pieces[WEIGHT][name])

    def check_names(self, sizes: Mapping[str, int]) -> None:
        """Raise InputError unless the state is that of parameters with these names and numbers of elements."""
        differing = sorted(sizes.keys() ^ self.pieces[WEIGHT].keys())
        differing += sorted(name for name in sizes.keys() & self.pieces[WEIGHT] if sizes[name] != self.numel(name))
        if differing:
            raise InputError(
                f"the checkpoint's optimizer is that of another model: {differing[0]!r} differs, and "
                f"{len(differing) - 1} more"
            )


def saved_layout(checkpoint: Path) -> Layout:
    """Return the layout of a checkpoint's optimizer."""
    files = _zero_files(checkpoint)
    if not files:
        return make_layout(0, 1)
    with tensors_only():
        return make_layout(_stage(_load(files[0])["optimizer_state_dict"]), len(files))


def check_convertible(checkpoint: Path) -> None:
    """Raise InputError unless the optimizer of a checkpoint is AdamW, which can be converted to another layout."""
    with tensors_only():
        files = _zero_files(checkpoint) or [_plain_file(checkpoint)]
        saved = _load(files[0])
        _step(_inner_state(saved.get("optimizer_state_dict", saved)).values(), files[0])


def read_optimizer(checkpoint: Path, keys: Mapping[str, str]) -> SavedOptimizer:
    """Map the state of a checkpoint's optimizer into memory.

    keys: names of the trained parameters, in the order of the optimizer's groups, with their keys in the safetensors
          files, for a checkpoint in one piece. The names of the others are in their files.

    Raises InputError for an optimizer other than AdamW, and for files that hold objects other than tensors.
    """
    with tensors_only():
        files = _zero_files(checkpoint)
        if not files:
            return _read_plain(checkpoint, keys)
        shards = [_load(file)["optimizer_state_dict"] for file in files]
        if _stage(shards[0]) < 3:
            return _read_partitions(shards, files[0])
        model_file = next(files[0].parent.glob("*_rank_0_*_model_states.pt"))
        return _read_shards(shards, _load(model_file)["param_shapes"], files[0])


def _read_plain(checkpoint: Path, keys: Mapping[str, str]) -> SavedOptimizer:
    file = _plain_file(checkpoint)
    states = _load(file)["state"]
    weights = {key: tensor for path in checkpoint.glob("*.safetensors") for key, tensor in load_file(path).items()}
    if states and len(states) != len(keys):
        raise InputError(f"{str(file)!r} is that of another model: of {len(states)} parameters, not of {len(keys)}")
    pieces: dict[str, dict[str, list[Tensor]]] = {key: {} for key in (WEIGHT, *MOMENTS)}
    for index, (name, key_in_weights) in enumerate(keys.items()):
        tensors = {WEIGHT: weights[key_in_weights], **_moments(states[index] if states else {})}
        if len({tensor.shape for tensor in tensors.values()}) > 1:
            raise InputError(f"{str(file)!r}: state {index} is not that of {name!r}: the shapes differ")
        for key, tensor in tensors.items():
            pieces[key][name] = [tensor.flatten()]
    return SavedOptimizer(step=_step(states.values(), file), pieces=pieces)


def _read_partitions(shards: Sequence[Mapping[str, Any]], file: Path) -> SavedOptimizer:
    """Read ZeRO 1 and 2: in the order of processes, the fragments of a parameter lie end to end."""
    pieces: dict[str, dict[str, list[Tensor]]] = {key: defaultdict(list) for key in (WEIGHT, *MOMENTS)}
    for shard in shards:
        states = _inner_state(shard)
        for group, fragments in enumerate(shard["param_slice_mappings"]):
            flat = {WEIGHT: shard["single_partition_of_fp32_groups"][group], **_moments(states.get(group, {}))}
            for name, fragment in fragments.items():
                for key, tensor in flat.items():
                    pieces[key][name].append(tensor.narrow(0, fragment.start, fragment.numel))
    return SavedOptimizer(step=_step(_all_states(shards), file), pieces=pieces)


def _read_shards(
    shards: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, torch.Size]], file: Path
) -> SavedOptimizer:
    """Read ZeRO-3, whose groups are cut into smaller ones of whole parameters; `shapes` has the names of each."""
    pieces: dict[str, dict[str, list[Tensor]]] = {key: defaultdict(list) for key in (WEIGHT, *MOMENTS)}
    for rank, shard in enumerate(shards):
        states = _inner_state(shard)
        for group, named in enumerate(shapes):
            flat, offset = {WEIGHT: shard["fp32_flat_groups"][group], **_moments(states.get(group, {}))}, 0
            for name, shape in named.items():
                size = -(-shape.numel() // len(shards))
                without_padding = max(0, min(size, shape.numel() - rank * size))
                for key, tensor in flat.items():
                    pieces[key][name].append(tensor.narrow(0, offset, without_padding))
                offset += size
    return SavedOptimizer(step=_step(_all_states(shards), file), pieces=pieces)


def _stage(shard: Mapping[str, Any]) -> int:
    return int(shard.get("zero_stage", 1))  # DeepSpeed's BF16_Optimizer, which shards as stage 1, does not save it


def _inner_state(shard: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the states of the torch optimizer, by index, of a plain state or of one that DeepSpeed wrapped."""
    inner = shard.get("base_optimizer_state", shard.get("optimizer_state_dict", shard))
    states: dict[int, dict[str, Any]] = inner["state"]
    return states


def _all_states(shards: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for shard in shards:
        yield from _inner_state(shard).values()


def _moments(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: state[key] for key in MOMENTS if key in state}


def _step(states: Iterable[Mapping[str, Any]], file: Path) -> float:
    """Return the number of AdamW's updates; InputError if the states are not AdamW's or differ in it."""
    steps = set()
    for state in states:
        if state.keys() != {"step", *MOMENTS}:
            raise InputError(
                f"{str(file)!r} holds {', '.join(map(str, state)) or 'no state'} of each parameter: only AdamW's state "
                "(step, exp_avg, exp_avg_sq) can be converted to another layout; resume under the earlier launch"
            )
        steps.add(float(state["step"]))
    if len(steps) > 1:
        raise InputError(
            f"{str(file)!r}: parameters have had {sorted(steps)} updates each; an optimizer is converted to another "
            "layout only if they are equal; resume under the earlier launch"
        )
    return steps.pop() if steps else 0.0


def _zero_files(checkpoint: Path) -> list[Path]:
    files = [path for path in checkpoint.rglob("*_optim_states.pt") if "_rank_" in path.name]
    return sorted(files, key=lambda path: int(path.name.split("_pp_rank_")[1].split("_")[0]))


def _plain_file(checkpoint: Path) -> Path:
    for name in PLAIN_FILES:
        if (checkpoint / name).exists():
            return checkpoint / name
    raise InputError(
        f"{str(checkpoint)!r} holds no optimizer; start a new run from its weights: rekatrain export RUN OUT"
    )


def _load(file: Path) -> dict[str, Any]:
    loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded

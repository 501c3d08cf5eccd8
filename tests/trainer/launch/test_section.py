"""The section `launch:`: each wrong one is one line, before anything is started."""

from typing import Any

import pytest

from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.section import LaunchConfig, check_launch, check_no_servers

GOOD: dict[str, Any] = {
    "gpus": 8,
    "placement": "split",
    "servers": 2,
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.8,
    "server_options": {"max_num_seqs": 256, "enforce-eager": True, "compilation_config": {"mode": 3}},
    "server_environment": {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_KVCACHE_SPACE": 4},
    "vllm_python": "~/vllm/bin/python",
    "port": 8000,
    "server_start_timeout": 600,
    "max_server_restarts": 0,
    "config_file": "zero3.yaml",
    "num_processes": 4,
    "hosts": ["node1", "user@node2.cluster"],
    "main_process_port": 29600,
}


def test_all_keys_are_accepted_together() -> None:
    assert check_launch(GOOD, stage="rloo", rloo={}) == LaunchConfig(**GOOD)
    assert check_launch({}, stage="sft", rloo={}) == LaunchConfig()


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"gpu": 8}, "unknown key launch.gpu: did you mean launch.gpus?"),
        ({"num_servers": 8}, "unknown key launch.num_servers"),
        ({"gpus": -1}, "launch.gpus is -1"),
        ({"gpus": "all"}, "launch.gpus is 'all'"),
        ({"placement": "colocate"}, "launch.placement is 'colocate'; it should be 'split', 'shared' or 'in_process'"),
        ({"servers": 0}, "launch.servers is 0"),
        ({"gpu_memory_utilization": 90}, "launch.gpu_memory_utilization is 90"),
        ({"port": 70000}, "launch.port is 70000"),
        ({"vllm_python": " "}, "launch.vllm_python is empty"),
        ({"config_file": ""}, "launch.config_file is empty"),
        ({"server_options": {"port": 8000}}, "launch.server_options.port is decided by launch.port"),
        ({"server_options": {"tensor-parallel-size": 2}}, "is decided by launch.tensor_parallel_size"),
        ({"server_options": {"--max-num-seqs": 2}}, "is no option of vLLM: write its name without dashes"),
        ({"server_options": {"max_num_seqs": None}}, "launch.server_options.max_num_seqs is None: write a value"),
        ({"server_environment": {"A=B": "1"}}, "launch.server_environment.A=B"),
        ({"server_environment": {"A": [1]}}, "launch.server_environment.A is"),
        ({"hosts": []}, "launch.hosts names no host"),
        ({"hosts": ["a", "a"]}, "launch.hosts names a host twice"),
        ({"hosts": ["-oProxyCommand=x"]}, "is no name of a host"),
        ({"hosts": ["a b"]}, "is no name of a host"),
        (
            {"placement": "in_process", "servers": 1},
            "launch.servers needs a server, and launch.placement",
        ),
        ({"placement": "shared", "servers": 2}, "with placement shared one server spans the GPUs of a node"),
        ({"server_start_timeout": 0}, "launch.server_start_timeout is 0"),
        ({"max_server_restarts": -1}, "launch.max_server_restarts is -1"),
    ],
)
def test_wrong_section_is_one_error(section: dict, error: str) -> None:
    with pytest.raises(InputError) as caught:
        check_launch(section, stage="rloo", rloo={})
    assert error in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["servers", "port", "server_options", "vllm_python"])
def test_servers_need_rollouts_and_are_not_named_twice(key: str) -> None:
    with pytest.raises(InputError, match=f"launch.{key} is for rollouts, which stage sft does not have"):
        check_launch({key: GOOD[key]}, stage="sft", rloo={})
    with pytest.raises(InputError, match=f"launch.{key} starts a server, but rloo.vllm_server_base_url names"):
        check_no_servers(LaunchConfig(**{key: GOOD[key]}))


@pytest.mark.parametrize("rloo", [{"max_staleness": 1}, {"vllm_weight_transfer": "nccl"}])
def test_shared_needs_turns(rloo: dict) -> None:
    with pytest.raises(InputError, match="set it to"):
        check_launch({"placement": "shared"}, stage="rloo", rloo=rloo)

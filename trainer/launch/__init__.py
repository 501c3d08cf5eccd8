"""`rekatrain launch`: the processes of a run, from its vLLM servers to its trainers.

section.py    the recipe's section `launch:`
placement.py  which GPUs serve and which train, by the section or by the plan
gpus.py       the placements that fit on GPUs
nodes.py      the dataclasses of a node and of a placement
commands.py   the command of each process
hosts.py      the nodes of the run: this machine, hosts by ssh, or a Slurm allocation
keep.py       a program that runs one process and ends it with all its descendants
processes.py  a process under keep.py, and its output
supervise.py  start, watch, restart and end the processes
launch.py     the command
"""

"""The machine, its processes and packages, and the precision and memory of a run.

- `machine`: GPUs, memory and package versions, and the settings that they rule out
- `processes`: the device of a process, and whether all processes of a launch are connected
- `precision`: mixed precision, and steps that overflow in float16
- `memory_estimate`: memory of a run, computed from the models' configurations
- `optional_packages`: packages that only some options need
"""

"""The machine (`machine`), its processes and packages, the precision of a run (`precision`), and its memory.

- `machine`: what it has and what it can run; `processes`: whether the processes of a launch know about each other
- `precision`: mixed precision, and the steps that overflow in float16
- `memory_estimate`: the memory of a run, from the models' configurations
- `optional_packages`: packages that single options need
"""

"""The paper that model cards cite."""

import textwrap

PAPER = {
    "title": "MiniLLM: On-Policy Distillation of Large Language Models",
    "id": "2306.08543",
    "citation": textwrap.dedent("""\
        @inproceedings{gu2024minillm,
            title     = {{MiniLLM: Knowledge Distillation of Large Language Models}},
            author    = {Yuxian Gu and Li Dong and Furu Wei and Minlie Huang},
            booktitle = {The Twelfth International Conference on Learning Representations},
            year      = 2024,
            url       = {https://arxiv.org/abs/2306.08543},
        }"""),
}

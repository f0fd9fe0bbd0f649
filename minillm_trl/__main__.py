"""`python -m minillm_trl` is the command `minillm-trl`, also under `accelerate launch -m minillm_trl`."""

from .cli import main

raise SystemExit(main())

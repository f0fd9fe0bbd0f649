"""Watching a run: the rules that detect degenerate text (`degeneration`) and the callback that applies them."""

"""Monitor a run: rules that detect degenerate text (`degeneration`), and the callback that applies them."""

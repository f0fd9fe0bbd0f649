"""Monitor a run: detect a student whose text degenerates while its loss improves.

- `degeneration`: the rules and their limits, as functions of logged metrics
- `degeneration_watch`: the callback that applies them, warns, stops, and keeps the last healthy checkpoint
"""

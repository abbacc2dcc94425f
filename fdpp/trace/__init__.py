"""A decode step by step: its record, a page that replays it, a still picture."""

"""A decode looked at step by step: recorded, as a page that replays it, as a still picture."""

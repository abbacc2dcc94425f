"""The block loop: when to run the model, and on what."""

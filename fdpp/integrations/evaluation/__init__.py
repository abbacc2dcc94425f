"""What an evaluation needs of a model, whichever harness asks: responses, likelihoods, a journal, presets."""

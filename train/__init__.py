"""From packed shards to a model and its numbers: loader, models, pretraining, SFT, DPO, evaluation."""

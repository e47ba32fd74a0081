"""Stage 1 (experts) and stage 2 (router): loss, update, loop, checkpoints."""

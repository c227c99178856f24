"""make_private, trainer, checkpoint and resume, evaluation, progress."""

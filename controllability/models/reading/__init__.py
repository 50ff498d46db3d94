"""What is read of a live model and checked before anything is solved."""

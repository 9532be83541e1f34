"""Training: objective, optimiser, memory plan, the Trainer."""

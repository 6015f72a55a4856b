"""Companions for trainers that have a loop of their own; each imports its trainer, and nothing else imports them."""

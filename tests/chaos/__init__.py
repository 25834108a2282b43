"""Faults on purpose, and the proof that nothing is lost, repeated or torn by them."""

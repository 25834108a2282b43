"""Measure flwr_ha side by side with what it is compared to."""

"""Content-addressed blobs, checkpoints, and their copies on other replicas."""

"""``make demo``: a cluster on this machine trains the MNIST CNN while its leader is killed."""

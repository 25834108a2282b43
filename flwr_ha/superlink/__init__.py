"""Everything that touches Flower's inside: the SuperLink child and its control plane."""

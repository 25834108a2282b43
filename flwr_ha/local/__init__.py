"""Processes on this machine: a ZooKeeper ensemble and a whole cluster, for the demo, tests and benchmarks."""

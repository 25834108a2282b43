"""Lets ``python -m flwr_ha`` do what ``flwr-ha`` does."""

from flwr_ha.cli import main

if __name__ == "__main__":
    main()

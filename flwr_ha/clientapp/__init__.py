"""The ClientApp side: mods for replay and for classic NumPyClients."""

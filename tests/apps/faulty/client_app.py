"""A ClientApp that is never asked for anything."""

from flwr.clientapp import ClientApp

app = ClientApp()

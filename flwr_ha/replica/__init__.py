"""The replica agent: the process that holds the session, decides, and supervises the SuperLink."""

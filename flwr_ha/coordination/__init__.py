"""Who leads, what is committed, who is there: small facts on which all replicas agree."""

"""Device code and its launchers. Nothing here imports the rest of mlp_fast."""

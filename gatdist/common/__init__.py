"""What every other package may use: errors, registries, heartbeats, random generators."""

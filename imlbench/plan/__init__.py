"""From names and settings to jobs: configuration, registry, identity."""

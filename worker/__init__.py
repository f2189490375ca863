"""The worker process: runs the core's plans on one device. One process per tensor-parallel rank."""
